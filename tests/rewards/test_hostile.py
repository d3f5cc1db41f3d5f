"""A thousand hostile answers: each gets a score, within a time limit, and what failed is counted."""

import random
import time
from collections import Counter

import pytest
import torch

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.parts import PARTS
from megatron_r1v2.rewards.score import reward_metrics, score_rollouts
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout

TIMEOUT = 1.0
COUNT = 1000
SETTINGS = RewardConfig(
    **{f"{name}_weight": 0.5 for name in PARTS if name != "model"},
    claim_pattern=r"(?P<name>(?:l+)+eft|right) (?P<value>\d)",  # careless: exponential on a row of l
)
TYPES = ("numeric", "choice", "exact", "math")
# Ends a worker by its time limit in math-verify, or by its memory.
HANGS = ("9^{9^{9}}", "10!!!!", "9**9**9", "2^{10^{12}}")


def _nested(generator, size):
    opening, closing = generator.choice([("{", "}"), ("(", ")"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\{", r"\}")])
    depth = max(1, size // len(opening + closing))
    return opening * depth + "8" + closing * (depth + generator.choice([-1, 0, 0, 1]))


def _latex(generator, size):
    words = [r"\frac{1}{2}", r"\sum_{i=1}^{n}", r"\int_0^1", "x^{2}", r"\left(", r"\right)", "&", r"\\", "8", "+"]
    return "".join(generator.choices(words, k=max(1, size // 6)))


def _digits(generator, size):
    sign = generator.choice(["", "-", "+", "1e", "0x", "0.", "1/"])
    return sign + generator.choice("123456789") * size + generator.choice(["", ",000" * size, "e99999", "%", "!"])


def _unbalanced(generator, size):
    return generator.choice(["\\boxed{", "{", "}", "\\boxed", "</think>", "\\"]) * max(1, size // 4)


def _bytes(generator, size):
    data = generator.randbytes(size)
    encoding = generator.choice(["latin-1", "utf-8", "utf-16-le", "shift_jis"])
    return data.decode(encoding, errors=generator.choice(["replace", "ignore", "backslashreplace"]))


def _code_points(generator, size):
    kinds = {
        "null": "\x00\x01\x1b\x7f",
        "surrogate": "\ud800\udfff\udc80",
        "digit": "\u0668\uff18\u0be8\u2078\u00bd\U0001d7d8",
        "direction": "\u202e\u200f\u2066\u2069\u061c8",
        "combining": "8\u0301\u0489\u200d\ufe0f",
        "space": "\u00a0\u2003\u3000\u2028\u200b8",
    }
    return "".join(generator.choices(kinds[generator.choice(sorted(kinds))], k=size))


def _regex_bait(generator, size):
    bait = generator.choice(
        ["1,", "1 ", "+-", "1/", "$", " ", "\\text{", "a", "lll", "left 3 ", ".", "8. ", "=", "^", "_"]
    )
    return bait * max(1, size // len(bait)) + generator.choice(["", "x", "!", "{"])


KINDS = (_nested, _latex, _digits, _unbalanced, _bytes, _code_points, _regex_bait)


def hostile_responses(seed, count):
    """Return (text, answer type) pairs: mostly short, some of a megabyte, a few that hang for certain."""
    generator = random.Random(seed)
    made = [(f"a, 3</think>\\boxed{{{value}}}", "math") for value in HANGS]
    while len(made) < count:
        answer_type = generator.choice(TYPES)
        # math-verify takes seconds for some texts of a few hundred characters; its limit of length lies beyond.
        longest = generator.choices([50, 1000, 30_000, 1_000_000], weights=[70, 20, 9, 1])[0]
        size = generator.randint(1, longest)
        if answer_type == "math" and 40 < size <= 3000:
            size = generator.choice([40, 3000])
        content = generator.choice(KINDS)(generator, size)
        frame = generator.choice(
            [
                "left 3, {}</think>\\boxed{{8}}",
                "left 3</think>\\boxed{{{}}}",
                "{}",
                "\\boxed{{{}",
                "lll{}</think>\\boxed{{8",
            ]
        )
        made.append((frame.format(content), answer_type))
    generator.shuffle(made)
    return made


def _prompt(answer_type):
    return Prompt(
        key=answer_type,
        messages=(),
        token_ids=(1,),
        tiles_TCHW=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
        answer="8",
        answer_type=answer_type,
        facts={"left": "3"},
    )


@pytest.fixture(scope="module")
def made():
    return hostile_responses(seed=7, count=COUNT)


def test_the_hostile_answers_are_what_they_should_be(made):
    assert made == hostile_responses(seed=7, count=COUNT)
    assert Counter(answer_type for _, answer_type in made).keys() == set(TYPES)
    assert len({text for text, _ in made}) > 0.8 * COUNT
    assert sum(len(text) > 300_000 for text, _ in made) >= 3
    for sign in ("\x00", "\ud800", "\u202e", "\u0668", "\ufffd", "9^{9^{9}}"):
        assert any(sign in text for text, _ in made), sign


def test_a_thousand_hostile_answers_get_a_score_a_time_limit_and_a_count(made):
    prompts = {answer_type: _prompt(answer_type) for answer_type in TYPES}
    rollouts = [
        Rollout(answer_type, index, tuple(text[:2000].encode("utf-8", "surrogatepass")), (), 0, "stop")
        for index, (text, answer_type) in enumerate(made)
    ]
    with VerifierPool(2, TIMEOUT) as pool:
        start = time.monotonic()
        scored, counts = score_rollouts(
            prompts, rollouts, [text for text, _ in made], settings=SETTINGS, pool=pool, max_response_tokens=6000
        )
        seconds = time.monotonic() - start
        assert [response.text for response in scored] == [text for text, _ in made]
        assert all(set(response.rewards) == PARTS.keys() - {"model"} for response in scored)
        assert all(0.0 <= value <= 1.0 for response in scored for value in response.rewards.values())
        assert all(0.0 <= response.total <= 3.0 for response in scored)
        failed = reward_metrics(counts)
        assert failed["verifier/timeouts"] + failed["verifier/crashes"] >= len(HANGS) / 2
        print(f"{COUNT} hostile answers in {seconds:.1f} s: {failed}")
        hanging = [response for response in scored if any(f"\\boxed{{{value}}}" in response.text for value in HANGS)]
        assert [response.rule_correct for response in hanging] == [False] * len(HANGS)
        # A text is not wrong because others were hostile.
        good = [r"left 3</think>\boxed{8}"] * 4
        scored, counts = score_rollouts(
            prompts, [Rollout(kind, 0, (1,), (), 0, "stop") for kind in TYPES], good,
            settings=SETTINGS, pool=pool, max_response_tokens=6000,
        )  # fmt: skip
        assert all(response.rule_correct and response.claims == (("left", "3"),) for response in scored)
        assert counts["verifier_timeouts"] == counts["verifier_crashes"] == 0
