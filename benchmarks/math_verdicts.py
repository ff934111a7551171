"""Math rewards against math-verify: equal verdicts, speed, and answers that fool `math` and `stem`.

Usage: PYTHONPATH=TRL python benchmarks/math_verdicts.py > benchmarks/results/math_verdicts.txt
TRL is a folder with an unpacked wheel of TRL, whose `accuracy_reward` judges the third part too.

The first part judges 2,000 drawn answers by the pool of processes that `score` uses, and by math-verify alone
in one process, as its README calls it.  The second part judges right answers in disguise (another form of the
same thing) and wrong ones that look right, 20 of each kind, by both verifiers: what each makes of each kind.
The third part has 44 responses written by hand to be paid for nothing, and 44 honest ones in many spellings.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.judge.rewards.reward import run_reward
from megatron_sov.judge.rewards.scoring import create_runner

Item = tuple[str, str]
"""A gold answer, and a response."""
BATCH_ROWS = 128


def number(draw: random.Random) -> int:
    """Return a random number of two to four digits that is not a multiple of ten."""
    return draw.randrange(11, 9999) // 10 * 10 + draw.randrange(1, 10)


def boxed(answer: str) -> str:
    """Return a response that ends with an answer in a box."""
    return f"Adding both sides gives the result. Therefore \\boxed{{{answer}}}."


RIGHT: dict[str, Callable[[random.Random, int], Item]] = {
    "decimal for a fraction": lambda draw, n: (f"{n}/8", boxed(f"{n / 8}")),
    "fraction in LaTeX": lambda draw, n: (f"{n}/7", boxed(f"\\dfrac{{{n}}}{{7}}")),
    "fraction not in lowest terms": lambda draw, n: (f"{n}/7", boxed(f"\\frac{{{3 * n}}}{{21}}")),
    "thousands set apart": lambda draw, n: (f"{n}123", boxed(f"{n * 1000 + 123:,}")),
    "trailing zeros": lambda draw, n: (f"{n}", boxed(f"{n}.00")),
    "power of ten": lambda draw, n: (f"{n}000", boxed(f"{n} \\times 10^3")),
    "equation": lambda draw, n: (f"{n}", boxed(f"x = {n}")),
    "text, no box": lambda draw, n: (f"{n}", f"First I add the tens.\nThe answer is {n}."),
    "bold": lambda draw, n: (f"{n}", f"First I add the tens.\n\n**The answer is: {n}**"),
    "corrected": lambda draw, n: (f"{n}", f"That is \\boxed{{{n + 1}}}, no wait, \\boxed{{{n}}}."),
    "worked out in the box": lambda draw, n: (f"{3 * n}", boxed(f"3 \\cdot {n} = {3 * n}")),
    "dollars around": lambda draw, n: (f"{n}", f"So the final answer is ${n}$."),
}
WRONG: dict[str, Callable[[random.Random, int], Item]] = {
    "sign": lambda draw, n: (f"{n}", boxed(f"-{n}")),
    "last digit": lambda draw, n: (f"{n}", boxed(f"{n + draw.choice([-1, 1])}")),
    "digits swapped": lambda draw, n: (f"{n}12", boxed(f"{n}21")),
    "digit left out": lambda draw, n: (f"{n}7", boxed(f"{n}")),
    "power of ten too large": lambda draw, n: (f"{n}", boxed(f"{n}0")),
    "fraction upside down": lambda draw, n: (f"{n}/7", boxed(f"\\frac{{7}}{{{n}}}")),
    "right on the way, wrong in the end": lambda draw, n: (
        f"{n}", f"First I find \\boxed{{{n}}}, but a term is missing. So the answer is \\boxed{{{n + 2}}}."),
    "two answers": lambda draw, n: (f"{n}", boxed(f"{n} \\text{{ or }} {n + 3}")),
    "rounded": lambda draw, n: (f"{7 * n + 2}/7", boxed(f"{n}")),
    "question stated again, a product": lambda draw, n: (f"{n * 37}", boxed(f"{n} \\times 37")),
    "question stated again, a sum": lambda draw, n: (f"{n + 4321}", boxed(f"{n} + 4321")),
    "question stated again, a power": lambda draw, n: (f"{n ** 2}", boxed(f"{n}^2")),
    "question stated again, a quotient": lambda draw, n: (f"{n}", boxed(f"\\frac{{{7 * n}}}{{7}}")),
    "false equation": lambda draw, n: (f"{n}", boxed(f"{n + 1} = {n}")),
    "corrected to a wrong one": lambda draw, n: (
        f"{n}", f"That is \\boxed{{{n}}}, no wait, \\boxed{{{n + 1}}}."),
    "no answer, the number in the text": lambda draw, n: (
        f"{n}", f"There are {n} cases to look at, and no time is left to go through all of them one by one"),
}
_RESPONSES = yaml.safe_load((Path(__file__).parent / "data/math_responses.yaml").read_text(encoding="utf-8"))
FOOLING, HONEST = ([(gold, text) for gold, text in _RESPONSES[kind]] for kind in ("fooling", "honest"))
"""Gold answers, and responses written by hand: paid by what they look like, and right."""
MORE: dict[str, Callable[[random.Random, int], Item]] = {
    "root": lambda draw, n: (f"{n}\\sqrt{{2}}", boxed(f"\\sqrt{{{2 * n * n}}}")),
    "wrong root": lambda draw, n: (f"{n}\\sqrt{{2}}", boxed(f"{n}\\sqrt{{3}}")),
    "product": lambda draw, n: (f"x^2-{n * n}", boxed(f"(x-{n})(x+{n})")),
    "wrong product": lambda draw, n: (f"x^2-{n * n}", boxed(f"(x-{n})^2")),
    "set": lambda draw, n: (f"\\{{{n}, {n + 1}\\}}", boxed(f"\\{{{n + 1}, {n}\\}}")),
    "interval": lambda draw, n: (f"[0, {n})", boxed(f"[0, {n}]")),
    "pair": lambda draw, n: (f"({n}, {n + 1})", boxed(f"({n + 1}, {n})")),
}
"""What only `math` reads; for the speed."""


def items_of(kinds: dict[str, Callable[[random.Random, int], Item]], count: int, seed: int) -> list[Item]:
    """Return so many items, of each kind alike."""
    draw = random.Random(seed)
    makers = list(kinds.values())
    return [makers[i % len(makers)](draw, number(draw)) for i in range(count)]


def by_pool(items: list[Item], workers: int) -> tuple[list[float | None], float]:
    """Return the rewards that the pool gives, and how long it took without its start."""
    request = request_reward("math", {})
    rows = [{"answer": gold, "response": response} for gold, response in items]
    with create_runner(request, build_versioned_reward(request), workers) as running:
        running.score(rows[:2 * workers])  # starts the processes
        begun_s = time.monotonic()
        found = [result.reward for i in range(0, len(rows), BATCH_ROWS)
                 for result in running.score(rows[i:i + BATCH_ROWS])]
        return found, time.monotonic() - begun_s


def by_math_verify(items: list[Item]) -> tuple[list[float], float]:
    """Return math-verify's own verdicts, golds in a box, and how long they took."""
    from math_verify import parse, verify

    parse("\\boxed{1}")
    begun_s = time.monotonic()
    found = [float(verify(parse(f"\\boxed{{{gold}}}"), parse(response))) for gold, response in items]
    return found, time.monotonic() - begun_s


def confusion(count: int) -> None:
    """Print the verdicts of each verifier for correct and wrong answers, by kind.

    Args:
        count: number of answers of each kind.
    """
    asked = {"math": request_reward("math", {}),
             "math, literal=false": request_reward("math", {"literal": False}),
             "math, marked_only=false": request_reward("math", {"marked_only": False}),
             "stem": request_reward("stem", {})}
    rewards = {name: build_versioned_reward(one).reward for name, one in asked.items()}
    rewards["math"].prepare()
    for name, reward in rewards.items():
        totals: Counter[tuple[bool, float | None]] = Counter()
        lines = []
        for right, kinds in ((True, RIGHT), (False, WRONG)):
            for kind in kinds:
                items = items_of({kind: kinds[kind]}, count, seed=7)
                counter = Counter(run_reward(reward, {"answer": gold, "response": text}).reward
                                  for gold, text in items)
                totals.update({(right, value): times for value, times in counter.items()})
                missed = len(items) - counter[float(right)]
                if missed:
                    lines.append(f"    {'right' if right else 'wrong'}: {kind}: {missed} of {len(items)} "
                                 "misjudged")
        print(f"\n{name}: {count * len(RIGHT)} right in disguise, {count * len(WRONG)} subtly wrong")
        for right in (True, False):
            print(f"  {'right' if right else 'wrong'} answers: {totals[right, 1.0]} paid, "
                  f"{totals[right, 0.0]} not paid, {totals[right, None]} without a reward")
        print("\n".join(lines) if lines else "    none misjudged")


def by_hand() -> None:
    """Print which verifiers accept the answers of the two hand-written lists."""
    judges = {"math": by_reward("math", {}), "math, literal=false": by_reward("math", {"literal": False}),
              "stem": by_reward("stem", {})}
    try:
        from trl.rewards.accuracy_rewards import accuracy_reward
    except ImportError:
        print("\nTRL is not there: its column is missing")
    else:
        judges["TRL's accuracy_reward"] = lambda gold, text: accuracy_reward(
            [[{"role": "assistant", "content": text}]], [f"\\boxed{{{gold}}}"])[0]
    print(f"\n{len(FOOLING)} responses that fool, and {len(HONEST)} honest ones: paid by")
    for name, judge in judges.items():
        fooled = [text for gold, text in FOOLING if judge(gold, text) == 1]
        missed = [text for gold, text in HONEST if judge(gold, text) != 1]
        print(f"  {name}: {len(fooled)} of {len(FOOLING)}, and {len(HONEST) - len(missed)} of {len(HONEST)}")
        for what, texts in (("paid for nothing", fooled), ("honest and not paid", missed)):
            print("".join(f"    {what}: {text!r}\n" for text in texts), end="")


def by_reward(name: str, settings: dict[str, object]) -> Callable[[str, str], float | None]:
    """Return a function that scores a response against a gold answer with one of our rewards."""
    reward = build_versioned_reward(request_reward(name, settings)).reward
    if name == "math":
        reward.prepare()
    return lambda gold, text: run_reward(reward, {"answer": gold, "response": text}).reward


def main() -> None:
    """Print the three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2040)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    kinds = {**RIGHT, **WRONG, **MORE}
    items = items_of(kinds, args.items, seed=0)
    pool, pool_s = by_pool(items, args.workers)
    own, own_s = by_math_verify(items)
    names = [list(kinds)[i % len(kinds)] for i in range(len(items))]
    different = Counter((name, p, o) for name, p, o in zip(names, pool, own, strict=True) if p != o)
    print(f"{len(items):,} answers, {sum(own):,.0f} right: {different.total()} verdicts differ from "
          "math-verify's")
    for (name, p, o), times in different.items():
        print(f"  {name}: {times} of {names.count(name)}: pool {p}, math-verify {o}")
    print(f"pool of {args.workers}: {len(items) / pool_s:.0f} answers/s; math-verify in one process: "
          f"{len(items) / own_s:.0f} answers/s", flush=True)
    confusion(args.count)
    by_hand()


if __name__ == "__main__":
    main()
