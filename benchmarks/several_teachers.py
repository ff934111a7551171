"""A teacher for each domain, beside each teacher alone for both, and beside SFT.

Usage: python benchmarks/several_teachers.py --work FOLDER [--seeds 0 1 2] [--steps 120]
       python benchmarks/several_teachers.py --work FOLDER --print

Questions and answers are those of distillation_learning.py.  Half of the kinds of things is one domain, half
the other.  A teacher has learned the shares of the answers in its own domain, and even answers in the other:
it knows that language too, and nothing of the shares.  The student starts from even answers in both.  All
arms go on from it over the same 200 conversations of each domain, for the same steps:

  both      each domain's conversations with the distributions of its own teacher
  first     those of the first domain's teacher for all
  second    those of the second domain's teacher for all
  SFT       the answers that were drawn, at the best of three learning rates

Each is asked the other four wordings.  Figures are bits per byte of 400 answers of each domain that were
drawn by the true shares (`megatron-sov eval ppl`): no teacher is asked.  Printed are means over the seeds
with 95 % intervals (Student's t), and the differences from `both`, seed by seed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection
from pathlib import Path
from statistics import fmean

from distillation_learning import (
    ASKED, LEARNED, RATE, STUDENT, TEACHER, THINGS, Work, conversations, run_seeds, words_of)
from seeds import over_seeds

DOMAINS = {"first": tuple(THINGS)[:3], "second": tuple(THINGS)[3:]}
SFT_RATES = {"SFT": RATE, "SFT, rate / 4": "optim.lr=5e-4", "SFT, rate / 16": "optim.lr=1.25e-4"}
ARMS = ("both", *DOMAINS, *SFT_RATES)


def both_domains(seed: int, count: int, even: Collection[str]) -> str:
    """Return conversations of both domains; the answers of those in `even` are as likely as each other."""
    return "".join(conversations(seed + i, count, LEARNED + ASKED, even=name in even, things=things)
                   for i, (name, things) in enumerate(DOMAINS.items()))


def measure(work: Work, seed: int, steps: int, teacher_steps: int) -> None:
    """Run all arms of a seed."""
    even = work.data("even", both_domains(5, 2_000, even=DOMAINS))
    for i, name in enumerate(DOMAINS):
        plenty = work.data(f"plenty-{name}", both_domains(10 + i, 6_000, even=DOMAINS.keys() - {name}))
        work.train(f"teacher-{name}", "pretrain", plenty, *TEACHER, f"train.steps={teacher_steps}",
                   "optim.lr=4e-3")
    own = f"train.seed={seed}"
    start = work.train(f"start-{seed}", "pretrain", even, *STUDENT, own, f"train.steps={teacher_steps}",
                       "optim.lr=4e-3")
    few = {name: work.data(f"few-{seed}-{name}", conversations(100 + seed, 200, LEARNED, things=things))
           for name, things in DOMAINS.items()}
    asked = {name: work.data(f"asked-{name}", conversations(200, 800, ASKED, things=things), heldout=0.5)
             for name, things in DOMAINS.items()}
    runs = [work.folder / f"arm-{seed}-{number}" for number in range(len(ARMS))]
    for arm, run in zip(ARMS, runs, strict=True):
        if not (run / "complete.json").exists():
            command = "sft" if arm in SFT_RATES else "distill"
            work.command("megatron_sov", command, "tiny-qwen3", "--from", start, "--run", run, "--resume",
                         *(word for name, data in few.items() for word in ("--data", f"{name}={data}")),
                         *teachers(work.folder, arm),
                         *words_of((own, f"train.steps={steps}", SFT_RATES.get(arm, RATE))))
    for run in (start, *runs):
        out = work.folder / f"asked-{run.name}.json"
        if not out.exists():
            work.command("megatron_sov", "eval", "ppl", run, "--seq-len", "128", "--output", out,
                         *(word for data in asked.values() for word in ("--data", data)))


def teachers(folder: Path, arm: str) -> list[str]:
    """Return the options that name an arm's teachers."""
    if arm in SFT_RATES:
        return []
    given = ([f"{name}={folder / f'teacher-{name}'}" for name in DOMAINS] if arm == "both"
             else [str(folder / f"teacher-{arm}")])
    return [word for teacher in given for word in ("--teacher", teacher)] + ["--states-dtype", "float32"]


def figures(file: Path) -> dict[str, float]:
    """Return the bits per byte of each domain."""
    told = json.loads(file.read_text())
    return {domain: told[f"asked-{domain}"]["bits_per_byte"] for domain in DOMAINS}


def report(folder: Path) -> None:
    """Print what there is."""
    files = {"start": "asked-start-{}.json",
             **{arm: f"asked-arm-{{}}-{number}.json" for number, arm in enumerate(ARMS)}}
    seeds = sorted(int(file.stem.rpartition("-")[2]) for file in folder.glob("asked-start-*.json"))
    found = {name: {seed: figures(told) for seed in seeds if (told := folder / file.format(seed)).exists()}
             for name, file in files.items()}
    if not found["both"]:
        raise SystemExit(f"{folder}: no seed is done yet")
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; bits per byte of answers drawn by the true shares, in wordings that "
          f"no arm has learned; seeds {', '.join(map(str, seeds))}\n")
    for name, by_seed in ((name, by_seed) for name, by_seed in found.items() if by_seed):
        each = "   ".join(f"{domain} {over_seeds([v[domain] for v in by_seed.values()], '.4f')}"
                          for domain in DOMAINS)
        means = {seed: fmean(values.values()) for seed, values in by_seed.items()}
        apart = [means[seed] - fmean(found["both"][seed].values()) for seed in means if seed in found["both"]]
        print(f"  {name:<14} {over_seeds(list(means.values()), '.4f')}   {each}   "
              f"{over_seeds(apart, '+.4f')} beside both")


if __name__ == "__main__":
    run_seeds(__doc__, measure, report)
