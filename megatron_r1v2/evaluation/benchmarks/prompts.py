"""The instructions of R1V (arXiv 2504.05599), word for word, and the places of images and options in a question."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER

_TAIL = (
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the information provided. "
    "Avoid repeating steps indefinitely\N{EM DASH}provide your best guess even if unsure. "
    "Think step by step logically, considering all relevant information before answering."
)
CHOICE_INSTRUCTION = (
    "Answer the multiple choice preceding question. The last line of your response should follow this format: "
    r"'Answer: \boxed{$LETTER}' (without quotes), where LETTER is one of the options. " + _TAIL
)
OPEN_INSTRUCTION = (
    "Answer the preceding question. The last line of your response should follow this format: "
    r"'Answer: \boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion based on the reasoning "
    "provided. " + _TAIL
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# "<image 1>" in MMMU, "<image1>" in MathVision, "<image_1>" in OlympiadBench.
_MARK = re.compile(r"<image[ _]?(\d*)>")


def options_text(options: Sequence[str]) -> str:
    """Return the options of a question, one a line behind its letter.

    Args:
        options: in order; where they are nothing but the letters themselves (drawn in the image), the letters alone.
    """
    if [option.strip() for option in options] == list(LETTERS[: len(options)]):
        return "Options: " + ", ".join(options)
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def place_images(text: str, numbers: Sequence[int]) -> tuple[str, list[int]]:
    """Put our image placeholders where a text marks its images.

    The first mark of an image becomes the image; later ones name it in words. Images without a mark come first, as
    InternVL puts them.

    Args:
        text: with marks such as "<image 1>".

    Returns:
        The text, and the numbers of the images in the order of its placeholders.
    """
    order: list[int] = []

    def replace(mark: re.Match[str]) -> str:
        number = int(mark[1]) if mark[1] else next((n for n in numbers if n not in order), 0)
        if number in numbers and number not in order:
            order.append(number)
            return IMAGE_PLACEHOLDER
        return f"(image {number})" if number else "(image)"

    text = _MARK.sub(replace, text)
    unmarked = [number for number in numbers if number not in order]
    return f"{IMAGE_PLACEHOLDER}\n" * len(unmarked) + text, unmarked + order
