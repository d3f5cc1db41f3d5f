"""The questions about two digits and their answers, with an image or as pure text.

The language model is pretrained without images. In the place of an image (`<img>`, 16 tokens a tile for two tiles and a
thumbnail, `</img>`) it sees a *note* of the same length: 16 words about the left digit, 16 about the right one, 16
about both. Words may be filler or wrong, so the model learns to weigh evidence instead of copying one position. Without
that, the image tokens of an adapter that is half trained would mean nothing to it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLER_WORDS = ("hm", "ink", "line", "curve", "blank", "edge")
TOKENS_PER_TILE = 16
"""32-pixel tiles, 4-pixel patches, pixel shuffle by 2: (32 / 4 / 2) ** 2."""

PHRASES = {
    "+": ("What is left plus right?", "Add the two digits.", "left + right = ?"),
    "-": ("What is left minus right?", "Take right away from left.", "left - right = ?"),
    "*": ("What is left times right?", "Multiply the two digits.", "left * right = ?"),
}
OPERATIONS = tuple(PHRASES)

CLAIM_PATTERN = r"(?P<name>left|right) (?P<value>\d)"
"""The value of `reward.claim_pattern`: it finds the claims of a response about the image."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<IMG_CONTEXT>\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""ChatML with QwQ's ending: the response begins inside <think>."""


@dataclass(frozen=True)
class Problem:
    """One question about two digits.

    Example: Problem(left=3, right=5, operation="+", question="Add the two digits.").
    """

    left: int
    right: int
    operation: str
    question: str

    @property
    def answer(self) -> str:
        """Return the value of the expression."""
        values = {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}
        return str(values[self.operation])

    @property
    def response(self) -> str:
        """Return the wanted continuation of the prompt, which already ends with `<think>` and a line break."""
        expression = f"{self.left}{self.operation}{self.right}={self.answer}"
        return f"left {self.left}, right {self.right}, {expression}</think>\\boxed{{{self.answer}}}"

    @property
    def facts(self) -> dict[str, str]:
        """Return the facts of the image, by the names that the claim pattern finds."""
        return {"left": str(self.left), "right": str(self.right)}


def make_problem(left: int, right: int, rng: random.Random) -> Problem:
    """Ask one of the three operations in one of its phrasings."""
    operation = rng.choice(OPERATIONS)
    return Problem(left, right, operation, rng.choice(PHRASES[operation]))


def make_note(left: int, right: int, rng: random.Random, *, filler: float, wrong: float) -> str:
    """Describe two digits in as many words as an image of them has tokens.

    Args:
        left, right: the digits.
        rng: source of chance.
        filler: probability that a word says nothing.
        wrong: probability that a word that names a digit names a random one.

    Returns:
        "note", 48 words and "end"; the last 16 follow the rows of a thumbnail: 2 left, 2 right, and so on.
    """
    thumbnail = [left, left, right, right] * (TOKENS_PER_TILE // 4)
    digits = [left] * TOKENS_PER_TILE + [right] * TOKENS_PER_TILE + thumbnail
    words = [_word(digit, rng, filler, wrong) for digit in digits]
    return f"note {' '.join(words)} end"


def _word(digit: int, rng: random.Random, filler: float, wrong: float) -> str:
    if rng.random() < filler:
        return rng.choice(FILLER_WORDS)
    return DIGIT_WORDS[rng.randrange(10) if rng.random() < wrong else digit]
