r"""The equality of two expressions: math-verify parses and judges them, constants are compared to fifteen digits.

The one module that imports math-verify (half a second); loaded when first needed. Its own time limits are off: they use
SIGALRM, which works in a main thread only and cannot stop a computation inside C. `VerifierPool` holds the limit from
outside. Texts are from `normalise`.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from megatron_r1v2.rewards.answers.numbers import (
    Number,
    has_endless_decimals,
    is_rounded,
    numbers_equal,
    read_number,
)

MAX_EXPRESSION_CHARACTERS = 2000

# math-verify compares six decimals unless told otherwise: 1.6e-19 would be 9.1e-31.
_DIGITS = 30
_RELATIVE = sympy.Float("1e-15", _DIGITS)
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_COMPLEX = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|\\(?:imath|mathbb\{C\})")
_EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?![\d.])")
# Which of the two powers of x^2^3 comes first is not said.
_DOUBLE_POWER = re.compile(r"\^\s?(?:\w|\{[^{}]*\})\s?\^")
_PRIMES = re.compile(r"([A-Za-z])('+)")
_REPEATING = re.compile(r"\d+\.\d*\\overline\{\d+\}")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?|(?<![A-Za-z\\])[A-Za-z]|\\(?:alpha|beta|gamma|theta|phi))\^\\circ")
_PLAIN_NAME = re.compile(
    r"(?<![A-Za-z\\])(sqrt|pi|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|alpha|beta|gamma|delta"
    r"|theta|lambda|sigma|omega)(?![A-Za-z])"
)
# R_{\odot}: the parser knows letters and digits as the index of a symbol.
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|Delta|Omega|Phi|Psi"
_INDEX = re.compile(rf"((?<![A-Za-z\\])[A-Za-z]|\\(?:{_GREEK}))_(?:\{{([^{{}}=]*)\}}|\\([A-Za-z]+))")
# 1/2x is half of x: the parser alone would read 1/(2x).
_COEFFICIENT = re.compile(
    r"(?<![\w.)}^_/])(\d+)/(\d+)(?= ?(?:[A-Za-z]|\\(?:pi|sqrt|theta|alpha|beta|ln|log|sin|cos|tan)(?![a-z])))"
)
# Where expressions are tried: no special values, so that x^2 and 2x do not meet by chance.
# Floats: an exact power of a fraction can have a million digits.
_POINTS = tuple(
    sympy.Float(numerator, 50) / 1009 for numerator in (1361, 2239, 733, 1873, 2687, 491, 1571, 3011, 907, 2423)
)
_TRIALS = 4
_UNKNOWABLE = (
    sympy.Sum,
    sympy.Product,
    sympy.Integral,
    sympy.Derivative,
    sympy.Limit,
    sympy.core.function.AppliedUndef,
)


def expressions_agree(given: str, reference: str) -> bool:
    """Return whether two expressions have the same value, for all values of their variables (rules 9 and 10).

    Args:
        given: of the response, LaTeX or plain, from `normalise`.
    """
    left, right = parse(given), parse(reference)
    if left is None or right is None:
        return False
    numbers = read_number(given), read_number(reference)
    if not _variables(left) and not _variables(right):
        return _constants_agree(left, right, *numbers)
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _expressions_agree(left, right)
    return _math_verify_agrees(left, right)


def equations_agree(given: tuple[str, str], reference: tuple[str, str]) -> bool:
    """Return whether two equations are the same up to a constant factor (rule 11)."""
    left, right = _difference(given), _difference(reference)
    return left is not None and right is not None and _factor(left, right) is not None


def inequalities_agree(given: tuple[str, str], reference: tuple[str, str]) -> bool:
    """Return whether two inequalities with the same sign are the same up to a positive factor (rule 11)."""
    left, right = _difference(given), _difference(reference)
    factor = _factor(left, right) if left is not None and right is not None else None
    return factor is not None and bool(factor > 0)


def value_of(text: str) -> float | None:
    """Return the real value of an expression without variables, or None."""
    parsed = parse(text)
    if not isinstance(parsed, sympy.Expr) or _variables(parsed):
        return None
    value = _number(parsed)
    if value is None or not value.is_real or not value.is_finite:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def parse(text: str) -> sympy.Basic | sympy.MatrixBase | None:
    """Return what math-verify's parser reads, all of the text and not its last number; None where it cannot."""
    if len(text) > MAX_EXPRESSION_CHARACTERS:
        return None
    text = _REPEATING.sub(_repeating, _spell_in_latex(text))
    if _DOUBLE_POWER.search(text) or re.search(r"\d'", text):
        return None
    text = _EXPONENT.sub(r"\\times 10^{\1}", text)
    text = _INDEX.sub(_plain_index, text)
    text = _COEFFICIENT.sub(r"\\frac{\1}{\2}", text)
    text = _PRIMES.sub(lambda match: f"{match[1]}_{{prime{len(match[2])}}}", text)
    text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text.replace(r"\log_e", r"\ln").replace(r"\lg", r"\log"))
    text = (
        text.replace(r"^\circ", r"\cdot\frac{\pi}{180}").replace(r"\mathbb{R}", "R").replace("%", r"\cdot\frac{1}{100}")
    )
    try:
        parsed = latex2sympy(
            text, is_real=not _COMPLEX.search(text), normalization_config=None, conversion_config=_CONVERSION
        )
        imaginary = {symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"}
        parsed = parsed.subs(imaginary)
        return parsed.doit() if isinstance(parsed, sympy.MatrixBase) else parsed
    # The parser raises nearly everything for what is no expression, RecursionError for deep nesting among it.
    except Exception:
        return None


def _repeating(match: re.Match[str]) -> str:
    number = read_number(match.group())
    return match.group() if number is None else rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def _spell_in_latex(text: str) -> str:
    r"""Spell what was written for a computer as the parser reads it: `sqrt(2)*x**2`, `e^(2x)`, `10^-3`, `pi/2`."""
    text = re.sub(r"\*\*", "^", text)
    text = _PLAIN_NAME.sub(lambda match: f"\\{match[1]} ", text)
    text = _close_brackets(r"\sqrt ", _close_brackets("^", text))
    return re.sub(r"\^\s?(-\d+(?:\.\d+)?|-[A-Za-z])", r"^{\1}", text)


def _close_brackets(before: str, text: str) -> str:
    """Turn the parentheses behind a sign or name into braces: of `e^(2x)` and `sqrt(x+1)`."""
    start = text.find(f"{before}(")
    while start >= 0:
        opening, depth = start + len(before), 0
        for end in range(opening, len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                text = f"{text[:start]}{before.strip()}{{{text[opening + 1 : end]}}}{text[end + 1 :]}"
                break
        start = text.find(f"{before}(", opening)
    return text


def _plain_index(match: re.Match[str]) -> str:
    index = match[3] if match[2] is None else re.sub(r"[^A-Za-z0-9]", "", match[2].replace(",", "c"))
    return f"{match[1]}_{{{index}}}" if index else match[1]


def _variables(parsed: sympy.Basic | sympy.MatrixBase) -> set[sympy.Symbol]:
    return set(parsed.free_symbols) | set(parsed.atoms(sympy.core.function.AppliedUndef))


def _number(expression: sympy.Expr) -> sympy.Expr | None:
    """Return the value of a constant to thirty digits, or None where it has none."""
    try:
        value = sympy.N(expression.doit(), _DIGITS)
    except (
        TypeError,
        ValueError,
        ZeroDivisionError,
        OverflowError,
        AttributeError,
        NotImplementedError,
        RecursionError,
    ):
        return None
    return value if value.is_number and value not in (sympy.nan, sympy.zoo) else None


def _constants_agree(left: sympy.Basic, right: sympy.Basic, given: Number | None, reference: Number | None) -> bool:
    if given is not None and reference is not None:
        return numbers_equal(given, reference)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return _math_verify_agrees(left, right)
    first, second = _number(left), _number(right)
    if first is None or second is None:
        return False
    if first == second or _close(first, second):
        return True
    # 3.14159 is pi to six digits (rule 9).
    return (given is not None and _rounds_to(given, right)) or (reference is not None and _rounds_to(reference, left))


def _rounds_to(decimal: Number, expression: sympy.Expr) -> bool:
    value = _number(expression)
    if value is None or not value.is_real or not value.is_finite:
        return False
    exact = expression if expression.is_Rational else sympy.Rational(str(value))
    fraction = Fraction(int(exact.p), int(exact.q))
    return is_rounded(decimal, fraction, endless=has_endless_decimals(fraction) if expression.is_Rational else True)


def _close(left: sympy.Expr, right: sympy.Expr) -> bool:
    if not left.is_finite or not right.is_finite:
        return bool(left == right)
    size = max(abs(left), abs(right))
    return size == 0 or bool(abs(left - right) <= _RELATIVE * size)


def _expressions_agree(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Try both at several points: values that differ decide, and so do values that agree at all of them."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if left.has(*_UNKNOWABLE) or right.has(*_UNKNOWABLE):
        return left == right or (left.free_symbols == right.free_symbols and _math_verify_agrees(left, right))
    compared = 0
    for trial in range(_TRIALS + len(symbols)):
        point = {symbol: _POINTS[(index + 3 * trial) % len(_POINTS)] + trial for index, symbol in enumerate(symbols)}
        is_negative = trial >= _TRIALS
        if is_negative:
            point[symbols[trial - _TRIALS]] *= -1
        first, second = _number(left.subs(point)), _number(right.subs(point))
        if first is None or second is None:
            continue
        # At negative points roots and logarithms have branches that nobody means: only real values count there.
        if is_negative and not (first.is_real and second.is_real):
            continue
        if not _close(first, second):
            return False
        compared += not is_negative
    return compared > 0


def _math_verify_agrees(given: sympy.Basic | sympy.MatrixBase, reference: sympy.Basic | sympy.MatrixBase) -> bool:
    return bool(verify(reference, given, float_rounding=_DIGITS, numeric_precision=_DIGITS, timeout_seconds=None))


def _difference(sides: tuple[str, str]) -> sympy.Expr | None:
    first, second = parse(sides[0]), parse(sides[1])
    return first - second if isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr) else None


def _factor(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr | None:
    """Return the constant that one expression is of another, or None where their quotient changes."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if left.free_symbols != right.free_symbols or left.has(*_UNKNOWABLE) or right.has(*_UNKNOWABLE):
        return sympy.Integer(1) if left == right else None
    factor = None
    for trial in range(_TRIALS):
        point = {symbol: _POINTS[(index + 3 * trial) % len(_POINTS)] + trial for index, symbol in enumerate(symbols)}
        first, second = _number(left.subs(point)), _number(right.subs(point))
        if first is None or second is None or first == 0 or second == 0:
            return None
        quotient = first / second
        if factor is not None and not _close(factor, quotient):
            return None
        factor = quotient
    return factor
