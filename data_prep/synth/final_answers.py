"""Final answers of solutions and programs: whether they are in a box at the end, and right.

The rewards `math` and `stem` compare answers in processes of their own: an answer such as 10**10**10 would
stop this one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from data_prep.responses.trajectories import Solution, choose_diverse
from data_prep.synth.replies import NoReply
from megatron_sov.judge.rewards.answers import extract_last_box, normalize_answer, read_quantity
from megatron_sov.judge.rewards.composed import Runner
from megatron_sov.judge.rewards.program_text import extract_program
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.judge.rewards.scoring import create_runner
from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import Sandbox

Way = Literal["auto", "math", "stem"]
"""How answers are compared: by mathematics; as choices, quantities and words; auto: as the answer looks."""
_LETTER = re.compile(r"[A-J]", re.ASCII)
_WORD = re.compile(r"(?<![A-Za-z\\])[^\W\d_]{3,}")
_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log",
    "exp", "sqrt", "max", "min", "gcd", "lcm", "det", "mod", "inf"))
_SAYS = re.compile(r"[^\W_]")
_SETTINGS: dict[str, Mapping[str, Any]] = {"math": {"literal": False}, "stem": {}}
"""Of the rewards: 6/2 and 3 say the same."""
MAX_BOXES = 20
"""Boxes of a solution that are looked at."""
MAX_PRINTED_CHARS = 200
"""Of the line that a program prints."""


def boxes(text: str) -> list[str]:
    """Return what stands in the boxes of a solution, the last one first."""
    found: list[str] = []
    while len(found) < MAX_BOXES and (inner := extract_last_box(text)) is not None:
        found.append(inner.strip())
        # the search goes on in front of this box
        text = text[:text.rindex("\\boxed{" + inner)]
    return found


def ends_in_box(text: str) -> bool:
    """Return whether a solution ends with its box: nothing is said behind it, in letters or digits."""
    inner = extract_last_box(text)
    if inner is None or not inner.strip():
        return False
    return _SAYS.search(text[text.rindex("\\boxed{" + inner) + len("\\boxed{" + inner):]) is None


def way_of(answer: str, choices: Sequence[str] = ()) -> Literal["math", "stem"]:
    """Return how an answer is compared: a letter, a quantity with a unit and words are no mathematics."""
    if choices or _LETTER.fullmatch(answer):
        return "stem"
    quantity = read_quantity(answer)
    if quantity is not None and quantity.dimension:
        return "stem"
    # commands of LaTeX, such as \frac, are no words
    plain = re.sub(r"\\[A-Za-z]+", " ", answer)
    return "stem" if any(word.lower() not in _FUNCTIONS for word in _WORD.findall(plain)) else "math"


class Verifier:
    """Compares answers; threads may share one. Its processes end with this one."""

    def __init__(self, name: Literal["math", "stem"]) -> None:
        asked = request_reward(name, _SETTINGS[name])
        self._runner: Runner = create_runner(asked, build_versioned_reward(asked), 1)
        self._lock = threading.Lock()

    def check(self, answers: Sequence[str], wanted: str, choices: Sequence[str] = ()) -> list[bool]:
        # equal texts need no process
        known = {answer: True for answer in answers
                 if normalize_answer(answer) == normalize_answer(wanted) != ""}
        asked = [answer for answer in dict.fromkeys(answers) if answer not in known]
        rows = [{"response": f"\\boxed{{{answer}}}", "answer": wanted, "choices": list(choices)}
                for answer in asked]
        if rows:
            with self._lock:
                results = self._runner.score(rows)
            for answer, result in zip(asked, results, strict=True):
                known[answer] = result.reward == 1.0
        return [known[answer] for answer in answers]


@lru_cache(maxsize=2)
def verifier(name: Literal["math", "stem"]) -> Verifier:
    """Return the verifier of this process."""
    return Verifier(name)


def check(answers: Sequence[str], wanted: str, choices: Sequence[str] = (), way: Way = "auto") -> list[bool]:
    """Return whether each of some final answers is the wanted one."""
    return verifier(way_of(wanted, choices) if way == "auto" else way).check(answers, wanted, choices)


def right_solutions(solutions: Sequence[str], wanted: str, choices: Sequence[str] = (), way: Way = "auto"
                    ) -> list[str]:
    """Return the solutions that were not cut off, end with their answer in a box, and say the wanted one in
    each of their boxes."""
    sound = [solution for solution in solutions
             if not getattr(solution, "cut", False) and ends_in_box(solution)]
    asked = [answer for solution in sound for answer in boxes(solution)]
    # one call for all: each is a round trip to the process that compares
    checked = dict(zip(asked, check(asked, wanted, choices, way), strict=True)) if asked else {}
    return [solution for solution in sound if all(checked[answer] for answer in boxes(solution))]


def different_solutions(solutions: Sequence[str], most: int, max_similarity: float) -> list[str]:
    """Return up to so many solutions that differ, as `sov-data trajectories` compares them."""
    compared = [Solution(solution, getattr(solution, "thinking", "")) for solution in solutions]
    chosen = {id(solution) for solution in choose_diverse(compared, most, max_similarity)}
    return [text for text, solution in zip(solutions, compared, strict=True) if id(solution) in chosen]


def final_answers(replies: str | Sequence[str]) -> list[str]:
    """Return the final answers of replies that were not cut off and end with one in a box."""
    listed = [replies] if isinstance(replies, str) else replies
    return [boxes(reply)[0] for reply in listed if not getattr(reply, "cut", False) and ends_in_box(reply)]


def boxed_or_plain(text: str) -> str:
    """Return the last box of a short answer, else the answer without marks around it."""
    text = text.strip().strip("*").strip()
    return (boxes(text) or [text.rstrip(".").strip("$").strip()])[0]


def count_right(answers: Sequence[str], wanted: str, choices: Sequence[str] = (), way: Way = "auto") -> int:
    """Return how many final answers are the wanted one, by the rewards `math` and `stem`."""
    return sum(check(list(answers), wanted, choices, way))


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox()


def run_programs(replies: Sequence[str]) -> list[str]:
    """Return the only lines that the programs in replies print, of those that end well in the sandbox.

    Raises:
        NoReply: the machine could not run one: the item is made again.
    """
    printed = []
    for reply in replies:
        source = "" if getattr(reply, "cut", False) else extract_program(reply)
        if not source:
            continue
        outcome = _sandbox().run(Program(source), Limits(wall_s=30, cpu_s=10))
        if outcome.status == "infrastructure":
            raise NoReply(f"the sandbox: {outcome.reason}")
        line = outcome.stdout.strip()
        if outcome.status == "ok" and line and "\n" not in line and len(line) <= MAX_PRINTED_CHARS:
            printed.append(line)
    return printed
