"""Math: whether a response's final answer equals the known one, by math-verify (Apache-2.0, extra `rl`).

math-verify reads LaTeX and plain expressions and compares them with sympy.  Its own limits of time are
signals, which need a main thread and do not stop C code; here the process that judges is ended instead.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import format_install_command
from megatron_sov.base.settings import AboveZero, AtLeastOne, SettingsProblem, to_problem
from megatron_sov.judge.rewards.answers import (
    final_answer, last_box, last_boxed, normalized, read_quantity, same)
from megatron_sov.judge.rewards.reward import Refused, Row, Score, content_of, text_of

MAX_ANSWER_CHARS = 10_000
MAX_BOXES = 12
"""That are read as one answer of several values."""
UNIT_TOLERANCE = 0.01
"""Numbers are compared by math-verify; one with a prefix too many is off by ten at least."""
_FULL_STOP = re.compile(r"(?<=\d)\.(?=\s*\}(?:[^{}]|\Z))")
"""At the end of a box: 42. is 42."""
_SPELLED = str.maketrans({"\u2212": "-", "\uff0d": "-", "°": "^{\\circ}", "∞": "\\infty ", "≤": "\\le ",
                          "≥": "\\ge ", "≠": "\\neq ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}",
                          **{chr(0xff10 + digit): str(digit) for digit in range(10)}})
"""Unicode signs, and digits as East Asian keyboards write them -> LaTeX that math-verify reads."""
_BRACKETS = {"langle": "(", "rangle": ")", "lbrace": "\\{", "rbrace": "\\}", "varnothing": "\\emptyset"}
_BRACKET = re.compile(rf"\\({'|'.join(_BRACKETS)})(?![A-Za-z])\s*")
"""Commands that math-verify does not read -> those that it reads."""
_FUNCTIONS = "pi|infty|(?:arc)?(?:sin|cos|tan)|sec|csc|cot|(?:sin|cos|tan)h|ln|log|exp|max|min|gcd|lcm|det"
_PLAIN_FUNCTION = re.compile(rf"(?<![\\A-Za-z])(?={_FUNCTIONS})(?=(?:{_FUNCTIONS})(?![A-Za-z]))")
"""The place before a function or constant without its backslash: sin(x) would be s times i times n(x)."""
_STYLED_NUMBER = re.compile(r"\\(?:math|text)(?:bf|rm|it|sf|tt|normal)?\s*\{([-+\d.,]+)( [^{}]*)?\}")
_ROOT = re.compile(r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)")
_GROUPED_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])")
"""1 000, which LaTeX reads as a product."""
_DRESS = re.compile(r"\\(?:text)?color\s*\{\w+\}|\\(?:boldsymbol|bm|underline)(?=\s*\{)|(?<=\{)\\[,;:!]")
"""Colour, weight, a line under it and a narrow space at its begin: nothing of an answer's value."""
_FRAMED = re.compile(r"(?<=\\boxed\{)\s*(?:\\[(\[]|\$)"
                     r"((?:(?!\\[()\[\]]|\$).){1,1000})(?:\\[)\]]|\$)\s*(?=\})", re.S)
"""All of a box as a formula in it: \\boxed{\\(42\\)}."""
_SET = re.compile(r"\\(?:\{|lbrace).*\\(?:\}|rbrace)", re.DOTALL)
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_THOUSANDS = re.compile(r"(?<=\d)\\[,!;: ]\s*(?=\d{3}(?!\d))")
"""LaTeX's narrow spaces between groups of three digits, which math-verify takes for a product."""
_THREE_DIGITS = re.compile(r"\A\s*\{\s*(?=\d{3}(?!\d))")
_BETWEEN = re.compile(r"(?:[\s$,;]|\\[()\[\]]|\b(?:and|or)\b)*", re.IGNORECASE)
"""Between boxes that are one answer of several values: all else makes the last one a correction."""
_MIXED = re.compile(r"(?<![\d.,/^_}])(\d{1,9}) +(\d{1,4})/(\d{1,4})(?![\d.,]*[\d/^])")
"""3 1/2, which is 7/2, and nothing where the fraction is no part of one."""
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d{1,30}(?:\.\d{1,30})?)[eE]\+?(-?\d{1,3})(?![\w.])", re.ASCII)
_COUNTED = re.compile(r"(?<=\d)\s*(개|명|원|마리|권|번|장|대|살|가지)(?=\s*(?:\}|\Z))")
"""A Korean counter after a number that is the whole of an answer."""
_MEASURED = re.compile(r"(?<=\\boxed\{)([-+]?[\d.,]{1,99}(?:/\d{1,9})?) ?"
                       r"((?:[A-Za-z]{2}|[A-Za-z](?=/))[A-Za-z/ .]{0,60}(?:\^\{?[23]\}?)?)(?=\})")
"""All of a box as a number with a unit in plain letters."""
_DELIMITED = re.compile(r"\s*(?:\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\])\s*\.?\s*", re.DOTALL)
_UNREADABLE = re.compile(
    r"\\[lc]?dots(?![A-Za-z])|\.\.\.|…|\\\{\s*[A-Za-z]\w*\s*(?:\\in[^{}]*)?(?:\\mid|\||:)"
    r"|\\(?:text|mathrm|mbox)\s*\{[^{}]*\b(?:is|are|if|when|where|for|not|unless|all|any|[ap]\.?m)\b"
    r"|\([A-J]\)\s*\}?\s+[-\d\\$]", re.IGNORECASE)
"""Parts of a gold answer that math-verify drops or misreads: dots, a set by its property, a condition in
words, the letter of a choice before its value."""
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
"""A number as it is written, blanks, brackets around it and units taken away."""
_NAME = re.compile(r"\\?[A-Za-z]\w{0,20}(?:_?\{?\w{0,8}\}?)?(?:\(\w{0,8}\))?'*", re.ASCII)
_SIDES = re.compile(r"(?<![\\<>!])=|\\approx|≈|\\in(?![A-Za-z])")
_UNDONE = re.compile(r"\\(?:i{0,3}int|oint|sum|prod|lim|det)(?![A-Za-z])|frac\s*\{\s*(?:d|\\partial)[^{}]*\}"
                     r"\s*\{\s*(?:d|\\partial)\s*[A-Za-z]")
"""Operators that state a question and answer none."""
_FORMULA = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end|operatorname)\s*\{[^{}]*\}")
_HEDGE = re.compile(r"n't\b|\b(?:not|never|neither|either|between|among|one of|below|above|unknown|maybe"
                    r"|perhaps|at (?:most|least)|(?:less|greater|more|fewer|other) than)\b|不是|ไม่ใช่",
                    re.IGNORECASE)
"""Words before a number that make it none that is given as the answer."""
_ANOTHER = re.compile(r"[\s$(]*(?:(?:or|to|and(?!\s+not))\b|또는|이나|或|または|หรือ)[^.]*\d", re.IGNORECASE)
"""Behind a number: another one."""
_TAKEN_BACK = re.compile(r"[\s$().,;:?!*]*(?:(?:no|wait|actually|sorry|hmm)\s*[,:.]|(?:not sure|could be"
                         r"|maybe|perhaps)\b)", re.IGNORECASE)
"""Behind a number that was said too early: what comes behind this counts."""
_LISTED = re.compile(r"\d[$)\]]*(?:,\s+|;\s*|\s+)(?!\d{3}(?!\d))[$(\[]*[-+]?\d[\d.,]*[\s$)\].]*\Z")
"""At the end: numbers beside each other, of which math-verify takes the last one."""
_OPEN = re.compile(r"\\(?:neg|neq?|not|[lc]?dots|pm|mp|lor|vee|[lg]t|propto)(?![A-Za-z])"
                   r"|\\(?:text|mathrm|mbox)\s*\{[^{}]*\b(?:or|wrong|false|incorrect|not|at least|at most)\b")
"""In a box: what takes its number back, or leaves it open."""
_SCALE = (r"\d[\s$)}]*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?"
          r"(?:(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed)\b")
_SCALED = re.compile(_SCALE + r"|[xyzn](?=[\s$).}]*\Z))", re.IGNORECASE)
_SCALED_GOLD = re.compile(_SCALE + ")", re.IGNORECASE)
"""Words after a number that multiply it, and that math-verify takes for a unit."""
_DENIED = re.compile(r"[^\d]{0,8}(?:아(?:니|닙|닌)|않|ではな)")
"""Behind a number, where verbs stand there: that it is not the answer."""
_WORD = re.compile(r"[^\W\d_]{2,}")
_SHORT_WORDS = frozenset(("no", "yes", "on", "off", "odd"))
"""Answers of at most three letters that are words; other letters may be a product, as in xy."""
_TEXT_ANSWER = re.compile(r"[^\W\d_]+(?:[ ,.'’-]+[^\W\d_]+)*")
_CAPITALS = re.compile(r"[A-Z]{3,}")
_PLAIN_EXPRESSION = re.compile(
    rf"=?\s*((?:\\(?:text|mathrm|mbox)\s*\{{[^{{}}]{{0,60}}\}}|\\[A-Za-z]+|\d[\d.,]*\d|\d|(?:{_FUNCTIONS}|sqrt)(?![A-Za-z])"
    r"|[aAI](?![A-Za-z']| [a-z]{2})|[B-HJ-Zb-z](?![A-Za-z'])|[-+*/^_=(){}\[\]|<>,\s])+)")
"""At the beginning of what follows "the answer is": numbers, single letters, functions and operators."""


@dataclass(frozen=True)
class Math:
    """1 for a right final answer, 0 for a wrong one or none."""

    LIBRARIES = ("math-verify", "latex2sympy2-extended", "sympy", "antlr4-python3-runtime")
    PRELOAD = ("math_verify",)
    CONTROL = "\\boxed{1}"

    cpu_limit_s: AboveZero = 2.0
    """Of a processor, for a row; an answer that takes longer to compare is worth 0."""
    time_limit_s: AboveZero = 60.0
    """By the clock; a judge that has no processor for so long judges the row once more."""
    tail_chars: AtLeastOne = 20_000
    """Only so much of the response's end is read: the answer stands there."""
    float_rounding: int = 6
    """Decimals to which numbers have to agree."""
    strict: bool = True
    """Variables have to have the same names, and a set is no tuple."""
    marked_only: bool = True
    """A response has to mark its answer (a box, answer tags, "the answer is", a last line that is nothing
    else); math-verify by itself takes any number in the text, so a response that lists numbers is paid."""
    literal: bool = True
    """Where the answer is a number, a response has to give the number: 6 \\times 7 restates a question."""

    def problems(self) -> list[SettingsProblem]:
        found = importlib.util.find_spec("math_verify") is not None
        return [] if found else [to_problem(f"math-verify is not installed; {format_install_command('rl')}")]

    def prepare(self) -> None:
        """Import what judges, so that the first row does not wait for it."""
        import math_verify

        # sympy takes seconds to import, which no row's time has to pay
        assert math_verify  # imported for its effect
        for name in ("math_verify", "latex2sympy2_extended"):  # they tell each response that is no formula
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def score(self, row: Row) -> Score:
        """Return whether the last answer of the response equals the row's `answer`.

        Raises:
            Refused: the row has no answer, or one that is no mathematics.
        """
        # the gold answer first: a row that cannot be judged is refused whatever the response says
        answer = text_of(row, "answer")
        if not 0 < len(answer.strip()) <= MAX_ANSWER_CHARS:
            raise Refused(f"answer has {len(answer):,} characters; it must have 1 to {MAX_ANSWER_CHARS:,}")
        answer = _undelimited(answer)
        # a box in the thoughts of a response, or in a call, is no answer of it
        said = content_of(row)[-self.tail_chars:]
        if wanted := _as_text(answer):
            if normalized(final_answer(f"\\boxed{{{answer}}}") or "") != wanted:
                raise _refused(answer, "is no short text")
            given = final_answer(said) or ""
            text = normalized(given)
            if _CAPITALS.fullmatch(answer.strip()):
                text = re.sub(r"[\s,]", "", text)
            return Score(float(text == wanted), {"extracted": given[:200]})
        box = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
        gold = self._gold(answer, box)
        # the proof that the answer was read whole and can be judged: in a box, it equals itself
        if not self._verdict(box, gold, _without_dollars(box))[0]:
            raise _refused(answer, "is not equal to itself for math-verify, which reads a part of it")
        right, shown = self._verdict(box, gold, said)
        return Score(float(right), {"extracted": shown[:200]})

    def _verdict(self, answer: str, gold: list[Any], said: str) -> tuple[bool, str]:
        """Return whether a response gives the gold answer, and the answer that it gives, as LaTeX.

        Args:
            answer: the gold answer in a box.
            gold: the gold answer as math-verify reads it.
            said: the response without thoughts and calls.
        """
        said = _in_latex(said, counter=_counter_of(answer))
        found = self._found(said, gold)
        # the text, since showing a number such as 10**10**10 would compute it
        shown = next((item for item in reversed(found) if isinstance(item, str)), "")
        right = (self._states(shown, found, gold, last_boxed(said) or "") and self._equal(gold, found)
                 and not (self.strict and _is_of_other_kind(gold, shown))
                 and _has_its_unit(answer, said) and _has_its_scale(answer, said)
                 and _has_its_base(answer, shown))
        return right, shown

    def _equal(self, gold: list[Any], found: list[Any]) -> bool:
        from math_verify import verify

        # no limit of time of its own: those are signals, and need a main thread
        return bool(verify(gold, found, float_rounding=self.float_rounding, strict=self.strict,
                           timeout_seconds=None))

    def _found(self, response: str, gold: list[Any]) -> list[Any]:
        """Return the answer of a response as math-verify reads it: from the last box on, else where an answer
        is announced."""
        is_number = all(isinstance(item, str) or getattr(item, "is_number", False) for item in gold)
        boxed = _from_last_boxes(response, alone=is_number)
        if boxed or not self.marked_only:
            return _parsed(boxed, latex_only=True) if boxed else _parsed(response)
        said = final_answer(response) or ""
        if _is_hedged(said) or (is_number and _LISTED.search(said)):
            return []
        # math-verify reads plain expressions in part (14 of 14 - i): they are read in a box, or not at all
        if expression := _plain_expression(said):
            return _parsed(f"\\boxed{{{expression}}}", latex_only=True)
        # no box: first where "the answer is" stands, then the last line, unless that is prose
        found = _parsed(response, anchored=True)
        if all(isinstance(item, str) for item in found):
            found = [] if _is_prose(said) else _parsed(said)
        return found

    def _states(self, shown: str, found: list[Any], gold: list[Any], box: str) -> bool:
        """Return whether an answer gives what was asked for, and does not ask for it again."""
        if not self.literal:
            return True
        wanted = next((item for item in reversed(gold) if isinstance(item, str)), "")
        # an integral written down again equals its value for sympy, and answers nothing
        if _UNDONE.search(shown) and not _UNDONE.search(wanted):
            return False
        *names, last = _SIDES.split(wanted)
        # an equation is answered by an equation, and has no value: x + y = 5 is not 5
        if any(_is_side_of_equation(name) for name in names):
            return len(_SIDES.split(shown)) > 1
        value = literal_value(last)
        is_one = all(isinstance(item, str) or getattr(item, "is_number", False)
                     or getattr(item, "is_Relational", False) for item in gold)
        if value is None or not is_one:
            return True
        if _OPEN.search(box):  # math-verify takes words and such signs away
            return False
        *sides, last = _SIDES.split(shown)
        given = literal_value(last)
        if given is None:
            # what math-verify shows may be another match than the one that it reads: a number in the text
            plain = [] if "\\boxed" in shown else _parsed(shown, expressions=True)
            return bool(found and plain) and getattr(found[0], "is_Number", False) and plain[0] == found[0]
        # relative: math-verify rounds to decimals, by which all charges of particles are equal
        if not any(math.isclose(given * factor, value, rel_tol=0.01)
                   # percent and share are both accepted: 50 % is 0.5
                   for factor in (1, 100, 0.01)):
            return False
        # "a + b = 42" leaves open what its beginning is; all else before the number has to be the number
        for i, side in enumerate(side for side in sides if _bare(side)):
            read = [] if _NAME.fullmatch(_bare(side)) else _parsed(f"\\boxed{{{side}}}")
            is_open = i == 0 and "," not in side and bool(read and getattr(read[0], "free_symbols", None))
            if not (_NAME.fullmatch(_bare(side)) or is_open or self._equal(gold, read)):
                return False
        return True

    def _gold(self, answer: str, box: str) -> list[Any]:
        """Return a gold answer as math-verify reads it: always LaTeX, in a box unless it has formulas.

        Raises:
            Refused: math-verify does not read it, or reads a part of it.
        """
        if found := _UNREADABLE.search(answer) or _SCALED_GOLD.search(answer):
            raise _refused(answer, f"has {found[0]!r}, which math-verify leaves out; write the value alone")
        has_formulas = re.search(r"\$[^$]+\$|\\[(\[]", answer) and "\\boxed" not in answer
        read = _in_latex(answer if has_formulas else box, counter=_counter_of(box))
        gold = _parsed(read, latex_only=True)
        if not gold or isinstance(gold[0], str):
            raise _refused(answer, "is no mathematics that math-verify reads")
        plain = _COMMAND.sub(" ", _ENVIRONMENT.sub(" ", str(gold[-1])))
        if word := re.search(r"[A-Za-z]{4,}|\b(?:of|is|to|the|per|out)\b", plain):
            raise _refused(answer, f"has the word {word[0]!r}, which is no mathematics")
        value = literal_value(answer)
        if value is not None and getattr(gold[0], "is_Number", False) and not any(
                math.isclose(float(gold[0]) * factor, value) for factor in (1, 100, 0.01)):
            raise _refused(answer, f"is {value:g}, and {float(gold[0]):g} for math-verify")
        # f(3) = 42 is given by 42 too, as x = 42 is for math-verify
        name, _, last = str(gold[-1]).rpartition("=")
        if name and literal_value(last) is not None and not _is_side_of_equation(name):
            number = _parsed(f"\\boxed{{{last}}}", latex_only=True)
            gold = gold if self._equal(gold[:1], number[:1]) else [*number[:1], *gold]
        return gold


def literal_value(text: str) -> float | None:
    """Return the number that a text is, written out: whole, decimal, mixed, a fraction that is no whole
    number, in scientific notation, with a sign of percent; None for expressions that have to be computed."""
    found = _LITERAL.fullmatch(_bare(text))
    # "1, 2" and tuples are several values; "1,000" is one
    several = re.search(r",\s", text) or ("," in text and text.lstrip().startswith(("(", "\\{", "\\left")))
    if found is None or several or not any(char.isdigit() for char in found[0]):
        return None
    # an odd number of minus signs in front is a minus
    sign = -1.0 if found[0][:len(found[0]) - len(found[0].lstrip("+-"))].count("-") % 2 else 1.0
    try:
        over, under = found["over"] or found["top"], found["under"] or found["bottom"]
        if over:
            # 6/2 restates a division that the question asks for; 7/2 is a value
            if (above := _number(over)) % (below := _number(under)) == 0:
                return None
            return sign * (float(found["whole"] or 0) + above / below)
        power = re.search(r"[+-]?\d+\}?\Z", found["power"] or "0")
        assert power is not None
        exponent = int(power[0].rstrip("}"))
        return sign * _number(found["number"] or "1") * 10.0 ** exponent
    except (OverflowError, ZeroDivisionError):
        return None


def _refused(answer: str, why: str) -> Refused:
    return Refused(f"answer = {answer[:80]!r} {why}; a gold answer has to be one value in LaTeX, or words")


def _undelimited(answer: str) -> str:
    """Return an answer without the delimiters of a formula around the whole of it."""
    found = _DELIMITED.fullmatch(answer)
    return next(filter(None, found.groups())).strip() if found else answer


def _without_dollars(box: str) -> str:
    return box if box.count("$") < 2 else re.sub(r"(?<!\\)\$", "", box)


def _as_text(answer: str) -> str:
    """Return a gold answer of words as it is compared, by letters; empty: it is mathematics."""
    text = normalized(answer)
    # an order, or a choice of several letters: as a product ACB would equal ABC
    if _CAPITALS.fullmatch(answer.strip()):
        return text
    if re.fullmatch(r"\\(?:text|mathrm|mbox)(?:bf|it)?\s*\{[^\W\d_][^{}]*\}", answer.strip()):
        return text if len(text) > 1 else ""
    is_word = any(len(word) > 3 or not word.isascii() or word.lower() in _SHORT_WORDS
                  for word in _WORD.findall(text))
    return text if is_word and _TEXT_ANSWER.fullmatch(text) and text != "infinity" else ""


def _with_marked_unit(found: re.Match[str]) -> str:
    """Return a quantity with its plain unit marked as text: math-verify would multiply by c and m."""
    is_unit = read_quantity(found[0]) is not None or re.match("[A-Za-z]{3}", found[2])
    is_function = re.match(f"(?:{_FUNCTIONS}|sqrt|infinity)", found[2])
    return f"{found[1]} \\text{{ {found[2]}}}" if is_unit and not is_function else found[0]


def _counter_of(answer: str) -> str:
    found = _COUNTED.search(answer)
    return found[1] if found else ""


def _in_latex(text: str, *, counter: str) -> str:
    """Return a text with its numbers and signs as math-verify reads them.

    Args:
        text: a response, or a gold answer in a box.
        counter: Korean counter of the gold answer; another one stays, and makes another answer. Empty: all
            go.
    """
    text = text.translate(_SPELLED).replace("\\fbox{", "\\boxed{")
    text = _BRACKET.sub(lambda found: _BRACKETS[found[1]], _STYLED_NUMBER.sub(r"\1\2", _DRESS.sub("", text)))
    text = _FRAMED.sub(r"\1", _FULL_STOP.sub("", text.replace("~", " ")))
    text = re.sub(r"(?<=\{)\s*=", "", re.sub(r"\\approx(?![A-Za-z])|≈", "=", text))
    text = _GROUPED_DIGITS.sub(lambda found: found[0].replace(" ", ""), text)
    # mixed numbers and powers of ten go in as LaTeX, in which math-verify cannot take them apart
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _MIXED.sub(_as_fraction, text))
    text = _COUNTED.sub(lambda found: "" if counter in ("", found[1]) else found[0], text)
    return _MEASURED.sub(_with_marked_unit, text)


def _is_side_of_equation(side: str) -> bool:
    """Return whether a side of a gold equation is an expression in variables, and no name of a value."""
    bare = _bare(side)
    has_variable = re.search("[A-Za-z]", _COMMAND.sub("", bare))
    return bool(has_variable and not _NAME.fullmatch(bare)
                and re.search(r"[-+*/^\d]|\\(?:cdot|times|[dt]?frac|sqrt)", bare))


def _plain_expression(said: str) -> str:
    """Return the expression that an announced answer begins with, if that is more than a number, a name or a
    quantity with its unit; else an empty text."""
    found = _PLAIN_EXPRESSION.match(said)
    expression = re.sub(r"[-+*/^_=(\[<>,\s]+\Z", "", found[1]) if found else ""
    is_more = re.search(rf"[-+*/^=(\[{{<>]|\\|(?:{_FUNCTIONS})(?![A-Za-z])", expression)
    is_number = literal_value(expression) is not None or read_quantity(expression) is not None
    return expression if is_more and not is_number else ""


def _is_of_other_kind(gold: list[Any], shown: str) -> bool:
    """Return whether one is written as a set and the other as a tuple or interval: sympy takes the first for
    whatever the second is."""
    wanted = next((item for item in reversed(gold) if isinstance(item, str)), "")
    one, other = (re.sub(r"\\(?:left|right)(?![A-Za-z])|[\s$]", "", _SIDES.split(text)[-1])
                  for text in (wanted, shown))
    return any(_SET.fullmatch(a) and _TUPLE.fullmatch(b) for a, b in ((one, other), (other, one)))


def _has_its_unit(answer: str, response: str) -> bool:
    """Return whether a response gives no other unit than the answer's: math-verify takes units away, and 5 m
    would be 5 km.  A unit that either leaves out, or that is not known, is no other one."""
    wanted = read_quantity(last_boxed(answer) or answer)
    given = read_quantity(final_answer(response) or "")
    if wanted is None or given is None or wanted.dimension is None or given.dimension is None:
        return True
    return same(wanted, given, UNIT_TOLERANCE)


def _has_its_scale(answer: str, response: str) -> bool:
    """Return whether a response says no "million" or "x" behind its number, where the answer is one."""
    said = last_boxed(response) or final_answer(response) or ""
    return literal_value(last_boxed(answer) or answer) is None or not _SCALED.search(said)


def _has_its_base(answer: str, shown: str) -> bool:
    """Return whether a response has no other base than 101_2; math-verify leaves the 2 out."""
    wanted, given = (_BASE.findall(text) for text in (answer, shown))
    return not wanted or not given or wanted[-1] == given[-1]


def _as_fraction(mixed: re.Match[str]) -> str:
    whole, over, under = mixed.groups()
    return f"{whole}\\frac{{{over}}}{{{under}}}" if 0 < int(over) < int(under) else mixed[0]


def _is_hedged(said: str) -> bool:
    """Return whether what stands behind "the answer is" names a number that it does not give as the answer:
    "not 42", "more than 41", "42 or 43", "42. No, 43"."""
    before = re.match(r"[^\d\\$]*", said)
    first = re.match(r"[^\d]*[\d.,]*\d", said)
    behind = said[first.end():first.end() + 40] if first else ""
    numbers = re.findall(r"\d[\d.,]*\d|\d", said)
    return any((_HEDGE.search(before[0] if before else ""), _DENIED.match(behind), _ANOTHER.match(behind),
                # "42. Wait, let me see: 6 * 7 = 42" comes to the same
                _TAKEN_BACK.match(behind) and numbers[-1] != numbers[0]))


def _is_prose(said: str) -> bool:
    """Return whether a last line tells something instead of being an answer, as "between 1 and 42"."""
    plain, formulas = _FORMULA.subn(" ", said)
    is_one = formulas == 1 and not any(char.isdigit() for char in plain)
    return not is_one and len(_WORD.findall(_COMMAND.sub(" ", plain))) > 1


def _number(digits: str) -> float:
    sign = -1 if digits.count("-") % 2 else 1
    return sign * float(re.sub(r"[^\d.]", "", digits))


def _bare(text: str) -> str:
    """Return an answer without blanks, dollars, brackets around it and text marks."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![A-Za-z])|\\[;: ]|[\s$~]", "", text)
    text = text.strip("*").rstrip(".").removeprefix("\\{").removesuffix("\\}")
    # brackets around the whole, however many
    while text[:1] + text[-1:] in ("()", "{}"):
        text = text[1:-1]
    return text


def _from_last_boxes(response: str, *, alone: bool) -> str:
    """Return a response from its last box on, with those beside it that make one answer of several values;
    empty: it has no box.

    Args:
        response: all of it.
        alone: whether the answer is one number: boxes with nothing at all between them are corrections then.
    """
    text = re.sub(r"\\boxed\s+\{", r"\\boxed{", re.sub(r"\\boxed\s*\{\s*\}", "", response))  # no answer
    # a box in a box is a part of the outer one's answer
    text = re.sub(r"(\\boxed\{[^{}]{0,1000})\\boxed(?=\{)", r"\1", text)
    end, start = len(text), -1
    # backwards from the end: the first box that does not belong to the others ends the answer
    for _ in range(MAX_BOXES):
        place = last_box(text[:end])
        if place is None:
            break
        between = text[place[1]:start]
        if start >= 0 and not (_BETWEEN.fullmatch(between) and (not alone or between.strip(" \n$\\()[]"))):
            break
        start = end = place[0]
    return text[start:] if start >= 0 else ""


def _parsed(text: str, *, anchored: bool = False, expressions: bool = False, latex_only: bool = False
            ) -> list[Any]:
    """Return the expression that math-verify reads, with its text.

    Args:
        text: with boxes, formulas, or plain.
        anchored: only where an answer is announced.
        expressions: only numbers and expressions without LaTeX.
        latex_only: only formulas and boxes, without the fallback to the last number of a text.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # `not anchored` also tries a match without an announcement before it
    kinds = [ExprExtractionConfig(not anchored)]
    if not expressions:
        kinds = [LatexExtractionConfig(not anchored), *([] if latex_only else kinds)]
    # it joins boxes that stand together by commas, and then reads 20 and 204 as 20,204: twenty thousand
    text = _ROOT.sub(r"\\sqrt{\1}", _THOUSANDS.sub("", text).replace("infinity", "infty"))
    text = _PLAIN_FUNCTION.sub(r"\\", text)
    first, *more = text.split("\\boxed")
    more[1:] = [_THREE_DIGITS.sub(r"{\\,", box) for box in more[1:]]
    return list(parse("\\boxed".join([first, *more]), kinds, parsing_timeout=None))
