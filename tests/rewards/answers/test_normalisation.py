import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answers.normalisation import MAX_CHARACTERS, normalise, plain_text
from megatron_r1v2.rewards.answers.numbers import read_number
from tests.rewards.answers.spellings import spelled, values, wrapped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\uff0d\uff13", "-3"),
        ("\u0663", "3"),
        ("\U0001d7d8", "0"),
        ("x\u00b2", "x^2"),
        ("x\u00b9\u00b2", "x^{12}"),
        ("x\u2081", "x_1"),
        ("10\u207b\u00b3", "10^{-3}"),
        ("\u00bd", r"\frac{1}{2}"),
        ("2\u00bd", r"2\frac{1}{2}"),
        ("2\u221a3", r"2\sqrt{3}"),
        ("\u221a12", r"\sqrt{12}"),
        ("\u221a(x+1)", r"\sqrt{x+1}"),
        ("\u221b2", r"\sqrt[3]{2}"),
        ("60\u00b0", r"60^\circ"),
        (r"60^{\circ}", r"60^\circ"),
        ("25\u2103", r"25^\circ C"),
        ("\uff08\uff11\uff0c\uff12\uff09", "(1, 2)"),
        ("\u2461", "(2)"),
        ("8\u3002", "8"),
        ("\u2264", r"\le"),
        ("a\u00a0b\u200b", "a b"),
        ("e\u0301", "\u00e9"),
        (r"1\,234", "1234"),
        (r"1{,}234{,}567", "1234567"),
        (r"1,\!234", "1234"),
        ("1,234", "1,234"),
        (r"1\,23", "1 23"),
        (r"\text{\textbf{red}}", "red"),
        (r"\text {red fox}", "red fox"),
        (r"\textcolor{red}{8}", "8"),
        (r"{\color{red} 8}", "8"),
        (r"\boxed {8}", "8"),
        (r"x\text{or}y", "x or y"),
        (r"\mathrm{H}_2\mathrm{O}", "H_2O"),
        (r"8\text{m}", "8 m"),
        (r"x^\text{ab}", "x^{ab}"),
        (r"\frac\text{1}2", r"\frac{1}{2}"),
        (r"\left(\frac12, 1\right]", r"(\frac{1}{2}, 1]"),
        (r"\left\{ 1 \right\}", r"\{1\}"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\dfrac34", r"\frac{3}{4}"),
        (r"\frac1x", r"\frac{1}{x}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\sqrt{12}", r"\sqrt{12}"),
        (r"x\leq 3", r"x\le3"),
        ("x<=3", r"x\le3"),
        (r"30\%", "30%"),
        (r"R\&D", "R&D"),
        (r"red\_fox", "red_fox"),
        (r"\$5", r"\$5"),
        ("$5", r"\$5"),
        ("$5$", "5"),
        (r"\[8\]", "8"),
        ("**8**", "8"),
        ("2**3", "2**3"),
        ("11 5/6", "11 5/6"),
        ("1, 234", "1, 234"),
        ("1. 5", "1. 5"),
        ("- 8", "-8"),
        (r"0.\overline{3}", r"0.\overline{3}"),
        (r"185\\", "185"),
        ("{{8}}", "8"),
        ("{1}+{2}", "{1}+{2}"),
        (r"1, \ldots", r"1,\ldots"),
        ("\u201cred\u201d", "red"),
        ("8!", "8!"),
    ],
)
def test_one_spelling(text, expected):
    assert normalise(text) == expected


@given(st.data(), values)
@settings(max_examples=400, deadline=None)
def test_no_spelling_changes_a_number(data, value):
    number = read_number(normalise(data.draw(spelled(value))))
    assert number is not None
    assert number.value == value


@given(st.data(), values, values)
@settings(max_examples=200, deadline=None)
def test_different_numbers_never_become_one(data, first, second):
    if first != second:
        assert normalise(data.draw(spelled(first))) != normalise(data.draw(spelled(second)))


@given(
    st.data(),
    st.sampled_from(["red fox", "ABC", "x^2", r"\frac{1}{2}", "(1, 2)", r"\{1, 2\}", "8 cm", r"60^\circ", "C"]),
)
@settings(max_examples=200, deadline=None)
def test_wrappers_say_nothing(data, text):
    assert normalise(data.draw(wrapped(text))) == normalise(text)


@given(st.text(alphabet=" 128.,x-+/^_{}()[]\\%$'*\u00b2\u221a\u00bd\uff08\uff09\u3002\u200b", max_size=30))
@settings(max_examples=1000, deadline=None)
def test_what_is_normal_stays(text):
    once = normalise(text)
    assert normalise(once) == once


@given(st.text(max_size=200))
@settings(max_examples=500, deadline=None)
def test_no_text_is_an_error(text):
    normalise(text)


def test_long_and_deep_texts_take_a_moment():
    start = time.process_time()
    for text in (
        r"\text{" * 600,
        "{" * 4000,
        "$" * 4000,
        r"\frac" * 700,
        "1," * 2000,
        "\u00b2" * 4000,
        " " * 4000,
        "* " * 2000,
    ):
        normalise(text)
    assert normalise("8 " * 1_000_000) == ("8 " * 1_000_000).strip()
    assert time.process_time() - start < 10.0


def test_a_megabyte_keeps_all_but_its_spaces():
    long = "\uff18" * (MAX_CHARACTERS + 1)
    assert normalise(f"  {long} ") == long


@pytest.mark.parametrize(
    ("text", "expected"),
    [(r"\text{8}", "8"), (" $8$ ", "8"), (r"\$8", "8"), ("a   b", "a b"), (r"\textbf{a b}", "a b")],
)
def test_plain_text(text, expected):
    assert plain_text(text) == expected


def test_the_spellings_are_what_they_should_be():
    assert Fraction("0.1") == read_number(normalise(r"\frac{2}{20}")).value


def test_a_raised_number_before_a_root_is_its_degree_or_the_power_of_what_stands_before():
    assert normalise("\u00b3\u221a8") == normalise("\u221b8") == r"\sqrt[3]{8}"
    assert normalise("1 + \u2074\u221a16") == normalise("1 + \u221c16")
    assert normalise("2\u00b3\u221a4") == normalise("2^3\u221a4")
