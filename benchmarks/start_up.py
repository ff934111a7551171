"""What commands cost before they do anything: CPU seconds of a process that prints its help.

    python benchmarks/start_up.py [--before CHECKOUT] [--repetitions 5] [--output FILE]

CHECKOUT is an older tree of this repository.  Each command runs in both trees in turn, with the bytecode of
imports kept; the least of the repetitions counts, since what else the machine does can only add to it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from data_prep.cli import COMMANDS as DATA_COMMANDS
from megatron_sov.cli import COMMANDS
from tokenizer.cli import COMMANDS as TOKENIZER_COMMANDS

ROOT = Path(__file__).parents[1]
PROGRAMS = {"megatron-sov": ("megatron_sov.cli", COMMANDS), "sov-data": ("data_prep.cli", DATA_COMMANDS),
            "sov-tokenizer": ("tokenizer.cli", TOKENIZER_COMMANDS)}


def cpu_s(tree: Path, module: str, words: list[str]) -> float:
    """Return the processor seconds of one command, its children's included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", module, *words], cwd=tree, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(tree)}, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    trees = {"before": args.before, "now": ROOT} if args.before else {"now": ROOT}
    lines = [f"start-up: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
             f"{platform.python_version()}; CPU seconds, the least of {args.repetitions} interleaved",
             "", f"{'command':36}" + "".join(f"{name:>8}" for name in trees)]
    found: dict[str, list[float]] = {name: [] for name in trees}
    for program, (module, commands) in PROGRAMS.items():
        for command in ("", *commands):
            words = [*command.split(), "--help"] if command else []
            runs = [[cpu_s(tree, module, words) for tree in trees.values()] for _ in range(args.repetitions)]
            least = [min(run) for run in zip(*runs, strict=True)]
            if command:
                for name, seconds in zip(trees, least, strict=True):
                    found[name].append(seconds)
            figures = "".join(f"{seconds:8.2f}" for seconds in least)
            lines.append(f"{program + ' ' + ' '.join(words):36}{figures}")
            print(lines[-1], flush=True)
    lines.append("")
    for name, of in (("median of --help", statistics.median), ("largest of --help", max)):
        lines.append(f"{name:36}" + "".join(f"{of(values):8.2f}" for values in found.values()))
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
