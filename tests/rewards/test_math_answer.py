"""Numbers within a tolerance; that expressions agree is tested by way of `answer_is_correct`."""

import pytest

from megatron_r1v2.rewards.math_answer import answer_is_within


@pytest.mark.parametrize(
    ("content", "answer", "tolerances", "within"),
    [
        ("3.45", "$3.5$", [0.1], True),
        ("3.39", "$3.5$", [0.1], False),
        ("3.6", "$3.5$", [0.1], True),
        (r"\frac{7}{2}", "3.45", [0.1], True),
        (r"v = 3.45\text{ m/s}", "$v=3.5$", [0.1], True),
        (r"3.4 \times 10^{-3}", r"$3.5 \times 10^{-3}$", [0.0001], True),
        ("1,200.3", "1200", [1], True),
        ("8.", "8", [0.1], True),
        ("3.1, 2", "2, 3", [0.1], True),
        (r"\pm 2.1", "$2$, $-2$", [0.1], True),
        ("3.1, 2", "2, 3", [0.01], False),
        ("3.1, 2", "2, 3", [0, 0.1], True),
        ("3, 2.1", "2, 3", [0, 0.1], False),
        ("2", "2, 3", [0.1], False),
        ("2, 3, 4", "2, 3", [0.1], False),
        ("2, 2.01", "2, 3", [0.1], False),
        ("2, 9", "2, 2.05", [0.1], False),
        ("2, 3", "2, 3", [0.1, 0.1, 0.1], False),
        ("x", "3", [0.1], False),
        ("3", "x", [0.1], False),
        ("i", "3", [10], False),
        ("x > 3", "3", [0.1], False),
        (r"\infty", "3", [0.1], False),
        ("1e999", "3", [0.1], False),
        ("", "3", [0.1], False),
        ("+".join(["1"] * 1200), "1200", [1], False),
    ],
)
def test_numbers_within_a_tolerance(content, answer, tolerances, within):
    assert answer_is_within(f"3.5</think>\\boxed{{{content}}}", answer, tolerances) is within


def test_no_box_is_no_number():
    assert not answer_is_within("3.5", "3.5", [1.0])
