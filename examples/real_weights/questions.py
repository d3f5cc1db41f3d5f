"""What is asked about a picture, and how it is answered: one rule for photographs and for digits."""

from __future__ import annotations

import random
from typing import Any

PHRASES = {
    "photograph": ("What does the picture show?", "What is this?", "Name what you see."),
    "digit": ("Which digit is this?", "Read the digit.", "What number is written here?"),
}
ANSWER_TYPES = {"photograph": "exact", "digit": "numeric"}

SYSTEM = "Answer with one word in a box, like \\boxed{cat}."
"""SmolLM2 knows from text what is asked of it; the adapter has to tell it what is seen, not how to answer."""


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
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"<image>\n{rng.choice(PHRASES[kind])}"},
        ],
        "answer": answer,
        "answer_type": ANSWER_TYPES[kind],
        "response": f"\\boxed{{{answer}}}",
        "images": [f"{key}.png"],
        "source": origin,
        "metadata": {"kind": kind},
    }
