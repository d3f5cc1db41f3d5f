import pytest

from megatron_r1v2.rewards.answers.structure import (
    Bracketed,
    Interval,
    is_name,
    read_brackets,
    read_interval,
    read_matrix,
    split_approximation,
    split_equation,
    split_list,
    split_name,
    split_plus_minus,
    split_relations,
    split_top,
    split_union,
    without_domain,
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1, 2", ["1", "2"]),
        ("1;2", ["1", "2"]),
        ("1 and 2 or 3", ["1", "2", "3"]),
        ("(1, 2),(3, 4)", ["(1, 2)", "(3, 4)"]),
        (r"\{1, 2\}", [r"\{1, 2\}"]),
        (r"\begin{pmatrix}1, 2\end{pmatrix}", [r"\begin{pmatrix}1, 2\end{pmatrix}"]),
        ("1,(2", ["1,(2"]),
        ("8", ["8"]),
        ("sand", ["sand"]),
        (r"\begin{cases}x=1\\y=2\end{cases}", ["x=1", "y=2"]),
        (r"x=1\\y=2", ["x=1", "y=2"]),
    ],
)
def test_lists(text, parts):
    assert split_list(text) == parts


def test_brackets_that_do_not_match_split_nothing():
    assert split_top("a:(b:c", ":") == ["a:(b:c"]
    assert split_top("a:b)", ":") == ["a:b)"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1, 2)", Bracketed("(", ")", ("1", "2"))),
        ("[1, 2)", Bracketed("[", ")", ("1", "2"))),
        (r"\{1, 2\}", Bracketed("{", "}", ("1", "2"))),
        (r"\langle 1,2\rangle", Bracketed("(", ")", ("1", "2"))),
        ("((1, 2), 3)", Bracketed("(", ")", ("(1, 2)", "3"))),
        ("(1, 2),(3, 4)", None),
        ("1, 2", None),
        ("(1", None),
    ],
)
def test_brackets(text, expected):
    assert read_brackets(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=8", ("x", "8")),
        ("8=x", ("x", "8")),
        ("x=2+3=5", ("x", "2+3=5")),
        ("m+n=8", ("m+n", "8")),
        (r"\angle ABC=60^\circ", (r"\angle ABC", r"60^\circ")),
        ("(x, y)=(1, 2)", ("(x, y)", "(1, 2)")),
        ("P(A|B)=1/2", ("P(A|B)", "1/2")),
        ("S_{ABC}=8", ("S_{ABC}", "8")),
        (r"\frac{AB}{CD}=2", (r"\frac{AB}{CD}", "2")),
        ("x^2+y^2=1", (None, "x^2+y^2=1")),
        ("2x+3y=6", (None, "2x+3y=6")),
        ("8=9", (None, "8=9")),
        ("8", (None, "8")),
    ],
)
def test_names(text, expected):
    assert split_name(text) == expected


@pytest.mark.parametrize(
    ("text", "named"), [("x_{max}", True), ("|z|", True), ("f(2)", True), ("2x", False), ("x^2", False), ("", False)]
)
def test_what_is_a_name(text, named):
    assert is_name(text) is named


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1, 2]", Interval("1", "2", False, True)),
        ("x>2", Interval("2", r"\infty", False, False, "x")),
        ("2<x", Interval("2", r"\infty", False, False, "x")),
        (r"x\le2", Interval(r"-\infty", "2", False, True, "x")),
        (r"1<x\le2", Interval("1", "2", False, True, "x")),
        (r"2\ge x>1", Interval("1", "2", False, True, "x")),
        (r"x\in[1, 2]", Interval("1", "2", True, True, "x")),
        (r"\{x|x>2\}", Interval("2", r"\infty", False, False, "x")),
        (r"\{x\in\mathbb{R}|x>2\}", Interval("2", r"\infty", False, False, "x")),
        (r"\mathbb{R}", Interval(r"-\infty", r"\infty", False, False)),
        (r"(1,+\infty)", Interval("1", r"\infty", False, False)),
        (r"x\ne2", None),
        ("x+2>3y", None),
        ("x>y", None),
        ("1>x<2", None),
        ("(1, 2, 3)", None),
        ("8", None),
    ],
)
def test_intervals(text, expected):
    assert read_interval(text) == expected


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [["1", "2"], ["3", "4"]]),
        (r"[\begin{array}{cc}1&2\\3&4\end{array}]", [["1", "2"], ["3", "4"]]),
        (r"\begin{bmatrix}1\\2\\\end{bmatrix}", [["1"], ["2"]]),
        (r"\begin{cases}1&2\end{cases}", None),
        (r"\begin{pmatrix}1\end{pmatrix}+\begin{pmatrix}1\end{pmatrix}", None),
        ("1&2", None),
    ],
)
def test_matrices(text, rows):
    assert read_matrix(text) == rows


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (r"2k\pi,k\in\mathbb{Z}", r"2k\pi"),
        (r"a+b(a,b\in\mathbb{N}^*)", r"a+b"),
        (r"x\in\mathbb{R}", r"x\in\mathbb{R}"),
        (r"1,k\in[1, 2]", r"1,k\in[1, 2]"),
    ],
)
def test_what_a_parameter_may_be(text, rest):
    assert without_domain(text) == rest


def test_signs_and_sides():
    assert split_plus_minus(r"1\pm\sqrt{5}") == [r"1+\sqrt{5}", r"1-\sqrt{5}"]
    assert split_plus_minus(r"\pm2") == ["2", "-2"]
    assert split_plus_minus(r"a\pm b\mp c") == ["a+ b- c", "a- b+ c"]
    assert split_plus_minus("2") == ["2"]
    assert split_equation("a=b=(c=d)") == ["a", "b", "(c=d)"]
    assert split_relations(r"1<x\le2") == ["1", "<", "x", r"\le", "2"]
    assert split_relations(r"(1<2)\left") == [r"(1<2)\left"]
    assert split_union(r"[1, 2]\cup[3, 4]") == ["[1, 2]", "[3, 4]"]


@pytest.mark.parametrize(
    ("text", "exact"),
    [(r"\frac{1}{3}\approx0.33", r"\frac{1}{3}"), (r"\approx0.33", "0.33"), (r"x\approx0.33", "0.33"), ("8", "8")],
)
def test_approximations(text, exact):
    assert split_approximation(text) == exact


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("p=5, q=2; p=7, q=2", ["(5, 2)", "(7, 2)"]),
        ("q=2, p=5; p=7, q=3", ["(5, 2)", "(7, 3)"]),
        ("x=1, y=2 or x=2, y=1", ["(1, 2)", "(2, 1)"]),
        ("x=1, y=2 and x=2, y=1", ["(1, 2)", "(2, 1)"]),
        ("x=1, y=2 and z=3", ["x=1", "y=2", "z=3"]),
        ("x=1, y=2", ["x=1", "y=2"]),
        ("x=1; x=2", ["x=1", "x=2"]),
        ("x=1, y=2; x=2, z=1", ["x=1", "y=2", "x=2", "z=1"]),
        ("x=1, x=2; x=3, x=4", ["x=1", "x=2", "x=3", "x=4"]),
        ("1, 2; 3, 4", ["1", "2", "3", "4"]),
    ],
)
def test_values_by_name_are_points(text, parts):
    assert split_list(text) == parts
