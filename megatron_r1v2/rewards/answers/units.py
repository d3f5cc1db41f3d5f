r"""Units of measure: a number's unit is read, and two units are the same, convertible or different (rules 5 to 7).

Standard library only: the verifier workers import this. Texts are from `normalise`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

_MAX_UNIT_CHARACTERS = 60


class Unit(NamedTuple):
    """A unit that a number counts.

    Example: "km/h" is Unit({"length": 1, "time": -1}, Fraction(1000, 3600)).
    """

    dimensions: Mapping[str, int]
    """Power of each base quantity; a noun that is counted is a quantity of its own."""
    factor: Fraction = Fraction(1)
    """How many of the base unit it is."""

    @property
    def is_percent(self) -> bool:
        """Return whether the unit is the percent sign, which is a value too."""
        return self.dimensions == {"percent": 1}


_FORCE = {"mass": 1, "length": 1, "time": -2}
_QUANTITIES: Mapping[str, Mapping[str, int]] = {
    "one": {},
    "area": {"length": 2},
    "volume": {"length": 3},
    "speed": {"length": 1, "time": -1},
    "frequency": {"time": -1},
    "force": _FORCE,
    "energy": {**_FORCE, "length": 2},
    "power": {**_FORCE, "length": 2, "time": -3},
    "pressure": {**_FORCE, "length": -1},
    "charge": {"current": 1, "time": 1},
    "voltage": {**_FORCE, "length": 2, "time": -3, "current": -1},
    "resistance": {**_FORCE, "length": 2, "time": -3, "current": -2},
    "magnetic field": {"mass": 1, "time": -2, "current": -1},
}
"""Those that are not a base quantity of their own."""

_PREFIXES = {"n": "1e-9", "u": "1e-6", r"\mu": "1e-6", "m": "1e-3", "": "1", "k": "1e3", "M": "1e6", "G": "1e9"}
_PREFIXED = (
    ("length", "1", "m"),
    ("mass", "1e-3", "g"),
    ("time", "1", "s"),
    ("current", "1", "A"),
    ("temperature", "1", "K"),
    ("amount", "1", "mol"),
    ("luminance", "1", "cd"),
    ("volume", "1e-3", "L l"),
    ("frequency", "1", "Hz"),
    ("force", "1", "N"),
    ("energy", "1", "J"),
    ("energy", "1.602176634e-19", "eV"),
    ("power", "1", "W"),
    ("pressure", "1", "Pa"),
    ("charge", "1", "C"),
    ("voltage", "1", "V"),
    ("resistance", "1", r"\Omega ohm"),
    ("magnetic field", "1", "T"),
)
_NAMED = (
    ("one", "1", "unit units AD CE"),
    ("length", "1e-3", "millimeter millimetre millimeters millimetres \u6beb\u7c73"),
    ("length", "1e-2", "cm centimeter centimetre centimeters centimetres \u5398\u7c73"),
    ("length", "1e-1", "dm decimeter decimetre decimeters decimetres \u5206\u7c73"),
    ("length", "1", "meter metre meters metres \u7c73"),
    ("length", "1000", "kilometer kilometre kilometers kilometres \u5343\u7c73 \u516c\u91cc"),
    ("length", "0.0254", "in inch inches"),
    ("length", "0.3048", "ft foot feet"),
    ("length", "0.9144", "yd yard yards"),
    ("length", "1609.344", "mi mile miles"),
    ("area", "1e-6", "\u5e73\u65b9\u6beb\u7c73"),
    ("area", "1e-4", "\u5e73\u65b9\u5398\u7c73"),
    ("area", "1e-2", "\u5e73\u65b9\u5206\u7c73"),
    ("area", "1", "\u5e73\u65b9\u7c73"),
    ("area", "1e6", "\u5e73\u65b9\u5343\u7c73 \u5e73\u65b9\u516c\u91cc"),
    ("area", "10000", "ha hectare hectares \u516c\u9877"),
    ("volume", "1e-6", "cc milliliter millilitre milliliters millilitres \u6beb\u5347 \u7acb\u65b9\u5398\u7c73"),
    ("volume", "1e-3", "liter litre liters litres \u5347 \u7acb\u65b9\u5206\u7c73"),
    ("volume", "1", "\u7acb\u65b9\u7c73"),
    ("mass", "1e-6", "milligram milligrams \u6beb\u514b"),
    ("mass", "1e-3", "gram grams gm gms \u514b"),
    ("mass", "1", "kilogram kilograms kilo kilos kgs \u5343\u514b \u516c\u65a4"),
    ("mass", "1000", "t ton tons tonne tonnes \u5428"),
    ("mass", "0.45359237", "lb lbs pound pounds"),
    ("mass", "0.028349523125", "oz ounce ounces"),
    ("time", "1", "sec secs second seconds \u79d2"),
    ("time", "60", "min mins minute minutes \u5206\u949f \u5206"),
    ("time", "3600", "h hr hrs hour hours \u5c0f\u65f6 \u65f6"),
    ("time", "86400", "day days \u5929 \u65e5"),
    ("time", "604800", "wk wks week weeks \u5468"),
    ("month", "1", "mo month months \u6708 \u4e2a\u6708"),
    ("month", "12", "yr yrs year years \u5e74 \u5c81"),
    ("speed", "0.44704", "mph"),
    ("speed", "5/18", "kph kmh"),
    ("force", "1", "newton newtons"),
    ("energy", "1", "joule joules"),
    ("energy", "3600000", "kWh"),
    ("power", "1", "watt watts"),
    ("pressure", "1", "pascal pascals"),
    ("pressure", "101325", "atm"),
    ("voltage", "1", "volt volts"),
    ("current", "1", "ampere amperes amp amps"),
    ("charge", "1", "coulomb coulombs"),
    ("resistance", "1", "ohms"),
    ("frequency", "1", "hertz"),
    ("temperature", "1", "kelvin kelvins"),
    ("amount", "1", "mole moles"),
    ("celsius", "1", r"^\circC degC celsius"),
    ("fahrenheit", "1", r"^\circF degF fahrenheit"),
    ("angle", "1", "^\\circ degree degrees deg degs \u5ea6"),
    ("angle", "1/60", "arcmin arcminute arcminutes"),
    ("angle", "1/3600", "arcsec arcsecond arcseconds"),
    ("radian", "1", "rad rads radian radians"),
    ("percent", "1", "% percent percents pct percentage"),
    ("dollar", "1", r"\$ dollar dollars USD"),
    ("dollar", "0.01", "cent cents"),
    ("euro", "1", "\N{EURO SIGN} euro euros EUR"),
    ("sterling", "1", "\N{POUND SIGN} GBP"),
    ("yuan", "1", "\u5143 yuan RMB CNY \N{YEN SIGN}"),
    ("rupee", "1", "\N{INDIAN RUPEE SIGN} rupee rupees Rs INR"),
)


def _unit(quantity: str, factor: Fraction) -> Unit:
    return Unit(_QUANTITIES.get(quantity, {quantity: 1}), factor)


UNITS: Mapping[str, Unit] = {
    f"{prefix}{symbol}": _unit(quantity, Fraction(factor) * Fraction(scale))
    for prefix, scale in _PREFIXES.items()
    for quantity, factor, symbols in _PREFIXED
    for symbol in symbols.split()
} | {name: _unit(quantity, Fraction(factor)) for quantity, factor, names in _NAMED for name in names.split()}
"""By symbol or name; of a clash (min is no milli-inch) the name counts."""

_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_BEHIND = {"squared": 2, "cubed": 3}
# Behind a digit without a space or \text{}, "mg" is m times g and "m" a variable; these are units (rule 5).
_ATTACHED = frozenset(
    ("cm", "km", "mm", "dm", "kg", "mL", "ml", "kJ", "kW", "kN", "kV", "Hz", "Pa", "eV", "ft", "yd", "hr", "lb", "oz")
)
_PIECE = re.compile(
    r"\s*(?:(?P<per>/|per\b)|(?P<join>\\cdot|\\times|\*|\.(?=[A-Za-z])|-(?=[A-Za-z]))"
    r"|(?P<name>\^\\circ\s?[CF](?![A-Za-z])|\^\\circ|\\\$|%|\\mu\s?[A-Za-z]|k?\\Omega|[A-Za-z]+|[^\x00-\x7f\W]+|[^\x00-\x7f])"
    r"(?:\^(?:\{(?P<braced>-?\d)\}|(?P<power>\d))|(?P<digit>[23])(?!\d))?)\s*"
)


# "8 or whatever" and "8 maybe" hedge (rule 17).
_NO_NOUNS = frozenset(
    ("or", "and", "not", "maybe", "perhaps", "possibly", "probably", "but", "if", "is", "are", "wrong")
)
_UNIT_FRACTION = re.compile(r"\\frac\{([A-Za-z][^{}]*(?:\{-?\d\})?)\}\{([A-Za-z][^{}]*(?:\{-?\d\})?)\}")
# "3 men" are counted, "3 xyz" and "3 abc" are products.
_NOUN = re.compile(r"[A-Za-z]{4,}|[A-Za-z](?=[a-z]?[aeiouAEIOU])[A-Za-z]{2}")


def read_unit(text: str) -> Unit | None:
    """Return the unit that a text names, a noun that is counted included, or None where it names neither.

    Args:
        text: what stands behind (or, for money, before) a number, from `normalise`.
    """
    pieces = _pieces(text)
    if not pieces or any(name.lower() in _NO_NOUNS for name, _ in pieces):
        return None
    known = [_find(name) for name, _ in pieces]
    is_rate = any(known) and any(power < 0 for _, power in pieces)
    if is_rate:
        # "rev/min" and "apples per day" count a noun.
        known = [
            unit or (Unit({_noun(name): 1}) if _NOUN.fullmatch(name) else None)
            for unit, (name, _) in zip(known, pieces, strict=True)
        ]
    if not any(known):
        # Only words are nouns: "5 x" and "3 ab" are products.
        words = [name for name, _ in pieces]
        is_phrase = len(words) > 1 and any(len(word) > 3 for word in words)
        is_noun = is_phrase or all(not word.isascii() or _NOUN.fullmatch(word) for word in words)
        return Unit({_noun(" ".join(words)): 1}) if is_noun else None
    dimensions: dict[str, int] = {}
    factor = Fraction(1)
    for unit, (_, power) in zip(known, pieces, strict=True):
        if unit is None:
            # "5 km east" is text: the rest of it is not forgiven.
            return None
        for quantity, exponent in unit.dimensions.items():
            dimensions[quantity] = dimensions.get(quantity, 0) + exponent * power
        factor *= unit.factor**power
    return Unit({quantity: power for quantity, power in dimensions.items() if power}, factor)


def is_attached_unit(text: str) -> bool:
    """Return whether a text is a unit even directly behind a digit, where a letter would be a variable."""
    name = _letters(text)
    return not name or name in _ATTACHED or (len(name) > 2 and _find(name) is not None)


def is_symbol(text: str) -> bool:
    """Return whether a text begins with the symbol of a unit."""
    return _letters(text) in UNITS


def _letters(text: str) -> str:
    return text[: len(text) - len(text.lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))]


def _pieces(text: str) -> list[tuple[str, int]] | None:
    """Return the names in a unit with their powers, None where something else stands between them."""
    text = _UNIT_FRACTION.sub(r" \1/\2", text.strip().replace("per cent", "percent"))
    text = re.sub(r"(percent(?:age)?) points?", r"\1", text)
    if not text or len(text) > _MAX_UNIT_CHARACTERS:
        return None
    text = re.sub(r"/\s*\(([^()]*)\)$", r"/\1", text)
    pieces: list[tuple[str, int]] = []
    position, sign, before = 0, 1, 1
    while position < len(text):
        match = _PIECE.match(text, position)
        if match is None:
            return None
        position = match.end()
        name = (match["name"] or "").replace(" ", "")
        if match["per"]:
            sign = -1
        elif name in _POWER_WORDS:
            before = _POWER_WORDS[name]
        elif name in _POWERS_BEHIND and pieces:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] * _POWERS_BEHIND[name])
        elif name:
            power = int(match["braced"] or match["power"] or match["digit"] or 1)
            pieces.append((name, sign * before * power))
            before = 1
    return pieces


def _find(name: str) -> Unit | None:
    return UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 2 else None)


def _noun(name: str) -> str:
    """Return a counted noun in lower case and the singular."""
    name = name.casefold()
    return name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name
