"""Final answers in solutions and programs: boxes, comparison with the right answer, and different solutions.

The rewards `math` and `stem` compare answers in child processes, because an answer such as 10**10**10 would
stop this process.
"""

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

ComparisonMethod = Literal["auto", "math", "stem"]
"""math: the reward `math`; stem: the reward `stem`, for choices, quantities and words; auto: by the answer's
form."""
MAX_BOXES = 20
"""Boxes read from a solution."""
MAX_PRINTED_CHARS = 200
"""Longest output line from a program."""
_LETTER = re.compile(r"[A-J]", re.ASCII)
_WORD = re.compile(r"(?<![A-Za-z\\])[^\W\d_]{3,}")
_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log",
    "exp", "sqrt", "max", "min", "gcd", "lcm", "det", "mod", "inf"))
_ALPHANUMERIC = re.compile(r"[^\W_]")
_REWARD_SETTINGS: dict[str, Mapping[str, Any]] = {"math": {"literal": False}, "stem": {}}
"""literal false: 6/2 equals 3."""


def find_boxes(text: str) -> list[str]:
    r"""Return the contents in each `\boxed{}`, last box first."""
    boxes: list[str] = []
    while len(boxes) < MAX_BOXES and (content := extract_last_box(text)) is not None:
        boxes.append(content.strip())
        text = text[:text.rindex("\\boxed{" + content)]
    return boxes


def ends_in_box(text: str) -> bool:
    r"""Return whether neither letters nor digits follow the last, non-empty `\boxed{}`."""
    content = extract_last_box(text)
    if content is None or not content.strip():
        return False
    box = "\\boxed{" + content
    return _ALPHANUMERIC.search(text[text.rindex(box) + len(box):]) is None


def choose_comparison_method(answer: str, choices: Sequence[str] = ()) -> Literal["math", "stem"]:
    """Choose `stem` for letters, quantities with units and words, else `math`."""
    if choices or _LETTER.fullmatch(answer):
        return "stem"
    quantity = read_quantity(answer)
    if quantity is not None and quantity.dimension:
        return "stem"
    # LaTeX commands such as \frac are not words
    plain = re.sub(r"\\[A-Za-z]+", " ", answer)
    return "stem" if any(word.lower() not in _FUNCTIONS for word in _WORD.findall(plain)) else "math"


@lru_cache(maxsize=2)
def _start_runner(name: Literal["math", "stem"]) -> tuple[Runner, threading.Lock]:
    """Return (runner, lock) for a reward; child processes end with this process."""
    request = request_reward(name, _REWARD_SETTINGS[name])
    return create_runner(request, build_versioned_reward(request), 1), threading.Lock()


def check_answers(answers: Sequence[str], expected: str, choices: Sequence[str] = (),
                  way: ComparisonMethod = "auto") -> list[bool]:
    """Compare final answers with `expected`; thread-safe."""
    # equal texts need no process
    results = {answer: True for answer in answers
               if normalize_answer(answer) == normalize_answer(expected) != ""}
    unknown = [answer for answer in dict.fromkeys(answers) if answer not in results]
    if unknown:
        rows = [{"response": f"\\boxed{{{answer}}}", "answer": expected, "choices": list(choices)}
                for answer in unknown]
        runner, lock = _start_runner(choose_comparison_method(expected, choices) if way == "auto" else way)
        with lock:
            scores = runner.score(rows)
        results |= {answer: score.reward == 1.0 for answer, score in zip(unknown, scores, strict=True)}
    return [results[answer] for answer in answers]


def select_right_solutions(solutions: Sequence[str], expected: str, choices: Sequence[str] = (),
                           way: ComparisonMethod = "auto") -> list[str]:
    """Return complete solutions that end with a box and have the expected answer in every box."""
    complete = [solution for solution in solutions if not _is_cut(solution) and ends_in_box(solution)]
    answers = [answer for solution in complete for answer in find_boxes(solution)]
    if not answers:
        return []
    # a single call: a round trip to a child process
    is_right = dict(zip(answers, check_answers(answers, expected, choices, way), strict=True))
    return [solution for solution in complete if all(is_right[answer] for answer in find_boxes(solution))]


def _is_cut(text: str) -> bool:
    return getattr(text, "cut", False)


def select_different_solutions(solutions: Sequence[str], most: int, max_similarity: float) -> list[str]:
    """Return up to `most` solutions that differ as in `sov-data trajectories`."""
    candidates = [Solution(solution, getattr(solution, "thinking", "")) for solution in solutions]
    selected = {id(candidate) for candidate in choose_diverse(candidates, most, max_similarity)}
    return [text for text, candidate in zip(solutions, candidates, strict=True) if id(candidate) in selected]


def find_final_answers(replies: str | Sequence[str]) -> list[str]:
    """Return the boxed answers from complete replies that end with a box."""
    listed = [replies] if isinstance(replies, str) else replies
    return [find_boxes(reply)[0] for reply in listed if not _is_cut(reply) and ends_in_box(reply)]


def get_boxed_or_plain(text: str) -> str:
    """Return the last box in a short answer, or else the answer without Markdown and dollar signs."""
    text = text.strip().strip("*").strip()
    boxes = find_boxes(text)
    return boxes[0] if boxes else text.rstrip(".").strip("$").strip()


def count_right_answers(answers: Sequence[str], expected: str, choices: Sequence[str] = (),
                        way: ComparisonMethod = "auto") -> int:
    """Count the final answers that equal `expected`, by the rewards `math` and `stem`."""
    return sum(check_answers(list(answers), expected, choices, way))


@lru_cache(maxsize=1)
def _get_sandbox() -> Sandbox:
    return Sandbox()


def run_programs(replies: Sequence[str]) -> list[str]:
    """Run the programs in complete replies in the sandbox, and return outputs that are a single line. Raises
    `NoReply`: the machine failed; the item is tried again."""
    lines = []
    for reply in replies:
        source = "" if _is_cut(reply) else extract_program(reply)
        if not source:
            continue
        outcome = _get_sandbox().run(Program(source), Limits(wall_s=30, cpu_s=10))
        if outcome.status == "infrastructure":
            raise NoReply(f"the sandbox: {outcome.reason}")
        line = outcome.stdout.strip()
        if outcome.status == "ok" and line and "\n" not in line and len(line) <= MAX_PRINTED_CHARS:
            lines.append(line)
    return lines
