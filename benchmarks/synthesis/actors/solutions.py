"""A scripted model that solves word problems in several ways, and planted cases for the checks of
`solutions`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from synthesis.cases import Case, Replies, asked

from data_prep.synth.generator import GeneratorItem

SETTINGS: dict[str, Any] = {"vote": True}
QUESTIONS = ("Mina has {} apples and buys {} boxes with {} apples each. How many apples has she now?",
             "민아는 사과 {}개가 있고, {}상자를 샀다. 한 상자에 사과가 {}개씩 들어 있다. "
             "사과는 모두 몇 개인가?")
WAYS = (
    ("The boxes hold {b} times {c}, which makes {bc} apples. Together with the first {a} that is {s}.",
     "Count on from {a}: every box adds {c}, and after box number {b} the count stands at {s}.",
     "Write the whole as a sum, {a} + {b} * {c}. Products come before sums, so we get {a} + {bc} = {s}.",
     "Suppose nothing was bought: she would have {a}. What was bought is {bc} more, hence {s} in the end.",
     "Let x be the number we look for. Taking away the {a} old apples is x - {a} = {b} * {c}, so x = {s}."),
    ("상자에 든 사과는 {b} 곱하기 {c}로 {bc}개이다. 처음의 {a}개와 더하면 {s}개가 된다.",
     "처음 {a}개에서 세기 시작하여 상자마다 {c}개를 더하면, {b}번째 상자 뒤에는 {s}개이다.",
     "식으로 쓰면 {a} + {b} * {c} 이고, 곱셈을 먼저 하므로 {a} + {bc} = {s} 를 얻는다.",
     "아무것도 사지 않았다면 {a}개뿐이다. 새로 산 것이 {bc}개이므로 마지막에는 {s}개가 남는다.",
     "구하는 수를 x 라 하자. 원래 있던 {a}개를 빼면 x - {a} = {b} * {c} 이므로 x = {s} 이다."))
Change = Callable[[str, int, int], "str | Mapping[str, Any]"]
"""Takes working, right answer and the number of the draw's way; gives what is said."""


def problem(number: int) -> tuple[str, int]:
    """Return a problem with its answer."""
    a, b, c = 3 + number * 7 % 90, 2 + number % 11, 4 + number * 5 % 17
    return QUESTIONS[number % 2].format(a, b, c), a + b * c


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return a right solution, its way by the seed."""
    return answer(request, lambda working, right, way: f"{working}\n\n\\boxed{{{right}}}")


def answer(request: Mapping[str, Any], change: Change) -> str | Mapping[str, Any]:
    """Return what a model says whose solutions are changed."""
    _, text = asked(request)
    a, b, c = (int(number) for number in re.findall(r"\d+", text)[:3])
    way = int(request.get("seed", 0)) % len(WAYS[0])
    language = int(re.search(r"[가-힣]", text) is not None)
    working = WAYS[language][way].format(a=a, b=b, c=c, bc=b * c, s=a + b * c)
    return change(working, a + b * c, way)


def arguments(folder: Path) -> list[str]:
    """Write problems and return the command's words."""
    rows = [{"problem": text, "answer": right} for text, right in map(problem, range(8))]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--input", str(folder / "problems.jsonl")]


def boxed(working: str, said: object) -> str:
    """Return a solution that ends as it should."""
    return f"{working}\n\n\\boxed{{{said}}}"


BAD: dict[str, Change] = {
    "a wrong answer": lambda working, right, way: boxed(working, right + 1),
    "a wrong answer that is nearly the right one": lambda working, right, way: boxed(working, f"{right}.001"),
    "the right box, then another answer": lambda working, right, way: (
        f"{boxed(working, right)}\nSo the answer is {right + 2}."),
    "two boxes, the last one right": lambda working, right, way: (
        f"\\boxed{{{right + 3}}} is what one might think. {boxed(working, right)}"),
    "one solution again and again": lambda working, right, way: boxed("It is plain.", right),
    "cut off before its end": lambda working, right, way: {
        "content": boxed(working, right), "finish_reason": "length"},
    "no box": lambda working, right, way: f"{working} The answer is {right}.",
    "a power tower": lambda working, right, way: boxed(working, "10^{10^{10^{10}}}"),
    "votes that are split": lambda working, right, way: boxed(working, right + way),
    "one right solution among wrong ones": lambda working, right, way: boxed(
        working, right if way == 0 else right + way),
}
GOOD: dict[str, Change] = {
    "right": lambda working, right, way: boxed(working, right),
    "right, in other forms": lambda working, right, way: boxed(
        working, (right, f"{right}.0", f"\\frac{{{2 * right}}}{{2}}", f"{right - 1} + 1", f"{right:,}")[way]),
    "right, with thoughts": lambda working, right, way: {
        "content": boxed(working, right), "reasoning_content": f"Let me see. {working}"},
    "right, in a formula of its own": lambda working, right, way: f"{working}\n$$\n\\boxed{{{right}}}\n$$",
    "four of five right": lambda working, right, way: boxed(working, right + (7 if way == 4 else 0)),
}


def cases() -> list[Case]:
    """Return 50 bad and 50 good cases; half of those without a trap of votes have a known answer."""
    found = []
    for changes, is_good in ((BAD, False), (GOOD, True)):
        for number in range(50):
            what = list(changes)[number % len(changes)]
            text, right = problem(number)
            by_votes = "votes" in what or (number // len(changes)) % 2 == 1
            is_known = not by_votes or "wrong" in what or "tower" in what
            fields = {"problem": text, "answer": str(right) if is_known else "", "choices": [], "domain": ""}
            found.append(Case(GeneratorItem(f"{'good' if is_good else 'bad'}-{number}", fields),
                              _replies(changes[what]), is_good, what))
    return found


def _replies(change: Change) -> Replies:
    return lambda request: answer(request, change)
