"""Words for the values that a setting accepts, and for the refusal of others."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_LONGEST_VALUE = 200
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def refusal(name: str, value: object, field: FieldInfo, kind: str) -> str:
    """Return why a value is refused.

    Args:
        name: of the setting, section.key.
        kind: pydantic's name of the error.
    """
    expected = type_name(field.annotation)
    # Said first: whoever leaves a value out, or writes "on", did not mean what YAML makes of it.
    if value is None or (isinstance(value, bool) and kind not in _OUT_OF_RANGE):
        got = "nothing" if value is None else str(value).lower()
        return f"{name} is {got}; expected {expected}; remove the line for the default"
    if kind in _OUT_OF_RANGE:
        return f"{name}={shorten(value)} is out of range; accepted: {range_text(field)}"
    if kind == "string_pattern_mismatch":
        return f"{name} is empty; give a value"
    return f"{name}={shorten(value)} is not accepted; expected {expected}"


def shorten(value: object) -> str:
    """Return a value as Python shows it, cut at 200 characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def type_name(expected: object) -> str:
    """Return what is accepted for a type, in words: "a number", "one of local, te", ..."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each {type_name(arguments[0])}"
    if origin is dict:
        return "a mapping"
    if NoneType in arguments:
        return type_name(next(argument for argument in arguments if argument is not NoneType))
    if origin is typing.Union or origin is UnionType:
        return ", or ".join(map(type_name, arguments))
    if isinstance(expected, type) and issubclass(expected, BaseModel):
        return "{" + ", ".join(expected.model_fields) + "}"
    if isinstance(expected, type) and issubclass(expected, Enum):
        return "one of " + ", ".join(member.name for member in expected)
    return _NAMES[expected]


def range_text(field: FieldInfo) -> str:
    """Return the bounds of a number in words, "" where there are none: "1 or more", "more than 0, at most 1", ..."""
    low: str | None = None
    high: str | None = None
    for bound in (*field.metadata, *_inner_metadata(field.annotation)):
        if isinstance(bound, Ge):
            low = f"{_number(bound.ge)}"
        elif isinstance(bound, Gt):
            low = f"more than {_number(bound.gt)}"
        elif isinstance(bound, Le):
            high = _number(bound.le)
        elif isinstance(bound, Lt):
            high = f"just below {_number(bound.lt)}"
    if low is None or high is None:
        return low if low is not None and low.startswith("more") else f"{low} or more" if low is not None else ""
    return f"{low}, at most {high}" if low.startswith("more") else f"{low} to {high}"


def _inner_metadata(annotation: object) -> Iterator[object]:
    """Yield the annotations of the alternatives of a type: a number with bounds, or a word."""
    for alternative in typing.get_args(annotation):
        if typing.get_origin(alternative) is typing.Annotated:
            yield from typing.get_args(alternative)[1:]


def _number(bound: object) -> str:
    assert isinstance(bound, int | float)
    # %g would write 2147483647 as 2.14748e+09.
    return f"{bound:g}" if abs(bound) < 1e6 else str(bound)


_NAMES: Mapping[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
