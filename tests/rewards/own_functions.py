"""Reward functions as users write them, some of them badly; the tests call them in real workers."""

import asyncio
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Seen:  # a dataclass needs its module in sys.modules
    images: int


def short(response, **others):
    return max(0.0, 1 - len(response) / 10)


def parts(response, prompt, answer, metadata, images):
    seen = Seen(len([path for path in images if Path(path).read_bytes()]))
    return {
        "says_answer": answer is not None and answer in response,
        "level": int(metadata["level"]) / 4,
        "images": seen.images / 2,
        "asked": float("add" in prompt),
    }


def fails_on_b(metadata, **others):
    if metadata.get("level") == "2":
        raise KeyError("level 2")
    return 1


def hangs_on_b(metadata, **others):
    if metadata.get("level") == "2":
        time.sleep(60)
    return 1.0


def leaves(**others):
    os._exit(3)


def returns(response, **others):
    return {"nan": math.nan, "two": 2, "text": "1", "nothing": None, "empty": {}, "one bad part": {"a": 1, "b": -1}}[
        response
    ]


def by_position(response, /, **others):
    return 1.0


def too_few(response, answer):
    return 1.0


async def later(**others):
    await asyncio.sleep(0)


NUMBER = 3
