"""A scripted judge of problems, who takes larger numbers for harder ones, and planted cases for the checks of
`comparisons`: judges that say the same whatever stands first, and such as are of two minds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthesis.actors import solutions
from synthesis.cases import Case, material

from data_prep.synth.generator import GeneratorItem

SETTINGS: dict[str, Any] = {}
Grade = Callable[[int, int], float]
"""Takes the sums of the numbers of the first and of the second problem; gives 0 (the first is
harder) to 10."""


def reply(request: Mapping[str, Any]) -> str:
    """Return the grade of a judge who is of one mind."""
    return graded(request, honest)


def graded(request: Mapping[str, Any], grade: Grade) -> str:
    """Return what a judge says of two problems."""
    shown = material(request)
    first, second = (sum(map(int, re.findall(r"\d+", shown[name]))) for name in ("first problem",
                                                                                 "second problem"))
    return json.dumps({"reason": "as scripted", "score": grade(first, second)})


def honest(first: int, second: int) -> float:
    """Return the grade of a judge who looks at the problems alone."""
    return 5.0 if first == second else 2.0 if first > second else 8.0


BAD: dict[str, Grade] = {
    "always the first": lambda first, second: 0.0, "always the second": lambda first, second: 9.0,
    "leans to the first": lambda first, second: max(0.0, honest(first, second) - 3.5),
    "leans to the second": lambda first, second: min(10.0, honest(first, second) + 3.5),
    "never decides": lambda first, second: 5.0,
}
GOOD: dict[str, Grade] = {
    "of one mind": honest,
    "leans a little": lambda first, second: honest(first, second) + 1.0,
    "quite sure": lambda first, second: 0.0 if first > second else 10.0,
    "in fractions": lambda first, second: 3.25 if first > second else 6.75,
    "leans a little to the first": lambda first, second: honest(first, second) - 1.0,
}


def arguments(folder: Path) -> list[str]:
    """Write problems and return the command's words."""
    return solutions.arguments(folder)


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases; of a bad judge no pair may be kept."""
    found = []
    for grades, is_good in ((BAD, False), (GOOD, True)):
        for number in range(50):
            what = list(grades)[number % len(grades)]
            one, other = solutions.problem(number)[0], solutions.problem(number + 31)[0]
            fields = {"first_id": f"p{number}", "first": one, "second_id": f"q{number}", "second": other}
            found.append(Case(GeneratorItem(f"{'good' if is_good else 'bad'}-{number}", fields),
                              _replies(grades[what]), is_good, what))
    return found


def _replies(grade: Grade) -> Callable[[Mapping[str, Any]], str]:
    return lambda request: graded(request, grade)
