"""What is asked about a picture, and how it is answered: one rule for photographs and for digits."""

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
"""Shows SmolLM2 in text what is asked of it: the adapter has to say what is seen, not how to answer. The box has a
space, so that the word in it is the token that it is in a sentence."""


def make_row(kind: str, key: str, answer: str, origin: str, rng: random.Random) -> dict[str, Any]:
    """Ask about the picture KEY.png.

    Args:
        kind: photograph or digit.
        key: of the sample.
        answer: what the picture shows.
        origin: where the picture is from.
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
