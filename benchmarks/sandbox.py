"""How fast programs run in the sandbox, and whether honest ones are affected.

Usage: python benchmarks/sandbox.py [--before CHECKOUT] [--repetitions 3] > benchmarks/results/sandbox.txt

500 honest programs (25 kinds, 20 inputs each) run in each enclosure that this machine has, with as many
workers as cores; what they print and exit with is compared with `subprocess.run([python, "-I", "-S", file])`.
That one runs half of them in each repetition, in as many threads.  CHECKOUT is an older tree of this
repository.  All take turns, each in a process of its own, so that they meet the same noise; the least of the
repetitions counts.  CPU seconds are those of this process and of all that have ended below it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.sandbox.program import Program
from megatron_sov.sandbox.sandbox import Sandbox

KINDS = (
    "print(sum(i * i for i in range({n} * 100)))",
    "print([i for i in range(2, {n} * 10) if all(i % d for d in range(2, int(i ** .5) + 1))][-5:])",
    "a = input().split(); print(a[::-1], len(a))",
    "import sys; print(sum(map(int, sys.stdin.read().split())))",
    "from collections import Counter; print(sorted(Counter('mississippi' * {n}).items()))",
    "import heapq; h = [(i * 7919) % 1009 for i in range({n})]; heapq.heapify(h); print(heapq.heappop(h))",
    "import math; print(math.factorial({n}) % 1000003, math.gcd({n}, 36))",
    "import re; print(re.sub(r'(\\d+)', lambda m: str(int(m[1]) + {n}), 'a1b22c333'))",
    "import json; print(json.dumps({{'n': {n}, 'l': list(range({n} % 7))}}, sort_keys=True))",
    "from itertools import combinations as c; print(len(list(c(range({n} % 12 + 3), 3))))",
    "from functools import lru_cache\n@lru_cache(None)\n"
    "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f({n}))",
    "from datetime import date, timedelta; print(date(2024, 1, 1) + timedelta({n}))",
    "from fractions import Fraction as F; print(sum(F(1, i) for i in range(1, {n} + 2)))",
    "from decimal import Decimal as D; print(D({n}) / D(7))",
    "open('x', 'w').write('한' * {n}); print(len(open('x', encoding='utf-8').read()))",
    "import random; random.seed({n}); print(random.random())",
    "import bisect; a = list(range(0, 1000, 7)); print(bisect.bisect(a, {n}))",
    "import string; print(''.join(string.ascii_lowercase[(i * {n}) % 26] for i in range(26)))",
    "class P:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'P({{self.x}})'\n"
    "print(sorted([P(i * {n} % 5) for i in range(5)], key=lambda p: p.x))",
    "def f(n): return n and 1 + f(n - 1)\nprint(f({n}))",
    "import hashlib; print(hashlib.sha256(b'x' * {n}).hexdigest())",
    "try:\n    [][{n}]\nexcept IndexError as e:\n    print(e)",
    "import sys; print({n}, file=sys.stderr); sys.exit({n} % 3)",
    "import threading\nl = []\nt = threading.Thread(target=l.append, args=({n},))\n"
    "t.start(); t.join(); print(l)",
    "import statistics as s; print(s.median(range({n})), s.pstdev(range({n})))",
)
ROOT = Path(__file__).parents[1]
ALONE = "subprocess.run"
ENCLOSURES = ("namespaces", "landlock")
INPUTS = range(3, 63, 3)


def programs() -> list[Program]:
    """Return the programs, kinds and inputs mixed."""
    return [Program(kind.format(n=n), stdin=f"{n} {n + 1} 7\n") for n in INPUTS for kind in KINDS]


def timed(what: Callable[[], Sequence[tuple[int, str]]]) -> tuple[Sequence[tuple[int, str]], float, float]:
    """Return what a call gives, its seconds by the clock and those of processors."""
    def cpu_s() -> float:
        return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (
            resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

    wall_s, before_s = time.monotonic(), cpu_s()
    found = what()
    return found, time.monotonic() - wall_s, cpu_s() - before_s


def alone(chosen: Sequence[Program], workers: int) -> list[tuple[int, str]]:
    """Return exit code and output of programs, each in an interpreter that is started for it."""
    def run(program: Program) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "program.py").write_text(program.source)
            done = subprocess.run([sys.executable, "-I", "-S", "program.py"], cwd=folder, text=True,
                                  input=program.stdin, capture_output=True)
            return done.returncode, done.stdout

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, chosen))


def enclosed(name: str, chosen: Sequence[Program], workers: int) -> list[tuple[int, str]]:
    """Return the same from a sandbox, the start of its servers included."""
    with Sandbox(enclosure=name, workers=workers) as sandbox, ThreadPoolExecutor(workers) as pool:
        return [(-1 if outcome.exit_code is None else outcome.exit_code, outcome.stdout)
                for outcome in pool.map(sandbox.run, chosen)]


def arm(name: str, chosen: Sequence[Program], workers: int) -> None:
    """Run programs in one way, and print what was found and took how long for the process that compares."""
    try:
        run = alone if name == ALONE else partial(enclosed, name)
        print(json.dumps(timed(lambda: run(chosen, workers))))
    except UserError as e:
        sys.exit(" ".join(str(e).split()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    workers, chosen = len(os.sched_getaffinity(0)), programs()
    if args.arm:  # in a process of its own, with the tree that PYTHONPATH names
        arm(args.arm[0], chosen[int(args.arm[1])::2] if args.arm[0] == ALONE else chosen, workers)
        return
    trees = {"before": args.before, "now": ROOT} if args.before else {"now": ROOT}
    arms = [(ALONE, "now"), *((name, tree) for name in ENCLOSURES for tree in trees)]
    print(f"{platform.machine()}, Linux {platform.release()}, {workers} cores, Python "
          f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}; {workers} workers; the least of "
          f"{args.repetitions} interleaved", flush=True)
    least: dict[tuple[str, str], list[float]] = {}
    right: dict[int, list[object]] = {}
    found: dict[tuple[str, str], list[list[object]]] = {}
    for turn in range(args.repetitions):
        for name, tree in list(arms):
            done = subprocess.run([sys.executable, __file__, "--arm", name, str(turn % 2)], check=False,
                                  text=True, capture_output=True,
                                  env={**os.environ, "PYTHONPATH": str(trees[tree])})
            if done.returncode:
                print(f"{name}, {tree}: {done.stderr.strip()}", flush=True)
                arms.remove((name, tree))
                continue
            outcomes, *seconds = json.loads(done.stdout)
            if name == ALONE:
                right |= dict(zip(range(turn % 2, len(chosen), 2), outcomes, strict=True))
            found[name, tree] = outcomes
            least[name, tree] = list(map(min, seconds, least.get((name, tree), seconds)))
    print(f"{'':<22}{'programs':>9}{'seconds':>9}{'per s':>8}{'CPU s':>8}{'per CPU s':>11}  other outcomes")
    for (name, tree), (wall_s, cpu_s) in least.items():
        others = "" if name == ALONE else sum(
            found[name, tree][i] != outcome for i, outcome in right.items())
        count = len(found[name, tree])
        label = name if name == ALONE else f"{name}, {tree}"
        print(f"{label:<22}{count:>9}{wall_s:>9.1f}{count / wall_s:>8.1f}{cpu_s:>8.1f}{count / cpu_s:>11.1f}"
              f"  {others}")
    of_alone_s = least[ALONE, "now"][0] / len(found[ALONE, "now"])
    for (name, tree), (wall_s, cpu_s) in least.items():
        if tree == "now" and name != ALONE:
            beside = f", {cpu_s / least[name, 'before'][1]:.2f} of the CPU seconds of before" * (
                (name, "before") in least)
            print(f"{name}: {of_alone_s / wall_s * len(chosen):.1f} times as many programs/s as "
                  f"subprocess.run{beside}")


if __name__ == "__main__":
    main()
