"""The final answer of a response, and STEM's rewards for it.

An answer stands in a box, in answer tags, behind "the answer is"; numbers with units are read, brought to SI
units, and compared."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from megatron_sov.base.settings import Fraction
from megatron_sov.judge.rewards.reward import Refused, Row, Score, format_short, get_content

MAX_CHARS = 100_000
"""Of a longer response the end is read."""
MAX_ANSWER_CHARS = 500
# "answer" alone is a word like others ("I hope this answer helps"): a mark has to follow it
_ANNOUNCEMENT = re.compile(r"(?:\banswer\b(?:[\s*]{0,6}is\b|(?=[ \t*]{0,6}\n|\W{0,6}(?:[:：=$\\]|[-+.]?\d|"
                   r"(?:option|choice)\b|(?-i:[A-HJ])\b)))|"
                   r"정답(?:은|:)?|답(?:은|:)|คำตอบ(?:คือ)?|答案(?:是)?|答え(?:は)?)"
                   r"[\s:：*]{0,6}", re.IGNORECASE)
_DISPLAYED = re.compile(r"(?:\$\$|\\\[)((?:(?!\$\$|\\[\[\]]).){1,500}?)(?:\$\$|\\\])", re.DOTALL)
_LAST_DISPLAYED = re.compile(_DISPLAYED.pattern + r"[\s.]*\Z", re.DOTALL)
_TAG = re.compile(r"<answer>([^<]{1,500})</answer>")
Dimension = tuple[float, float, float, float, float, float]
"""Exponents of metre, kilogram, second, ampere, kelvin, mole."""
_PREFIXED_UNITS: dict[str, tuple[float, Dimension]] = {
    "m": (1, (1, 0, 0, 0, 0, 0)), "g": (1e-3, (0, 1, 0, 0, 0, 0)), "s": (1, (0, 0, 1, 0, 0, 0)),
    "A": (1, (0, 0, 0, 1, 0, 0)), "K": (1, (0, 0, 0, 0, 1, 0)), "mol": (1, (0, 0, 0, 0, 0, 1)),
    "N": (1, (1, 1, -2, 0, 0, 0)), "J": (1, (2, 1, -2, 0, 0, 0)), "W": (1, (2, 1, -3, 0, 0, 0)),
    "Pa": (1, (-1, 1, -2, 0, 0, 0)), "Hz": (1, (0, 0, -1, 0, 0, 0)), "C": (1, (0, 0, 1, 1, 0, 0)),
    "V": (1, (2, 1, -3, -1, 0, 0)), "Ω": (1, (2, 1, -3, -2, 0, 0)), "F": (1, (-2, -1, 4, 2, 0, 0)),
    "T": (1, (0, 1, -2, -1, 0, 0)), "H": (1, (2, 1, -2, -2, 0, 0)), "Wb": (1, (2, 1, -2, -1, 0, 0)),
    "S": (1, (-2, -1, 3, 2, 0, 0)), "L": (1e-3, (3, 0, 0, 0, 0, 0)), "l": (1e-3, (3, 0, 0, 0, 0, 0)),
    "eV": (1.602176634e-19, (2, 1, -2, 0, 0, 0)), "cal": (4.184, (2, 1, -2, 0, 0, 0)),
    "bar": (1e5, (-1, 1, -2, 0, 0, 0)), "M": (1e3, (-3, 0, 0, 0, 0, 1)),
}
"""Units that take prefixes: factor to SI, dimension (SI brochure, 9th edition)."""
_PLAIN_UNITS: dict[str, tuple[float, Dimension]] = {
    "min": (60, (0, 0, 1, 0, 0, 0)), "h": (3600, (0, 0, 1, 0, 0, 0)), "hr": (3600, (0, 0, 1, 0, 0, 0)),
    "day": (86400, (0, 0, 1, 0, 0, 0)), "atm": (101325, (-1, 1, -2, 0, 0, 0)),
    "Å": (1e-10, (1, 0, 0, 0, 0, 0)), "rad": (1, (0,) * 6), "°": (math.pi / 180, (0,) * 6),
    "deg": (math.pi / 180, (0,) * 6), "%": (0.01, (0,) * 6), "u": (1.66053906660e-27, (0, 1, 0, 0, 0, 0)),
    "ft": (0.3048, (1, 0, 0, 0, 0, 0)), "in": (0.0254, (1, 0, 0, 0, 0, 0)),
    "mi": (1609.344, (1, 0, 0, 0, 0, 0)),
    "lb": (0.45359237, (0, 1, 0, 0, 0, 0)),
}
"""Units that take none."""
_PREFIXES = {"": 1, "f": 1e-15, "p": 1e-12, "n": 1e-9, "µ": 1e-6, "u": 1e-6, "m": 1e-3, "c": 1e-2, "d": 1e-1,
             "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNIT_NAMES = {"meters": "m", "meter": "m", "metres": "m", "metre": "m", "seconds": "s", "second": "s",
               "sec": "s",
          "grams": "g", "gram": "g", "kilograms": "kg", "kilogram": "kg", "newtons": "N", "newton": "N",
          "joules": "J", "joule": "J", "watts": "W", "watt": "W", "volts": "V", "volt": "V", "ohms": "Ω",
          "ohm": "Ω", "kelvin": "K", "kelvins": "K", "moles": "mol", "mole": "mol", "hours": "h", "hour": "h",
          "minutes": "min", "minute": "min", "days": "day", "degrees": "°", "degree": "°", "percent": "%",
          "kilometers": "km", "kilometres": "km", "kilometer": "km", "centimeters": "cm", "liters": "L",
          "litres": "L", "liter": "L", "hertz": "Hz", "pascals": "Pa", "pascal": "Pa", "amperes": "A",
          "amps": "A", "miles": "mi", "mile": "mi", "feet": "ft", "foot": "ft", "inches": "in", "inch": "in",
          "pounds": "lb", "pound": "lb", "radians": "rad", "radian": "rad"}
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,400})?(?:\.\d{0,400})?", re.ASCII)
_POWER = re.compile(r"\s*(?:[eE]([+-]?\d{1,4})\b|"
                    r"(?:x|×|\*|·)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d{1,4})\s*\}?)",
                     re.ASCII)
_DIVISOR = re.compile(r"\s*/\s*(\d{1,400}(?:\.\d{1,400})?)", re.ASCII)
# beside a digit it is a part of a mixed number, which is not read: two and a half is not 21/2
_FRACTION = re.compile(r"(?<![\d.])\\[dt]?frac\s*\{\s*([+-]?[\d.,]+)\s*\}\s*\{\s*([\d.]+)\s*\}(?!\.?\d)",
                       re.ASCII)
_FACTOR = re.compile(r"([*/]?)([^\d\s*/^+-]+)(?:\^?\(?([+-]?\d{1,2}(?:\.5)?)\)?)?", re.ASCII)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_EXPONENT_START = re.compile(r"(?<=[0-9])(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁻])")
"""Between a number and its exponent: 10² is not 102."""


def extract_final_answer(response: str) -> str | None:
    """Return what a response says in the end, by its clearest mark; None where nothing is marked.

    The marks, of which the last of the first kind that there is counts: \\boxed{...}; <answer>...</answer>;
    "the answer is ..." (also in Korean, Thai, Chinese, Japanese); a displayed formula at the end, as $...$; a
    last line of few words.
    """
    text = response[-MAX_CHARS:].strip()
    # the clearest mark wins, and of its kind the last: a response may correct itself
    boxed = extract_last_box(text)
    if boxed is not None:
        return boxed.strip()
    tagged = _TAG.findall(text)
    if tagged:
        return tagged[-1].strip()
    # an announcement ends with its line: what follows is talk about it; a displayed formula is one line
    announcement_ends = [match.end() for match in _ANNOUNCEMENT.finditer(text)]
    if announcement_ends:
        announced = text[announcement_ends[-1]:]
        displayed = _DISPLAYED.match(announced.lstrip())
        line = f"${displayed[1].strip()}$" if displayed else announced.partition("\n")[0]
        return line[:MAX_ANSWER_CHARS].strip().strip("*").strip()
    # nothing is marked: a displayed formula, or a short last line, is an answer; a long one is prose
    if displayed := _LAST_DISPLAYED.search(text):
        return f"${displayed[1].strip()}$"
    line = text.rsplit("\n", 1)[-1].strip()
    return line if line and len(line.split()) <= 8 and len(line) <= MAX_ANSWER_CHARS else None


def extract_last_box(text: str) -> str | None:
    """Return the content of the last whole \\boxed{...}, braces in it balanced; None where there is none."""
    place = find_last_box(text)
    return None if place is None else text[place[0] + len("\\boxed{"):place[1] - 1]


def find_last_box(text: str) -> tuple[int, int] | None:
    """Return where the last whole \\boxed{...} begins and ends; None where there is none."""
    end = len(text)
    for _ in range(20):  # of a response of boxes that are never closed the last ones are enough
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            return None
        depth = 0
        for i in range(start + len("\\boxed"), min(len(text), start + MAX_ANSWER_CHARS)):
            # braces nest in LaTeX (\boxed{\frac{1}{2}}), which no regular expression counts
            if text[i] == "{":
                depth += 1
            elif text[i] == "}":
                depth -= 1
            if depth == 0:
                return start, i + 1
        end = start
    return None


def normalize_answer(text: str) -> str:
    """Return a short answer without case, articles, punctuation at its ends, LaTeX's text marks, and with
    single spaces."""
    # full-width letters and digits of East Asian keyboards become the plain ones
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^(?:the|an?)\s+", "", text.strip().strip("$").strip())
    return re.sub(r"\s+", " ", text).strip(" .,;:!?'\"`*()[]。、$")


@dataclass(frozen=True)
class Quantity:
    """A number in SI units."""

    value: float
    """In SI units."""
    dimension: Dimension | None
    """None: no unit was given."""
    plain: float
    """The number as it was written."""
    is_whole: bool = False
    """Whether it was written as a whole number: digits, and no power of ten."""


def read_quantity(text: str) -> Quantity | None:
    """Return the number that a short text is, with its unit; None where it is none, has a unit that is not
    known, or a number that no float holds."""
    text = _simplify_quantity(text)
    number = _NUMBER.match(text)
    if number is None or not any(char.isdigit() for char in number[0]):
        return None
    plain, rest = float(number[0].replace(",", "")), text[number.end():]
    is_whole = "." not in number[0]
    below = _DIVISOR.match(rest)
    if below:
        divisor = float(below[1])
        # a division by zero becomes infinity, which is refused below: no error of a response reaches the
        # caller
        plain, rest, is_whole = plain / divisor if divisor else math.inf, rest[below.end():], False
    power = _POWER.match(rest)
    if power:
        exponent = int(power[1] or power[2])
        # beyond 1e300 a float overflows, and `**` would raise
        plain, rest = (plain * 10.0 ** exponent if abs(exponent) <= 300 else math.inf), rest[power.end():]
        is_whole = False
    if not math.isfinite(plain):
        return None
    unit = rest.strip(" .;")
    if not unit:
        return Quantity(plain, None, plain, is_whole)
    read = _parse_unit(unit)
    return None if read is None else Quantity(plain * read[0], read[1], plain, is_whole)


def are_equal_quantities(first: Quantity, second: Quantity, relative_tolerance: float) -> bool:
    """Return whether two quantities are equal within a tolerance; one without a unit is taken to have the
    other's."""
    # the numbers as they were written are compared: a factor to SI of one side alone would be wrong
    if first.dimension is None or second.dimension is None:
        return math.isclose(first.plain, second.plain, rel_tol=relative_tolerance)
    return (first.dimension == second.dimension
            and math.isclose(first.value, second.value, rel_tol=relative_tolerance))


def _simplify_quantity(text: str) -> str:
    """Return a quantity without LaTeX's dress: $9.8\\,\\mathrm{m/s^{2}}$ is 9.8 m/s^2."""
    # the caret goes in before superscripts become digits: 10² would be 102
    text = _EXPONENT_START.sub("^",
                               text[:500]).translate(_SUPERSCRIPTS).strip().rstrip(".;").strip("$").strip()
    text = _FRACTION.sub(r"\1/\2", text)
    text = re.sub(r"\^\{\s*([+-]?[\d.]+)\s*\}", r"^\1", text)
    text = re.sub(r"\\(?:text|mathrm|unit|si|rm)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\s+\^", "^", text)  # \text{s}^2
    text = text.replace("\\%", "%").replace("^\\circ", "°").replace("\\Omega", "Ω").replace("\\mu", "µ")
    text = re.sub(r"\\[,;!: ]|~", " ", text).replace("\\times", "*").replace("\\cdot", "*")
    # minus, micro and ohm have two code points each; the tables above know one
    text = unicodedata.normalize("NFC", text).replace("−", "-").replace("μ", "µ").replace("\u2126", "Ω")
    return re.sub(r"^(?:=|≈|~|about|approximately)\s*", "", text.strip())


def _parse_unit(text: str) -> tuple[float, Dimension] | None:
    """Return factor and dimension of a compound unit such as kg m/s^2; None where a part is not known."""
    if len(text) > 40:
        return None
    # a slash holds for the unit behind it alone, so m/(s kg) becomes m/s/kg first
    text = re.sub(r"\s*([*/])\s*", r"\1", text.replace("·", "*"))
    text = re.sub(r"/\(([^()]*)\)", lambda below: "/" + re.sub(r"[\s*]+", "/", below[1].strip()), text)
    text = text.replace("(", "").replace(")", "")
    factor, dimension, place = 1.0, [0.0] * 6, 0
    while place < len(text):
        part = _FACTOR.match(text, place)
        if part is None:
            if text[place] == " ":
                place += 1
                continue
            return None
        # one unknown part makes the whole unit unknown: a guess could pay a wrong answer
        single = _parse_simple_unit(part[2])
        if single is None:
            return None
        exponent = float(part[3] or 1) * (-1 if part[1] == "/" else 1)
        try:
            factor *= single[0] ** exponent
        except OverflowError:
            return None
        dimension = [a + b * exponent for a, b in zip(dimension, single[1], strict=True)]
        place = part.end()
    a, b, c, d, e, f = dimension
    return factor, (a, b, c, d, e, f)


def _parse_simple_unit(name: str) -> tuple[float, Dimension] | None:
    # short names are symbols, where case counts: mW is no MW
    name = _UNIT_NAMES.get(name.lower(), name) if len(name) > 2 else name
    # these take no prefix: a kilominute is no unit
    if name in _PLAIN_UNITS:
        return _PLAIN_UNITS[name]
    for prefix, scale in _PREFIXES.items():
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest in _PREFIXED_UNITS:
            factor, dimension = _PREFIXED_UNITS[rest]
            return factor * scale, dimension
    return None


Kind = Literal["choice", "number", "text"]
_LETTER = re.compile(r"\W*([A-J])\W*", re.ASCII)
_SEVERAL = re.compile(r"\W*[A-J](?:\W+(?:(?:AND|OR)\W+)?[A-J])+\W*", re.ASCII)
_LEADING = re.compile(r"[\s(\[*\"']*(?:option|choice)?\s*[(\[]?([A-J])(?:[)\].:,*]|\s*$|\s+[-–—])",
                      re.IGNORECASE)


@dataclass(frozen=True)
class Stem:
    """1 for a right final answer, 0 for a wrong one or none."""

    CONTROL, cpu_limit_s = "", 10.0

    kind: Literal["auto", "choice", "number", "text"] = "auto"
    """auto: a single letter is a choice, what reads as a number is one, all else is text."""
    relative_tolerance: Fraction = 0.01
    """For numbers."""
    exact_integers: bool = True
    """A whole number without a unit is a count: another whole number is no rounding of it, however near."""
    unit_required: bool = False
    """A number without the answer's unit is wrong; without, it is taken to have that unit."""

    def score(self, row: Row) -> Score:
        """Return whether the response's final answer is the row's `answer`, or one of several in a list."""
        golds = _get_gold_answers(row)
        kind: Kind = self._classify_answers(golds)
        for gold in golds:
            if not self._is_right(kind, gold, gold, row):
                raise Refused(f"answer = {format_short(gold)} is not equal to itself as a {kind}; correct it")
        answer = extract_final_answer(get_content(row))
        if answer is None:
            return Score(0.0, {"kind": kind, "extracted": None})
        right = any(self._is_right(kind, answer, gold, row) for gold in golds)
        return Score(float(right), {"kind": kind, "extracted": answer[:200]})

    def _classify_answers(self, golds: list[str]) -> Kind:
        if self.kind != "auto":
            return self.kind
        if all(_LETTER.fullmatch(gold) for gold in golds):
            return "choice"
        return "number" if all(map(_parse_quantity, golds)) else "text"

    def _is_right(self, kind: Kind, answer: str, gold: str, row: Row) -> bool:
        if kind == "choice":
            return _parse_choice(answer, row) == _get_gold_letter(gold)
        if kind == "text":
            return normalize_answer(answer) == normalize_answer(gold) != ""
        expected, quantity = _parse_quantity(gold), _parse_quantity(answer)
        if expected is None:
            raise Refused(f"answer = {format_short(gold)} is no number with a known unit")
        if quantity is None or (self.unit_required and expected.dimension and not quantity.dimension):
            return False
        # a count has no tolerance: 100 people are not 101 within one per cent
        if self.exact_integers and expected.dimension is None and expected.is_whole and quantity.is_whole:
            return expected.plain == quantity.plain
        return are_equal_quantities(expected, quantity, self.relative_tolerance)


def _get_gold_answers(row: Row) -> list[str]:
    """Return the answers that are right.

    Raises:
        Refused: there are none, or something else than text.
    """
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    golds = [gold for gold in answers if isinstance(gold, str) and gold.strip()]
    if not golds or len(golds) < len(answers):
        raise Refused(f"answer = {format_short(answer)} must be text, or a list of texts" if "answer" in row
                      else "has no 'answer'")
    return golds


def _get_gold_letter(gold: str) -> str:
    match = _LETTER.fullmatch(gold.strip().upper())
    if match is None:
        raise Refused(f"answer = {format_short(gold)} must be a letter from A to J")
    return match[1]


def _parse_choice(answer: str, row: Row) -> str | None:
    """Return the letter that a final answer names, or whose choice it is, word for word; None for several."""
    # "A or B" hedges, and would be right for two answers
    if _SEVERAL.fullmatch(answer.upper()):
        return None
    match = _LETTER.fullmatch(answer.upper()) or _LEADING.match(answer)
    if match:
        return match[1].upper()
    choices = row.get("choices")
    if isinstance(choices, list) and len(choices) <= 10:
        normalized_answer = normalize_answer(answer)
        # a response may write the choice out; two equal choices would leave its letter open
        hits = [letter for letter, choice in zip("ABCDEFGHIJ", choices, strict=False)
                if isinstance(choice, str) and normalize_answer(choice) == normalized_answer]
        if len(hits) == 1:
            return hits[0]
    return None


def _parse_quantity(answer: str) -> Quantity | None:
    """Return the quantity of a final answer; of v = 3 m/s what stands behind the last sign of equality, where
    no other number is said to be equal to it."""
    # in "v = 3 m/s" the name may stand before; in "2 = 3" two numbers contradict each other
    *sides, last = re.split(r"=|≈|\\approx", answer)
    quantity = read_quantity(last)
    left_quantities = list(filter(None, map(read_quantity, sides)))
    return quantity if quantity is None or all(are_equal_quantities(other, quantity, 0.01)
                                               for other in left_quantities) else None
