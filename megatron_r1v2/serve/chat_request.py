"""A chat completion request: which fields of OpenAI's API are understood, and what each accepts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER
from megatron_r1v2.serve.requests import BadRequest, Limits, Turn, read_messages

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
MAX_ALTERNATIVES = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 128

_UNDERSTOOD = (
    "messages",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "stream",
    "stream_options",
    "seed",
    "logprobs",
    "top_logprobs",
)
IGNORED = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "parallel_tool_calls",
)
"""They change nothing about the answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("medium",),
    "verbosity": ("medium",),
    "chat_template_kwargs": ({}, {"enable_thinking": True}),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "best_of": (1,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
}
"""Not supported; accepted where they would change nothing: the value is what is done anyway."""


@dataclass(frozen=True)
class Defaults:
    """What a server does where a request says nothing, and how far a request may go."""

    model: str
    max_response_tokens: int
    temperature: float
    top_p: float
    max_choices: int = MAX_CHOICES


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    messages: tuple[Mapping[str, str], ...]
    """"<image>" in a content marks the place of an image."""
    images: tuple[Image.Image, ...]
    """In order of appearance."""
    max_tokens: int
    temperature: float
    top_p: float
    num_choices: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether a stream ends with the token counts."""
    seed: int | None
    """None: the server draws one."""
    num_alternatives: int | None
    """Alternatives told for each token; None: no log-probs at all."""


def read_chat_request(content: dict[str, Any], defaults: Defaults, limits: Limits) -> ChatRequest:
    """Check a request.

    Args:
        content: the JSON object.
        defaults: of the server.
        limits: on messages and images.

    Returns:
        The request, its images decoded.

    Raises:
        BadRequest: naming the field, the value and what is accepted.
    """
    content = {name: value for name, value in content.items() if value is not None}
    _check_fields(content)
    if content.get("model", defaults.model) != defaults.model:
        raise BadRequest(
            f"model={content['model']!r} is not served here; accepted: {defaults.model!r}", 404, param="model"
        )
    temperature = _number(content, "temperature", defaults.temperature, 0, MAX_TEMPERATURE)
    if 0 < temperature < MIN_TEMPERATURE:
        # Logits divided by less overflow.
        raise BadRequest(
            f"temperature={temperature:g}; accepted: 0 (the most probable token), or {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g}",
            param="temperature",
        )
    top_p = _number(content, "top_p", defaults.top_p, 0, 1)
    if top_p == 0:
        raise BadRequest("top_p=0 leaves no token; accepted: more than 0, at most 1", param="top_p")
    options = content.get("stream_options", {})
    if not isinstance(options, dict):
        raise BadRequest(f"stream_options={options!r}; accepted: an object with include_usage", param="stream_options")
    turns = read_messages(content, limits)
    messages, images = _to_prompt(turns)
    return ChatRequest(
        messages=messages,
        images=images,
        max_tokens=_max_tokens(content, defaults.max_response_tokens),
        temperature=temperature,
        top_p=top_p,
        num_choices=_integer(content, "n", 1, 1, defaults.max_choices),
        stop=_stop(content.get("stop", [])),
        stream=_flag(content, "stream"),
        include_usage=_flag(options, "include_usage"),
        seed=_integer(content, "seed", 0, -(2**63), 2**63 - 1) if "seed" in content else None,
        num_alternatives=_alternatives(content),
    )


def _check_fields(content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if name in _UNDERSTOOD or name in IGNORED:
            continue
        if name not in NEUTRAL:
            close = difflib.get_close_matches(name, _UNDERSTOOD, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"accepted: {', '.join(_UNDERSTOOD)}"
            raise BadRequest(f"unknown field {name!r}; {advice}", param=name)
        if value not in NEUTRAL[name]:
            accepted = " or ".join(repr(neutral) for neutral in NEUTRAL[name])
            raise BadRequest(f"{name}={value!r} is not supported; accepted: {accepted}, or leave it out", param=name)


def _to_prompt(turns: Sequence[Turn]) -> tuple[tuple[Mapping[str, str], ...], tuple[Image.Image, ...]]:
    """Return the messages as a shard holds them, images marked by "<image>", and the images."""
    if turns[-1].role != "user":
        raise BadRequest(
            f"messages[{len(turns) - 1}].role={turns[-1].role!r}: the last message must be the user's", param="messages"
        )
    messages = []
    for index, turn in enumerate(turns):
        if any(IMAGE_PLACEHOLDER in part for part in turn.parts if isinstance(part, str)):
            raise BadRequest(
                f"messages[{index}].content has {IMAGE_PLACEHOLDER!r} in its text, which stands for an image; send the "
                "image as a part of type image_url in its place",
                param="messages",
            )
        text = _join(turn.parts)
        if not _is_text(text):
            raise BadRequest(
                f"messages[{index}].content has half of a surrogate pair; send valid Unicode", param="messages"
            )
        messages.append({"role": turn.role, "content": text})
    return tuple(messages), tuple(part for turn in turns for part in turn.parts if not isinstance(part, str))


def _join(parts: Sequence[str | Image.Image]) -> str:
    """Put the parts of a message together; a text after an image begins a line, as in the model's training data."""
    text = ""
    for part in parts:
        if not isinstance(part, str):
            text += IMAGE_PLACEHOLDER
        elif text.endswith(IMAGE_PLACEHOLDER) and part and not part[0].isspace():
            text += "\n" + part
        else:
            text += part
    return text


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _max_tokens(content: Mapping[str, Any], limit: int) -> int:
    names = ("max_completion_tokens", "max_tokens")
    given = {name: _integer(content, name, limit, 1, limit) for name in names if name in content}
    if len(set(given.values())) > 1:
        told = " and ".join(f"{name}={value}" for name, value in given.items())
        raise BadRequest(f"{told} name one limit; send one of them", param="max_tokens")
    return next(iter(given.values()), limit)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > MAX_STOP_STRINGS
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts)
    ):
        raise BadRequest(
            f"stop={_short(value)}; accepted: a text, or a list of at most {MAX_STOP_STRINGS}, each of 1 to "
            f"{MAX_STOP_LENGTH} characters",
            param="stop",
        )
    return tuple(texts)


def _alternatives(content: Mapping[str, Any]) -> int | None:
    wanted = _flag(content, "logprobs")
    if "top_logprobs" in content and not wanted:
        raise BadRequest("top_logprobs needs logprobs=true", param="top_logprobs")
    return _integer(content, "top_logprobs", 0, 0, MAX_ALTERNATIVES) if wanted else None


def _number(content: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = content.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name}={_short(value)}; accepted: a number from {low:g} to {high:g}", param=name)
    if not low <= value <= high:  # nan is in no range
        raise BadRequest(f"{name}={_short(value)} is out of range; accepted: {low:g} to {high:g}", param=name)
    return float(value)


def _integer(content: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = content.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name}={_short(value)}; accepted: a whole number from {low} to {high}", param=name)
    if not low <= value <= high:
        raise BadRequest(f"{name}={_short(value)} is out of range; accepted: {low} to {high}", param=name)
    return value


def _flag(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{name}={_short(value)}; accepted: true or false", param=name)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
