"""Ways to write the same answer, drawn by hypothesis: numbers, fractions, units, letters and sets."""

from fractions import Fraction

from hypothesis import strategies as st

FULL_WIDTH = str.maketrans("0123456789.,()-", "".join(chr(ord(char) + 0xFEE0) for char in "0123456789.,()-"))
RAISED = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")
WRAPPERS = (
    "{}", "${}$", "$${}$$", r"\({}\)", r"\text{{{}}}", r"\mathbf{{{}}}", r"\boldsymbol{{{}}}",
    r"\textcolor{{red}}{{{}}}",
    r"{{\color{{blue}} {}}}", r"\boxed{{{}}}", "**{}**", "{{{}}}", r"\displaystyle {}", r"\text{{\textbf{{{}}}}}",
    "{}.", "{}\u3002", r"{}\,", r"{}\ ", " {} ", "\u200b{}", r"\left. {} \right.",
)  # fmt: skip


@st.composite
def wrapped(draw, text):
    """Put up to two wrappers around an answer, none of which changes what it says."""
    for wrapper in draw(st.lists(st.sampled_from(WRAPPERS), max_size=2)):
        text = wrapper.format(text)
    return text


integers = st.integers(-(10**9), 10**9)
decimals = st.builds(
    lambda digits, places: Fraction(digits, 10**places), st.integers(-(10**6), 10**6), st.integers(1, 5)
)
fractions = st.builds(Fraction, st.integers(-999, 999), st.integers(1, 999))
values = integers.map(Fraction) | decimals | fractions


def _decimal(value):
    """Return a value with finite decimals in full, or None."""
    for places in range(12):
        scaled = value * 10**places
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
            sign = "-" if value < 0 else ""
            return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
    return None


@st.composite
def spelled(draw, value):
    """Write a number in one of the usual ways."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    top, bottom = size.numerator, size.denominator
    factor = draw(st.integers(1, 9))
    ways = [
        f"{sign}{top}/{bottom}",
        rf"{sign}\frac{{{top * factor}}}{{{bottom * factor}}}",
        rf"\dfrac{{{sign}{top}}}{{{bottom}}}",
        f"{value.numerator}/{bottom}",
    ]
    if bottom > 1 and top > bottom:
        ways += [
            rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}",
            f"{sign}{top // bottom} {top % bottom}/{bottom}",
        ]
    if (written := _decimal(value)) is not None:
        whole, dot, rest = written.removeprefix("-").partition(".")
        groups = f"{int(whole):,}"
        ways += [
            written,
            f"{written}.0" if not dot else f"{written}00",
            sign + groups + dot + rest,
            sign + groups.replace(",", "{,}") + dot + rest,
            sign + groups.replace(",", r",\!") + dot + rest,
            sign + groups.replace(",", r"\,") + dot + rest,
            written.translate(FULL_WIDTH),
            written.replace("-", "\N{MINUS SIGN}"),
            f"({written})",
            rf"{_decimal(value / 1000)}\times 10^{{3}}",
            rf"{_decimal(value * 100)}\times10^{{-2}}",
            f"{_decimal(value / 10)}e1",
            f"{_decimal(value * 10)}\N{MULTIPLICATION SIGN}10{'-1'.translate(RAISED)}",
        ]
    return draw(wrapped(draw(st.sampled_from(ways))))
