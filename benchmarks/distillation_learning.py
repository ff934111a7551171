"""What a student learns of its teacher's distributions from few tokens: distillation beside SFT.

Usage: python benchmarks/distillation_learning.py --work FOLDER [--seeds 0 1 2] [--steps 120]
       python benchmarks/distillation_learning.py --work FOLDER --print

A question ("Name a fruit for Mina.") has eight answers, of which each kind of thing makes some likelier than
others.  Everything runs through the ordinary commands on one process of one thread.

  teacher   learns 12,000 conversations whose answers are drawn from these distributions, in eight wordings
  start     a smaller model, which learns the same questions with answers drawn evenly: it knows the language,
            and nothing of the distributions
  arms      go on from the start over the same 200 conversations, in the same order, for the same steps, in
            four of the wordings: SFT learns the one answer that was drawn, the others the teacher's
            distributions at the same tokens; on-policy, the same questions in rounds of one step, eight in
            each, with answers that the student writes itself (`rl run` with `policy.method=gkd`).  At the
            learning rate of the others SFT learns the 200 drawn answers by heart, so it has smaller ones too,
            and the others are compared with its best

Each is then asked the other four wordings: KL(teacher || student) in nats per token of the answers, by the
same command, before its first step, each conversation whole.  Printed are means over the seeds with 95 %
intervals (Student's t) where there are several; an arm is compared with SFT seed by seed.  A run that is
complete is not run again, and one that was killed goes on, so that seeds can be added one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from claims.choices import NAMES, THINGS
from seeds import over_seeds

LEARNED = ("Name a {thing} for {name}.", "{name} asks for a {thing}.", "Which {thing} will it be, {name}?",
           "A {thing}, please, says {name}.")
ASKED = ("{name} wants some {thing}.", "Tell {name} about a {thing}.", "Give {name} a {thing}.",
         "For {name}: one {thing}.")
MODEL = ("model.vocab_size=512", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2",
         "model.head_dim=16", 'data.phases=[{"name": "main", "seq_len": 128}]', "data.max_epochs=0",
         "train.global_batch_size=8", "train.micro_batch_size=8", "train.eval_every_steps=0",
         "train.checkpoint_every_steps=100000", "train.num_threads=1", "optim.weight_decay=0",
         "guards.sigma=0")
TEACHER = ("model.hidden_size=96", "model.dense_ffn_dim=192")
STUDENT = ("model.hidden_size=48", "model.dense_ffn_dim=96")
ARMS = {
    "SFT": ("sft",),
    "forward KL": ("distill",),
    "reverse KL": ("distill", "distillation.beta=1"),
    "JSD 0.5": ("distill", "distillation.beta=0.5"),
    "forward KL, top-k 8": ("distill", "distillation.top_k=8"),
    "forward KL + 0.1 CE": ("distill", "distillation.ce_coeff=0.1"),
    "SFT, rate / 4": ("sft", "optim.lr=5e-4", "optim.min_lr=5e-5"),
    "SFT, rate / 16": ("sft", "optim.lr=1.25e-4", "optim.min_lr=1.25e-5"),
}
RATE = "optim.lr=2e-3"
"""Of an arm that has none of its own."""
ON_POLICY = "forward KL, on-policy"


def conversations(seed: int, count: int, wordings: tuple[str, ...], even: bool = False,
                  things: Sequence[str] = tuple(THINGS)) -> str:
    """Return chats about things, one a line; the answers of each kind of thing have shares of 1/2, 1/4, ...
    in an order of its own, or even ones."""
    draw, lines = random.Random(seed), []
    for _ in range(count):
        thing, name = draw.choice(things), draw.choice(NAMES)
        answers = THINGS[thing].split()
        random.Random(thing).shuffle(answers)
        shares = [1.0 if even else 0.5 ** i for i in range(len(answers))]
        question = draw.choice(wordings).format(thing=thing, name=name)
        lines.append(json.dumps({"messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{draw.choices(answers, shares)[0]} for {name}"}]}))
    return "\n".join(lines) + "\n"


class Work:
    """A folder with data and runs."""

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

    def data(self, name: str, text: str, heldout: float = 0.0) -> Path:
        """Return token shards of conversations."""
        file, shards = self.folder / f"{name}.jsonl", self.folder / name
        if not (shards / "manifest.json").exists():
            file.write_text(text)
            tokenizer = self.folder / "tokenizer"
            if not tokenizer.exists():
                texts = self.folder / "texts.jsonl"
                contents = [m["content"] for line in text.splitlines() for m in json.loads(line)["messages"]]
                texts.write_text("".join(json.dumps({"text": content}) + "\n" for content in contents))
                self.command("tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "512",
                             "--input", texts, "--output", tokenizer)
            self.command("data_prep.cli", "pack", "--tokenizer", tokenizer, "--format", "chat", "--heldout",
                         str(heldout), "--workers", "1", "--input", file, "--output", shards)
        return shards

    def train(self, name: str, command: str, data: Path, *settings: str, start: str = "",
              states: str = "") -> Path:
        """Return a run, which is run where it is not complete."""
        run = self.folder / name
        if not (run / "complete.json").exists():
            words = words_of(settings)
            words += ["--from", str(self.folder / start)] if start else []
            words += ["--teacher", str(self.folder / "teacher"), "--states", str(self.folder / states),
                      "--states-dtype", "float32"] if command == "distill" else []
            self.command("megatron_sov", command, "tiny-qwen3", "--data", data, "--run", run, "--resume",
                         *words)
        return run

    def rounds(self, name: str, prompts: Path, start: str, seed: int, steps: int, *settings: str) -> str:
        """Return a run of on-policy rounds."""
        rounds = ("policy.method=gkd", "rollout.samples_per_prompt=1", f"rollout.rounds={steps}",
                  "rollout.max_new_tokens=12", "rollout.temperature=1.0", f"rollout.seed={seed}")
        self.command("megatron_sov", "rl", "run", "tiny-qwen3", "--from", self.folder / start, "--teacher",
                     self.folder / "teacher", "--prompts", prompts, "--reward", "none", "--store",
                     self.folder / name / "store", "--run", self.folder / name / "run", "--resume",
                     *words_of((*rounds, *settings)))
        return f"{name}/run"


def words_of(settings: tuple[str, ...]) -> list[str]:
    """Return --set arguments."""
    return [word for setting in (*MODEL, *settings) for word in ("--set", setting)]


def measure(work: Work, seed: int, steps: int, teacher_steps: int) -> None:
    """Run all arms of a seed."""
    plenty = work.data("plenty", conversations(1, 12_000, LEARNED + ASKED))
    asked = work.data("asked", conversations(2, 400, ASKED), heldout=0.5)
    work.train("teacher", "pretrain", plenty, *TEACHER, f"train.steps={teacher_steps}", "optim.lr=4e-3")
    even = work.data("even", conversations(3, 4_000, LEARNED + ASKED, even=True))
    text = conversations(100 + seed, 200, LEARNED)
    few = work.data(f"few-{seed}", text)
    prompts = work.folder / f"prompts-{seed}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": json.loads(line)["messages"][0]["content"]}) + "\n"
                               for line in text.splitlines()))
    own = f"train.seed={seed}"
    work.train(f"start-{seed}", "pretrain", even, *STUDENT, own, f"train.steps={teacher_steps}",
               "optim.lr=4e-3")
    for number, (command, *settings) in enumerate(ARMS.values()):
        states = f"states-{seed}-top" if any("top_k" in s for s in settings) else f"states-{seed}"
        rate = [] if any(s.startswith("optim.lr=") for s in settings) else [RATE]
        work.train(f"arm-{seed}-{number}", command, few, own, f"train.steps={steps}", *rate, *settings,
                   start=f"start-{seed}", states=states)
    last = work.rounds(f"rounds-{seed}", prompts, f"start-{seed}", seed, steps, own, RATE,
                       "rollout.prompts_per_round=8", "rollout.piece_prompts=8",
                       "rollout.max_prompt_tokens=64")
    runs = {f"arm-{seed}-{number}": f"arm-{seed}-{number}" for number in range(len(ARMS))}
    for name, run in ({f"start-{seed}": f"start-{seed}", f"rounds-{seed}": last} | runs).items():
        work.train(f"asked-{name}", "distill", asked, own, RATE, "train.steps=1", start=run,
                   states="states-asked")


def kl(run: Path) -> float:
    """Return the KL to the teacher that a run was met with."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(float(e["kl"]) for e in events if e["event"] == "heldout_divergence" and e["step"] == 0)


def steps_of(run: Path) -> int:
    """Return the steps of a complete run."""
    return int(json.loads((run / "complete.json").read_text())["step"])


def report(folder: Path) -> None:
    """Print what there is."""
    seeds = sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("asked-start-*")
                   if (folder / f"arm-{p.name.rpartition('-')[2]}-0/complete.json").exists())
    if not seeds:
        raise SystemExit(f"{folder}: no seed is done yet")
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; KL(teacher || student), nats per token of the answers, on wordings "
          f"that no arm has learned; seeds {', '.join(map(str, seeds))}; steps of the teacher and of an arm: "
          f"{', '.join(str(steps_of(folder / name)) for name in ('teacher', f'arm-{seeds[0]}-0'))}\n")
    runs = {"start": "start-{}", **{arm: f"arm-{{}}-{number}" for number, arm in enumerate(ARMS)},
            ON_POLICY: "rounds-{}"}
    found = {name: {s: kl(folder / f"asked-{run.format(s)}") for s in seeds
                    if (folder / f"asked-{run.format(s)}/complete.json").exists()}
             for name, run in runs.items()}
    best = min((name for name in found if name.startswith("SFT") and found[name]),
               key=lambda name: fmean(found[name].values()), default="SFT")
    for name, values in found.items():
        changes = [value / found[best][s] - 1 for s, value in values.items() if s in found[best]]
        if changes:
            print(f"  {name:<22} {over_seeds(list(values.values()), '.4f'):>17}   "
                  f"{over_seeds(changes, '+.1%'):>16} against {best}   "
                  f"({', '.join(f'{v:.4f}' for v in values.values())})")


def run_seeds(description: str | None, measure_seed: Callable[[Work, int, int, int], object],
              report_work: Callable[[Path], object]) -> None:
    """Run what is missing of the seeds that the command line names, and print what there is.

    Args:
        description: what the benchmark shows.
        measure_seed: runs all arms of a seed: (folder, seed, steps of an arm, steps of the teacher).
        report_work: prints what there is in the folder.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--print", action="store_true", help="only print what there is")
    args = parser.parse_args()
    if not args.print:
        for seed in args.seeds:
            measure_seed(Work(args.work), seed, args.steps, args.teacher_steps)
    report_work(args.work)


if __name__ == "__main__":
    run_seeds(__doc__, measure, report)
