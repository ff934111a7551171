"""A scripted model that knows ten programming tasks, each for five places, and planted cases for `code`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synthesis.cases import Case, Replies, asked

from data_prep.synth.generator import GeneratorItem

SETTINGS: dict[str, Any] = {"test_time_s": 2.0}


@dataclass(frozen=True)
class Known:
    """A task with right programs and input that tells them from wrong ones."""

    head: str
    """The function's first line."""
    says: str
    """What it is to do."""
    bodies: tuple[str, ...]
    """Of right programs, without indentation of their own."""
    inputs: tuple[tuple[Any, ...], ...]
    """Arguments of calls."""

    @property
    def name(self) -> str:
        """Return the function's name."""
        return re.findall(r"def (\w+)", self.head)[0]

    def at(self, place: str) -> Known:
        """Return the task as somebody at a place has it: under another name, with more said of it."""
        return replace(self, head=self.head.replace(f"{self.name}(", f"{self.name}_of_{place}(", 1),
                       says=f"{self.says} It is used in the books of the {place}.")

    def task(self) -> str:
        """Return the task as it is written for people."""
        return f'{self.says}\n\n```python\n{self.head}\n    """{self.says}"""\n```'

    def programs(self) -> list[str]:
        """Return right programs."""
        return [f"{self.head}\n" + "\n".join(f"    {line}" for line in body.splitlines()) + "\n"
                for body in self.bodies]

    def tests(self) -> list[str]:
        """Return assertions that a right program passes."""
        names: dict[str, Any] = {}
        exec(self.programs()[0], names)
        return [f"assert {self.name}({', '.join(map(repr, values))}) == {names[self.name](*values)!r}"
                for values in self.inputs]


TASKS = (
    Known("def gap(values: list[int]) -> int:",
          "Return the largest value minus the smallest; 0 for no values.",
          ("return max(values) - min(values) if values else 0",
           "if not values:\n    return 0\nordered = sorted(values)\nreturn ordered[-1] - ordered[0]"),
          (([1, 5],), ([],), ([3],), ([-2, 7, 1],), ([10, 1, 1],), ([0, -4],), ([5, 5, 5],))),
    Known("def vowels(text: str) -> int:", "Count the letters a, e, i, o, u of a text, in either case.",
          ("return sum(c in 'aeiou' for c in text.lower())",
           "found = 0\nfor c in text:\n    if c in 'aeiouAEIOU':\n        found += 1\nreturn found"),
          (("hello",), ("",), ("xyz",), ("AEIOU",), ("Aardvark",), ("Queue",), ("unusual idea",))),
    Known("def clamp(x: int, low: int, high: int) -> int:", "Return x, or the bound that it lies beyond.",
          ("return max(low, min(x, high))",
           "if x < low:\n    return low\nif x > high:\n    return high\nreturn x"),
          ((5, 0, 10), (-3, 0, 10), (12, 0, 10), (0, 0, 10), (10, 0, 10), (1, 2, 2), (3, 2, 2))),
    Known("def sums(values: list[int]) -> list[int]:", "Return the sums of the first one, two, ... values.",
          ("found, total = [], 0\nfor value in values:\n    total += value\n    found.append(total)\n"
           "return found",
           "return [sum(values[:i + 1]) for i in range(len(values))]"),
          (([1, 2, 3],), ([],), ([5],), ([-1, 1],), ([0, 0, 2],), ([3, -5, 7, 1],), ([10, 20],))),
    Known("def mirrored(text: str) -> bool:", "Return whether the letters and digits of a text, in one case, "
          "read the same from behind.",
          ("said = [c for c in text.lower() if c.isalnum()]\nreturn said == said[::-1]",
           "said = ''.join(filter(str.isalnum, text)).lower()\nfor i in range(len(said) // 2):\n"
           "    if said[i] != said[len(said) - 1 - i]:\n        return False\nreturn True"),
          (("level",), ("ab",), ("",), ("A man, a plan, a canal: Panama",), ("No",), ("1a1",), ("abca",))),
    Known("def digit_sum(n: int) -> int:",
          "Return the sum of the decimal digits of a number, without its sign.",
          ("return sum(int(c) for c in str(abs(n)))",
           "n, total = abs(n), 0\nwhile n:\n    n, last = divmod(n, 10)\n    total += last\nreturn total"),
          ((0,), (7,), (123,), (-45,), (1000,), (999,), (80706,))),
    Known("def rotated(values: list[int], k: int) -> list[int]:",
          "Return values moved k places to the right, in a circle.",
          ("if not values:\n    return []\nk %= len(values)\n"
           "return values[-k:] + values[:-k] if k else list(values)",
           "n = len(values)\nreturn [values[(i - k) % n] for i in range(n)]"),
          (([1, 2, 3], 1), ([1, 2, 3], 0), ([], 4), ([1, 2, 3], 5), ([1, 2, 3, 4], -1), ([9], 3),
           ([1, 2], 2))),
    Known("def fibonacci(n: int) -> int:", "Return the n-th number of 0, 1, 1, 2, 3, 5, ..., counted from 0.",
          ("a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
           "known = [0, 1]\nwhile len(known) <= n:\n    known.append(known[-1] + known[-2])\n"
           "return known[n]"),
          ((0,), (1,), (2,), (3,), (7,), (10,), (20,))),
    Known("def pairs(values: list[int], total: int) -> int:",
          "Count the pairs of two places whose values add up to a total.",
          ("return sum(values[i] + values[j] == total for i in range(len(values)) for j in range(i))",
           "seen, found = {}, 0\nfor value in values:\n    found += seen.get(total - value, 0)\n"
           "    seen[value] = seen.get(value, 0) + 1\nreturn found"),
          (([1, 2, 3], 4), ([], 0), ([2, 2, 2], 4), ([1, 5], 7), ([0, 0], 0), ([4, -1, 5], 4),
           ([1, 3, 3], 4))),
    Known("def longest(text: str) -> str:",
          "Return the longest word of a text, of equals the first; '' for no word.",
          ("return max(text.split(), key=len, default='')",
           "best = ''\nfor word in text.split():\n    if len(word) > len(best):\n        best = word\n"
           "return best"),
          (("a bcd ef",), ("",), ("one",), ("aa bb",), ("x yy  zzz",), ("long longer",), ("  lead",))),
)
PLACES = ("harbour", "library", "garden", "observatory", "bakery")
KNOWN = (*TASKS, *(task.at(place) for place in PLACES for task in TASKS))
"""All that can be asked for; equal cases would be kept once."""
ABOUT = ("I go through it from front to back and keep what matters so far.",
         "Another road: state the result as one expression and let Python do the walking.")
Change = Callable[[str, Known, int], "str | Mapping[str, Any] | None"]
"""Takes what is asked for (task, tests, solve), the task and the draw's seed; None: as the right model
says."""


def known_in(text: str) -> Known:
    """Return the task that a prompt is about."""
    return next((known for known in KNOWN
                 if f"def {known.name}(" in text or f"about {known.name}." in text), TASKS[0])


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return a task, right tests or a right program."""
    return answer(request, lambda what, known, seed: None)


def answer(request: Mapping[str, Any], change: Change) -> str | Mapping[str, Any]:
    """Return what a model says of which something is changed."""
    system, text = asked(request)
    known, seed = known_in(text), int(request.get("seed", 0))
    what = "task" if "programming tasks" in system else "tests" if "write tests" in system else "solve"
    changed = change(what, known, seed)
    if changed is not None:
        return changed
    if what == "task":
        return known.task()
    if what == "tests":
        tests = known.tests()
        return fenced("\n".join(tests[seed % 2:] + tests[:seed % 2]))
    return f"{ABOUT[seed % 2]}\n\n{fenced(known.programs()[seed % 2])}"


def fenced(text: str) -> str:
    """Return a block of Python."""
    return f"```python\n{text.rstrip()}\n```"


def arguments(folder: Path) -> list[str]:
    """Write seeds and tasks and return the command's words."""
    rows = [{"seed": f"Something about {known.name}."} for known in TASKS[:4]]
    rows += [{"task": known.task()} for known in TASKS[4:6]]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--input", str(folder / "seeds.jsonl"), "--set", "num_solutions=3", "--set", "max_mutants=4"]


def tests_only(make: Callable[[Known], list[str]]) -> Change:
    """Return a change of the tests."""
    return lambda what, known, seed: fenced("\n".join(make(known))) if what == "tests" else None


def programs_only(make: Callable[[Known, int], str]) -> Change:
    """Return a change of the programs."""
    return lambda what, known, seed: fenced(make(known, seed)) if what == "solve" else None


def calls(known: Known) -> list[str]:
    """Return the calls of a task's tests."""
    return [test.removeprefix("assert ").rsplit(" == ", 1)[0] for test in known.tests()]


def with_first(known: Known, line: str, number: int = 0) -> str:
    """Return a right program with one more line at its beginning."""
    head, _, body = known.programs()[number].partition("\n")
    return f"{head}\n    {line}\n{body}"


def near(known: Known, by: int) -> str:
    """Return a program that gives something else than the right one, by a number."""
    return (f"{known.programs()[0].replace(f'def {known.name}(', 'def _right(', 1)}\n\n"
            f"def {known.name}(*given):\n    return [_right(*given), {by}]\n")


BAD: dict[str, Change] = {
    "tests that accept everything": tests_only(lambda known: [f"assert {c} == {c}" for c in calls(known)]),
    "tests that accept all but nothing": tests_only(
        lambda known: [f"assert {c} is not None" for c in calls(known)]),
    "tests that never end": tests_only(lambda known: [f"assert {c} == sum(1 for _ in iter(int, 1))"
                                                      for c in calls(known)]),
    "one test": tests_only(lambda known: known.tests()[:1]),
    "tests whose values are wrong": tests_only(lambda known: [f"assert {c} == 'wrong {i}'"
                                                              for i, c in enumerate(calls(known))]),
    "tests by type alone": tests_only(lambda known: [
        f"assert type({c}) is {type(eval(t.rsplit(' == ', 1)[1])).__name__}"
        for c, t in zip(calls(known), known.tests(), strict=True)]),
    "programs that are wrong each in its way": programs_only(lambda known, seed: near(known, seed)),
    "programs that read a file": programs_only(lambda known, seed: with_first(
        known, "open('/etc/hostname').read()", seed % 2)),
    "programs that reach for the network": programs_only(
        lambda known, seed: "import socket\n" + known.programs()[0]),
    "programs that never end": programs_only(lambda known, seed: with_first(
        known, "while True: pass", seed % 2)),
}
GOOD: dict[str, Change] = {
    "right": lambda what, known, seed: None,
    "a wrong test beside the right ones": tests_only(
        lambda known: [*known.tests(), f"assert {calls(known)[0]} == 'wrong'"]),
    "a test that says nothing beside the right ones": tests_only(
        lambda known: [*known.tests(), f"assert {calls(known)[0]} == {calls(known)[0]}"]),
    "a wrong program beside right ones": lambda what, known, seed: (
        fenced(near(known, 1)) if what == "solve" and seed % 5 == 0 else None),
    "a program that never ends beside right ones": lambda what, known, seed: (
        fenced(with_first(known, "while True: pass")) if what == "solve" and seed % 7 == 0 else None),
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases of 50 tasks; half of the tasks are given, half are written."""
    found = []
    for changes, is_good in ((BAD, False), (GOOD, True)):
        for number in range(50):
            what = list(changes)[number % len(changes)]
            turn, place = divmod(number, len(TASKS))
            known = TASKS[(place + 3 * turn) % len(TASKS)].at(PLACES[turn])
            fields = {"task": known.task() if number % 2 else "", "entry_point": "",
                      "seed": "" if number % 2 else f"Something about {known.name}."}
            found.append(Case(GeneratorItem(f"{'good' if is_good else 'bad'}-{number}", fields),
                              _replies(changes[what]), is_good, what))
    return found


def _replies(change: Change) -> Replies:
    return lambda request: answer(request, change)
