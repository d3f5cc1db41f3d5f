"""A chat completion request: the fields of OpenAI's API that are understood, and what each accepts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from PIL import Image
from pydantic import Field, InstanceOf, create_model, field_validator, model_validator

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER
from megatron_r1v2.serve.messages import Turn, WireModel, read_fields, read_messages
from megatron_r1v2.serve.web import RequestError

# Logits divided by less overflow.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2
MAX_ALTERNATIVES = 20
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256

IGNORED = frozenset(("user", "metadata", "store", "safety_identifier", "service_tier", "parallel_tool_calls"))
IGNORED |= {"prompt_cache_key", "prompt_cache_retention"}
"""They change nothing about the answer."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "best_of"), (1,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("reasoning_effort", "verbosity"), ("medium",)),
    **dict.fromkeys(("include_reasoning", "add_generation_prompt"), (True,)),
    "chat_template_kwargs": ({}, {"enable_thinking": True}),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "top_k": (-1, 0),
}
"""Not supported; accepted with these values, which change nothing: they are done anyway."""

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_STOP = f"a text, or a list of at most {MAX_STOP_STRINGS}, each of 1 to {MAX_STOP_LENGTH} characters"
_FLAG, _INTEGER, _NUMBER = "true or false", "a whole number", "a number"


class StreamOptions(WireModel):
    """The options of a stream."""

    include_usage: bool = False
    """Whether a stream ends with the token counts."""


class ChatRequest(WireModel):
    """The fields of a request that decide its answer; `served_request` gives them the bounds of a server."""

    turns: tuple[InstanceOf[Turn], ...] = Field((), alias="messages", validate_default=True)
    model: str = ""
    max_tokens: int = 0
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[StopString, ...] = Field((), max_length=MAX_STOP_STRINGS, description=_STOP)
    stream: bool = Field(False, description=_FLAG)
    stream_options: StreamOptions = Field(StreamOptions(), description=f"an object with include_usage, {_FLAG}")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description=_INTEGER)
    """None: the server draws one."""
    logprobs: bool = Field(False, description=_FLAG)
    top_logprobs: int = Field(0, ge=0, le=MAX_ALTERNATIVES, description=_INTEGER)
    skip_special_tokens: bool = Field(True, description=_FLAG)

    @property
    def messages(self) -> tuple[Mapping[str, str], ...]:
        """Return the messages as a shard holds them: "<image>" marks the place of an image."""
        return tuple({"role": turn.role, "content": _join(turn.parts)} for turn in self.turns)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Return the images in order of appearance."""
        return tuple(part for turn in self.turns for part in turn.parts if not isinstance(part, str))

    @property
    def response_tokens(self) -> int:
        """Return the length of the longest response that is wanted."""
        return self.max_completion_tokens or self.max_tokens

    @field_validator("turns", mode="before")
    @classmethod
    def _read_turns(cls, value: object) -> tuple[Turn, ...]:
        turns = [_without_placeholder(turn) if turn.role == "assistant" else turn for turn in read_messages(value)]
        for index, turn in enumerate(turns):
            if any(IMAGE_PLACEHOLDER in part for part in turn.parts if isinstance(part, str)):
                refusal = (
                    f"messages[{index}].content has {IMAGE_PLACEHOLDER!r} in its text, which stands for an image; send "
                    "the image as a part of type image_url in its place"
                )
                raise RequestError(refusal, param="messages")
        if turns[-1].role != "user":
            refusal = f"messages[{len(turns) - 1}].role={turns[-1].role!r}: the last message must be the user's"
            raise RequestError(refusal, param="messages")
        return tuple(turns)

    @field_validator("stop", mode="before")
    @classmethod
    def _read_stop(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        refusal, param = "", ""
        if "max_tokens" in self.model_fields_set and self.max_completion_tokens not in (None, self.max_tokens):
            limits = f"max_completion_tokens={self.max_completion_tokens} and max_tokens={self.max_tokens}"
            refusal, param = f"{limits} name one limit; send one of them", "max_tokens"
        elif 0 < self.temperature < MIN_TEMPERATURE:
            accepted = f"0 (the most probable token), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
            refusal, param = f"temperature={self.temperature:g}; accepted: {accepted}", "temperature"
        elif self.top_p == 0:
            refusal, param = "top_p=0 leaves no token; accepted: more than 0, at most 1", "top_p"
        elif "top_logprobs" in self.model_fields_set and not self.logprobs:
            refusal, param = "top_logprobs needs logprobs=true", "top_logprobs"
        if refusal:
            raise RequestError(refusal, param=param)
        return self


def served_request(name: str, settings: GenerationConfig, *, max_choices: int) -> type[ChatRequest]:
    """Return the request as a server accepts it: its limits and defaults stand at the fields, as the fixed ones do."""
    most = settings.max_response_tokens
    # Quoted by a refusal.
    title = "generation.max_response_tokens"
    return create_model(
        "ServedRequest",
        __base__=ChatRequest,
        model=(str, name),
        max_tokens=(int, Field(most, ge=1, le=most, title=title, description=_INTEGER)),
        max_completion_tokens=(int | None, Field(None, ge=1, le=most, title=title, description=_INTEGER)),
        temperature=(float, Field(settings.temperature, ge=0, le=MAX_TEMPERATURE, description=_NUMBER)),
        top_p=(float, Field(1.0, ge=0, le=1, description=_NUMBER)),
        n=(int, Field(1, ge=1, le=max_choices, description=_INTEGER)),
    )


def read_chat_request(content: Mapping[str, object], model: type[ChatRequest]) -> ChatRequest:
    """Check a request and decode its images.

    Args:
        content: the JSON object; null is as good as nothing.

    Raises:
        RequestError: naming the field, the value and what is accepted.
    """
    content = {name: value for name, value in content.items() if value is not None}
    _check_names(content)
    # Not a field error: OpenAI's clients expect 404 for a model.
    served = model.model_fields["model"].default
    if content.get("model", served) != served:
        raise RequestError(f"model={content['model']!r} is not served here; accepted: {served!r}", 404, param="model")
    return read_fields(model, content)


def _check_names(content: Mapping[str, object]) -> None:
    """Refuse fields that are unknown, and unsupported ones that would change the answer."""
    understood = [field.alias or name for name, field in ChatRequest.model_fields.items()]
    for name in (name for name in content if name not in IGNORED and name not in understood):
        if name not in NEUTRAL:
            close = difflib.get_close_matches(name, understood, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"accepted: {', '.join(understood)}"
            raise RequestError(f"unknown field {name!r}; {advice}", param=name)
        if content[name] not in NEUTRAL[name]:
            accepted = " or ".join(repr(neutral) for neutral in NEUTRAL[name])
            refusal = f"{name}={content[name]!r} is not supported; accepted: {accepted}, or leave it out"
            raise RequestError(refusal, param=name)


def _without_placeholder(turn: Turn) -> Turn:
    """Return a turn without the placeholder of images in its texts, which a model may have written."""
    texts = (part.replace(IMAGE_PLACEHOLDER, "") if isinstance(part, str) else part for part in turn.parts)
    return Turn(turn.role, tuple(texts))


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
