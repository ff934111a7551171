"""Programs against tests in the sandbox, and which of both may be believed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.synth.generator import NoReply
from data_prep.synth.generators.code_mutants import mutants, stubs
from megatron_sov.rewards.code import Code
from megatron_sov.rewards.reward import Refused

MOST_ENDLESS = 2
"""Tests of a program that take too long, each tried by itself; then all others count as failed."""


@dataclass(frozen=True)
class Agreement:
    """The programs and tests that agree best."""

    programs: tuple[int, ...]
    """Numbers of the programs that pass the same tests."""
    tests: tuple[int, ...]
    """Numbers of these tests."""


def passed(code: Code, program: str, tests: Sequence[str]) -> list[bool]:
    """Return which tests a program passes; where one takes too long the others are run without it.

    Raises:
        NoReply: the machine could not say: the item is made again.
    """
    found = _run(code, program, tests)
    if all(found) or len(tests) == 1:
        return found
    first = found.index(False)
    if any(found[first:]):  # they were all reached
        return found
    endless = 0
    for i in range(first, len(tests)):
        if endless == MOST_ENDLESS:
            break
        alone = _timed(code, program, tests[i])
        found[i], endless = alone is True, endless + (alone is None)
    return found


def fails(code: Code, program: str, tests: Sequence[str]) -> bool:
    """Return whether a program fails a test, or does not end."""
    return not all(_run(code, program, tests))


def agreement(matrix: Sequence[Sequence[bool]]) -> Agreement:
    """Return the programs and tests that agree best: of programs that pass the same tests those whose number
    times that of these tests is largest (CodeT, arXiv 2207.10397, section 3.2; of equals the earlier ones).

    Args:
        matrix: for each program, which tests it passes.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(matrix):
        groups[tuple(i for i, right in enumerate(row) if right)].append(number)
    tests, programs = max(groups.items(), key=lambda group: len(group[0]) * len(group[1]), default=((), []))
    return Agreement(tuple(programs), tests)


def telling(code: Code, entry_point: str, tests: Sequence[str]) -> tuple[list[str], str]:
    """Return the tests that some program fails which knows nothing of the task, and the first such program
    that passes all of these; empty: none does."""
    programs = stubs(entry_point)
    rows = [passed(code, program, tests) for program in programs]
    kept = [i for i in range(len(tests)) if not all(row[i] for row in rows)]
    blind = next((program for program, row in zip(programs, rows, strict=True)
                  if all(row[i] for i in kept)), "")
    return [tests[i] for i in kept], blind


def killed(code: Code, program: str, tests: Sequence[str], most: int) -> tuple[int, int]:
    """Return how many of a program's mutants fail the tests, and how many there are."""
    found = mutants(program, most)
    return sum(fails(code, mutant, tests) for mutant in found), len(found)


def _timed(code: Code, program: str, test: str) -> bool | None:
    """Return whether a program passes a test; None: it takes too long."""
    try:
        score = code.score({"response": program, "tests": [test]})
    except Refused:
        return False
    except (TimeoutError, RuntimeError) as e:
        raise NoReply(f"the sandbox: {e}") from None
    return None if score.timed_out else score.reward == 1.0


def _run(code: Code, program: str, tests: Sequence[str]) -> list[bool]:
    try:
        return code.passed({"response": program, "tests": list(tests)})
    except Refused:
        return [False] * len(tests)
    except (TimeoutError, RuntimeError) as e:
        raise NoReply(f"the sandbox: {e}") from None
