"""What a student learns by on-policy distillation in one run: `rl run` with policy.method=opd.

Usage: python benchmarks/opd_learning.py --work FOLDER [--seeds 0 1 2] [--rounds 120]
       python benchmarks/opd_learning.py --work FOLDER --print

The task, models and measure are those of distillation_learning.py, with half of its teacher's conversations
and 400 steps of the teacher and the start in the place of 600.  `megatron-sov serve` answers for the teacher,
which is larger than the student.  The student answers eight of 200 questions in each round, four times each,
and takes one step on them; no reward is asked.

The baseline that could win is fine-tuning of the same start on answers that the teacher itself samples to the
same 200 questions (`generate`): as many as the student writes in the rounds, in as many steps of as many
documents, at the rounds' learning rate, half and twice of it.

Printed are, over the seeds with 95 % intervals (Student's t): KL(teacher || student) in nats per token of the
answers to questions in wordings that no arm has learned, before and after; the difference of both arms, seed
by seed; and KL(student || teacher) a token as the rounds' own responses tell it, over the first and last ten
rounds.  Complete runs stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from distillation_learning import ASKED, LEARNED, RATE, STUDENT, TEACHER, Work, conversations, kl, words_of
from seed_runs import tokens_a_document
from seeds import over_seeds

PORT, STEPS, ENDS = 18731, 400, 10
ROW = 128
"""Tokens of a row (MODEL)."""
PROMPTS, SAMPLES = 8, 4
NO_WARMUP = "optim.warmup_steps=0"
OPD = ("policy.method=opd", NO_WARMUP, f"rollout.prompts_per_round={PROMPTS}",
       f"rollout.samples_per_prompt={SAMPLES}", "rollout.max_new_tokens=12", "rollout.max_prompt_tokens=64")
SFT_RATES = ("1e-3", "2e-3", "4e-3")
"""That of the rounds, half and twice of it."""


@contextmanager
def served(work: Work) -> Iterator[str]:
    """Give the address of the teacher's server."""
    url = f"http://127.0.0.1:{PORT}"
    with open(work.folder / "serve.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "megatron_sov", "serve", str(work.folder / "teacher"),
             "--port", str(PORT)], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/v1/models").close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def measure(work: Work, seeds: list[int], rounds: int) -> None:
    """Run all seeds."""
    plenty = work.data("plenty", conversations(1, 6_000, LEARNED + ASKED))
    asked = work.data("asked", conversations(2, 400, ASKED), heldout=0.5)
    even = work.data("even", conversations(3, 4_000, LEARNED + ASKED, even=True))
    rate = (f"train.steps={STEPS}", "optim.lr=4e-3")
    work.train("teacher", "pretrain", plenty, *TEACHER, *rate)
    with served(work) as url:
        for seed in seeds:
            own, start, run = f"train.seed={seed}", f"start-{seed}", f"opd-{seed}"
            work.train(start, "pretrain", even, *STUDENT, own, *rate)
            prompts = work.folder / f"asks-{seed}.jsonl"
            prompts.write_text("".join(
                json.dumps({"prompt": json.loads(line)["messages"][0]["content"]}) + "\n"
                for line in conversations(100 + seed, 200, LEARNED).splitlines()))
            if not (work.folder / run / "complete.json").exists():
                work.command("megatron_sov", "rl", "run", "tiny-qwen3", "--from", work.folder / start,
                             "--prompts", prompts, "--reward", "none", "--teacher-url", url, "--store",
                             work.folder / f"store-{seed}", "--run", work.folder / run, "--resume",
                             *words_of((own, RATE, *OPD, f"rollout.rounds={rounds}")))
            fine_tune(work, seed, rounds, prompts)
            for name in (start, run, *(f"sft-{rate}-{seed}" for rate in SFT_RATES)):
                work.train(f"asked-{name}", "distill", asked, own, RATE, "train.steps=1", start=name,
                           states="states-asked")


def fine_tune(work: Work, seed: int, rounds: int, prompts: Path) -> None:
    """Fine-tune the start on answers of the teacher, as many in a step as a round has."""
    answers = work.folder / f"taught-{seed}.answers.jsonl"
    if not answers.exists():
        samples = round(rounds * PROMPTS * SAMPLES / len(prompts.read_text().splitlines()))
        work.command("megatron_sov", "generate", work.folder / "teacher", "--prompts", prompts, "--chat",
                     "--max-new-tokens", "12", "--temperature", "1", "--samples", str(samples),
                     "--seed", str(seed), "--output", answers)
    rows = map(json.loads, answers.read_text().splitlines())
    taught = work.data(f"taught-{seed}", "".join(
        json.dumps({"messages": [{"role": "user", "content": row["prompt"]},
                                 {"role": "assistant", "content": row["response"].strip()}]}) + "\n"
        for row in rows))
    batch = round(PROMPTS * SAMPLES * tokens_a_document(taught) / ROW)
    for rate in SFT_RATES:
        work.train(f"sft-{rate}-{seed}", "sft", taught, f"train.seed={seed}", f"optim.lr={rate}", NO_WARMUP,
                   f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}",
                   f"train.steps={rounds}", start=f"start-{seed}")


def apart(run: Path) -> list[float]:
    """Return KL(student || teacher) of each round's responses."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [float(e["reverse_kl"]) for e in events if e["event"] == "round"]


def report(folder: Path) -> None:
    """Print what there is."""
    seeds = sorted(int(p.parent.name.rpartition("-")[2]) for p in folder.glob("asked-opd-*/complete.json"))
    if not seeds:
        raise SystemExit(f"{folder}: no seed is done yet")
    told = {seed: apart(folder / f"opd-{seed}") for seed in seeds}
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, load "
          f"{os.getloadavg()[0]:.0f}, Python {platform.python_version()}; seeds "
          f"{', '.join(map(str, seeds))}; rounds of one step: "
          f"{', '.join(str(len(rounds)) for rounds in told.values())}\n")
    opd = [kl(folder / f"asked-opd-{s}") for s in seeds]
    tuned = {rate: [kl(folder / f"asked-sft-{rate}-{s}") for s in seeds] for rate in SFT_RATES}
    rows = {"KL(teacher || student), held out, start": [kl(folder / f"asked-start-{s}") for s in seeds],
            "the same, after on-policy distillation": opd,
            **{f"after SFT on the teacher's answers, {r}": values for r, values in tuned.items()},
            **{f"on-policy less SFT at {r}": [own - other for own, other in zip(opd, values, strict=True)]
               for r, values in tuned.items()},
            f"KL(student || teacher), first {ENDS} rounds": [fmean(told[s][:ENDS]) for s in seeds],
            f"the same, last {ENDS} rounds": [fmean(told[s][-ENDS:]) for s in seeds]}
    for name, values in rows.items():
        print(f"  {name:<42} {over_seeds(values, '.4f'):>17}   ({', '.join(f'{v:.4f}' for v in values)})")


def main() -> None:
    """Run, or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--print", action="store_true", help="only print what there is")
    args = parser.parse_args()
    if not args.print:
        measure(Work(args.work), args.seeds, args.rounds)
    report(args.work)


if __name__ == "__main__":
    main()
