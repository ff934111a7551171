"""Are the pool's verdicts those of math-verify, how fast is it, and which answers fool `math` and `stem`?

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

from megatron_sov.judge.rewards.registry import make, order
from megatron_sov.judge.rewards.reward import judged
from megatron_sov.judge.rewards.scoring import runner

Item = tuple[str, str]
"""A gold answer, and a response."""
BATCH_ROWS = 128


def number(draw: random.Random) -> int:
    """Return a number of two to four digits that is no multiple of ten."""
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
FOOLING: list[Item] = [
    # the question again
    ("80779853376", r"\boxed{123456 \times 654321}"), ("1048576", r"\boxed{2^{20}}"),
    ("42", r"\boxed{17+25}"), ("42", r"\boxed{\frac{84}{2}}"), ("1/3", r"\boxed{\int_0^1 x^2 \, dx}"),
    ("5050", r"\boxed{\sum_{k=1}^{100} k}"), ("120", r"\boxed{\binom{10}{3}}"), ("120", r"\boxed{5!}"),
    ("12", r"\boxed{\gcd(48,36)}"), ("12", r"\boxed{\sqrt{144}}"), ("3", r"\boxed{\log_2 8}"),
    ("3", r"\boxed{\lfloor 3.7 \rfloor}"), ("2", r"\boxed{\lim_{x\to 0} \frac{\sin 2x}{x}}"),
    ("42", r"\boxed{142 \bmod 100}"), ("6x", r"\boxed{\frac{d}{dx} 3x^2}"), ("7/2", r"\boxed{3+\frac12}"),
    ("42", "The answer is $6 \\times 7$."), ("42", r"\boxed{\(6 \cdot 7\)}"), ("42", r"\boxed{= 6 \cdot 7}"),
    # of another kind
    ("(4, 3)", r"\boxed{\{4, 3\}}"), ("\\{3, 4\\}", r"\boxed{(3, 4)}"),
    # false, open, or taken back
    ("42", r"\boxed{41=42}"), ("42", r"\boxed{42=43}"), ("42", r"\boxed{x \le 42}"),
    ("42", r"\boxed{\neq 42}"), ("42", r"\boxed{\pm 42}"), ("42", r"\boxed{42 \text{ is wrong}}"),
    ("42", r"\boxed{42 \ldots}"), ("42", "The answer is not 42."), ("42", "The answer isn't 42."),
    ("42", "The answer is more than 42."), ("42", "답은 42가 아닙니다."),
    # several answers
    ("42", r"\boxed{41 \text{ or } 42}"), ("42", r"\boxed{41} or \boxed{42}"), ("42", r"\boxed{\{41, 42\}}"),
    ("42", "The answer is 42 or 43."), ("42", "Answer: 42 (or 43)"),
    ("42", r"\boxed{42}, no wait, \boxed{43}"),
    # no answer
    ("42", "It is somewhere between 1 and 42"), ("42", "The candidates are 40, 41, 42, 43 and 44."),
    ("42", r"<think>It must be \boxed{42}."), ("42", r"<think>It must be \boxed{42}.</think>I do not know."),
    ("42", r'<tool_call>{"name": "f", "arguments": {"a": "\\boxed{42}"}}</tool_call>'),
    ("42", r"\boxed{\boxed{42}+1}")]
"""Gold answers, and responses that are paid by what they look like."""
HONEST: list[Item] = [
    ("42", r"\boxed{42}"), ("42", "The answer is 42."), ("42", "**Answer: 42**"), ("42", "6 * 7 gives\n42"),
    ("42", "Thus $x = 42$."), ("42", r"\boxed{x = 42}"), ("42", r"\boxed{6 \times 7 = 42}"),
    ("42", r"\boxed{+42}"), ("42", r"\boxed{42.0}"), ("42", r"\boxed{42.}"), ("42", r"\fbox{42}"),
    ("42", r"\boxed{\text{42}}"), ("42", r"\boxed{42 \text{ apples}}"), ("42", r"\boxed{\$42}"),
    ("42", r"\boxed{42^\circ}"), ("42", r"\[\boxed{42}\]"), ("42", r"\boxed{3}, no wait \boxed{42}"),
    ("42", r"<think>43?</think>\boxed{42}"), ("42", "<answer>42</answer>"), ("42", "답은 42입니다."),
    ("42", "答案是42。"), ("42", "The answer is 42 and not 43."),
    ("42", "The answer is 42 because 6 * 7 = 42."), ("1000", r"\boxed{1,000}"), ("1000", r"\boxed{1{,}000}"),
    ("1000", r"\boxed{1\,000}"), ("1/2", r"\boxed{0.5}"), ("1/2", r"\boxed{\dfrac12}"),
    ("1/2", r"\boxed{1/2}"), ("1/2", r"\boxed{50\%}"), ("2/3", r"\boxed{\frac{4}{6}}"),
    ("7/2", r"\boxed{3\frac{1}{2}}"), ("-7", "\\boxed{\u22127}"), ("-1/2", r"\boxed{\frac{-1}{2}}"),
    ("300000000", r"\boxed{3 \times 10^8}"), ("3\\sqrt{2}", r"\boxed{\sqrt{18}}"),
    ("(1, 2)", r"\boxed{(1,2)}"), ("\\{1, 2\\}", r"\boxed{\{2,1\}}"), ("x^2-4", r"\boxed{(x-2)(x+2)}"),
    ("5 km", r"\boxed{5 \text{ km}}"), ("5 km", r"\boxed{\(5 \text{ km}\)}"), ("42", r"\boxed{\(42\)}"),
    ("(4, 3)", r"\boxed{4, 3}"), ("\\{(1, 2), (3, 4)\\}", r"\boxed{(1, 2), (3, 4)}")]
"""Gold answers, and right responses."""
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
    asked = order("math", {})
    rows = [{"answer": gold, "response": response} for gold, response in items]
    with runner(asked, make(asked), workers) as running:
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
    """Print what each verifier makes of right and of wrong answers, by kind.

    Args:
        count: of each kind.
    """
    asked = {"math": order("math", {}), "math, literal=false": order("math", {"literal": False}),
             "math, marked_only=false": order("math", {"marked_only": False}),
             "stem": order("stem", {})}
    rewards = {name: make(one).reward for name, one in asked.items()}
    rewards["math"].prepare()
    for name, reward in rewards.items():
        totals: Counter[tuple[bool, float | None]] = Counter()
        lines = []
        for right, kinds in ((True, RIGHT), (False, WRONG)):
            for kind in kinds:
                items = items_of({kind: kinds[kind]}, count, seed=7)
                found = Counter(judged(reward, {"answer": gold, "response": text}).reward
                                for gold, text in items)
                totals.update({(right, value): times for value, times in found.items()})
                missed = len(items) - found[float(right)]
                if missed:
                    lines.append(f"    {'right' if right else 'wrong'}: {kind}: {missed} of {len(items)} "
                                 "misjudged")
        print(f"\n{name}: {count * len(RIGHT)} right in disguise, {count * len(WRONG)} subtly wrong")
        for right in (True, False):
            print(f"  {'right' if right else 'wrong'} answers: {totals[right, 1.0]} paid, "
                  f"{totals[right, 0.0]} not paid, {totals[right, None]} without a reward")
        print("\n".join(lines) if lines else "    none misjudged")


def by_hand() -> None:
    """Print what is paid of the two lists, by whom."""
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
    """Return what judges a gold answer and a response by a reward of this project."""
    reward = make(order(name, settings)).reward
    if name == "math":
        reward.prepare()
    return lambda gold, text: judged(reward, {"answer": gold, "response": text}).reward


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
