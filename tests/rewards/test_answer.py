import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answer import answer_is_correct, last_boxed


def _boxed(content):
    return f"left 3, right 5</think>The answer is \\boxed{{{content}}}."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{8}", "8"),
        (r"\boxed{7} then \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}} more}", r"\frac{1}{2}"),
        (r"\boxed{{{8}}}", "{{8}}"),
        (r"\boxed{\boxed{8}}", "8"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{}", ""),
        ("\\boxed{8\x00}", "8\x00"),
        ("\\boxed{8\n}", "8\n"),
        (r"\boxed{8", None),
        (r"\boxed{7} then \boxed{8", None),
        (r"\boxed{8\}", None),
        (r"\boxed 8", None),
        ("", None),
        ("8", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@given(
    st.text(),
    st.recursive(
        st.text(alphabet="a8 \\{", max_size=0) | st.sampled_from(["8", "x", r"\{", r"\\"]),
        lambda inner: st.lists(inner.map(lambda text: "{" + text + "}"), max_size=3).map("".join),
    ),
)
def test_last_boxed_returns_any_balanced_content_whatever_stands_around_it(before, content):
    after = "} {{ \\} \x00"
    assert last_boxed(f"{before} \\boxed{{{content}}}{after}") == content


@given(st.text(alphabet="\\boxed{} 8\n\x00"))
@settings(max_examples=300)
def test_no_text_is_an_error(text):
    last_boxed(text)
    for answer_type in ("numeric", "choice", "exact"):
        answer_is_correct(text, "8", answer_type)


def test_megabytes_take_a_moment():
    start = time.perf_counter()
    assert last_boxed("\\boxed{" * 300_000) is None
    assert last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert last_boxed("a" * 5_000_000 + r"\boxed{8}") == "8"
    for content in ("9" * 3_000_000, r"\text{" * 300_000, "1,000" * 300_000, "$" * 1_000_000, " " * 1_000_000):
        assert not answer_is_correct("\\boxed{" + content + "}", "8", "numeric")
    assert time.perf_counter() - start < 10.0


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        ("8", "8", True),
        (" 8 ", "8", True),
        ("08", "8", True),
        ("8.", "8", True),
        ("8.0", "8", True),
        ("+8", "8", True),
        ("$8$", "8", True),
        (r"\$8", "8", True),
        (r"\text{8}", "8", True),
        ("\N{MINUS SIGN}8", "-8", True),
        ("1,234,567", "1234567", True),
        ("1.5e3", "1500", True),
        (".5", "1/2", True),
        ("1 / 2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"-\dfrac{1}{2}", "-0.5", True),
        ("0.3333333", "1/3", True),
        ("0.333", "1/3", False),
        ("9", "8", False),
        ("-8", "8", False),
        ("12345679", "12345678", False),
        ("1e-9", "0", False),
        ("1,23", "123", False),
        ("1/0", "0", False),
        (r"\frac{1}{0}", "8", False),
        ("1e999999999", "8", False),
        ("nan", "nan8", False),
        ("inf", "8", False),
        ("1_0", "10", False),
        ("\N{FULLWIDTH DIGIT EIGHT}", "8", False),
        ("9**9**9", "8", False),
        ("8 9", "8", False),
        ("8\x00", "8", False),
        ("", "8", False),
        ("  ", "8", False),
        ("", "", False),
        ("8", "", False),
        ("8" * 5000, "8", False),
        ("8 cm", "8", False),
        ("8 cm", "8 cm", True),
    ],
)
def test_numeric(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "numeric") is correct


@pytest.mark.parametrize(
    ("content", "answer", "tolerance", "correct"),
    [
        ("10.5", "10", 0.05, True),  # at the limit, exactly
        ("10.51", "10", 0.05, False),
        ("-9.5", "-10", 0.05, True),
        ("9.5", "-10", 0.05, False),
        ("11", "10", 0.5, False),  # whole numbers do not differ a little
        ("10.000001", "10", 0.0, False),
        ("10.0", "10", 0.0, True),
        ("1e-9", "0", 1.0, False),
    ],
)
def test_numeric_tolerance(content, answer, tolerance, correct):
    assert answer_is_correct(_boxed(content), answer, "numeric", tolerance) is correct


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_are_equal_only_when_they_are(given_value, answer):
    assert answer_is_correct(_boxed(given_value), str(answer), "numeric") is (given_value == answer)
    assert answer_is_correct(_boxed(f"{answer:,}"), str(answer), "numeric")


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        ("C", "C", True),
        ("c", "C", True),
        ("(C)", "C", True),
        ("C.", "C", True),
        ("C: 12 cm", "C", True),
        (r"\text{C}", "C", True),
        (r"\textbf{(C)}", "C", True),
        ("C", "(C) 12 cm", True),
        ("B", "C", False),
        ("A cat", "A", False),
        ("Cat", "C", False),
        ("", "C", False),
        ("C and D", "C", False),
    ],
)
def test_choice(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "choice") is correct


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        ("red  fox", "red fox", True),
        (r"\text{red fox}", "red fox", True),
        ("Red fox", "red fox", False),
        ("8.0", "8", False),
    ],
)
def test_exact(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "exact") is correct


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        (r"\frac{2}{4}", "0.5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        ("8.", "8", True),
        ("1e-3", "0.001", True),
        ("1e-3", "0.0010001", False),
        ("8, 9", "8", False),
        ("x^2+1", "x^2+2x+1", False),
        ("8", "9", False),
        ("{}", "8", False),
        ("\x00", "8", False),
    ],
)
def test_math(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "math") is correct


def test_math_is_not_asked_about_what_nobody_would_write():
    long = "+".join(["1"] * 1200)
    assert not answer_is_correct(_boxed(long), "1200", "math")
    assert answer_is_correct(_boxed(long), long, "math")
    assert answer_is_correct(_boxed("+".join(["1"] * 12)), "12", "math")


def test_math_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(answer_is_correct(_boxed(r"\frac{2}{4}"), "0.5", "math")))
    thread.start()
    thread.join()
    assert results == [True]


def test_only_the_last_box_counts():
    assert not answer_is_correct(r"\boxed{8} no, \boxed{9}", "8", "numeric")
    assert not answer_is_correct(r"\boxed{8} no, \boxed{", "8", "numeric")
    assert not answer_is_correct("8", "8", "numeric")


def test_an_unknown_answer_type_is_an_error():
    with pytest.raises(ValueError, match="'number' is unknown; use one of numeric, choice, exact, math"):
        answer_is_correct(r"\boxed{8}", "8", "number")
