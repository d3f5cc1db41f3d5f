r"""One spelling for each way to write the same answer, so that every reader needs one pattern.

Rule 1 of docs/rewards.md: a spelling is unified only where its value cannot change. `11 5/6` keeps its space, a
superscript two becomes `^2` and no plain 2, `\overline{3}` keeps its line. Standard library only: the verifier workers
import this.
"""

from __future__ import annotations

import re
import unicodedata

# Nobody would give a longer answer: it is compared as it stands, so no pattern below meets a megabyte.
MAX_CHARACTERS = 4000
# A second pass unwraps what the first one uncovered (`$\boxed{\text{8.}}$.`); no sane answer needs more.
_MAX_PASSES = 4

_SYMBOLS = {
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{DIVISION SLASH}": "/",
    "\N{FRACTION SLASH}": "/",
    "\N{RATIO}": ":",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{MINUS-OR-PLUS SIGN}": r"\mp ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{LESS-THAN OR SLANTED EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR SLANTED EQUAL TO}": r"\ge ",
    "\N{LESS-THAN OVER EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OVER EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{APPROXIMATELY EQUAL TO}": r"\cong ",
    "\N{IDENTICAL TO}": r"\equiv ",
    "\N{INFINITY}": r"\infty ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{SUBSET OF}": r"\subset ",
    "\N{ANGLE}": r"\angle ",
    "\N{WHITE UP-POINTING TRIANGLE}": r"\triangle ",
    "\N{INCREMENT}": r"\Delta ",
    "\N{UP TACK}": r"\perp ",
    "\N{PARALLEL TO}": r"\parallel ",
    "\N{N-ARY SUMMATION}": r"\sum ",
    "\N{INTEGRAL}": r"\int ",
    "\N{PARTIAL DIFFERENTIAL}": r"\partial ",
    "\N{RIGHTWARDS ARROW}": r"\to ",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{MIDLINE HORIZONTAL ELLIPSIS}": r"\ldots ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{MASCULINE ORDINAL INDICATOR}": r"^\circ ",
    "\N{DEGREE CELSIUS}": r"^\circ C",
    "\N{DEGREE FAHRENHEIT}": r"^\circ F",
    "\N{PRIME}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{DOUBLE PRIME}": "''",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{IDEOGRAPHIC FULL STOP}": ".",
    "\N{HALFWIDTH IDEOGRAPHIC FULL STOP}": ".",
    "\N{IDEOGRAPHIC COMMA}": ", ",
    "\N{FULLWIDTH COMMA}": ", ",
    "\N{LEFT BLACK LENTICULAR BRACKET}": "[",
    "\N{RIGHT BLACK LENTICULAR BRACKET}": "]",
    # LaTeX reads an ASCII tilde as a space, and a minus would change the value of "about 3".
    "\N{FULLWIDTH TILDE}": r"\sim ",
    "\N{WAVE DASH}": r"\sim ",
    "\N{TILDE OPERATOR}": r"\sim ",
    "\N{FULLWIDTH DOLLAR SIGN}": r"\$",
    "\N{FULLWIDTH PERCENT SIGN}": "%",
    "\N{LEFT CEILING}": r"\lceil ",
    "\N{RIGHT CEILING}": r"\rceil ",
    "\N{LEFT FLOOR}": r"\lfloor ",
    "\N{RIGHT FLOOR}": r"\rfloor ",
    "\N{MATHEMATICAL LEFT ANGLE BRACKET}": r"\langle ",
    "\N{MATHEMATICAL RIGHT ANGLE BRACKET}": r"\rangle ",
    "\N{MICRO SIGN}": r"\mu ",
    "\N{OHM SIGN}": r"\Omega ",
    "\N{GREEK PHI SYMBOL}": r"\varphi ",
}
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa mu nu xi pi rho sigma tau upsilon phi chi psi omega"
_GREEK_CAPITALS = "gamma delta theta xi pi sigma phi psi omega"
_SYMBOLS |= {unicodedata.lookup(f"GREEK SMALL LETTER {name}"): rf"\{name} " for name in _GREEK.split()}
_SYMBOLS[unicodedata.lookup("GREEK SMALL LETTER LAMDA")] = r"\lambda "
_SYMBOLS |= {
    unicodedata.lookup(f"GREEK CAPITAL LETTER {name}"): rf"\{name.title()} " for name in _GREEK_CAPITALS.split()
}
_SYMBOLS |= {
    unicodedata.lookup(f"DOUBLE-STRUCK CAPITAL {letter}"): rf"\mathbb{{{letter}}}"
    for letter in ("C", "N", "Q", "R", "Z")
}
_ROOTS = {"\N{SQUARE ROOT}": "", "\N{CUBE ROOT}": "[3]", "\N{FOURTH ROOT}": "[4]"}
# A raised number before a root is its degree, unless it may be the power of what stands before.
_RAISED_ROOTS = {
    "\N{SUPERSCRIPT THREE}\N{SQUARE ROOT}": "\N{CUBE ROOT}",
    "\N{SUPERSCRIPT FOUR}\N{SQUARE ROOT}": "\N{FOURTH ROOT}",
}
_RAISED_ROOT = re.compile(rf"(?<![\w)\]}}|!'])(?:{'|'.join(_RAISED_ROOTS)})")
_ROOT = re.compile(rf"([{''.join(_ROOTS)}])\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\)|(?=\{{))")

_SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "leqq": "le", "geq": "ge",
    "geqslant": "ge", "geqq": "ge", "neq": "ne", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots",
    "varnothing": "emptyset", "infin": "infty", "rightarrow": "to", "lbrace": "{", "rbrace": "}", "land": "wedge",
    "ast": "cdot", "bullet": "cdot", "vee": "lor", "tbinom": "binom", "dbinom": "binom", "hdots": "ldots",
}  # fmt: skip
_PLAIN = {
    "lt": "<", "gt": ">", "colon": ":", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "lbrack": "[",
    "rbrack": "]", "degree": r"^\circ ", "degrees": r"^\circ ", "celsius": r"^\circ C", "percent": "%",
    "R": r"\mathbb{R}", "textdegree": r"^\circ ", "textpercent": "%", "textdollar": r"\$", "prime": "'",
    "euro": "\N{EURO SIGN}",
    "pounds": "\N{POUND SIGN}", "yen": "\N{YEN SIGN}", "minus": "-",
}  # fmt: skip
# What stands in their braces is the answer.
_WRAPPER_NAMES = (
    "text textbf textit textrm textsf texttt textup textmd textnormal textsl emph mbox hbox fbox boxed framebox mathrm "
    "mathbf mathit mathsf mathtt mathnormal mathord boldsymbol bm pmb bold ensuremath underline uline displaylines "
    "operatorname* operatorname rm bf it"
)
_WRAPPERS = frozenset(_WRAPPER_NAMES.split())
_ARGUMENT_AND_WRAPPER = frozenset({"textcolor", "colorbox", "fcolorbox", "raisebox", "fontsize"})
_DROPPED_NAMES = (
    "displaystyle textstyle scriptstyle limits nolimits nonumber notag hfill break newline bf rm it tt sf sl large "
    "Large LARGE small normalsize boldmath unboldmath bfseries itshape centering noindent left right big Big bigg Bigg "
    "bigl bigr bigm Bigl Bigr Bigm biggl biggr biggm Biggl Biggr mathopen mathclose mathstrut strut null relax "
    "allowbreak"
)
_DROPPED = frozenset(_DROPPED_NAMES.split())
_SPACES = frozenset(
    ("quad", "qquad", "enspace", "thinspace", "medspace", "thickspace", "space", "enskip", "nobreakspace")
)
_COMMAND = re.compile(r"\\([A-Za-z]+\*?)\s*")
_SPACE_ESCAPE = re.compile(r"(?<!\\)(?:\\[,;:> ]|~|\\\n)")
_INFINITY = re.compile(r"(?:(?<=^)|(?<=[-+,(\[ ]))(?:infinity|inf)(?=$|[,)\] ])", re.IGNORECASE)
_THIN = r"(?:\{,\}|,\\!|\{?\\[,;:!> ]\}?|~|\{ \})"
_THOUSANDS = re.compile(rf"(?<![\d\\])\d{{1,3}}(?:{_THIN}\s*\d{{3}})+(?!\d)")
_MATH_MARKS = re.compile(r"(?<!\\)\\[()\[\]](?![\dpemc]*\])")
_MARKDOWN = re.compile(r"(\*+|__+|`+)([^*_`\s](?:[^*`]*[^*_`\s])?)\1")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d|(?<=\s)[A-Za-z])|\{([^{}]*)\})\s*(?:(\d|[A-Za-z])|\{([^{}]*)\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d|[A-Za-z])")
_SINGLE = re.compile(r"([\^_])\s*\{\s*([0-9A-Za-z]|\\circ|\\prime|\\ast|\*|')\s*\}")
# A space between words, between numbers ("11 5/6", "1. 5", "1, 234") and before letters ("8 m") has a meaning.
_IDLE_SPACE = re.compile(
    r" (?=[^\w .,\\]|[.,](?!\d))|(?<=[^\w\s}).,]) (?=\S)|(?<=[.,]) (?=[^\s\d])|(?<=[\w})]) (?=\\)|(?<=[})]) (?=\d)"
)
_EMPTY_SET = re.compile(r"(?<!\\)\\\{\\\}")
_STOPS = ".,;:"
# Most answers; nothing in them has a second spelling.
_PLAIN_WORDS = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|(?!(?i:inf))[A-Za-z0-9 ]*")


def normalise(text: str) -> str:
    r"""Return an answer in the one spelling that the readers know; the value is the same (rule 1).

    Args:
        text: the content of a box, or a reference answer. More than 4,000 characters keep all but their spaces.
    """
    if len(text) > MAX_CHARACTERS or _PLAIN_WORDS.fullmatch(text):
        return " ".join(text.split())
    for _ in range(_MAX_PASSES):
        unified = _normalise_once(text)
        if unified == text:
            break
        text = unified
    return text


def plain_text(text: str) -> str:
    r"""Return a line of reasoning, or an answer to look for in one: without `\text{}`, `$` and runs of spaces.

    Args:
        text: of any length.
    """
    unwrapped = _TEXT_COMMAND.sub(r"\1", text).replace(r"\$", "$")
    return " ".join(unwrapped.strip().strip("$").split())


_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")


def _normalise_once(text: str) -> str:
    text = _RAISED_ROOT.sub(lambda match: _RAISED_ROOTS[match.group()], unicodedata.normalize("NFC", text.strip()))
    text = _unify_characters(text)
    text = _ROOT.sub(_root, text)
    text = _MARKDOWN.sub(r"\2", text) if _MARKDOWN.fullmatch(text) else text
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _drop_math_marks(text)
    text = _unwrap(text.replace(r"\!", ""))
    text = _SPACE_ESCAPE.sub(" ", text).replace("{,}", ",")
    text = _COMMAND.sub(_synonym, text)
    text = re.sub(r"\\([%&#_])", r"\1", text).replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = _INFINITY.sub(r"\\infty ", text.replace("...", r"\ldots "))
    text = _complete_arguments(text)
    text = _tidy_spaces(text)
    return _strip_ends(text)


def _unify_characters(text: str) -> str:
    """Spell what Unicode has a character of its own for: digits, signs, fractions, full-width and raised forms."""
    if text.isascii():
        return text
    pieces: list[str] = []
    for char in text:
        kind = unicodedata.decomposition(char).partition(" ")[0]
        category = unicodedata.category(char)
        if char.isascii() or char in _ROOTS:
            pieces.append(char)
        elif char in _SYMBOLS:
            pieces.append(_SYMBOLS[char])
        elif category == "Cf":
            continue  # zero-width characters and marks of direction
        elif category == "Zs":
            pieces.append(" ")
        elif category == "Pd":
            pieces.append("-")
        elif category == "Nd":
            pieces.append(str(unicodedata.decimal(char)))
        elif kind in ("<super>", "<sub>"):
            _append_script(pieces, "^" if kind == "<super>" else "_", unicodedata.normalize("NFKC", char))
        elif kind == "<fraction>":
            numerator, _, denominator = unicodedata.normalize("NFKC", char).partition("\N{FRACTION SLASH}")
            pieces.append(rf"\frac{{{numerator}}}{{{denominator}}}" if denominator else char)
        elif kind == "<circle>":
            pieces.append(f"({unicodedata.normalize('NFKC', char)})")
        elif kind in ("<wide>", "<narrow>", "<font>", "<square>", "<small>"):
            pieces.append(unicodedata.normalize("NFKC", char))
        else:
            pieces.append(char)
    return "".join(pieces)


def _append_script(pieces: list[str], mark: str, char: str) -> None:
    """Append a raised or lowered character, in one group with those before it: two raised ones are no power of both."""
    char = "-" if char == "\N{MINUS SIGN}" else char
    if pieces and pieces[-1].startswith(mark + "{"):
        pieces[-1] = f"{pieces[-1][:-1]}{char}}}"
    else:
        pieces.append(f"{mark}{{{char}}}")


def _root(match: re.Match[str]) -> str:
    argument = match[2] if match[2] is not None else match[3]
    return rf"\sqrt{_ROOTS[match[1]]}" + ("" if argument is None else f"{{{argument}}}")


def _drop_math_marks(text: str) -> str:
    r"""Drop `$...$`, `\(...\)` and `\[...\]`; one `$` alone is money."""
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars % 2:
        text = re.sub(r"(?<!\\)\$(?=\s*[\d.])", r"\\$", text, count=1)
    text = re.sub(r"(?<!\\)\$", " ", text)
    return _MATH_MARKS.sub(" ", text)


def _unwrap(text: str) -> str:
    """Drop the commands that only say how something looks, and the braces that belong to them, at any depth."""
    if "\\" not in text:
        return text
    closing = _matching_braces(text)
    dropped: dict[int, tuple[int, str]] = {}
    for match in _COMMAND.finditer(text):
        name, end = match[1], match.end()
        if name in _ARGUMENT_AND_WRAPPER and end in closing:
            end = closing[end] + 1
            end += len(text[end:]) - len(text[end:].lstrip())
            _drop_wrapper(text, closing, dropped, match.start(), end)
        elif name == "color" and end in closing:
            dropped[match.start()] = (closing[end] + 1, "")
        elif name in ("hspace", "vspace", "phantom", "hphantom", "label", "tag") and end in closing:
            dropped[match.start()] = (closing[end] + 1, " ")
        elif name in _WRAPPERS and end in closing:
            _drop_wrapper(text, closing, dropped, match.start(), end)
        elif name in ("left", "right") and text[end : end + 1] == ".":
            dropped[match.start()] = (end + 1, "")
        elif name in _DROPPED:
            dropped[match.start()] = (end, "")
    pieces, position = [], 0
    for start in sorted(dropped):
        if start < position:
            continue
        end, instead = dropped[start]
        pieces += [text[position:start], instead]
        position = end
    return "".join(pieces) + text[position:]


def _drop_wrapper(
    text: str, closing: dict[int, int], dropped: dict[int, tuple[int, str]], start: int, brace: int
) -> None:
    if brace not in closing:
        return
    before, inside = text[:start].rstrip(), text[brace + 1 : closing[brace]]
    # x^\text{ab} without its braces would be another value; \frac\text{1}2 too.
    if re.search(r"[\^_]$|\\(?:frac|sqrt|overline|bar|vec|hat)$", before):
        dropped[start] = (brace, "")
        return
    # Words do not run together, and "8\text{ m}" keeps what makes its m a unit; H_2O stays in one piece.
    is_word = inside[:1].isalpha() and re.search(r"[A-Za-z0-9})]$|\\[A-Za-z]+$", before) is not None
    is_word &= not re.search(r"_\{?\w\}?$", before)
    dropped[start] = (brace + 1, " " if is_word else "")
    after = text[closing[brace] + 1 : closing[brace] + 2]
    dropped[closing[brace]] = (closing[brace] + 1, " " if inside[-1:].isalpha() and after.isalnum() else "")


def _matching_braces(text: str) -> dict[int, int]:
    """Return the place of the closing brace of each opening one."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def _synonym(match: re.Match[str]) -> str:
    name = match[1]
    if name in _SPACES:
        return " "
    if name in _PLAIN:
        return _PLAIN[name]
    name = _SYNONYMS.get(name, name)
    following = match.string[match.end() : match.end() + 1]
    return f"\\{name}" + (" " if name[-1].isalpha() and following.isalpha() else "")


def _complete_arguments(text: str) -> str:
    r"""Write `\frac12`, `\frac1{72}`, `\sqrt2`, `x^{2}` and `60^{\circ}` in one way each."""
    text = re.sub(r"\\(frac|sqrt)\s+(?=[\d{])", r"\\\1", text)
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SINGLE.sub(r"\1\2", text)
    return re.sub(r"\^\\circ\s+(?=[^A-Za-z]|$)", r"^\\circ", text).replace("^'", "'").replace(r"^\prime", "'")


def _tidy_spaces(text: str) -> str:
    text = re.sub(r"([{(\[])\s+|\s+([})\]])", lambda match: match[1] or match[2], " ".join(text.split()))
    return _EMPTY_SET.sub(r"\\emptyset ", _IDLE_SPACE.sub("", text)).rstrip()


def _strip_ends(text: str) -> str:
    """Drop closing stops, a line break at the end, and braces or quotes around all of it."""
    text = re.sub(r"(?:\\\\|(?<!\\)\\)$", "", text.strip()).strip()
    if text[-1:] in _STOPS:
        text = text[:-1].rstrip()
    if len(text) > 1 and text[0] == "{" and _matching_braces(text).get(0) == len(text) - 1:
        text = text[1:-1].strip()
    if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text
