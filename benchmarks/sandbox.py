"""Measure programs per second in the sandbox, and compare outputs with `subprocess.run`.

Usage: python benchmarks/sandbox.py [--before CHECKOUT] [--repetitions 3] > benchmarks/results/sandbox.txt

500 programs (25 kinds, 20 inputs each) run in each enclosure of this machine, with a worker per core. Output
and exit code are compared with `subprocess.run([python, "-I", "-S", file])`, which runs half the programs in
each repetition. CHECKOUT is an older tree of this repository. Enclosures and trees take turns, each in a new
process, and the minimum over the repetitions counts. CPU seconds include child processes that have ended.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from measurement import describe_machine, read_child_cpu_s

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
"""Sources of the programs; {n} is one of INPUTS."""
ROOT = Path(__file__).parents[1]
DIRECT = "subprocess.run"
ENCLOSURES = ("namespaces", "landlock")
INPUTS = range(3, 63, 3)
Arm = tuple[str, str]
"""Enclosure or `DIRECT`; tree."""
Results = Sequence[tuple[int, str]]
"""Exit code and standard output per program."""


def main() -> None:
    """Run all arms in turn, and print the table; with --arm run one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    programs = [Program(kind.format(n=n), stdin=f"{n} {n + 1} 7\n") for n in INPUTS for kind in KINDS]
    if args.arm:  # in a child process, with the tree in PYTHONPATH
        name, first = args.arm
        run_arm(name, programs[int(first)::2] if name == DIRECT else programs, workers)
        return
    trees = {"before": args.before, "now": ROOT} if args.before else {"now": ROOT}
    arms = [(DIRECT, "now"), *((name, tree) for name in ENCLOSURES for tree in trees)]
    print(f"{describe_machine()}, Linux {os.uname().release}; {workers} workers; the least of "
          f"{args.repetitions} interleaved", flush=True)
    least_s: dict[Arm, list[float]] = {}
    expected: dict[int, list[object]] = {}
    results: dict[Arm, list[list[object]]] = {}
    for repetition in range(args.repetitions):
        for name, tree in list(arms):
            process = subprocess.run([sys.executable, __file__, "--arm", name, str(repetition % 2)],
                                     check=False, text=True, capture_output=True,
                                     env={**os.environ, "PYTHONPATH": str(trees[tree])})
            if process.returncode:
                print(f"{name}, {tree}: {process.stderr.strip()}", flush=True)
                arms.remove((name, tree))
                continue
            arm_results, *seconds = json.loads(process.stdout)
            if name == DIRECT:
                expected |= dict(zip(range(repetition % 2, len(programs), 2), arm_results, strict=True))
            results[name, tree] = arm_results
            least_s[name, tree] = list(map(min, seconds, least_s.get((name, tree), seconds)))
    print_table(least_s, results, expected)
    direct_s = least_s[DIRECT, "now"][0] / len(results[DIRECT, "now"])
    for (name, tree), (wall_s, cpu_s) in least_s.items():
        if tree == "now" and name != DIRECT:
            speedup = direct_s / wall_s * len(programs)
            print(f"{name}: {speedup:.1f} times as many programs/s as subprocess.run")
            if (name, "before") in least_s:
                print(f"{name}: {cpu_s / least_s[name, 'before'][1]:.2f} of the CPU seconds of before")


def print_table(least_s: dict[Arm, list[float]], results: dict[Arm, list[list[object]]],
                expected: dict[int, list[object]]) -> None:
    """Print a row per arm: least wall and CPU seconds, and the number of results unlike `DIRECT`."""
    print(f"{'':<22}{'programs':>9}{'seconds':>9}{'per s':>8}{'CPU s':>8}{'per CPU s':>11}  other outcomes")
    for (name, tree), (wall_s, cpu_s) in least_s.items():
        num_different = "" if name == DIRECT else sum(
            results[name, tree][i] != result for i, result in expected.items())
        count = len(results[name, tree])
        label = name if name == DIRECT else f"{name}, {tree}"
        print(f"{label:<22}{count:>9}{wall_s:>9.1f}{count / wall_s:>8.1f}{cpu_s:>8.1f}{count / cpu_s:>11.1f}"
              f"  {num_different}")


def run_arm(name: str, programs: Sequence[Program], workers: int) -> None:
    """Run programs and print JSON: results, wall seconds, CPU seconds."""
    run = run_directly if name == DIRECT else partial(run_enclosed, name)
    begin_s, begin_cpu_s = time.monotonic(), read_cpu_s()
    try:
        results = run(programs, workers)
    except UserError as e:
        sys.exit(" ".join(str(e).split()))
    print(json.dumps([results, time.monotonic() - begin_s, read_cpu_s() - begin_cpu_s]))


def read_cpu_s() -> float:
    return time.process_time() + read_child_cpu_s()


def run_directly(programs: Sequence[Program], workers: int) -> Results:
    """Run each program in a new interpreter."""
    def run_program(program: Program) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "program.py").write_text(program.source)
            process = subprocess.run([sys.executable, "-I", "-S", "program.py"], cwd=folder, text=True,
                                     input=program.stdin, capture_output=True)
            return process.returncode, process.stdout

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run_program, programs))


def run_enclosed(name: str, programs: Sequence[Program], workers: int) -> Results:
    """Run programs in a sandbox; its start is part of the time."""
    with Sandbox(enclosure=name, workers=workers) as sandbox, ThreadPoolExecutor(workers) as pool:
        return [(-1 if outcome.exit_code is None else outcome.exit_code, outcome.stdout)
                for outcome in pool.map(sandbox.run, programs)]


if __name__ == "__main__":
    main()
