"""Forms of rows: the columns that people use, read into the fields of a sample.

A row is ours, or it is read column by column: each role (question, answer, image ...) has a few usual names.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_r1v2.data.row_images import as_list, is_media
from megatron_r1v2.data.samples import (
    IMAGE_PLACEHOLDER,
    ROLES,
    SCHEMA_VERSION,
    THINK,
    THINK_END,
    JsonObject,
    SampleError,
    count_placeholders,
)
from megatron_r1v2.types import AnswerType

Message = Mapping[str, str]

USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "question": ("messages", "conversations", "prompt", "question", "problem", "query"),
    "answer": ("answer", "answers", "ground_truth", "reward_model.ground_truth", "solution"),
    "image": ("image", "images"),
    "response": ("response",),
    "chosen": ("chosen",),
    "rejected": ("rejected", "rejected_response"),
    "margin": ("margin",),
    "source": ("source", "data_source"),
    "key": ("key",),
}
"""By role, the columns that are looked for, the first that a row has; a dot leads into an object."""
_OURS_ALONE = {"schema", "answer_type", "facts", "alternatives", "tolerances", "metadata"}
_OURS = {
    "key", "messages", "answer", "answer_type", "facts", "images", "response", "chosen", "rejected", "margin",
    "source", "alternatives", "tolerances", "metadata",
}  # fmt: skip
_OUR_NAMES = {"question": "messages", "image": "images"}
_SENDERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
# A question that is shown without them could not be answered.
_OPTIONS = ("options", "choices")


@dataclass(frozen=True)
class RowForm:
    """The wishes of the user about rows that are not in our own form."""

    answer_type: AnswerType = "math"
    columns: Mapping[str, str] = field(default_factory=dict)
    """By role, the column that has it."""
    ignored: frozenset[str] = frozenset()
    """Columns to leave out."""
    template: str = ""
    """The question as the model gets it, with columns in braces; empty: the question itself."""
    no_answer: bool = False
    """Accept rows without an answer, for a reward of one's own."""
    unclosed_think: bool = False
    """Accept pairs with a response that never closes its `<think>`."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.columns) - set(USUAL_COLUMNS)):
            raise ValueError(
                f"--columns: unknown {unknown[0]!r}; accepted are {', '.join(USUAL_COLUMNS)}, each =COLUMN"
            )
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise ValueError(f"--prompt {self.template!r}: {error}; write a brace of the text twice: {{{{") from error
        if bad := [name for name in names if not name.isidentifier()]:
            raise ValueError(
                f"--prompt {self.template!r}: {{{bad[0]}}} is no column; write a brace of the text twice: {{{{"
            )


def sample_fields(row: JsonObject, form: RowForm) -> JsonObject:
    """Return the fields of a sample, with `images` as a list of what the row gives for each.

    Raises:
        SampleError: the row's form is unknown, or a value is not accepted.
    """
    row = {name: value for name, value in row.items() if name not in form.ignored}
    _refuse_broken_text(row)
    is_ours = "messages" in row and bool(_OURS_ALONE & set(row) or ("answer" not in row and set(row) <= _OURS))
    fields = _own_fields(_renamed(row, form.columns)) if is_ours else _foreign_fields(row, form)
    if form.template:
        fields["messages"] = _fill_template(fields["messages"], row, form.template)
    fields["messages"] = _with_placeholders(fields["messages"], len(fields["images"]))
    _check_pair(fields, unclosed_think=form.unclosed_think)
    sides = [fields[side] for side in ("chosen", "rejected") if fields.get(side) is not None]
    fields["unclosed_think"] = form.unclosed_think and not all(THINK_END in str(side) for side in sides)
    if not fields["answer"].strip() and not (fields.get("response") or fields.get("chosen")):
        if not form.no_answer:
            raise SampleError(
                f"no answer (looked for {', '.join(USUAL_COLUMNS['answer'])}); name its column with "
                "--columns answer=NAME, or give --no-answer where a reward of your own judges without"
            )
        fields |= {"answer": "", "answer_type": None}
    return fields


def _renamed(row: JsonObject, columns: Mapping[str, str]) -> JsonObject:
    """Return a row of ours with the fields that --columns names under their own names."""
    for role, column in columns.items():
        if column not in row:
            raise _no_column(role, column, row)
        row = {**row, _OUR_NAMES.get(role, role): row[column]}
        row = {name: value for name, value in row.items() if name != column}
    return row


def _no_column(role: str, column: str, row: JsonObject) -> SampleError:
    others = ", ".join(sorted(row)) or "none"
    return SampleError(f"--columns {role}={column}: the row has no column {column!r}, only {others}")


def _own_fields(row: JsonObject) -> JsonObject:
    unknown = sorted(set(row) - _OURS - {"schema"})
    if unknown or row.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        what = f"field {unknown[0]!r}" if unknown else f"schema {row['schema']!r} (accepted is {SCHEMA_VERSION})"
        raise SampleError(f"unknown {what}; known fields: {', '.join(sorted(_OURS))}")
    messages, inline = _messages(row["messages"])
    answer = row.get("answer", "")
    if not isinstance(answer, str):
        raise SampleError(f"answer must be text, got {answer!r:.80}")
    return {
        **{name: value for name, value in row.items() if name in _OURS},
        "messages": messages,
        "answer": answer,
        "answer_type": row.get("answer_type", "exact" if "answer" not in row else None),
        "facts": _object(row.get("facts", {}), "facts"),
        "metadata": _object(row.get("metadata", {}), "metadata"),
        "images": inline or as_list(row.get("images")),
    }


def _foreign_fields(row: JsonObject, form: RowForm) -> JsonObject:
    found = {role: match for role in USUAL_COLUMNS if (match := _find(row, role, form.columns.get(role)))}
    used = {role: column for role, (column, _) in found.items()}
    given = {role: value for role, (_, value) in found.items()}
    chosen = given.get("chosen")
    if isinstance(chosen, list) and "question" not in given:
        given["question"] = chosen[:-1]  # TRL's implicit prompt
    if "question" not in given:
        raise SampleError(
            f"unknown kind of row with fields {', '.join(sorted(row))}; a row needs messages (our own), "
            "question, chosen and rejected (MMPR), prompt and reward_model (verl), conversations, or a question under "
            f"{', '.join(USUAL_COLUMNS['question'])}; name others with --columns question=NAME,answer=NAME,image=NAME"
        )
    messages, inline = _messages(given["question"], column=used.get("question", "chosen"))
    messages, last = _without_response(messages)
    if last is not None:  # of a conversation: the response to learn from, and the better one of ms-swift's pairs
        given.setdefault("chosen" if "rejected" in given else "response", last)
    images = as_list(given.get("image"))
    if inline and images:
        raise SampleError(f"images are in the messages and in the column {used['image']!r}; keep one of them")
    answers = _answers(given["answer"], used["answer"]) if "answer" in given else [""]
    if "reward_model" in row and "answer" not in given and not form.no_answer:
        reward_model = _object(row["reward_model"], "reward_model")
        raise SampleError(f"reward_model has no ground_truth, only {', '.join(sorted(reward_model)) or 'nothing'}")
    sides = ("chosen", "rejected", "response")
    texts: JsonObject = {side: _response(given[side], side) for side in sides if side in given}
    named: JsonObject = {name: str(given[name]) for name in ("source", "key") if name in given}
    return {
        **texts,
        **named,
        "messages": messages,
        "images": inline or images,
        "margin": given.get("margin"),
        "answer": answers[0],
        "alternatives": tuple(answers[1:]),
        "answer_type": form.answer_type,
        "metadata": _metadata(row, {name.partition(".")[0] for name in used.values()}, form),
    }


def _find(row: JsonObject, role: str, wanted: str | None) -> tuple[str, object] | None:
    """Return the column of a role and its value; None where the row has none of its columns.

    Args:
        wanted: the column that --columns names.
    """
    names = (wanted,) if wanted else USUAL_COLUMNS[role]
    matches = [(name, value) for name in names for value in _values_at(row, name)]
    if wanted and not matches:
        raise _no_column(role, wanted, row)
    if role == "image":
        matches = [(name, value) for name, value in matches if as_list(value)]
        if len(matches) > 1:
            raise SampleError("images are under image and under images; name one with --columns image=NAME")
    elif role != "answer":  # parquet gives a row every column of its file; an answer that is null is refused, though
        matches = [(name, value) for name, value in matches if value is not None]
    return next(iter(matches), None)


def _values_at(row: JsonObject, name: str) -> list[object]:
    """Return the value at a dotted name in a list; an empty list where there is none."""
    if name in row:
        return [row[name]]
    outer, dot, inner = name.partition(".")
    within = row.get(outer)
    return _values_at(within, inner) if dot and isinstance(within, dict) else []


def _messages(value: object, *, column: str = "messages") -> tuple[tuple[Message, ...], list[object]]:
    """Return chat messages, and the images that stand in their contents.

    Args:
        value: the text of a question, messages of OpenAI's form, or conversations of LLaVA's.
    """
    if isinstance(value, str):
        if not value.strip():
            raise SampleError(f"{column} is empty")
        return ({"role": "user", "content": value},), []
    images: list[object] = []
    messages: list[Message] = []
    for message in value if isinstance(value, list) and value else [None]:
        content = _content(message, images)
        if not isinstance(message, dict) or content is None:
            raise SampleError(f"expected a list of messages with a text as content, got {value!r:.300} in {column!r}")
        sender = message.get("role", message.get("from"))
        role = _SENDERS.get(sender, sender) if isinstance(sender, str) else repr(sender)
        messages.append({"role": role, "content": content})
    return tuple(messages), images


def _content(message: object, images: list[object]) -> str | None:
    """Return a message's text, or None; an image in it becomes a placeholder and is appended to `images`."""
    content = message.get("content", message.get("value")) if isinstance(message, dict) else None
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            text += IMAGE_PLACEHOLDER
            given = next(
                (part[name] for name in ("image", "image_url", "url", "path", "bytes") if part.get(name)), None
            )
            if given is not None:  # otherwise it is in the column of images
                images.append(given if not isinstance(given, bytes) else {"bytes": given})
        else:
            raise SampleError(f"a part of a message must be text, image or image_url, got {part!r:.100}")
    return text


def _without_response(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """Split off a final message of the assistant."""
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _response(value: object, side: str) -> object:
    """Return a response, which TRL gives as a conversation that ends with it; `ShardSample`'s checks do the rest."""
    if isinstance(value, list):
        messages, _ = _messages(value, column=side)
        return messages[-1]["content"]
    return value


def _answers(value: object, column: str) -> list[str]:
    """Return the right answers that a column gives, the reference first."""
    if isinstance(value, list | tuple):
        if not value:
            raise SampleError(f"{column} is an empty list; give at least one right answer")
        return list(dict.fromkeys(answer for item in value for answer in _answers(item, column)))
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise SampleError(
            f"{column} is {value!r:.80}; accepted are a text, a number, or a list of right answers. Take the row out, "
            f"or name another column with --columns answer=NAME"
        )
    return [str(value)]


def _object(value: object, name: str) -> JsonObject:
    if not isinstance(value, dict):
        raise SampleError(f"{name} must be an object, got {value!r:.80}")
    return value


def _metadata(row: JsonObject, used: set[str], form: RowForm) -> dict[str, str]:
    """Return the other columns as text; refuse those that the model would have to see."""
    others = {name: value for name, value in row.items() if name not in used and value not in (None, "", [], {})}
    for name, value in others.items():
        if is_media(value):
            raise SampleError(
                f"column {name!r} holds or names an image, a video or a sound: {value!r:.80}; name images with "
                f"--columns image={name}, or leave it out with --ignore {name}"
            )
        if name in _OPTIONS and value and not form.template:
            raise SampleError(
                f"column {name!r} has options that the question may not show; put them into it with "
                f"--prompt '{{question}} {{{name}}}', or leave them out with --ignore {name}"
            )
    return {name: value if isinstance(value, str) else _as_text(value) for name, value in others.items()}


def _as_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _fill_template(messages: tuple[Message, ...], row: JsonObject, template: str) -> tuple[Message, ...]:
    """Put the columns of a row into the template, which becomes the last message."""
    *earlier, last = messages
    values = {name: value if isinstance(value, str) else _as_text(value) for name, value in row.items()}
    try:
        text = string.Formatter().vformat(template, (), values | {"question": last["content"]})
    except KeyError as error:
        raise SampleError(f"--prompt: the row has no column {error}, only {', '.join(sorted(row))}") from error
    return (*earlier, {**last, "content": text})


def _with_placeholders(messages: tuple[Message, ...], images: int) -> tuple[Message, ...]:
    """Put the images of a row without placeholders before its first question."""
    # InternVL does the same.
    first = next((index for index, message in enumerate(messages) if message["role"] == ROLES[1]), None)
    if first is None or count_placeholders(messages):
        return messages
    content = f"{IMAGE_PLACEHOLDER}\n" * images + messages[first]["content"]
    return (*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :])


def _check_pair(fields: JsonObject, *, unclosed_think: bool) -> None:
    """Refuse a pair that teaches nothing, or whose response ends while it thinks."""
    sides = {side: fields[side] for side in ("chosen", "rejected") if fields.get(side) is not None}
    if not sides:
        return
    if len(sides) == 1:
        raise SampleError(f"{next(iter(sides))} is there without the other; a pair has chosen and rejected")
    for side, text in sides.items():
        if not isinstance(text, str):
            continue  # named by the checks of the schema
        if not text.strip():
            raise SampleError(f"{side} is empty; a pair needs two responses")
        if THINK in text and THINK_END not in text.rpartition(THINK)[2] and not unclosed_think:
            raise SampleError(
                f"{side} opens {THINK} and never closes it: {text[:60]!r}; take the row out, or accept such responses "
                "with --unclosed-think"
            )
    if sides["chosen"] == sides["rejected"]:
        raise SampleError(f"chosen and rejected are equal: {sides['chosen'][:60]!r}; a pair has two different ones")


def _refuse_broken_text(value: object, path: Sequence[str] = ()) -> None:
    """Refuse text with half of a character, which cannot be written as UTF-8, by the column that has it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SampleError(
                f"column {'.'.join(path)} has half of a character, {value[error.start]!a}, at place {error.start + 1}: "
                f"{value[:60]!a}; repair the text"
            ) from error
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_broken_text(name, path)
            _refuse_broken_text(item, (*path, str(name)))
    elif isinstance(value, list):
        for item in value:
            _refuse_broken_text(item, path)
