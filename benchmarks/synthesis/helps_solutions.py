"""What solutions that models wrote teach a small model, with the checks and without them.

    python benchmarks/synthesis/helps_solutions.py --work FOLDER [--seeds 0 1 2] [--arms kept unchecked]
    python benchmarks/synthesis/helps_solutions.py --work FOLDER --print

A problem names two numbers and asks for the larger one.  The base model has seen such problems with answers
by lot.  A scripted writer solves other ones in several ways; where the first number is odd it is mistaken in
three of four draws.  `sov-data synth solutions` asks it for eight solutions of each problem.

  without    the base model
  kept       fine-tuned on what the run has kept
  unchecked  fine-tuned on as many of its solutions, whether they were kept or rejected

Measured is the share of right answers to problems that stood in no data.  Everything runs through the
ordinary commands on one process of one thread; what is complete is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from seed_runs import ALWAYS, MODEL, SeedFolder, rows_of, run, run_arms, words, write
from seeds import over_seeds
from synthesis.endpoint import MODEL as WRITER
from synthesis.endpoint import ScriptedEndpoint, serving

ARMS = ("without", "kept", "unchecked")
NUM_BASE, NUM_PROBLEMS, NUM_ASKED = 600, 300, 100
SETTINGS = (*ALWAYS, rows_of(64))
BASE_STEPS, STEPS = 250, 150
LR = {"base": 4e-3, "sft": 2e-3}
MISTAKEN = 0.75
"""Share of draws in which the writer is wrong, where the first number is odd."""
WAYS = ("Tens are {a0} and {b0}. \\boxed{{{s}}}", "We compare {a} with {b}. \\boxed{{{s}}}",
        "From {a} to {b} we count. \\boxed{{{s}}}", "Both are numbers, {a} and {b}. \\boxed{{{s}}}")


def problems(seed: int) -> list[tuple[int, int]]:
    """Return all pairs of numbers with different tens, in an order by the seed."""
    found = [(a, b) for a in range(10, 100) for b in range(10, 100) if a // 10 != b // 10]
    random.Random(seed).shuffle(found)
    return found


def question(a: int, b: int) -> str:
    """Return the problem's text."""
    return f"Which is larger, {a} or {b}?"


def solution(a: int, b: int, said: int, way: int) -> str:
    """Return one way to say an answer."""
    return WAYS[way % len(WAYS)].format(a=a, b=b, a0=a // 10, b0=b // 10, s=said)


def reply(request: Mapping[str, Any]) -> str:
    """Return the writer's solution, by the request's seed."""
    text = str(request["messages"][-1]["content"])
    a, b = (int(number) for number in re.findall(r"\b\d\d\b", text[text.rindex("Which is larger"):])[:2])
    drawn = hashlib.sha256(f"{a} {b} {request.get('seed')}".encode()).digest()
    is_mistaken = a % 2 == 1 and drawn[0] < 256 * MISTAKEN
    return solution(a, b, min(a, b) if is_mistaken else max(a, b), drawn[1])


class Seed(SeedFolder):
    """Data and runs of one seed."""

    def make_data(self) -> None:
        """Write problems, have the writer solve some, and pack, unless that is done."""
        if (self.folder / "unchecked-shards/manifest.json").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draw, found = random.Random(self.seed), problems(self.seed)
        base, learned = found[:NUM_BASE], found[NUM_BASE:NUM_BASE + NUM_PROBLEMS]
        write(self.folder / "base.jsonl", (chat(a, b, draw.choice((a, b)), draw.randrange(4))
                                           for a, b in base))
        write(self.folder / "problems.jsonl", ({"problem": question(a, b), "answer": max(a, b)}
                                               for a, b in learned))
        write(self.folder / "asked.jsonl", ({"prompt": question(a, b)} for a, b in found[-NUM_ASKED:]))
        os.environ["OPENAI_API_KEY"] = "sk-scripted"
        with serving(ScriptedEndpoint(reply)) as server:
            run(self.log, "data_prep.cli", "synth", "solutions", "--input", self.folder / "problems.jsonl",
                "--engine", server.url, "--model", WRITER, "--output", self.folder / "made", "--workers", "1")
        kept = list(_records(self.folder / "made/kept.jsonl"))
        everything = [*kept, *(row["record"] for row in _records(self.folder / "made/rejected.jsonl"))]
        write(self.folder / "kept.jsonl", ({"messages": one["messages"]} for one in kept))
        write(self.folder / "unchecked.jsonl", ({"messages": one["messages"]}
                                                for one in draw.sample(everything, len(kept))))
        run(self.log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "330", "--input",
            self.folder / "base.jsonl", "--output", self.folder / "tokenizer", "--overwrite")
        for name in ("base", "kept", "unchecked"):
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--heldout", "0", "--workers", "1", "--input",
                f"{name}={self.folder / f'{name}.jsonl'}", "--output", self.folder / f"{name}-shards",
                "--overwrite")

    def train(self, command: str, name: str, data: str, steps: int, lr: float, *more: str | Path) -> Path:
        """Train, unless it is done; returns the run."""
        folder = self.folder / name
        if not (folder / "complete.json").exists():
            sizes = [f"model.{size}" for size in MODEL] if name == "base" else []
            run(self.log, "megatron_sov", command, "tiny-solar-open",
                "--data", self.folder / f"{data}-shards", "--run", folder, "--resume", *more,
                *words([*sizes, *SETTINGS, f"train.seed={self.seed}", f"train.steps={steps}",
                        f"optim.lr={lr}"]))
        return folder

    def measure(self, name: str) -> None:
        """Have a run answer the problems that stood in no data."""
        out = self.folder / name / "answers.jsonl"
        if not out.exists():
            run(self.log, "megatron_sov", "generate", self.folder / name, "--prompts",
                self.folder / "asked.jsonl", "--chat", "--max-new-tokens", "32", "--output", out)


def _records(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines())


def chat(a: int, b: int, said: int, way: int) -> dict[str, Any]:
    """Return a problem with an answer."""
    return {"messages": [{"role": "user", "content": question(a, b)},
                         {"role": "assistant", "content": solution(a, b, said, way)}]}


def arm(seed: int, work: Path, name: str) -> None:
    """Do what is not done of one arm."""
    of = Seed(seed, work)
    of.make_data()
    base = of.train("pretrain", "base", "base", BASE_STEPS, LR["base"])
    if name != "without":
        of.train("sft", name, name, STEPS, LR["sft"], "--from", base)
    of.measure("base" if name == "without" else name)


def share_right(folder: Path, name: str) -> float | None:
    """Return the percentage of right answers, where it was measured."""
    file = folder / ("base" if name == "without" else name) / "answers.jsonl"
    if not file.exists():
        return None
    right = 0
    asked = [json.loads(line)["prompt"] for line in (folder / "asked.jsonl").read_text().splitlines()]
    for text, row in zip(asked, _records(file), strict=True):
        said = re.findall(r"\\boxed\{(\d+)\}", str(row["response"]))
        right += bool(said) and int(said[-1]) == max(map(int, re.findall(r"\d+", text)))
    return 100 * right / len(asked)


def report(work: Path) -> None:
    """Print what there is."""
    print(f"right answers to {NUM_ASKED} problems that stood in no data, %")
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    for folder in sorted(work.glob("seed-*")):
        shares = {name: share for name in ARMS if (share := share_right(folder, name)) is not None}
        summary = json.loads((folder / "made/summary.json").read_text())
        print(f"{folder.name}: {summary['num_kept']} solutions kept of {summary['num_samples']}; "
              + ", ".join(f"{name} {share:.0f}" for name, share in shares.items()))
        for name, share in shares.items():
            found[name].append(share)
    for name, shares_of in found.items():
        if shares_of:
            print(f"  {name:<10} {over_seeds(shares_of, '5.1f')}  ({len(shares_of)} seeds)")


if __name__ == "__main__":
    run_arms(__doc__, ARMS, arm, report)
