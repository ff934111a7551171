"""A scripted model that writes, solves and computes small problems, and planted cases for the checks of
`probes`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthesis.cases import Case, Replies, asked

from data_prep.synth.generator import GeneratorItem

LEAKED = Path(__file__).with_name("leaked.jsonl")
"""Made-up items that stand for a benchmark."""
SETTINGS: dict[str, Any] = {"benchmarks": (str(LEAKED),)}
DOMAINS = ("algebra", "geometry", "calculus", "statistics")
Change = Callable[[str, str, int, int], "str | Mapping[str, Any] | None"]
"""Takes what is asked for (problem, solve, program), problem, answer and the draw's seed; None: as the right
model says."""


def problem(topic: str, number: str) -> str:
    """Return a problem of a topic and a number."""
    digest = hashlib.sha256(f"{topic} {number}".encode()).digest()
    a, b, c = 2 + digest[0] % 40, 3 + digest[1] % 30, 1 + digest[2] % 5
    return (f"On the subject of {topic}: a gardener plants {a} rows of {b} trees, and {c} of all these trees "
            "do not survive the winter. How many trees stand in spring?")


def solved(text: str) -> int:
    """Return the answer of a problem."""
    a, b, c = (int(number) for number in re.findall(r"\d+", text)[-3:])
    return a * b - c


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return a problem with its answer, a solution, or a program."""
    return answer(request, lambda what, text, right, seed: None)


def answer(request: Mapping[str, Any], change: Change) -> str | Mapping[str, Any]:
    """Return what a model says of which something is changed."""
    system, text = asked(request)
    seed = int(request.get("seed", 0))
    if "You write problems" in system:
        found = re.search(r"problem number (\d+) of a list on (.+?) \(", text)
        assert found is not None, text
        said = problem(found[2], found[1])
        return (change("problem", said, solved(said), seed)
                or f"Problem: {said}\nAnswer: {solved(said)}")
    said = text.split("\n\n")[0]
    right = solved(said) if len(re.findall(r"\d+", said)) >= 3 else 112
    if "Python programs" in system:
        return (change("program", said, right, seed)
                or f"```python\ntrees = {right} + 10\nprint(trees - 10)\n```")
    return (change("solve", said, right, seed)
            or f"All trees together, less those that die, are {right}.\n\n\\boxed{{{right}}}")


def arguments(folder: Path) -> list[str]:
    """Write topics and return the command's words."""
    rows = [{"domain": domain, "topic": f"gardens and {domain}"} for domain in DOMAINS]
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--input", str(folder / "topics.jsonl"), "--set", "per_topic=2"]


def said_of(wanted: str, say: Callable[[str, int, int], str | Mapping[str, Any]]) -> Change:
    """Return a change of one sort of answer."""
    return lambda what, text, right, seed: say(text, right, seed) if what == wanted else None


def items_of_benchmark() -> list[str]:
    """Return what may not be asked."""
    return [json.loads(line)["question"] for line in LEAKED.read_text(encoding="utf-8").splitlines()]


BAD: dict[str, Change] = {
    "a wrong answer": said_of("problem", lambda text, right, seed: f"Problem: {text}\nAnswer: {right + 1}"),
    "solutions that do not agree": said_of("solve", lambda text, right, seed: (
        f"\\boxed{{{right + seed % 97}}}")),
    "a program that computes something else": said_of(
        "program", lambda text, right, seed: f"```python\nprint({right} - 1)\n```"),
    "an item of a benchmark": said_of("problem", lambda text, right, seed: (
        f"Problem: {items_of_benchmark()[0]}\nAnswer: 112")),
    "an item of a benchmark, in other signs": said_of("problem", lambda text, right, seed: (
        f"Problem: {items_of_benchmark()[0].upper().replace(',', ' --')}\nAnswer: 112")),
    "a Korean item of a benchmark": said_of("problem", lambda text, right, seed: (
        f"Problem: {items_of_benchmark()[1]}\nAnswer: 112")),
    "not in the form": said_of("problem", lambda text, right, seed: f"{text} It is {right}."),
    "cut off": said_of("problem", lambda text, right, seed: {
        "content": f"Problem: {text}\nAnswer: {right}", "finish_reason": "length"}),
    "solutions that are cut off": said_of("solve", lambda text, right, seed: {
        "content": f"\\boxed{{{right}}}", "finish_reason": "length"}),
    "an answer that is a sentence": said_of("problem", lambda text, right, seed: (
        f"Problem: {text}\nAnswer: it depends on the winter")),
}
GOOD: dict[str, Change] = {
    "right": said_of("", lambda text, right, seed: ""),
    "right, the answer in a box": said_of("problem", lambda text, right, seed: (
        f"Problem: {text}\nAnswer: $\\boxed{{{right}}}$")),
    "one wrong solution of several": said_of("solve", lambda text, right, seed: (
        f"\\boxed{{{right + (seed % 23 == 0)}}}")),
    "a program that does not end well": said_of("program", lambda text, right, seed: "```python\n1/0\n```"),
    "marked with stars": said_of("problem", lambda text, right, seed: (
        f"**Problem:** {text}\n\n**Answer:** {right}")),
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases."""
    found = []
    for changes, is_good in ((BAD, False), (GOOD, True)):
        for number in range(50):
            what = list(changes)[number % len(changes)]
            fields = {"domain": DOMAINS[number % 4], "topic": f"orchards, part {number}",
                      "number": 1 + number % 3}
            found.append(Case(GeneratorItem(f"{'good' if is_good else 'bad'}-{number}", fields),
                              _replies(changes[what]), is_good, what))
    return found


def _replies(change: Change) -> Replies:
    return lambda request: answer(request, change)
