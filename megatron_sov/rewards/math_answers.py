"""Math: whether a response's final answer equals the known one, by math-verify (Apache-2.0, extra `rl`).

math-verify reads LaTeX and plain expressions and compares them with sympy.  Its own limits of time are
signals, which need a main thread and do not stop C code; here the process that judges is ended instead.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import dataclass
from typing import Any

from megatron_sov.errors import how_to_install
from megatron_sov.rewards.answers import final_answer
from megatron_sov.rewards.reward import Refused, Row, Score, text_of

DELIMITERS = ("$", "\\(", "\\[", "\\boxed", "\\begin")
"""What says that an answer is LaTeX; without, math-verify takes the 3 of 3\\sqrt{2} for the whole of it."""
MAX_ANSWER_CHARS = 10_000
_THREE_DIGITS = re.compile(r"\A\s*\{\s*(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class Math:
    """1 for a right final answer, 0 for a wrong one or none."""

    LIBRARIES = ("math-verify", "latex2sympy2-extended", "sympy", "antlr4-python3-runtime")
    PRELOAD = ("math_verify",)
    CONTROL = "\\boxed{1}"

    cpu_limit_s: float = 2.0
    """Of a processor, for a row; an answer that takes longer to compare is worth 0."""
    time_limit_s: float = 60.0
    """By the clock; a judge that has no processor for so long judges the row once more."""
    tail_chars: int = 20_000
    """Only so much of the response's end is read: the answer stands there."""
    float_rounding: int = 6
    """Decimals to which numbers have to agree."""
    strict: bool = True
    """Variables have to have the same names, and a set is no tuple."""
    marked_only: bool = False
    """A response has to mark its answer (a box, answer tags, "the answer is", a short last line); math-verify
    itself takes any number in the text, so a response that lists numbers may be paid."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        p = [f"{name} = {value} must be positive"
             for name, value in (("cpu_limit_s", self.cpu_limit_s), ("time_limit_s", self.time_limit_s),
                               ("tail_chars", self.tail_chars))
             if not value > 0]
        if importlib.util.find_spec("math_verify") is None:
            p.append(f"math-verify is not installed; {how_to_install('rl')}")
        return p

    def prepare(self) -> None:
        """Import what judges, so that the first row does not wait for it."""
        import math_verify

        assert math_verify  # imported for its effect
        for name in ("math_verify", "latex2sympy2_extended"):  # they tell each response that is no formula
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def score(self, row: Row) -> Score:
        """Return whether the last answer of the response equals the row's `answer`.

        Raises:
            Refused: the row has no answer, or one that is no mathematics.
        """
        from math_verify import verify

        gold = self._gold(text_of(row, "answer"))
        response = text_of(row, "response")[-self.tail_chars:]
        if self.marked_only and final_answer(response) is None:
            return Score(0.0, {"extracted": ""})
        found = _parsed(response)
        right = verify(gold, found, float_rounding=self.float_rounding, strict=self.strict,
                       timeout_seconds=None)
        # the text, since showing a number such as 10**10**10 would compute it
        shown = next((item for item in reversed(found) if isinstance(item, str)), "")
        return Score(float(right), {"extracted": shown[:200]})

    def _gold(self, answer: str) -> list[Any]:
        if not 0 < len(answer.strip()) <= MAX_ANSWER_CHARS:
            raise Refused(f"answer has {len(answer):,} characters; it must have 1 to {MAX_ANSWER_CHARS:,}")
        marked = any(mark in answer for mark in DELIMITERS)
        gold = _parsed(answer if marked else f"\\boxed{{{answer}}}")
        if not gold:
            raise Refused(f"answer = {answer[:80]!r} is no mathematics that math-verify reads")
        return gold


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    # it joins boxes that stand together by commas, and then reads 20 and 204 as 20,204: twenty thousand
    first, *more = text.split("\\boxed")
    more[1:] = [_THREE_DIGITS.sub(r"{\\,", box) for box in more[1:]]
    return list(parse("\\boxed".join([first, *more]), parsing_timeout=None))
