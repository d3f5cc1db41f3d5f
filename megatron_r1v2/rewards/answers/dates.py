"""Dates, times of day and ranges of numbers, each in one spelling (rule 15).

Standard library only: the verifier workers import this. Texts are from `normalise`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NAMES = "january february march april may june july august september october november december"
_MONTHS = _NAMES.split()
_MONTH = rf"({'|'.join(f'{month}|{month[:3]}' for month in _MONTHS)}|sept)\.?"
_TO = r"\s*(?:-+|\\sim|\bto\b|\bthrough\b|\\to|\u81f3|\u5230)\s*"
_NUMBER = r"-?\d+(?:\.\d+)?"
_YEAR_FIRST = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})")
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})")
_CHINESE = re.compile(r"(\d{4})\s*\u5e74\s*(\d{1,2})\s*\u6708\s*(?:(\d{1,2})\s*[\u65e5\u53f7])?")
_MONTH_FIRST = re.compile(rf"{_MONTH} ?(\d{{1,2}})(?:st|nd|rd|th)?(?:,? ?(\d{{4}}))?", re.IGNORECASE)
_DAY_FIRST = re.compile(rf"(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH},? ?(\d{{4}})?", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))? ?([ap])\.?\s?m\.?", re.IGNORECASE)
_RANGE = re.compile(rf"(?:from |between )?({_NUMBER})(?:{_TO}|(?<=\d) and (?=\d))({_NUMBER})")
_CENTURY = re.compile(r"(\d{4})s")


def read_date(text: str) -> str | None:
    """Return a date, a time of day or a range of numbers in one spelling, or None for anything else.

    `7-8` is a range, and never the difference of two numbers that nobody would leave unevaluated. Day and month of
    `1/5/1999` cannot be told apart, so they stay in their order.
    """
    for pattern, spell in _READERS:
        if match := pattern.fullmatch(text):
            return spell(match)
    return None


def _date(year: str | None, month: str | int | None, day: str | None) -> str:
    return f"date {int(year or 0)}-{int(month or 0)}-{int(day or 0)}"


def _number_of(month: str) -> int:
    return next(number for number, name in enumerate(_MONTHS, start=1) if month.lower()[:3] == name[:3])


def _time(match: re.Match[str]) -> str:
    return f"time {int(match[1])}:{match[2] or '00'} {match[3].lower()}m"


def _range(match: re.Match[str]) -> str | None:
    between = match.group().startswith("between ")
    if (" and " in match.group()) != between:
        return None
    return f"range {match[1]} to {match[2]}"


_READERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str | None]], ...] = (
    (_YEAR_FIRST, lambda match: _date(match[1], match[3], match[4])),
    (_YEAR_LAST, lambda match: f"date {int(match[1])}/{int(match[3])}/{match[4]}"),
    (_CHINESE, lambda match: _date(match[1], match[2], match[3])),
    (_MONTH_FIRST, lambda match: _date(match[3], _number_of(match[1]), match[2])),
    (_DAY_FIRST, lambda match: _date(match[3], _number_of(match[2]), match[1])),
    (_TIME, _time),
    (_RANGE, _range),
    (_CENTURY, lambda match: f"decade {match[1]}"),
)
