"""How fast programs run in the sandbox, and whether honest ones are affected.

Usage: python benchmarks/sandbox.py > benchmarks/results/sandbox.txt

500 honest programs (25 kinds, 20 inputs each) run in each enclosure that this machine has, with as many
workers as cores; what they print and exit with is compared with `subprocess.run([python, "-I", "-S", file])`.
That one runs half of them before and half behind, in as many threads, so that both meet the machine's
noise. CPU seconds are those of this process and of all that have ended below it.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sov.errors import UserError
from megatron_sov.rewards.sandbox import Program, Sandbox

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
ALONE = "subprocess.run"
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
    with Sandbox(enclosure=name, workers=workers) as sandbox:
        return [(-1 if outcome.exit_code is None else outcome.exit_code, outcome.stdout)
                for outcome in sandbox.run_many(chosen)]


def main() -> None:
    """Print the table."""
    workers, chosen = len(os.sched_getaffinity(0)), programs()
    print(f"{platform.machine()}, Linux {platform.release()}, {workers} cores, Python "
          f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}; {len(chosen)} programs, "
          f"{workers} workers", flush=True)
    print(f"{'':<16}{'programs':>9}{'seconds':>9}{'per s':>8}{'CPU s':>8}", flush=True)
    expected: dict[int, tuple[int, str]] = {}
    enclosures: dict[str, tuple[Sequence[tuple[int, str]], float]] = {}
    alone_s = 0.0
    for name in (ALONE, "namespaces", "landlock", ALONE):
        places = [i for i in range(len(chosen)) if name != ALONE or i % 2 == bool(expected)]
        few = [chosen[i] for i in places]
        try:
            found, wall_s, cpu_s = timed(lambda name=name, few=few: (
                alone(few, workers) if name == ALONE else enclosed(name, few, workers)))
        except UserError as e:
            print(f"{name:<16}{' '.join(str(e).split())}")
            continue
        print(f"{name:<16}{len(few):>9}{wall_s:>9.1f}{len(few) / wall_s:>8.1f}{cpu_s:>8.1f}", flush=True)
        if name == ALONE:
            expected |= dict(zip(places, found, strict=True))
            alone_s += wall_s
        else:
            enclosures[name] = found, wall_s
    for name, (found, wall_s) in enclosures.items():
        others = sum(found[i] != right for i, right in expected.items())
        print(f"{name}: {alone_s / wall_s:.1f} times as many programs/s as subprocess.run; "
              f"{others} of {len(expected)} with another output or exit code")


if __name__ == "__main__":
    main()
