"""What a student learns from a teacher of another tokenizer: distillation beside training on the same tokens.

Usage: python benchmarks/other_tokenizer.py --work FOLDER [--seeds 0 1 2] [--documents 60] [--steps 40]

The texts are those of `distillation_learning.py` (a question and one of eight answers, some likelier than
others), as plain documents behind a "# ", which is a token of both tokenizers: what stands behind the first
token is all that bits per byte count, and so it is the same for both.  Everything runs through the ordinary
commands on one process of one thread.

  teacher   learns 12,000 documents in the tokens of a tokenizer of its own (384 ids, SuperBPE)
  start     a smaller model in the tokens of another (512 ids, byte-level BPE), which learns the same
            questions with answers that are drawn evenly
  arms      go on from the start over the same few documents, in the same order, for the same steps:
            next-token training, and distillation from that teacher alone.  Both have the same rates; the
            one that counts is the best on a validation part, seed by seed

Printed are bits per byte on a test part, which chose nothing, beside those of the teacher and the entropy of
the texts: means over the seeds with 95 % intervals (Student's t), and differences to next-token training
seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from distillation_learning import ASKED, LEARNED, NAMES, STUDENT, TEACHER, THINGS, conversations, words_of
from seeds import over_seeds

VOCABULARY = {"own": ("solar-open", 512), "other": ("k-exaone", 384)}
"""Tokenizer -> its preset and ids."""
SETTINGS = ("model.tied_embeddings=true",)
FEW = ("train.global_batch_size=2", "train.micro_batch_size=2", "optim.warmup_steps=4")
"""Of an arm: an update of 256 tokens, so that few documents are not seen whole in each."""
RATES = (2e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4)
ACROSS = ("distillation.other_tokenizer=true", "distillation.top_k=64")
BASE = "next token"
ARMS = {
    BASE: ("pretrain",),
    "other tokenizer": ("distill", *ACROSS),
}
PARTS = ("validation", "test")
ROW_TOKENS = 16_000
"""Of evaluation: all of a part, so that no document is cut where a row is full.  What stands behind a cut is
judged without its question, of the teacher's longer documents more often than of the student's."""


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
                {"text": " ".join(["#", *(m["content"] for m in chat["messages"])])}) + "\n"
                for chat in chats))
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

    def asked(self, tokenizer: str = "own") -> list[Path]:
        """Return what validates and what tests, in the tokens of a tokenizer."""
        return [self.data(f"{part}-{tokenizer}", self.texts(part, 2 + i, 1_200), tokenizer, heldout=0.5)
                for i, part in enumerate(PARTS)]

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

    def bits(self, run: Path, parts: list[Path]) -> dict[str, float]:
        """Return bits per byte of the held-out documents of each part."""
        out = run.with_suffix(".ppl.json")
        if not out.exists():
            self.command("megatron_sov", "eval", "ppl", run, *(w for p in parts for w in ("--data", p)),
                         "--output", out, "--max-tokens", "100000", "--seq-len", str(ROW_TOKENS))
        return {part: float(figures["bits_per_byte"]) for part, figures in
                zip(PARTS, json.loads(out.read_text()).values(), strict=True)}


def entropy(texts: Path) -> float:
    """Return bits per byte of the texts' own distribution: a wording, a kind of thing, a name and an
    answer, over all bytes but the "#" and the token that ends a text."""
    shares = [0.5 ** i for i in range(8)]
    answer = -sum(s / sum(shares) * math.log2(s / sum(shares)) for s in shares)
    bits = math.log2(len(LEARNED + ASKED)) + math.log2(len(THINGS)) + math.log2(len(NAMES)) + answer
    return bits / fmean(len(json.loads(line)["text"]) - 1 for line in texts.read_text().splitlines())


def measure(work: Work, seed: int, args: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Run all arms of a seed; returns name -> bits per byte on the test part, and the chosen rate."""
    plenty, long = work.texts("plenty", 1, 12_000), ("optim.lr=4e-3", f"train.steps={args.teacher_steps}")
    teacher = work.train("teacher", "pretrain", work.data("plenty-other", plenty, "other"), *TEACHER,
                         "model.vocab_size=384", *long)
    even = work.data("even", work.texts("even", 3, 4_000, even=True))
    few = work.data(f"few-{seed}", work.texts(f"few-{seed}", 100 + seed, args.documents))
    own, name = f"train.seed={seed}", f"start-{seed}"
    start = work.train(name, "pretrain", even, *STUDENT, own, *long)
    found = {"entropy of the texts": (entropy(plenty), ""),
             "teacher": (work.bits(teacher, work.asked("other"))["test"], ""),
             "start": (work.bits(start, work.asked())["test"], "")}
    for number, (arm, (command, *settings)) in enumerate(ARMS.items()):
        tried = []
        for place, rate in enumerate(RATES):
            run = work.train(f"arm-{seed}-{number}-{place}", command, few, *STUDENT, *FEW, own,
                             f"train.steps={args.steps}", f"optim.lr={rate}", f"optim.min_lr={rate / 10}",
                             *settings, start=name, states=f"states-{seed}")
            bits = work.bits(run, work.asked())
            tried.append((bits["validation"], bits["test"], f"{rate:g}"))
        found[arm] = min(tried)[1:]
    return found


def report(found: dict[int, dict[str, tuple[float, str]]], args: argparse.Namespace, load: float) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load {load:.1f} at the "
          f"start), Python {platform.python_version()}; bits per byte on about 600 documents that no arm has "
          f"learned and nothing was chosen by; {args.documents} documents; seeds "
          f"{', '.join(map(str, found))}; steps of teacher and start, and of an arm: {args.teacher_steps}, "
          f"{args.steps}; rates {', '.join(f'{rate:g}' for rate in RATES)}\n")
    for arm in next(iter(found.values())):
        values = [of_seed[arm][0] for of_seed in found.values()]
        line = f"  {arm:<25} {over_seeds(values, '.4f'):>17}   ({', '.join(f'{v:.4f}' for v in values)})"
        if arm in ARMS:
            changes = [of_seed[arm][0] - of_seed[BASE][0] for of_seed in found.values()]
            line += (f"   {over_seeds(changes, '+.4f'):>18} ({', '.join(f'{c:+.4f}' for c in changes)})   "
                     f"rates {', '.join(of_seed[arm][1] for of_seed in found.values())}")
        print(line)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--teacher-steps", type=int, default=1200)
    args, load = parser.parse_args(), os.getloadavg()[0]
    report({seed: measure(Work(args.work), seed, args) for seed in args.seeds}, args, load)


if __name__ == "__main__":
    main()
