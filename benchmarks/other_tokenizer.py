"""What a student learns from a teacher of another tokenizer: distillation beside training on the same tokens.

Usage: python benchmarks/other_tokenizer.py --work FOLDER [--seeds 0 1 2] [--steps 120]

The texts are those of `distillation_learning.py` (a question and one of eight answers, some likelier than
others), as plain documents.  Everything runs through the ordinary commands on one process of one thread.

  teacher   learns 12,000 documents in the tokens of a tokenizer of its own (384 ids, SuperBPE)
  start     a smaller model in the tokens of another (512 ids, byte-level BPE), which learns the same
            questions with answers that are drawn evenly
  arms      go on from the start over the same 200 documents, in the same order, for the same steps:
            next-token training at three rates, and distillation from that teacher, alone, and with
            cross-entropy at three rates

Printed are bits per byte on 600 other documents, means over the seeds with 95 % intervals (Student's t); an
arm is compared with the best of next-token training seed by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from distillation_learning import ASKED, LEARNED, RATE, STUDENT, TEACHER, conversations, words_of
from seeds import over_seeds

VOCABULARY = {"own": ("solar-open", 512), "other": ("k-exaone", 384)}
"""Tokenizer -> its preset and ids."""
SETTINGS = ("model.tied_embeddings=true",)
SLOW, SLOWER = ("optim.lr=5e-4", "optim.min_lr=5e-5"), ("optim.lr=1.25e-4", "optim.min_lr=1.25e-5")
ARMS = {
    "next token": ("pretrain",),
    "next token, rate / 4": ("pretrain", *SLOW),
    "next token, rate / 16": ("pretrain", *SLOWER),
    "other tokenizer": ("distill",),
    "other tokenizer + 1 CE": ("distill", "distillation.ce_coeff=1"),
    "other tokenizer + 1 CE, rate / 4": ("distill", "distillation.ce_coeff=1", *SLOW),
    "other tokenizer + 1 CE, rate / 16": ("distill", "distillation.ce_coeff=1", *SLOWER),
}
ACROSS = ("distillation.other_tokenizer=true", "distillation.top_k=64")


class Work:
    """A folder with tokenizers, data and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def command(self, module: str, *arguments: str | Path) -> None:
        """Run a command, its output into a file."""
        with open(self.folder / "log", "a") as log:
            done = subprocess.run([sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
                                  stdout=log, stderr=subprocess.STDOUT, check=False,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}\nended with exit code {done.returncode}; see "
                             f"{self.folder / 'log'}")

    def texts(self, name: str, seed: int, count: int, *, even: bool = False) -> Path:
        """Return a file of documents."""
        file = self.folder / f"{name}.jsonl"
        if not file.exists():
            chats = map(json.loads, conversations(seed, count, LEARNED + ASKED, even).splitlines())
            file.write_text("".join(json.dumps(
                {"text": " ".join(m["content"] for m in chat["messages"])}) + "\n" for chat in chats))
        return file

    def data(self, name: str, file: Path, tokenizer: str = "own", heldout: float = 0.0) -> Path:
        """Return token shards of documents."""
        shards, folder = self.folder / name, self.folder / f"tokenizer-{tokenizer}"
        if not folder.exists():
            preset, vocab_size = VOCABULARY[tokenizer]
            self.command("tokenizer.cli", "train", "--preset", preset, "--vocab-size", str(vocab_size),
                         "--input", self.texts("plenty", 1, 12_000), "--output", folder)
        if not (shards / "manifest.json").exists():
            self.command("data_prep.cli", "pack", "--tokenizer", folder, "--heldout", str(heldout),
                         "--workers", "1", "--input", file, "--output", shards)
        return shards

    def train(self, name: str, command: str, data: Path, *settings: str, start: str = "",
              states: str = "") -> Path:
        """Return a run, which is run where it is not complete."""
        run = self.folder / name
        if not (run / "complete.json").exists():
            words = words_of((*SETTINGS, *settings))
            words += ["--from", str(self.folder / start)] if start else []
            words += ["--teacher", str(self.folder / "teacher"),
                      "--states", str(self.folder / states)] if command == "distill" else []
            self.command("megatron_sov", command, "tiny-qwen3", "--data", data, "--run", run, "--resume",
                         *words)
        return run

    def bits(self, run: Path, data: Path) -> float:
        """Return bits per byte on a split of held-out documents."""
        out = run.with_suffix(".ppl.json")
        if not out.exists():
            self.command("megatron_sov", "eval", "ppl", run, "--data", data, "--out", out, "--max-tokens",
                         "100000")
        (figures,) = json.loads(out.read_text()).values()
        return float(figures["bits_per_byte"])


def measure(work: Work, seed: int, steps: int, teacher_steps: int) -> dict[str, float]:
    """Run all arms of a seed; returns arm -> bits per byte."""
    other = work.data("plenty-other", work.texts("plenty", 1, 12_000), "other")
    asked = work.data("asked", work.texts("asked", 2, 1_200), heldout=0.5)
    work.train("teacher", "pretrain", other, *TEACHER, "model.vocab_size=384", f"train.steps={teacher_steps}",
               "optim.lr=4e-3")
    even = work.data("even", work.texts("even", 3, 4_000, even=True))
    few = work.data(f"few-{seed}", work.texts(f"few-{seed}", 100 + seed, 200))
    own = f"train.seed={seed}"
    found = {"start": work.bits(work.train(f"start-{seed}", "pretrain", even, *STUDENT, own,
                                           f"train.steps={teacher_steps}", "optim.lr=4e-3"), asked)}
    for number, (arm, (command, *settings)) in enumerate(ARMS.items()):
        rate = [] if any(s.startswith("optim.lr=") for s in settings) else [RATE]
        across = ACROSS if command == "distill" else ()
        run = work.train(f"arm-{seed}-{number}", command, few, *STUDENT, own, f"train.steps={steps}", *rate,
                         *across, *settings, start=f"start-{seed}", states=f"states-{seed}")
        found[arm] = work.bits(run, asked)
    return found


def report(found: dict[int, dict[str, float]], steps: int, teacher_steps: int) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; bits per byte on 600 documents that no arm has learned; seeds "
          f"{', '.join(map(str, found))}; steps of the teacher and of an arm: {teacher_steps}, {steps}\n")
    arms = {arm: [values[arm] for values in found.values()] for arm in next(iter(found.values()))}
    best = min((arm for arm in arms if arm.startswith("next")), key=lambda arm: fmean(arms[arm]))
    for arm, values in arms.items():
        changes = [value / other - 1 for value, other in zip(values, arms[best], strict=True)]
        print(f"  {arm:<34} {over_seeds(values, '.4f'):>17}   {over_seeds(changes, '+.1%'):>16} against "
              f"{best}   ({', '.join(f'{v:.4f}' for v in values)})")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--teacher-steps", type=int, default=600)
    args = parser.parse_args()
    report({seed: measure(Work(args.work), seed, args.steps, args.teacher_steps) for seed in args.seeds},
           args.steps, args.teacher_steps)


if __name__ == "__main__":
    main()
