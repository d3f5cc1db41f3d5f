import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answer import answer_is_correct, describe_misfit, last_boxed, type_of_alternative
from tests.rewards.further_answers import FURTHER, FURTHER_OF_TYPES


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
        (r"\boxed {8}", "8"),
        ("\\boxed\n{8} or \\boxed 9", "8"),
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
    start = time.process_time()
    assert last_boxed("\\boxed{" * 300_000) is None
    assert last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert last_boxed("a" * 5_000_000 + r"\boxed{8}") == "8"
    for content in ("9" * 3_000_000, r"\text{" * 300_000, "1,000" * 300_000, "$" * 1_000_000, " " * 1_000_000):
        assert not answer_is_correct("\\boxed{" + content + "}", "8", "numeric")
    assert time.process_time() - start < 10.0


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
        ("\N{FULLWIDTH DIGIT EIGHT}", "8", True),  # rule 1 of docs/rewards.md
        ("9**9**9", "8", False),
        ("8 9", "8", False),
        ("8\x00", "8", False),
        ("", "8", False),
        ("  ", "8", False),
        ("", "", False),
        ("8", "", False),
        ("8" * 5000, "8", False),
        ("8 cm", "8", True),  # rule 7
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


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        (r"\frac34", "0.75", True),
        ("12{,}345", "12345", True),
        (r"12,\!345", "12345", True),
        (r"1\,000", "1000", True),
        (r"2.5\times 10^{-3}", "0.0025", True),
        ("2.5e-3", "0.0025", True),
        ("10^{-2}", "0.01", True),
        (r"25\%", "25%", True),
        ("25%", "25", True),
        (r"45^\circ", "45", True),
        ("45\xb0", r"45^{\circ}", True),
        ("y = 8", "8", True),
        ("8 = y", "8", True),
        (r"1\frac{3}{4}", "1.75", True),
        ("1 3/4", "1.75", True),
        (r"8\;", "8", True),
        ("8~", "8", True),
        ("((8))", "8", True),
        ("+8", "8", True),
        ("\u22128", "-8", True),
        ("\uff18", "8", True),
        ("$8$", "8", True),
        (r"\text{8}", "8", True),
        (r"0.\overline{3}", "1/3", True),
        (r"\$8", "8", True),
        (r"8 \text{ cm}", "8", True),
        ("8 cm", "8 m", False),
        ("9", "8", False),
        ("8 or 9", "8", False),
        ("eight", "8", False),
        ("\xbd", "0.5", True),
        ("-\xbd", "-0.5", True),
        ("\u4e09", "3", False),
        (r"8\%", r"9\%", False),
        ("1e3", "1000", True),
        ("8\uff01", "8", False),
        ("8\u3002", "8", True),
    ],
)
def test_numeric_in_other_spellings(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "numeric") is correct


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        ("\uff08B\uff09", "B", True),
        ("B\uff0e", "B", True),
        ("B\uff1a12", "B", True),
        ("\u7b54\u6848\uff1aB", "B", True),
        ("\u7b54\u6848\u662fB", "B", True),
        ("\u6545\u9009B", "B", True),
        ("\u9009\u9879B", "B", True),
        ("\u6b63\u786e\u7b54\u6848\u4e3aB", "B", True),
        ("The correct answer is B", "B", True),
        ("The answer is (B)", "B", True),
        ("answer: B", "B", True),
        ("Choice B", "B", True),
        ("option (B)", "B", True),
        (r"\mathbf{B}", "B", True),
        (r"\text{(B)}", "B", True),
        (r"\textrm{(B) } 12", "B", True),
        ("$B$", "B", True),
        ("*B*", "B", True),
        ("`B`", "B", True),
        ("[B]", "B", True),
        ("<B>", "B", False),
        ("B) 12 cm", "B", True),
        ("b", "B", True),
        ("B or C", "B", False),
        ("B/C", "B", False),
        ("B and C", "B", False),
        ("not B", "B", False),
        ("A, B, C, D", "B", False),
        ("ABCD", "B", False),
        ("Either B or C", "B", False),
        ("B, maybe C", "B", False),
        ("B (or C)", "B", False),
        ("B but possibly C", "B", False),
        ("neither", "B", False),
        ("", "B", False),
        ("Both A and B", "B", False),
        ("Blue", "B", False),
        ("B is correct", "B", True),
        ("B is right", "B", True),
        ("AB", "A,B", True),
        ("A and B", "AB", True),
        ("A\u3001B", "AB", True),
        ("A; B", "A,B", True),
        ("(A), (B)", "AB", True),
        ("A B", "AB", True),
        ("B, A", "A and B", True),
        ("A", "A, B", False),
        ("A, B, C", "A, B", False),
        ("2", "2", True),
        ("(2)", "2", True),
        ("\u2461", "2", True),
        ("2", "1", False),
        ("12", "1", False),
        ("1.5", "1", False),
        ("(ii)", "ii", True),
        ("D. None of the above", "D", True),
        ("C. Both A and B", "C", True),
        ("A. True", "A", True),
        ("A cat", "A", False),
        ("I", "I", True),
        ("E", "E", True),
        ("J", "J", True),
        (r"\boxed{B}", "B", True),
        (r"\color{red}{B}", "B", True),
        ("Answer", "A", False),
        ("All of the above", "D", False),
        ("B.C", "B", False),
        ("B,C", "B", False),
        ("Option B or Option C", "B", False),
        ("12 cm", "12 cm", True),
        (r"12\text{ cm}", "12 cm", True),
        ("the answer is B.", "B", True),
        ("B:", "B", True),
        ("B\\\\", "B", True),
        ("(B", "B", True),
        ("B)", "B", True),
        ("B. because A is wrong", "B", True),
        ("a) b)", "a", False),
        ("A) 1, B) 2", "A", False),
    ],
)
def test_choices_in_other_spellings(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "choice") is correct


@pytest.mark.parametrize(
    ("content", "answer", "correct"),
    [
        (r"25\%", "25%", True),
        (r"Q\&A", "Q&A", True),
        (r"blue\_car", "blue_car", True),
        (r"C\#", "C#", True),
        (r"\mbox{red fox}", "red fox", True),
        (r"\textit{red fox}", "red fox", True),
        (r"\textbf{\textit{red}}", "red", True),
        ("red\xa0fox", "red fox", True),
        ("\ufeffred fox", "red fox", True),
        ("\u7ea2\u3002", "\u7ea2", True),
        ("\uff52\uff45\uff44", "red", True),
        ("e\u0301", "\xe9", True),
        ("Red", "red", False),
        ("8.0", "8", False),
        ("red  fox", "red fox", True),
        ("red fox.", "red fox", True),
        ("\u201cred\u201d", "red", True),
        (r"$\text{red}$", "red", True),
        ("**red fox**", "red fox", True),
        ("\u5782\u76f4\uff0c\u5e73\u884c", "\u5782\u76f4,\u5e73\u884c", True),
        ("x\xb2", "x^2", True),
        ("x2", "x^2", False),
        ("red fox", "redfox", False),
        ("a-b", "a b", False),
    ],
)
def test_exact_in_other_spellings(content, answer, correct):
    assert answer_is_correct(_boxed(content), answer, "exact") is correct


@pytest.mark.parametrize(
    ("alternative", "answer_type", "compared"),
    [("12 cm", "choice", "math"), ("B", "choice", "choice"), (" b ", "choice", "choice"), ("8", "numeric", "numeric")],
)
def test_how_an_alternative_is_compared(alternative, answer_type, compared):
    assert type_of_alternative(alternative, answer_type) == compared


def test_a_missing_answer_is_never_right():
    for answer_type in ("numeric", "choice", "exact", "math"):
        assert not answer_is_correct(_boxed(""), "", answer_type)
        assert not answer_is_correct(_boxed("None"), "", answer_type)
        assert not answer_is_correct(_boxed("."), "8", answer_type)


def test_only_the_last_box_counts():
    assert not answer_is_correct(r"\boxed{8} no, \boxed{9}", "8", "numeric")
    assert not answer_is_correct(r"\boxed{8} no, \boxed{", "8", "numeric")
    assert not answer_is_correct("8", "8", "numeric")


def test_an_unknown_answer_type_is_an_error():
    with pytest.raises(ValueError, match="'number' is unknown; use one of numeric, choice, exact, math"):
        answer_is_correct(r"\boxed{8}", "8", "number")


@pytest.mark.parametrize(
    ("answer_type", "answer", "reference", "right"),
    [("math", *case) for cases in FURTHER.values() for case in cases]
    + [(answer_type, *case) for answer_type, cases in FURTHER_OF_TYPES.items() for case in cases],
)
def test_further_answers(answer_type, answer, reference, right):
    assert answer_is_correct(_boxed(answer), reference, answer_type) is right


def test_each_kind_has_at_least_five_further_cases():
    assert all(len(cases) >= 5 for cases in [*FURTHER.values(), *FURTHER_OF_TYPES.values()])


@pytest.mark.parametrize(
    ("answer", "answer_type", "misfit"),
    [
        ("eight", "numeric", "is no number"), ("x + 1", "numeric", "is no number"), ("8 km", "numeric", None),
        (r"\boxed{8}", "numeric", None), (r"\frac{1}{2}", "numeric", None), ("12", "choice", "is no option letter"),
        ("blue", "choice", "is no option letter"), ("2", "choice", None), ("A, C", "choice", None),
        ("eight", "math", None), ("$$", "exact", "has nothing in it"), (r"\boxed{}", "math", "has nothing in it"),
    ],
)  # fmt: skip
def test_a_reference_that_no_response_could_equal_is_told(answer, answer_type, misfit):
    found = describe_misfit(answer, answer_type)
    assert found is None if misfit is None else found.startswith(misfit)
