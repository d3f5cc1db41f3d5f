"""A reward of one's own for `make demo`: a near answer is worth something, and so is the sum that leads to it."""

import re


def nearness(response, answer, **_others):
    """Return two parts, each from 0 to 1."""
    boxed = re.findall(r"\\boxed\{(-?\d{1,4})\}", response)
    if not boxed:
        return {"near": 0, "shown": 0}
    distance = abs(int(boxed[-1]) - int(answer))
    return {
        "near": max(0, 1 - distance / 5),
        "shown": int(f"={boxed[-1]}</think>" in response),
    }
