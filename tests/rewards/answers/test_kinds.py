import pytest

from megatron_r1v2.rewards.answers.kinds import Kind, is_choice, is_text, kind_of, read_numeral


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("8", Kind.NUMBER),
        ("8 cm", Kind.NUMBER),
        ("30%", Kind.NUMBER),
        (r"\sqrt{2}", Kind.EXPRESSION),
        ("2ab", Kind.EXPRESSION),
        ("x", Kind.EXPRESSION),
        (r"mg\sin\theta", Kind.EXPRESSION),
        ("x=8", Kind.ASSIGNMENT),
        ("f(x)=2x+1", Kind.ASSIGNMENT),
        ("x^2+y^2=1", Kind.EQUATION),
        ("2x+3y=6", Kind.EQUATION),
        ("x^2+y<3", Kind.EQUATION),
        ("(1, 2)", Kind.TUPLE),
        ("1, 2", Kind.LIST),
        ("x=1, y=2", Kind.LIST),
        (r"1\pm\sqrt{5}", Kind.LIST),
        ("(1, 2),(3, 4)", Kind.LIST),
        (r"1, 3,\ldots, 9", Kind.SEQUENCE),
        (r"\{1, 2\}", Kind.SET),
        ("[1, 2)", Kind.INTERVAL),
        (r"(1, 2)\cup(3, 4)", Kind.INTERVAL),
        ("x>2", Kind.INTERVAL),
        ("x<1 or x>2", Kind.INTERVAL),
        (r"\{x|x>2\}", Kind.INTERVAL),
        (r"\begin{pmatrix}1&2\end{pmatrix}", Kind.MATRIX),
        ("1:2", Kind.RATIO),
        ("10101_2", Kind.NUMERAL),
        ("A", Kind.CHOICE),
        ("(A),(C)", Kind.CHOICE),
        ("1999/05/01", Kind.DATE),
        ("7-8", Kind.DATE),
        ("ABC", Kind.TEXT),
        ("A, B, C", Kind.TEXT),
        (r"\angle ABC", Kind.TEXT),
        ("H_2O", Kind.TEXT),
        ("5 km east", Kind.TEXT),
        ("red, blue", Kind.TEXT),
        ("no", Kind.TEXT),
        ("a necessary but not a sufficient condition", Kind.TEXT),
        ("\u5e73\u884c", Kind.TEXT),
    ],
)
def test_the_reference_decides(reference, kind):
    assert kind_of(reference) is kind


@pytest.mark.parametrize(
    ("text", "choice"), [("A", True), ("(A)", True), ("a", False), ("(A)(C)", True), ("A, C", False), ("AB", False)]
)
def test_choices(text, choice):
    assert is_choice(text) is choice


@pytest.mark.parametrize(
    ("text", "numeral"),
    [
        ("10101_2", ("10101", "2")),
        ("(0FF)_{16}", ("FF", "16")),
        ("12_{three}", ("12", "3")),
        ("x_2", None),
        ("10", None),
    ],
)
def test_numerals(text, numeral):
    assert read_numeral(text) == numeral


@pytest.mark.parametrize(
    "text", ["C_6H_{12}O_6", "OH2", "Na^+", "SO_4^{2-}", r"AB\parallel CD", '"x"', "SRAC=LRAC", "3 of 5 dogs"]
)
def test_text(text):
    assert is_text(text)


@pytest.mark.parametrize(
    "text", ["x+1", "2ab", "AB+BC", r"\sin x", r"F_{net}", "C", "V_2", r"\frac{a}{b}", "(ab)", "x y"]
)
def test_what_is_no_text(text):
    assert not is_text(text)
