"""Reward `math`: compare final answers with `math-verify` (Apache-2.0, extra `rl`).

`math-verify` parses LaTeX and plain expressions and compares them with `sympy`. Its own time limits use
signals, which need a main thread and cannot stop C code; therefore the judging process is ended instead.
"""

import importlib.util
import logging
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_sov.base.errors import format_install_command
from megatron_sov.base.settings import AboveZero, AtLeastOne, SettingsProblem, to_problem
from megatron_sov.judge.rewards.answers import (
    are_equal_quantities, extract_final_answer, extract_last_box, find_last_box, normalize_answer,
    read_quantity)
from megatron_sov.judge.rewards.reward import Refused, Row, Score, get_content, get_text

MAX_ANSWER_CHARS = 10_000
MAX_BOXES = 12
"""Boxes that may form a single answer with several values."""
UNIT_TOLERANCE = 0.01
"""`math-verify` compares numbers; a wrong prefix changes a value by a factor of at least ten."""
_FULL_STOP = re.compile(r"(?<=\d)\.(?=\s*\}(?:[^{}]|\Z))")
"""Full stop at the end inside a box: 42. is 42."""
_UNICODE_TO_LATEX = str.maketrans({"\u2212": "-", "\uff0d": "-", "°": "^{\\circ}", "∞": "\\infty ",
                                   "≤": "\\le ",
                                   "≥": "\\ge ", "≠": "\\neq ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}",
                                   **{chr(0xff10 + digit): str(digit) for digit in range(10)}})
"""Unicode signs and full-width digits -> LaTeX for `math-verify`."""
_BRACKETS = {"langle": "(", "rangle": ")", "lbrace": "\\{", "rbrace": "\\}", "varnothing": "\\emptyset"}
_BRACKET = re.compile(rf"\\({'|'.join(_BRACKETS)})(?![A-Za-z])\s*")
"""Commands unknown to `math-verify` -> supported commands."""
_FUNCTIONS = "pi|infty|(?:arc)?(?:sin|cos|tan)|sec|csc|cot|(?:sin|cos|tan)h|ln|log|exp|max|min|gcd|lcm|det"
_PLAIN_FUNCTION = re.compile(rf"(?<![\\A-Za-z])(?={_FUNCTIONS})(?=(?:{_FUNCTIONS})(?![A-Za-z]))")
"""Place before a function or constant without backslash: sin(x) would be s times i times n(x)."""
_STYLED_NUMBER = re.compile(r"\\(?:math|text)(?:bf|rm|it|sf|tt|normal)?\s*\{([-+\d.,]+)( [^{}]*)?\}")
_ROOT = re.compile(r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)")
_GROUPED_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])")
"""1 000, which LaTeX reads as a product."""
_STYLES = re.compile(r"\\(?:text)?color\s*\{\w+\}|\\(?:boldsymbol|bm|underline)(?=\s*\{)|(?<=\{)\\[,;:!]")
"""Colour, weight, underline and leading narrow space, without effect on the value."""
_FRAMED = re.compile(r"(?<=\\boxed\{)\s*(?:\\[(\[]|\$)"
                     r"((?:(?!\\[()\[\]]|\$).){1,1000})(?:\\[)\]]|\$)\s*(?=\})", re.S)
"""Box whose content is a delimited formula: \\boxed{\\(42\\)}."""
_SET = re.compile(r"\\(?:\{|lbrace).*\\(?:\}|rbrace)", re.DOTALL)
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_THOUSANDS = re.compile(r"(?<=\d)\\[,!;: ]\s*(?=\d{3}(?!\d))")
"""Narrow spaces between groups of three digits, which `math-verify` reads as a product."""
_THREE_DIGITS = re.compile(r"\A\s*\{\s*(?=\d{3}(?!\d))")
_BOX_SEPARATORS = re.compile(r"(?:[\s$,;]|\\[()\[\]]|\b(?:and|or)\b)*", re.IGNORECASE)
"""Text between boxes that form a single answer; other text makes the last box a correction."""
_MIXED = re.compile(r"(?<![\d.,/^_}])(\d{1,9}) +(\d{1,4})/(\d{1,4})(?![\d.,]*[\d/^])")
"""Mixed number: 3 1/2 is 7/2."""
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d{1,30}(?:\.\d{1,30})?)[eE]\+?(-?\d{1,3})(?![\w.])", re.ASCII)
_KOREAN_COUNTER = re.compile(r"(?<=\d)\s*(개|명|원|마리|권|번|장|대|살|가지)(?=\s*(?:\}|\Z))")
"""Korean counter after a number at the end."""
_BOXED_MEASURE = re.compile(r"(?<=\\boxed\{)([-+]?[\d.,]{1,99}(?:/\d{1,9})?) ?"
                       r"((?:[A-Za-z]{2}|[A-Za-z](?=/))[A-Za-z/ .]{0,60}(?:\^\{?[23]\}?)?)(?=\})")
"""Box whose content is a number with a unit in plain letters."""
_DELIMITED = re.compile(r"\s*(?:\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\])\s*\.?\s*", re.DOTALL)
_UNREADABLE = re.compile(
    r"\\[lc]?dots(?![A-Za-z])|\.\.\.|…|\\\{\s*[A-Za-z]\w*\s*(?:\\in[^{}]*)?(?:\\mid|\||:)"
    r"|\\(?:text|mathrm|mbox)\s*\{[^{}]*\b(?:is|are|if|when|where|for|not|unless|all|any|[ap]\.?m)\b"
    r"|\([A-J]\)\s*\}?\s+[-\d\\$]", re.IGNORECASE)
"""Parts that `math-verify` drops or misreads in gold answers: dots, set-builder notation, conditions in
words, a choice's letter."""
_BASE = re.compile(r"\d_\{?(\d{1,2})(?!\d)")
_SIGNS = r"[+-]*"
_INTEGER = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!)\d{3})+|\d{1,5000})"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d{{0,5000}})?|\.\d{{1,5000}})"
_LITERAL = re.compile(
    rf"{_SIGNS}(?:(?P<whole>\d{{0,5000}})(?:\\[dt]?frac\{{(?P<over>{_SIGNS}{_DECIMAL})\}}"
    rf"\{{(?P<under>{_SIGNS}{_DECIMAL})\}})"
    rf"|(?P<top>{_DECIMAL})/(?P<bottom>{_DECIMAL})"
    rf"|(?P<number>{_DECIMAL})?(?P<power>(?:(?<=[\d.])(?:\\times|\\cdot|\*|×|·))?10(?:\^|\*\*)"
    rf"(?:\{{[+-]?\d{{1,5}}\}}|[+-]?\d{{1,5}})|[eE][+-]?\d{{1,5}})?)(?:\\?%|\^\{{?\\circ\}}?|°)?", re.ASCII)
"""Literal number without blanks, outer brackets and units."""
_NAME = re.compile(r"\\?[A-Za-z]\w{0,20}(?:_?\{?\w{0,8}\}?)?(?:\(\w{0,8}\))?'*", re.ASCII)
_SIDES = re.compile(r"(?<![\\<>!])=|\\approx|≈|\\in(?![A-Za-z])")
_OPEN_OPERATORS = re.compile(r"\\(?:i{0,3}int|oint|sum|prod|lim|det)(?![A-Za-z])|"
                             r"frac\s*\{\s*(?:d|\\partial)[^{}]*\}\s*\{\s*(?:d|\\partial)\s*[A-Za-z]")
"""Operators that restate a question instead of answering."""
_FORMULA = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end|operatorname)\s*\{[^{}]*\}")
_HEDGES = re.compile(r"n't\b|\b(?:not|never|neither|either|between|among|one of|below|above|unknown|maybe"
                    r"|perhaps|at (?:most|least)|(?:less|greater|more|fewer|other) than)\b|不是|ไม่ใช่",
                     re.IGNORECASE)
"""Words that withdraw the following number."""
_SECOND_NUMBER = re.compile(r"[\s$(]*(?:(?:or|to|and(?!\s+not))\b|또는|이나|或|または|หรือ)[^.]*\d",
                            re.IGNORECASE)
"""A second number after the first."""
_RETRACTION = re.compile(r"[\s$().,;:?!*]*(?:(?:no|wait|actually|sorry|hmm)\s*[,:.]|(?:not sure|could be"
                         r"|maybe|perhaps)\b)", re.IGNORECASE)
"""Retraction after a number: the later number counts."""
_NUMBER_LIST = re.compile(r"\d[$)\]]*(?:,\s+|;\s*|\s+)(?!\d{3}(?!\d))[$(\[]*[-+]?\d[\d.,]*[\s$)\].]*\Z")
"""Adjacent numbers at the end; `math-verify` takes the last."""
_OPEN_BOX = re.compile(r"\\(?:neg|neq?|not|[lc]?dots|pm|mp|lor|vee|[lg]t|propto)(?![A-Za-z])"
                   r"|\\(?:text|mathrm|mbox)\s*\{[^{}]*\b(?:or|wrong|false|incorrect|not|at least|at most)\b")
"""Parts in a box that negate the number or leave the answer open."""
_SCALE = (r"\d[\s$)}]*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?"
          r"(?:(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed)\b")
_SCALED = re.compile(_SCALE + r"|[xyzn](?=[\s$).}]*\Z))", re.IGNORECASE)
_SCALED_GOLD = re.compile(_SCALE + ")", re.IGNORECASE)
"""Multiplying words after a number; `math-verify` reads them as units."""
_NEGATION = re.compile(r"[^\d]{0,8}(?:아(?:니|닙|닌)|않|ではな)")
"""Negation after a number, in languages with the verb at the end."""
_WORD = re.compile(r"[^\W\d_]{2,}")
_SHORT_WORDS = frozenset(("no", "yes", "on", "off", "odd"))
"""Words with at most three letters; other short letter sequences may be products, as in xy."""
_TEXT_ANSWER = re.compile(r"[^\W\d_]+(?:[ ,.'’-]+[^\W\d_]+)*")
_CAPITALS = re.compile(r"[A-Z]{3,}")
_PLAIN_EXPRESSION = re.compile(
    rf"=?\s*((?:\\(?:text|mathrm|mbox)\s*\{{[^{{}}]{{0,60}}\}}|\\[A-Za-z]+|\d[\d.,]*\d|\d|(?:{_FUNCTIONS}|sqrt)(?![A-Za-z])"
    r"|[aAI](?![A-Za-z']| [a-z]{2})|[B-HJ-Zb-z](?![A-Za-z'])|[-+*/^_=(){}\[\]|<>,\s])+)")
"""Start after "the answer is": numbers, single letters, functions and operators."""


@dataclass(frozen=True)
class Math:
    """Reward `math`: 1 for a correct final answer, else 0."""

    LIBRARIES = ("math-verify", "latex2sympy2-extended", "sympy", "antlr4-python3-runtime")
    PRELOAD = ("math_verify",)
    CONTROL = "\\boxed{1}"

    cpu_limit_s: AboveZero = 2.0
    """Processor time per row; answers that take longer to compare score 0."""
    time_limit_s: AboveZero = 60.0
    """Clock time per row; without a free processor the row is judged a second time."""
    tail_chars: AtLeastOne = 20_000
    """Characters read from the end, where the answer is."""
    float_rounding: int = 6
    """Decimals that must agree."""
    strict: bool = True
    """Variables must have the same names, and a set is not a tuple."""
    marked_only: bool = True
    """Require a marked answer (a box, answer tags, "the answer is", or a bare last line). `math-verify` alone
    accepts any number in the text, which rewards listing numbers."""
    literal: bool = True
    """Require a number if the answer is a number: 6 \\times 7 restates the question."""

    def problems(self) -> list[SettingsProblem]:
        is_installed = importlib.util.find_spec("math_verify") is not None
        return [] if is_installed else [
            to_problem(f"math-verify is not installed; {format_install_command('rl')}")]

    def prepare(self) -> None:
        """Import `math_verify`, which must not count towards a row's time."""
        _load_math_verify()

    def score(self, row: Row) -> Score:
        """Compare the response's final answer with the row's `answer`.

        Raises:
            Refused: the answer is missing or not mathematics.
        """
        # Gold answer first: rows that cannot be judged are refused for any response.
        answer = get_text(row, "answer")
        if not 0 < len(answer.strip()) <= MAX_ANSWER_CHARS:
            raise Refused(f"answer has {len(answer):,} characters; it must have 1 to {MAX_ANSWER_CHARS:,}")
        answer = _strip_delimiters(answer)
        # Ignore boxes in thoughts and tool calls.
        content = get_content(row)[-self.tail_chars:]
        if gold_words := _normalize_words(answer):
            if normalize_answer(extract_final_answer(f"\\boxed{{{answer}}}") or "") != gold_words:
                raise _refuse_answer(answer, "is no short text")
            extracted = extract_final_answer(content) or ""
            text = normalize_answer(extracted)
            if _CAPITALS.fullmatch(answer.strip()):
                text = re.sub(r"[\s,]", "", text)
            return Score(float(text == gold_words), {"extracted": extracted[:200]})
        box = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
        gold = self._parse_gold(answer, box)
        # Proof that math-verify reads the whole gold answer: in a box, it equals itself.
        if not self._compare_response(box, gold, _strip_dollars(box))[0]:
            raise _refuse_answer(answer, "is not equal to itself for math-verify, which reads a part of it")
        right, extracted_text = self._compare_response(box, gold, content)
        return Score(float(right), {"extracted": extracted_text[:200]})

    def _compare_response(self, answer: str, gold: list[Any], response: str) -> tuple[bool, str]:
        """Return whether a response states the gold answer, and the extracted answer as LaTeX.

        Args:
            answer: boxed gold answer.
            gold: gold answer parsed by `math-verify`.
            response: response without thoughts and calls.
        """
        response = _to_latex(response, counter=_find_counter(answer))
        parsed = self._parse_response(response, gold)
        # The text form, because printing a number such as 10**10**10 would compute it.
        extracted = next((item for item in reversed(parsed) if isinstance(item, str)), "")
        right = (self._states_value(extracted, parsed, gold, extract_last_box(response) or "")
                 and self._verify(gold, parsed)
                 and not (self.strict and _mixes_set_and_tuple(gold, extracted))
                 and _has_matching_unit(answer, response) and _has_no_scale_word(answer, response)
                 and _has_matching_base(answer, extracted))
        return right, extracted

    def _verify(self, gold: list[Any], parsed: list[Any]) -> bool:
        # Without math-verify's own time limit, which uses signals and needs a main thread.
        return bool(_load_math_verify().verify(gold, parsed, float_rounding=self.float_rounding,
                                               strict=self.strict, timeout_seconds=None))

    def _parse_response(self, response: str, gold: list[Any]) -> list[Any]:
        """Parse the answer in a response: from the last box on, else after an announcement."""
        is_number = all(isinstance(item, str) or getattr(item, "is_number", False) for item in gold)
        boxed = _cut_to_last_boxes(response, alone=is_number)
        if boxed or not self.marked_only:
            return _parse_expressions(boxed, latex_only=True) if boxed else _parse_expressions(response)
        announced = extract_final_answer(response) or ""
        if _is_hedged(announced) or (is_number and _NUMBER_LIST.search(announced)):
            return []
        # math-verify parses plain expressions partially (14 in 14 - i), so they are parsed in a box or
        # rejected.
        if expression := _plain_expression(announced):
            return _parse_expressions(f"\\boxed{{{expression}}}", latex_only=True)
        # Without a box: first after "the answer is", then the last line unless it is prose.
        parsed = _parse_expressions(response, anchored=True)
        if all(isinstance(item, str) for item in parsed):
            parsed = [] if _is_prose(announced) else _parse_expressions(announced)
        return parsed

    def _states_value(self, extracted: str, parsed: list[Any], gold: list[Any], box: str) -> bool:
        """Return whether an answer states the value instead of restating the question."""
        if not self.literal:
            return True
        gold_text = next((item for item in reversed(gold) if isinstance(item, str)), "")
        # sympy considers a restated integral equal to its value.
        if _OPEN_OPERATORS.search(extracted) and not _OPEN_OPERATORS.search(gold_text):
            return False
        *names, last = _SIDES.split(gold_text)
        # An equation must be answered by an equation: x + y = 5 is not 5.
        if any(_is_equation_side(name) for name in names):
            return len(_SIDES.split(extracted)) > 1
        value = literal_value(last)
        is_single_value = all(isinstance(item, str) or getattr(item, "is_number", False)
                              or getattr(item, "is_Relational", False) for item in gold)
        if value is None or not is_single_value:
            return True
        if _OPEN_BOX.search(box):  # math-verify strips words and signs like these
            return False
        *sides, last = _SIDES.split(extracted)
        extracted_value = literal_value(last)
        if extracted_value is None:
            # math-verify may display another match than it parses, such as a number in the text.
            plain = [] if "\\boxed" in extracted else _parse_expressions(extracted, expressions=True)
            return bool(parsed and plain) and getattr(parsed[0], "is_Number", False) and plain[0] == parsed[0]
        # Relative tolerance, because rounding to decimals makes all particle charges equal.
        if not any(math.isclose(extracted_value * factor, value, rel_tol=0.01)
                   # percent and fraction are both accepted: 50 % is 0.5
                   for factor in (1, 100, 0.01)):
            return False
        # The first part in "a + b = 42" may be open; every later part must equal the number.
        for i, side in enumerate(side for side in sides if _strip_brackets(side)):
            read = [] if _NAME.fullmatch(_strip_brackets(side)) else _parse_expressions(f"\\boxed{{{side}}}")
            is_open = i == 0 and "," not in side and bool(read and getattr(read[0], "free_symbols", None))
            if not (_NAME.fullmatch(_strip_brackets(side)) or is_open or self._verify(gold, read)):
                return False
        return True

    def _parse_gold(self, answer: str, box: str) -> list[Any]:
        """Parse a gold answer as LaTeX, in a box unless it contains formulas.

        Raises:
            Refused: `math-verify` cannot parse all parts.
        """
        if unreadable := _UNREADABLE.search(answer) or _SCALED_GOLD.search(answer):
            raise _refuse_answer(answer,
                                 f"has {unreadable[0]!r}, which math-verify ignores; write the value alone")
        has_formulas = re.search(r"\$[^$]+\$|\\[(\[]", answer) and "\\boxed" not in answer
        read = _to_latex(answer if has_formulas else box, counter=_find_counter(box))
        gold = _parse_expressions(read, latex_only=True)
        if not gold or isinstance(gold[0], str):
            raise _refuse_answer(answer, "is no mathematics that math-verify reads")
        plain = _COMMAND.sub(" ", _ENVIRONMENT.sub(" ", str(gold[-1])))
        if word := re.search(r"[A-Za-z]{4,}|\b(?:of|is|to|the|per|out)\b", plain):
            raise _refuse_answer(answer, f"has the word {word[0]!r}, which is no mathematics")
        value = literal_value(answer)
        if value is not None and getattr(gold[0], "is_Number", False) and not any(
                math.isclose(float(gold[0]) * factor, value) for factor in (1, 100, 0.01)):
            raise _refuse_answer(answer, f"is {value:g}, and {float(gold[0]):g} for math-verify")
        # Accept 42 for f(3) = 42, as math-verify does for x = 42.
        name, _, last = str(gold[-1]).rpartition("=")
        if name and literal_value(last) is not None and not _is_equation_side(name):
            number = _parse_expressions(f"\\boxed{{{last}}}", latex_only=True)
            gold = gold if self._verify(gold[:1], number[:1]) else [*number[:1], *gold]
        return gold


def literal_value(text: str) -> float | None:
    """Return the value for a literal number: integer, decimal, mixed number, reduced fraction, scientific
    notation, percentage; None for expressions."""
    match = _LITERAL.fullmatch(_strip_brackets(text))
    # "1, 2" and tuples have several values; "1,000" is a single value.
    several = re.search(r",\s", text) or ("," in text and text.lstrip().startswith(("(", "\\{", "\\left")))
    if match is None or several or not any(char.isdigit() for char in match[0]):
        return None
    # An odd number of leading minus signs is a minus.
    sign = -1.0 if match[0][:len(match[0]) - len(match[0].lstrip("+-"))].count("-") % 2 else 1.0
    try:
        over, under = match["over"] or match["top"], match["under"] or match["bottom"]
        if over:
            # 6/2 restates a division in the question; 7/2 is a value.
            if (above := _parse_number(over)) % (below := _parse_number(under)) == 0:
                return None
            return sign * (float(match["whole"] or 0) + above / below)
        power = re.search(r"[+-]?\d+\}?\Z", match["power"] or "0")
        assert power is not None
        exponent = int(power[0].rstrip("}"))
        return sign * _parse_number(match["number"] or "1") * 10.0 ** exponent
    except (OverflowError, ZeroDivisionError):
        return None


def _refuse_answer(answer: str, why: str) -> Refused:
    return Refused(f"answer = {answer[:80]!r} {why}; a gold answer has to be one value in LaTeX, or words")


def _strip_delimiters(answer: str) -> str:
    """Strip formula delimiters around a whole answer."""
    match = _DELIMITED.fullmatch(answer)
    return next(filter(None, match.groups())).strip() if match else answer


def _strip_dollars(box: str) -> str:
    return box if box.count("$") < 2 else re.sub(r"(?<!\\)\$", "", box)


def _normalize_words(answer: str) -> str:
    """Return the normalized text if a gold answer consists of words; "" for mathematics."""
    text = normalize_answer(answer)
    # An ordering or several choices: as products, ACB would equal ABC.
    if _CAPITALS.fullmatch(answer.strip()):
        return text
    if re.fullmatch(r"\\(?:text|mathrm|mbox)(?:bf|it)?\s*\{[^\W\d_][^{}]*\}", answer.strip()):
        return text if len(text) > 1 else ""
    is_word = any(len(word) > 3 or not word.isascii() or word.lower() in _SHORT_WORDS
                  for word in _WORD.findall(text))
    return text if is_word and _TEXT_ANSWER.fullmatch(text) and text != "infinity" else ""


def _mark_unit(match: re.Match[str]) -> str:
    """Mark a plain unit as text, because `math-verify` would multiply by c and m."""
    is_unit = read_quantity(match[0]) is not None or re.match("[A-Za-z]{3}", match[2])
    is_function = re.match(f"(?:{_FUNCTIONS}|sqrt|infinity)", match[2])
    return f"{match[1]} \\text{{ {match[2]}}}" if is_unit and not is_function else match[0]


def _find_counter(answer: str) -> str:
    match = _KOREAN_COUNTER.search(answer)
    return match[1] if match else ""


def _to_latex(text: str, *, counter: str) -> str:
    """Rewrite numbers and signs for `math-verify`.

    Args:
        text: response, or boxed gold answer.
        counter: the gold answer's Korean counter, which is removed while other counters stay; "": remove all.
    """
    text = text.translate(_UNICODE_TO_LATEX).replace("\\fbox{", "\\boxed{")
    text = _BRACKET.sub(lambda found: _BRACKETS[found[1]],
                        _STYLED_NUMBER.sub(r"\1\2", _STYLES.sub("", text)))
    text = _FRAMED.sub(r"\1", _FULL_STOP.sub("", text.replace("~", " ")))
    text = re.sub(r"(?<=\{)\s*=", "", re.sub(r"\\approx(?![A-Za-z])|≈", "=", text))
    text = _GROUPED_DIGITS.sub(lambda found: found[0].replace(" ", ""), text)
    # Mixed numbers and powers of ten become LaTeX, which math-verify reads as a unit.
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _MIXED.sub(_format_mixed_number, text))
    text = _KOREAN_COUNTER.sub(lambda found: "" if counter in ("", found[1]) else found[0], text)
    return _BOXED_MEASURE.sub(_mark_unit, text)


def _is_equation_side(side: str) -> bool:
    """Return whether a side in a gold equation is an expression with variables rather than a name."""
    bare = _strip_brackets(side)
    has_variable = re.search("[A-Za-z]", _COMMAND.sub("", bare))
    return bool(has_variable and not _NAME.fullmatch(bare)
                and re.search(r"[-+*/^\d]|\\(?:cdot|times|[dt]?frac|sqrt)", bare))


def _plain_expression(announced: str) -> str:
    """Return the expression at the start of an announced answer, unless it is a plain number, name or
    quantity; else ""."""
    match = _PLAIN_EXPRESSION.match(announced)
    expression = re.sub(r"[-+*/^_=(\[<>,\s]+\Z", "", match[1]) if match else ""
    is_more = re.search(rf"[-+*/^=(\[{{<>]|\\|(?:{_FUNCTIONS})(?![A-Za-z])", expression)
    is_number = literal_value(expression) is not None or read_quantity(expression) is not None
    return expression if is_more and not is_number else ""


def _mixes_set_and_tuple(gold: list[Any], extracted: str) -> bool:
    """Return whether one answer is a set and the other a tuple or interval, which `sympy` would not
    distinguish."""
    gold_text = next((item for item in reversed(gold) if isinstance(item, str)), "")
    gold_value, value = (re.sub(r"\\(?:left|right)(?![A-Za-z])|[\s$]", "", _SIDES.split(text)[-1])
                         for text in (gold_text, extracted))
    return any(_SET.fullmatch(a) and _TUPLE.fullmatch(b)
               for a, b in ((gold_value, value), (value, gold_value)))


def _has_matching_unit(answer: str, response: str) -> bool:
    """Return whether units agree, because `math-verify` drops units and 5 m would equal 5 km; missing or
    unknown units match."""
    gold_quantity = read_quantity(extract_last_box(answer) or answer)
    quantity = read_quantity(extract_final_answer(response) or "")
    if gold_quantity is None or quantity is None or None in (gold_quantity.dimension, quantity.dimension):
        return True
    return are_equal_quantities(gold_quantity, quantity, UNIT_TOLERANCE)


def _has_no_scale_word(answer: str, response: str) -> bool:
    """Return whether no "million" or "x" follows the number, if the gold answer is a number."""
    extracted = extract_last_box(response) or extract_final_answer(response) or ""
    return literal_value(extract_last_box(answer) or answer) is None or not _SCALED.search(extracted)


def _has_matching_base(answer: str, extracted: str) -> bool:
    """Return whether bases as in 101_2 agree, because `math-verify` drops them."""
    gold_bases, bases = (_BASE.findall(text) for text in (answer, extracted))
    return not gold_bases or not bases or gold_bases[-1] == bases[-1]


def _format_mixed_number(mixed: re.Match[str]) -> str:
    integer, over, under = mixed.groups()
    return f"{integer}\\frac{{{over}}}{{{under}}}" if 0 < int(over) < int(under) else mixed[0]


def _is_hedged(announced: str) -> bool:
    """Return whether an announcement mentions a number without committing to it: "not 42", "more than 41",
    "42 or 43", "42. No, 43"."""
    before = re.match(r"[^\d\\$]*", announced)
    first = re.match(r"[^\d]*[\d.,]*\d", announced)
    following = announced[first.end():first.end() + 40] if first else ""
    numbers = re.findall(r"\d[\d.,]*\d|\d", announced)
    return any((_HEDGES.search(before[0] if before else ""), _NEGATION.match(following),
                _SECOND_NUMBER.match(following),
                # "42. Wait, let me see: 6 * 7 = 42" repeats the number.
                _RETRACTION.match(following) and numbers[-1] != numbers[0]))


def _is_prose(line: str) -> bool:
    """Return whether a last line is prose rather than an answer: "between 1 and 42"."""
    plain, formulas = _FORMULA.subn(" ", line)
    is_single_formula = formulas == 1 and not any(char.isdigit() for char in plain)
    return not is_single_formula and len(_WORD.findall(_COMMAND.sub(" ", plain))) > 1


def _parse_number(digits: str) -> float:
    sign = -1 if digits.count("-") % 2 else 1
    return sign * float(re.sub(r"[^\d.]", "", digits))


def _strip_brackets(text: str) -> str:
    """Strip blanks, dollars, outer brackets and text commands."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![A-Za-z])|\\[;: ]|[\s$~]", "", text)
    text = text.strip("*").rstrip(".").removeprefix("\\{").removesuffix("\\}")
    # Outer brackets, however many.
    while text[:1] + text[-1:] in ("()", "{}"):
        text = text[1:-1]
    return text


def _cut_to_last_boxes(response: str, *, alone: bool) -> str:
    """Return a response from its last box on, including earlier boxes that form a single answer; "" without a
    box.

    Args:
        response: complete response.
        alone: the answer is a single number, so adjacent boxes are corrections.
    """
    text = re.sub(r"\\boxed\s+\{", r"\\boxed{", re.sub(r"\\boxed\s*\{\s*\}", "", response))  # empty
    # A nested box belongs to the outer answer.
    text = re.sub(r"(\\boxed\{[^{}]{0,1000})\\boxed(?=\{)", r"\1", text)
    end, start = len(text), -1
    # Backwards from the end, up to the first box that does not belong to the answer.
    for _ in range(MAX_BOXES):
        place = find_last_box(text[:end])
        if place is None:
            break
        between = text[place[1]:start]
        if start >= 0 and not (_BOX_SEPARATORS.fullmatch(between)
                               and (not alone or between.strip(" \n$\\()[]"))):
            break
        start = end = place[0]
    return text[start:] if start >= 0 else ""


@lru_cache
def _load_math_verify() -> Any:
    import math_verify  # optional package; imports sympy, which takes seconds

    for name in ("math_verify", "latex2sympy2_extended"):  # both log every response without a formula
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return math_verify


def _parse_expressions(text: str, *, anchored: bool = False, expressions: bool = False,
                       latex_only: bool = False) -> list[Any]:
    """Parse text with `math-verify`; return expressions and their text.

    Args:
        text: text with boxes or formulas, or plain text.
        anchored: only after an announcement.
        expressions: only numbers and expressions without LaTeX.
        latex_only: only formulas and boxes, without falling back to the last number.
    """
    library = _load_math_verify()
    # `not anchored` also tries a match without an announcement.
    kinds = [library.ExprExtractionConfig(not anchored)]
    if not expressions:
        kinds = [library.LatexExtractionConfig(not anchored), *([] if latex_only else kinds)]
    # math-verify joins adjacent boxes by commas, and reads 20 and 204 as 20,204.
    text = _ROOT.sub(r"\\sqrt{\1}", _THOUSANDS.sub("", text).replace("infinity", "infty"))
    text = _PLAIN_FUNCTION.sub(r"\\", text)
    first, *more = text.split("\\boxed")
    more[1:] = [_THREE_DIGITS.sub(r"{\\,", box) for box in more[1:]]
    return list(library.parse("\\boxed".join([first, *more]), kinds, parsing_timeout=None))
