"""Verdicts and speed of the rewards `math` and `stem`, compared with math-verify and TRL.

    PYTHONPATH=TRL python benchmarks/math_verdicts.py > benchmarks/results/math_verdicts.txt

TRL is a folder with an unpacked wheel of TRL, for the third part. The parts are

1. 2,000 random answers, judged by the process pool of `score`, and by math-verify in one process as in its
   README: verdicts and answers per second.
2. Right answers in another form and wrong answers that look right, 20 of each kind: kinds that the rewards
   `math` and `stem` misjudge.
3. 44 handwritten responses that try to be rewarded without a right answer, and 44 honest responses in many
   spellings: the responses that our rewards and TRL's `accuracy_reward` pay.
"""

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml
from measurement import describe_machine

from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.judge.rewards.reward import run_reward
from megatron_sov.judge.rewards.scoring import create_runner

Item = tuple[str, str]
"""(gold answer, response)."""
BATCH_ROWS = 128


def draw_number(draw: random.Random) -> int:
    """Return a random number of two to four digits that is not a multiple of ten."""
    return draw.randrange(11, 9999) // 10 * 10 + draw.randrange(1, 10)


def box_answer(answer: str) -> str:
    """Return a response that ends with an answer in a box."""
    return f"Adding both sides gives the result. Therefore \\boxed{{{answer}}}."


RIGHT: dict[str, Callable[[random.Random, int], Item]] = {
    "decimal for a fraction": lambda draw, n: (f"{n}/8", box_answer(f"{n / 8}")),
    "fraction in LaTeX": lambda draw, n: (f"{n}/7", box_answer(f"\\dfrac{{{n}}}{{7}}")),
    "fraction not in lowest terms": lambda draw, n: (f"{n}/7", box_answer(f"\\frac{{{3 * n}}}{{21}}")),
    "thousands set apart": lambda draw, n: (f"{n}123", box_answer(f"{n * 1000 + 123:,}")),
    "trailing zeros": lambda draw, n: (f"{n}", box_answer(f"{n}.00")),
    "power of ten": lambda draw, n: (f"{n}000", box_answer(f"{n} \\times 10^3")),
    "equation": lambda draw, n: (f"{n}", box_answer(f"x = {n}")),
    "text, no box": lambda draw, n: (f"{n}", f"First I add the tens.\nThe answer is {n}."),
    "bold": lambda draw, n: (f"{n}", f"First I add the tens.\n\n**The answer is: {n}**"),
    "corrected": lambda draw, n: (f"{n}", f"That is \\boxed{{{n + 1}}}, no wait, \\boxed{{{n}}}."),
    "worked out in the box": lambda draw, n: (f"{3 * n}", box_answer(f"3 \\cdot {n} = {3 * n}")),
    "dollars around": lambda draw, n: (f"{n}", f"So the final answer is ${n}$."),
}
"""Kind of right answer -> function (draw, a number) -> item."""
WRONG: dict[str, Callable[[random.Random, int], Item]] = {
    "sign": lambda draw, n: (f"{n}", box_answer(f"-{n}")),
    "last digit": lambda draw, n: (f"{n}", box_answer(f"{n + draw.choice([-1, 1])}")),
    "digits swapped": lambda draw, n: (f"{n}12", box_answer(f"{n}21")),
    "digit left out": lambda draw, n: (f"{n}7", box_answer(f"{n}")),
    "power of ten too large": lambda draw, n: (f"{n}", box_answer(f"{n}0")),
    "fraction upside down": lambda draw, n: (f"{n}/7", box_answer(f"\\frac{{7}}{{{n}}}")),
    "right on the way, wrong in the end": lambda draw, n: (
        f"{n}", f"First I find \\boxed{{{n}}}, but a term is missing. So the answer is \\boxed{{{n + 2}}}."),
    "two answers": lambda draw, n: (f"{n}", box_answer(f"{n} \\text{{ or }} {n + 3}")),
    "rounded": lambda draw, n: (f"{7 * n + 2}/7", box_answer(f"{n}")),
    "question stated again, a product": lambda draw, n: (f"{n * 37}", box_answer(f"{n} \\times 37")),
    "question stated again, a sum": lambda draw, n: (f"{n + 4321}", box_answer(f"{n} + 4321")),
    "question stated again, a power": lambda draw, n: (f"{n ** 2}", box_answer(f"{n}^2")),
    "question stated again, a quotient": lambda draw, n: (f"{n}", box_answer(f"\\frac{{{7 * n}}}{{7}}")),
    "false equation": lambda draw, n: (f"{n}", box_answer(f"{n + 1} = {n}")),
    "corrected to a wrong one": lambda draw, n: (
        f"{n}", f"That is \\boxed{{{n}}}, no wait, \\boxed{{{n + 1}}}."),
    "no answer, the number in the text": lambda draw, n: (
        f"{n}", f"There are {n} cases to look at, and no time is left to go through all of them one by one"),
}
"""Kind of wrong answer -> function (draw, a number) -> item."""
_RESPONSES = yaml.safe_load((Path(__file__).parent / "data/math_responses.yaml").read_text(encoding="utf-8"))
FOOLING: list[Item] = [(gold, text) for gold, text in _RESPONSES["fooling"]]
"""Handwritten responses that deserve no reward, but look as if they did."""
HONEST: list[Item] = [(gold, text) for gold, text in _RESPONSES["honest"]]
"""Handwritten right responses."""
MORE: dict[str, Callable[[random.Random, int], Item]] = {
    "root": lambda draw, n: (f"{n}\\sqrt{{2}}", box_answer(f"\\sqrt{{{2 * n * n}}}")),
    "wrong root": lambda draw, n: (f"{n}\\sqrt{{2}}", box_answer(f"{n}\\sqrt{{3}}")),
    "product": lambda draw, n: (f"x^2-{n * n}", box_answer(f"(x-{n})(x+{n})")),
    "wrong product": lambda draw, n: (f"x^2-{n * n}", box_answer(f"(x-{n})^2")),
    "set": lambda draw, n: (f"\\{{{n}, {n + 1}\\}}", box_answer(f"\\{{{n + 1}, {n}\\}}")),
    "interval": lambda draw, n: (f"[0, {n})", box_answer(f"[0, {n}]")),
    "pair": lambda draw, n: (f"({n}, {n + 1})", box_answer(f"({n + 1}, {n})")),
}
"""Kinds of answers that only `math` can judge, for the first part."""


def draw_items(kinds: dict[str, Callable[[random.Random, int], Item]], count: int, seed: int) -> list[Item]:
    """Return random items, one of each kind in turn."""
    draw = random.Random(seed)
    makers = list(kinds.values())
    return [makers[i % len(makers)](draw, draw_number(draw)) for i in range(count)]


def score_by_pool(items: list[Item], workers: int) -> tuple[list[float | None], float]:
    """Return the rewards of a process pool, and the seconds that it took without its start."""
    request = request_reward("math", {})
    rows = [{"answer": gold, "response": response} for gold, response in items]
    with create_runner(request, build_versioned_reward(request), workers) as running:
        running.score(rows[:2 * workers])  # starts the processes
        begin_s = time.monotonic()
        rewards = [result.reward for i in range(0, len(rows), BATCH_ROWS)
                   for result in running.score(rows[i:i + BATCH_ROWS])]
        return rewards, time.monotonic() - begin_s


def score_by_math_verify(items: list[Item]) -> tuple[list[float], float]:
    """Return math-verify's verdicts with boxed gold answers, and the seconds that they took."""
    from math_verify import parse, verify

    parse("\\boxed{1}")  # the first call builds the grammar
    begin_s = time.monotonic()
    verdicts = [float(verify(parse(f"\\boxed{{{gold}}}"), parse(response))) for gold, response in items]
    return verdicts, time.monotonic() - begin_s


def print_misjudged_kinds(count: int) -> None:
    """Print per reward how many right and wrong answers it rewards, and the kinds that it misjudges.

    Args:
        count: number of answers of each kind.
    """
    scorers = {"math": build_scorer("math", {}),
               "math, literal=false": build_scorer("math", {"literal": False}),
               "math, marked_only=false": build_scorer("math", {"marked_only": False}),
               "stem": build_scorer("stem", {})}
    for name, score in scorers.items():
        totals: Counter[tuple[bool, float | None]] = Counter()
        lines = []
        for label, is_right, kinds in (("right", True, RIGHT), ("wrong", False, WRONG)):
            for kind in kinds:
                items = draw_items({kind: kinds[kind]}, count, seed=7)
                counter = Counter(score(gold, text) for gold, text in items)
                totals.update({(is_right, value): times for value, times in counter.items()})
                misjudged = len(items) - counter[float(is_right)]
                if misjudged:
                    lines.append(f"    {label}: {kind}: {misjudged} of {len(items)} misjudged")
        print(f"\n{name}: {count * len(RIGHT)} right in disguise, {count * len(WRONG)} subtly wrong")
        for label, is_right in (("right", True), ("wrong", False)):
            print(f"  {label} answers: {totals[is_right, 1.0]} paid, {totals[is_right, 0.0]} not paid, "
                  f"{totals[is_right, None]} without a reward")
        print("\n".join(lines) if lines else "    none misjudged")


def print_handwritten_verdicts() -> None:
    """Print which handwritten responses each verifier rewards, with those that it misjudges."""
    scorers = {"math": build_scorer("math", {}),
               "math, literal=false": build_scorer("math", {"literal": False}),
               "stem": build_scorer("stem", {})}
    try:
        from trl.rewards.accuracy_rewards import accuracy_reward
    except ImportError:
        print("\nTRL is not installed: its column is missing")
    else:
        scorers["TRL's accuracy_reward"] = lambda gold, text: accuracy_reward(
            [[{"role": "assistant", "content": text}]], [f"\\boxed{{{gold}}}"])[0]
    print(f"\n{len(FOOLING)} responses that fool, and {len(HONEST)} honest ones: paid by")
    for name, score in scorers.items():
        fooled = [text for gold, text in FOOLING if score(gold, text) == 1]
        missed = [text for gold, text in HONEST if score(gold, text) != 1]
        print(f"  {name}: {len(fooled)} of {len(FOOLING)}, and {len(HONEST) - len(missed)} of {len(HONEST)}")
        for label, texts in (("paid for nothing", fooled), ("honest and not paid", missed)):
            print("".join(f"    {label}: {text!r}\n" for text in texts), end="")


def build_scorer(name: str, settings: dict[str, object]) -> Callable[[str, str], float | None]:
    """Return a function (gold answer, response) -> score of the reward `name`."""
    reward = build_versioned_reward(request_reward(name, settings)).reward
    if name == "math":
        reward.prepare()
    return lambda gold, text: run_reward(reward, {"answer": gold, "response": text}).reward


def main() -> None:
    """Print the results of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=2040)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    print(describe_machine(), flush=True)
    kinds = {**RIGHT, **WRONG, **MORE}
    items = draw_items(kinds, args.items, seed=0)
    ours, ours_s = score_by_pool(items, args.workers)
    peers, peers_s = score_by_math_verify(items)
    names = [list(kinds)[i % len(kinds)] for i in range(len(items))]
    different = Counter(row for row in zip(names, ours, peers, strict=True) if row[1] != row[2])
    print(f"{len(items):,} answers, {sum(peers):,.0f} right: {different.total()} verdicts differ from "
          "math-verify's")
    for (name, our, peer), times in different.items():
        print(f"  {name}: {times} of {names.count(name)}: pool {our}, math-verify {peer}")
    print(f"pool of {args.workers}: {len(items) / ours_s:.0f} answers/s; math-verify in one process: "
          f"{len(items) / peers_s:.0f} answers/s", flush=True)
    print_misjudged_kinds(args.count)
    print_handwritten_verdicts()


if __name__ == "__main__":
    main()
