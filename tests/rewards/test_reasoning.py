import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rewards.reasoning import overlong_score, repetition_score, steps_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"left 3, right 5, 3+5=8</think>\boxed{8}", 1.0),
        (r"left 3, 3+5=8</think>\boxed{8}", 2 / 3),
        ("I see a 3.\nI see a 5.\nThe sum is 8.</think>The answer is \\boxed{8}.", 1.0),
        ("3, 3, 3, 3+5=8</think>\\boxed{8}", 2 / 3),  # said three times, one step
        (" LEFT  3,\nleft 3; ..., --- , 3+5=8</think>\\boxed{8}", 2 / 3),  # nor are marks a step
        ("1,000 and 3.5</think>\\boxed{3.5}", 1 / 3),  # one step: no space after the marks
        ("\u5de6\u8fb9\u662f3\uff0c\u53f3\u8fb9\u662f5\u3002\u548c\u662f 8\u3002</think>\\boxed{8}", 1.0),
        (r"it is C: a, b, so (c)</think>\boxed{\text{C}}", 1.0),
        (r"a, b, so \frac{1}{2}$</think>$\boxed{\frac{1}{2}}$", 1.0),
        # The answer is not what the steps lead to: a guess, another answer, said too early, part of another number.
        (r"left 3, right 5, so what</think>\boxed{8}", 0.0),
        (r"left 3, right 5, 3+5=8</think>\boxed{9}", 0.0),
        (r"3+5=8, left 3, right 5, hm</think>\boxed{8}", 0.0),
        (r"a, b, 3+5=18</think>\boxed{8}", 0.0),
        (r"a, b, 3+5=8.5</think>\boxed{8}", 0.0),
        (r"a, b, 3+5=0.8</think>\boxed{8}", 0.0),
        (r"a, b, 88 is 8</think>\boxed{8}", 1.0),
        # Nothing reasoned, nothing boxed, no end.
        (r"</think>\boxed{8}", 0.0),
        (r"left 3, right 5, 3+5=8</think>8", 0.0),
        (r"left 3, right 5, 3+5=8</think>\boxed{}", 0.0),
        (r"left 3, right 5, 3+5=8 \boxed{8}", 0.0),
        ("", 0.0),
    ],
)
def test_steps(text, score):
    assert steps_score(text, wanted=3, conclusion=2) == pytest.approx(score)


def test_steps_wanted_and_where_the_conclusion_may_stand():
    text = r"3+5=8, left 3, right 5</think>\boxed{8}"
    assert steps_score(text, wanted=6, conclusion=3) == 0.5
    assert steps_score(text, wanted=2, conclusion=3) == 1.0
    assert steps_score(text, wanted=6, conclusion=2) == 0.0


@pytest.mark.parametrize(
    ("token_ids", "tokens", "score"),
    [
        ((1, 2, 3, 4, 5), 2, 1.0),
        ((1, 2, 1, 2, 1), 2, 0.5),  # 12 21 12 21
        ((7, 7, 7, 7, 7), 2, 0.25),
        ((1, 2, 3, 1, 2, 3, 4), 3, 0.8),  # 123 231 312 123 234
        ((7,) * 1003, 4, 1 / 1000),
        ((7, 7), 3, 1.0),
        ((7, 7, 7), 3, 1.0),
        ((), 3, 1.0),
    ],
)
def test_repetition(token_ids, tokens, score):
    assert repetition_score(token_ids, tokens) == pytest.approx(score)


@pytest.mark.parametrize(
    ("length", "score"), [(0, 1.0), (60, 1.0), (61, 39 / 40), (80, 0.5), (99, 1 / 40), (100, 0.0), (101, 0.0)]
)
def test_overlong_falls_over_the_last_tokens(length, score):
    assert overlong_score(length, "stop", longest=100, buffer=40) == pytest.approx(score)
    # The formula of DAPO, equation 13, plus 1.
    published = 0.0 if length <= 60 else (60 - length) / 40 if length <= 100 else -1.0
    assert overlong_score(length, "stop", longest=100, buffer=40) == pytest.approx(published + 1)


def test_overlong_without_a_buffer_is_a_step_and_a_cut_response_gets_nothing():
    assert overlong_score(100, "stop", longest=100, buffer=0) == 1.0
    assert overlong_score(100, "length", longest=100, buffer=0) == 0.0
    assert overlong_score(10, "length", longest=100, buffer=40) == 0.0


@given(st.text() | st.text(alphabet="8a, .\n\\boxed{}</think>"), st.integers(1, 5), st.integers(1, 5))
def test_steps_of_any_text_are_in_bounds(text, wanted, conclusion):
    for variant in (text, f"{text}8</think>\\boxed{{8}}", f"a 8</think>\\boxed{{{text}}}"):
        assert 0.0 <= steps_score(variant, wanted, conclusion) <= 1.0


@given(st.lists(st.integers(0, 3)), st.integers(1, 6))
def test_repetition_of_any_tokens_is_in_bounds(token_ids, tokens):
    assert 0.0 <= repetition_score(token_ids, tokens) <= 1.0


@given(st.integers(0, 200), st.sampled_from(["stop", "length"]), st.integers(1, 100), st.integers(0, 100))
def test_overlong_of_any_length_is_in_bounds(length, finish_reason, longest, buffer):
    score = overlong_score(length, finish_reason, longest=longest, buffer=min(buffer, longest))
    assert 0.0 <= score <= 1.0


def test_megabytes_take_a_moment():
    start = time.process_time()
    for text in ("8, " * 300_000, "8" * 1_000_000, "\\text{" * 100_000, "{" * 1_000_000, "$" * 1_000_000):
        for variant in (text, f"{text}</think>\\boxed{{8}}", f"a 8</think>\\boxed{{{text}}}"):
            steps_score(variant, wanted=3, conclusion=2)
    assert repetition_score(range(1_000_000), 8) == 1.0
    assert time.process_time() - start < 10.0
