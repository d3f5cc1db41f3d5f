r"""Option letters: `C`, `(C)`, `C. 12 cm`, `Option C`, `A, C`; a hedge (`A or B`) chooses nothing (rules 16, 17).

Standard library only: the verifier workers import this. Texts are from `normalise`.
"""

from __future__ import annotations

import re

_MAX_CHOICE_CHARACTERS = 400
# The words around a letter in English and Chinese: the answer is, the correct option is, choose.
_PREFIX = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,? *)?"
    r"(?:(?:the|my)? *(?:final|correct|right|best)? *(?:answer|option|choice|statement)s?"
    r"(?: is| are)?(?: *(?:option|choice|letter)s?)?|(?:choose|select|pick)(?: option)?|it is|it's"
    r"|\u6545?(?:\u7b54\u6848|\u6b63\u786e\u7b54\u6848|\u9009\u9879)?[\u662f\u4e3a]?"
    r"(?:\u6545?\u5e94?\u9009(?:\u9879|\u62e9)?)?)[: ,]*",
    re.IGNORECASE,
)
_SUFFIX = re.compile(r" is (?:the )?(?:correct|right|true)(?: (?:answer|option|choice))?$", re.IGNORECASE)
_LABEL = r"[\(\[]?\s*(?P<label>[A-Za-z]|[ivx]{2,4}|\d{1,2})"
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?\.?")
_LABELLED = re.compile(rf"{_LABEL}\s*(?P<end>[)\]]\s*[.:,]?|[.:,]|\s*(?=\())\s*(?P<text>.*)", re.DOTALL)
_ALONE = re.compile(rf"{_LABEL}\s*[)\]]?")
_ROW = re.compile(r"[A-Z]{2,10}")
# What stands between the letters of an answer with several.
_TOKEN = re.compile(
    r"\s*(?:\(?([A-Za-z]|\d{1,2})\)?(?![A-Za-z0-9])|([,;/&+.:]|\band\b|\u548c|\u4e0e))\s*", re.IGNORECASE
)
_HEDGES = frozenset(("or", "not", "maybe", "perhaps", "possibly", "either", "neither", "nor", "but", "also", "\u6216"))
_NEXT_LABEL = re.compile(r"(?:^|[\s,;])\(?[b-zB-Z]\)\s*\S")


def read_choice(text: str) -> frozenset[str] | None:
    """Return the option letters (or numbers) that a text chooses, or None where it chooses none or hedges."""
    if not text or len(text) > _MAX_CHOICE_CHARACTERS:
        return None
    text = _SUFFIX.sub("", _without_prefix(text))
    if match := _ALONE.fullmatch(text):
        return frozenset({match["label"].upper()})
    if _ROW.fullmatch(text):
        return frozenset(text) if len(set(text)) == len(text) else None
    if (letters := _several(text)) is not None:
        return letters
    match = _LABELLED.fullmatch(text)
    if match is None or _hedges(match["text"]) or (match["label"].isdigit() and match["text"][:1].isdigit()):
        return None
    return frozenset({match["label"].upper()})


def is_label(text: str) -> bool:
    """Return whether a text is one option letter, in parentheses or not: the kind of reference that chooses."""
    return _LETTER_ALONE.fullmatch(text) is not None


def _without_prefix(text: str) -> str:
    match = _PREFIX.match(text)
    if match is None or not match.group():
        return text
    rest = text[match.end() :]
    # "Answer" alone is a word; its A is no option.
    return (
        rest
        if rest and (not match.group()[-1].isalpha() or not rest[0].isalpha() or not match.group()[-1].isascii())
        else text
    )


def _several(text: str) -> frozenset[str] | None:
    """Return the letters of a text that holds two or more and nothing else but what joins them."""
    position, letters = 0, []
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match[1]:
            letters.append(match[1].upper())
    # "C, 12" is an option with its text; two numbers are a list, not two options.
    mixed = any(letter.isdigit() for letter in letters) and any(letter.isalpha() for letter in letters)
    return None if len(letters) < 2 or mixed else frozenset(letters)


def _hedges(text: str) -> bool:
    """Return whether what stands behind a letter is a second choice, or the labels of further statements."""
    if _NEXT_LABEL.search(text):
        return True
    words = re.findall(r"[A-Za-z]+|\d+|[^\x00-\x7f]", text)
    letters = [word for word in words if len(word) == 1 and word.isalpha()]
    others = [word for word in words if word.lower() not in _HEDGES and word not in letters and word.lower() != "and"]
    return bool(words) and not others and (bool(letters) or len(words) > len(letters))
