import pytest

from megatron_r1v2.rewards.format import format_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"left 3, right 5, 3+5=8</think>\boxed{8}", 1.0),
        ("<think>\nleft 3</think>\n\nAnswer: \\boxed{8}.\n", 1.0),
        ("  <think>left 3</think>\\boxed{\\frac{1}{2}}", 1.0),
        ("", 0.0),
        (r"\boxed{8}", 0.0),
        (r"left 3 \boxed{8}", 0.0),
        (r"</think>\boxed{8}", 0.0),
        ("<think> \n</think>\\boxed{8}", 0.0),
        ("left 3</think>8", 0.0),
        (r"left 3</think></think>\boxed{8}", 0.0),
        (r"left 3</think>\boxed{8}</think>", 0.0),
        (r"left 3<think>right 5</think>\boxed{8}", 0.0),
        (r"<think><think>left 3</think>\boxed{8}", 0.0),
        (r"left 3</think><think>\boxed{8}", 0.0),
        (r"left \boxed{3}</think>\boxed{8}", 0.0),
        (r"left 3</think>\boxed{8}\boxed{8}", 0.0),
        (r"left 3</think>\boxed{8} or \boxed 9", 0.0),
        (r"left 3</think>\boxed{\boxed{8}}", 0.0),
        (r"left 3</think>\boxed{8", 0.0),
        (r"left 3</think>\boxed{}", 0.0),
        (r"left 3</think>\boxed{ }", 0.0),
        (r"left 3</think>\boxed 8", 0.0),
        ("<think>", 0.0),
        ("</think>" * 100_000, 0.0),
        ("\x00</think>\\boxed{\x00}", 1.0),
    ],
)
def test_format(text, score):
    assert format_score(text) == score
