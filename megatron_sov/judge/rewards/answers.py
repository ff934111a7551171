"""Extract the final answer from a response, and compare answers for the reward `stem`.

The final answer is in a box, in answer tags, or after "the answer is". Numbers with units are converted to SI
units before they are compared.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from megatron_sov.base.settings import Fraction
from megatron_sov.judge.rewards.reward import Refused, Row, Score, format_short, get_content

MAX_CHARS = 100_000
"""Longer responses are cut to their last characters."""
MAX_ANSWER_CHARS = 500
# "answer" alone is an ordinary word ("I hope this answer helps"), so a mark must follow.
_ANNOUNCEMENT = re.compile(r"(?:\banswer\b(?:[\s*]{0,6}is\b|(?=[ \t*]{0,6}\n|\W{0,6}(?:[:：=$\\]|[-+.]?\d|"
                   r"(?:option|choice)\b|(?-i:[A-HJ])\b)))|"
                   r"정답(?:은|:)?|답(?:은|:)|คำตอบ(?:คือ)?|答案(?:是)?|答え(?:は)?)"
                   r"[\s:：*]{0,6}", re.IGNORECASE)
_DISPLAYED = re.compile(r"(?:\$\$|\\\[)((?:(?!\$\$|\\[\[\]]).){1,500}?)(?:\$\$|\\\])", re.DOTALL)
_LAST_DISPLAYED = re.compile(_DISPLAYED.pattern + r"[\s.]*\Z", re.DOTALL)
_TAG = re.compile(r"<answer>([^<]{1,500})</answer>")
Dimension = tuple[float, float, float, float, float, float]
"""Exponents for metre, kilogram, second, ampere, kelvin and mole."""
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
"""Units with prefixes: factor to SI, dimension (SI brochure, 9th edition)."""
_PLAIN_UNITS: dict[str, tuple[float, Dimension]] = {
    "min": (60, (0, 0, 1, 0, 0, 0)), "h": (3600, (0, 0, 1, 0, 0, 0)), "hr": (3600, (0, 0, 1, 0, 0, 0)),
    "day": (86400, (0, 0, 1, 0, 0, 0)), "atm": (101325, (-1, 1, -2, 0, 0, 0)),
    "Å": (1e-10, (1, 0, 0, 0, 0, 0)), "rad": (1, (0,) * 6), "°": (math.pi / 180, (0,) * 6),
    "deg": (math.pi / 180, (0,) * 6), "%": (0.01, (0,) * 6), "u": (1.66053906660e-27, (0, 1, 0, 0, 0, 0)),
    "ft": (0.3048, (1, 0, 0, 0, 0, 0)), "in": (0.0254, (1, 0, 0, 0, 0, 0)),
    "mi": (1609.344, (1, 0, 0, 0, 0, 0)),
    "lb": (0.45359237, (0, 1, 0, 0, 0, 0)),
}
"""Units without prefixes."""
_PREFIXES = {"": 1, "f": 1e-15, "p": 1e-12, "n": 1e-9, "µ": 1e-6, "u": 1e-6, "m": 1e-3, "c": 1e-2, "d": 1e-1,
             "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NAMES = {"meters": "m", "meter": "m", "metres": "m", "metre": "m", "seconds": "s", "second": "s",
          "sec": "s", "grams": "g", "gram": "g", "kilograms": "kg", "kilogram": "kg", "newtons": "N",
          "newton": "N", "joules": "J", "joule": "J", "watts": "W", "watt": "W", "volts": "V", "volt": "V",
          "ohms": "Ω", "ohm": "Ω", "kelvin": "K", "kelvins": "K", "moles": "mol", "mole": "mol", "hours": "h",
          "hour": "h", "minutes": "min", "minute": "min", "days": "day", "degrees": "°", "degree": "°",
          "percent": "%", "kilometers": "km", "kilometres": "km", "kilometer": "km", "centimeters": "cm",
          "liters": "L", "litres": "L", "liter": "L", "hertz": "Hz", "pascals": "Pa", "pascal": "Pa",
          "amperes": "A",
          "amps": "A", "miles": "mi", "mile": "mi", "feet": "ft", "foot": "ft", "inches": "in", "inch": "in",
          "pounds": "lb", "pound": "lb", "radians": "rad", "radian": "rad"}
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,400})?(?:\.\d{0,400})?", re.ASCII)
_POWER = re.compile(r"\s*(?:[eE]([+-]?\d{1,4})\b|"
                    r"(?:x|×|\*|·)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d{1,4})\s*\}?)",
                     re.ASCII)
_DIVISOR = re.compile(r"\s*/\s*(\d{1,400}(?:\.\d{1,400})?)", re.ASCII)
# Next to a digit the fraction belongs to a mixed number, which is not parsed: two and a half is not 21/2.
_FRACTION = re.compile(r"(?<![\d.])\\[dt]?frac\s*\{\s*([+-]?[\d.,]+)\s*\}\s*\{\s*([\d.]+)\s*\}(?!\.?\d)",
                       re.ASCII)
_FACTOR = re.compile(r"([*/]?)([^\d\s*/^+-]+)(?:\^?\(?([+-]?\d{1,2}(?:\.5)?)\)?)?", re.ASCII)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_EXPONENT_START = re.compile(r"(?<=[0-9])(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁻])")
"""Place between a number and its exponent: 10² is not 102."""


def extract_final_answer(response: str) -> str | None:
    """Return the final answer in a response by its clearest mark; None without a mark.

    Marks in this order, the last occurrence counts: \\boxed{...}; <answer>...</answer>; "the answer is ..."
    (English, Korean, Thai, Chinese, Japanese); a displayed formula at the end, returned as $...$; a short
    last line.
    """
    text = response[-MAX_CHARS:].strip()
    # The clearest mark wins; its last occurrence counts, because a response may correct itself.
    boxed = extract_last_box(text)
    if boxed is not None:
        return boxed.strip()
    tagged = _TAG.findall(text)
    if tagged:
        return tagged[-1].strip()
    # An announcement ends with its line, because explanations may follow; a displayed formula counts as a
    # line.
    announcement_ends = [match.end() for match in _ANNOUNCEMENT.finditer(text)]
    if announcement_ends:
        announced = text[announcement_ends[-1]:]
        displayed = _DISPLAYED.match(announced.lstrip())
        line = f"${displayed[1].strip()}$" if displayed else announced.partition("\n")[0]
        return line[:MAX_ANSWER_CHARS].strip().strip("*").strip()
    # Without a mark, a displayed formula or a short last line is the answer; a long line is prose.
    if displayed := _LAST_DISPLAYED.search(text):
        return f"${displayed[1].strip()}$"
    line = text.rsplit("\n", 1)[-1].strip()
    return line if line and len(line.split()) <= 8 and len(line) <= MAX_ANSWER_CHARS else None


def extract_last_box(text: str) -> str | None:
    """Return the content between the balanced braces in the last complete \\boxed{...}, or None."""
    place = find_last_box(text)
    return None if place is None else text[place[0] + len("\\boxed{"):place[1] - 1]


def find_last_box(text: str) -> tuple[int, int] | None:
    """Return start and end index for the last complete \\boxed{...}, or None."""
    end = len(text)
    for _ in range(20):  # unclosed boxes could be many; the last few suffice
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            return None
        depth = 0
        for i in range(start + len("\\boxed"), min(len(text), start + MAX_ANSWER_CHARS)):
            # Braces nest in LaTeX (\boxed{\frac{1}{2}}), which regular expressions cannot match.
            if text[i] == "{":
                depth += 1
            elif text[i] == "}":
                depth -= 1
            if depth == 0:
                return start, i + 1
        end = start
    return None


def normalize_answer(text: str) -> str:
    """Return a short answer in lower case, without articles, surrounding punctuation and LaTeX text commands,
    with single spaces."""
    # Full-width letters and digits from East Asian keyboards become ASCII.
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^(?:the|an?)\s+", "", text.strip().strip("$").strip())
    return re.sub(r"\s+", " ", text).strip(" .,;:!?'\"`*()[]。、$")


@dataclass(frozen=True)
class Quantity:
    """A parsed number with its unit."""

    value: float
    """Value in SI units."""
    dimension: Dimension | None
    """SI dimension; None without a unit."""
    plain: float
    """The number in its written unit."""
    is_whole: bool = False
    """Written as an integer: digits without a power of ten."""


def read_quantity(text: str) -> Quantity | None:
    """Parse a short text as a `Quantity`; return None for prose, unknown units and overflow."""
    text = _simplify_quantity(text)
    number = _NUMBER.match(text)
    if number is None or not any(char.isdigit() for char in number[0]):
        return None
    plain, rest = float(number[0].replace(",", "")), text[number.end():]
    is_whole = "." not in number[0]
    below = _DIVISOR.match(rest)
    if below:
        divisor = float(below[1])
        # Division by zero becomes infinity, which is refused below.
        plain, rest, is_whole = plain / divisor if divisor else math.inf, rest[below.end():], False
    power = _POWER.match(rest)
    if power:
        exponent = int(power[1] or power[2])
        # Beyond 1e300 floats overflow, and `**` would raise.
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
    """Return whether two quantities agree within a relative tolerance; a missing unit is assumed to match."""
    # Compare the written numbers, because only one side could be converted to SI.
    if first.dimension is None or second.dimension is None:
        return math.isclose(first.plain, second.plain, rel_tol=relative_tolerance)
    return (first.dimension == second.dimension
            and math.isclose(first.value, second.value, rel_tol=relative_tolerance))


def _simplify_quantity(text: str) -> str:
    """Strip LaTeX from a quantity: $9.8\\,\\mathrm{m/s^{2}}$ becomes 9.8 m/s^2."""
    # Insert the caret before superscripts become digits, because 10² would become 102.
    text = _EXPONENT_START.sub("^",
                               text[:500]).translate(_SUPERSCRIPTS).strip().rstrip(".;").strip("$").strip()
    text = _FRACTION.sub(r"\1/\2", text)
    text = re.sub(r"\^\{\s*([+-]?[\d.]+)\s*\}", r"^\1", text)
    text = re.sub(r"\\(?:text|mathrm|unit|si|rm)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\s+\^", "^", text)  # \text{s}^2
    text = text.replace("\\%", "%").replace("^\\circ", "°").replace("\\Omega", "Ω").replace("\\mu", "µ")
    text = re.sub(r"\\[,;!: ]|~", " ", text).replace("\\times", "*").replace("\\cdot", "*")
    # Minus, micro and ohm have two code points each; the tables above have one.
    text = unicodedata.normalize("NFC", text).replace("−", "-").replace("μ", "µ").replace("\u2126", "Ω")
    return re.sub(r"^(?:=|≈|~|about|approximately)\s*", "", text.strip())


def _parse_unit(text: str) -> tuple[float, Dimension] | None:
    """Return factor and dimension for a compound unit such as kg m/s^2; None for unknown parts."""
    if len(text) > 40:
        return None
    # A slash applies to the next unit only, so m/(s kg) is rewritten as m/s/kg.
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
        # An unknown part makes the whole unit unknown, because a guess could reward a wrong answer.
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
    # Short names are case-sensitive symbols: mW is not MW.
    name = _NAMES.get(name.lower(), name) if len(name) > 2 else name
    # No prefixes: a kilominute is not a unit.
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
    """Reward `stem`: 1 for a correct final answer, else 0."""

    CONTROL, cpu_limit_s = "", 10.0

    kind: Literal["auto", "choice", "number", "text"] = "auto"
    """`auto`: single letters are choices, parsable quantities are numbers, other answers are text."""
    relative_tolerance: Fraction = 0.01
    """Relative tolerance for numbers."""
    exact_integers: bool = True
    """Integers without a unit are counts, which must be equal."""
    unit_required: bool = False
    """Require the answer's unit; otherwise a missing unit is assumed to match."""

    def score(self, row: Row) -> Score:
        """Compare the response's final answer with the row's `answer`, a text or a list of alternatives."""
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
        # Counts have no tolerance: 100 people are not 101 within one per cent.
        if self.exact_integers and expected.dimension is None and expected.is_whole and quantity.is_whole:
            return expected.plain == quantity.plain
        return are_equal_quantities(expected, quantity, self.relative_tolerance)


def _get_gold_answers(row: Row) -> list[str]:
    """Return the accepted answers in a row.

    Raises:
        Refused: `answer` is missing or not text.
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
    """Return the letter in a final answer, or the letter for a choice written out; None if ambiguous."""
    # "A or B" would be right for two answers.
    if _SEVERAL.fullmatch(answer.upper()):
        return None
    match = _LETTER.fullmatch(answer.upper()) or _LEADING.match(answer)
    if match:
        return match[1].upper()
    choices = row.get("choices")
    if isinstance(choices, list) and len(choices) <= 10:
        normalized_answer = normalize_answer(answer)
        # The response may write the choice out; equal choices would be ambiguous.
        hits = [letter for letter, choice in zip("ABCDEFGHIJ", choices, strict=False)
                if isinstance(choice, str) and normalize_answer(choice) == normalized_answer]
        if len(hits) == 1:
            return hits[0]
    return None


def _parse_quantity(answer: str) -> Quantity | None:
    """Parse a final answer; for v = 3 m/s, parse the part after the last equals sign, unless an earlier part
    is another number."""
    # "v = 3 m/s" starts with a name, but in "2 = 3" the numbers contradict each other.
    *sides, last = re.split(r"=|≈|\\approx", answer)
    quantity = read_quantity(last)
    earlier = list(filter(None, map(read_quantity, sides)))
    return quantity if quantity is None or all(are_equal_quantities(number, quantity, 0.01)
                                               for number in earlier) else None
