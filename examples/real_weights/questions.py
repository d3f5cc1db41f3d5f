"""The questions about a picture and their answers, by one rule for photographs and for digits."""

from __future__ import annotations

import random
from typing import Any

PHRASES = {
    "photograph": ("What does the picture show?", "What is this?", "Name what you see."),
    "digit": ("Which digit is this?", "Read the digit.", "What number is written here?"),
}
ANSWER_TYPES = {"photograph": "exact", "digit": "numeric"}

OPENING = (
    {"role": "system", "content": "Name what is shown."},
    {"role": "user", "content": "cat cat cat cat\nWhat is this?"},
    {"role": "assistant", "content": "\\boxed{ cat}"},
)
"""An example in text, so that the adapter has to convey the picture and not the form of an answer. The box has a space
before the word, which makes it the same token as inside a sentence."""


def make_row(kind: str, key: str, answer: str, origin: str, rng: random.Random) -> dict[str, Any]:
    """Ask about the picture KEY.png.

    Args:
        kind: photograph or digit.
        key: of the sample.
        answer: the name of the thing in the picture.
        origin: source of the picture.
        rng: chooses the phrasing.
    """
    return {
        "schema": 1,
        "key": key,
        "messages": [
            *OPENING,
            {"role": "user", "content": f"<image>\n{rng.choice(PHRASES[kind])}"},
        ],
        "answer": answer,
        "answer_type": ANSWER_TYPES[kind],
        "response": f"\\boxed{{ {answer}}}",
        "images": [f"{key}.png"],
        "source": origin,
        "metadata": {"kind": kind},
    }
