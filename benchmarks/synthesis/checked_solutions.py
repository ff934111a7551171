"""Accuracy of a small model fine-tuned on synthesized solutions, with and without checks of the solutions.

    python benchmarks/synthesis/checked_solutions.py --work FOLDER [--seeds 0 1 2] [--arms kept unchecked]
    python benchmarks/synthesis/checked_solutions.py --work FOLDER --print

A problem asks whether a number is odd (1) or even (0). The base model is pretrained on such problems with
random answers. A scripted model writes eight solutions of each training problem (`sov-data synth solutions`);
for numbers that begin with a digit above 5, three in four of its solutions are wrong.

  without    the base model
  kept       fine-tuned on the solutions that passed the checks
  unchecked  fine-tuned on as many solutions, drawn from accepted and rejected ones

The figure is the share of right answers to held-out problems. All commands run on one process with one
thread; completed commands are not repeated.
"""

import argparse
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
from command_lines import format_settings, format_single_phase, run_command, write_jsonl
from measurement import describe_machine
from seeds import format_over_seeds
from synthesis.endpoint import MODEL as WRITER, ScriptedEndpoint, serving

ARMS = ("without", "kept", "unchecked")
NUM_BASE, NUM_PROBLEMS, NUM_HELD_OUT = 300, 400, 100
MODEL = ("model.vocab_size=512", "model.hidden_size=64", "model.num_layers=3", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=16", "model.num_experts=4", "model.num_experts_per_token=2",
         "model.expert_ffn_dim=64")
SETTINGS = ("train.num_threads=1", "train.checkpoint_every_steps=100000", "train.eval_every_steps=0",
            "train.global_batch_size=16", "train.micro_batch_size=8", "train.steps=200", "data.max_epochs=0",
            format_single_phase(96))
"""A row of 96 tokens holds every conversation, so that no answer is truncated."""
LR = {"pretrain": 4e-3, "sft": 3e-3}
LAST_RIGHT_DIGIT = 5
"""Solutions of numbers whose first digit is larger may be wrong."""
WRONG_SHARE = 0.75
"""Share of wrong solutions among those."""
SOLUTIONS = ("The end of {} tells it. \\boxed{{{}}}", "Halves of {} leave this: \\boxed{{{}}}",
             "Count {} in twos, see \\boxed{{{}}}", "Pairs of {} are made, over is \\boxed{{{}}}")


def space_digits(number: int) -> str:
    """Return a number with spaces between its digits, so that each digit is a token."""
    return " ".join(str(number))


def format_problem(number: int) -> str:
    return f"Is {space_digits(number)} odd, 1, or even, 0?"


def build_chat(number: int, answer: int, wording: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": format_problem(number)},
                         {"role": "assistant",
                          "content": SOLUTIONS[wording].format(space_digits(number), answer)}]}


def write_solution(request: Mapping[str, Any]) -> str:
    """Return the scripted model's solution, a function of the problem and the request's seed."""
    text = str(request["messages"][-1]["content"])
    match = re.search(r"Is (\d) (\d) (\d) odd", text)
    assert match is not None, text
    digest = hashlib.sha256(f"{match[0]} {request.get('seed')}".encode()).digest()
    is_wrong = int(match[1]) > LAST_RIGHT_DIGIT and digest[0] < 256 * WRONG_SHARE
    wording = SOLUTIONS[digest[1] % len(SOLUTIONS)]
    return wording.format(" ".join(match.groups()), int(match[3]) % 2 ^ is_wrong)


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines())


class SeedRun:
    """Data, training runs and answers of one seed."""

    def __init__(self, seed: int, work: Path) -> None:
        self.seed, self.folder = seed, work / f"seed-{seed}"

    def run_command(self, module: str, *arguments: str | Path) -> None:
        run_command(self.folder / "log", module, *arguments)

    def write_data(self) -> None:
        """Write problems, synthesize solutions, and pack the data of all arms, unless that is complete."""
        if (self.folder / "unchecked-shards/manifest.json").exists():
            return
        rng, numbers = random.Random(self.seed), list(range(100, 1000))
        random.Random(self.seed).shuffle(numbers)
        write_jsonl(self.folder / "base.jsonl", [build_chat(number, rng.randrange(2), rng.randrange(4))
                                                 for number in numbers[:NUM_BASE]])
        write_jsonl(self.folder / "problems.jsonl", [
            {"problem": format_problem(number), "answer": number % 2}
            for number in numbers[NUM_BASE:NUM_BASE + NUM_PROBLEMS]])
        write_jsonl(self.folder / "asked.jsonl", [{"prompt": format_problem(number), "answer": number % 2}
                                                  for number in numbers[-NUM_HELD_OUT:]])
        os.environ["OPENAI_API_KEY"] = "sk-scripted"
        with serving(ScriptedEndpoint(write_solution)) as server:
            self.run_command("data_prep.cli", "synth", "solutions", "--input", self.folder / "problems.jsonl",
                             "--engine", server.url, "--model", WRITER, "--output", self.folder / "made",
                             "--workers", "1")
        kept = list(read_rows(self.folder / "made/kept.jsonl"))
        all_rows = [*kept, *(row["record"] for row in read_rows(self.folder / "made/rejected.jsonl"))]
        for name, rows in (("kept", kept), ("unchecked", rng.sample(all_rows, len(kept)))):
            write_jsonl(self.folder / f"{name}.jsonl", [{"messages": row["messages"]} for row in rows])
        tokenizer = self.folder / "tokenizer"
        self.run_command("tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "330", "--input",
                         self.folder / "base.jsonl", "--output", tokenizer, "--overwrite")
        for name in ("base", *ARMS[1:]):
            self.run_command("data_prep.cli", "pack", "--tokenizer", tokenizer, "--format", "chat",
                             "--workers", "1", "--heldout", "0", "--input",
                             f"{name}={self.folder / f'{name}.jsonl'}", "--output",
                             self.folder / f"{name}-shards", "--overwrite")

    def train(self, command: str, name: str, *options: str | Path) -> Path:
        """Train on the shards of `name`, unless that run is complete; return the run's folder."""
        folder = self.folder / name
        if not (folder / "complete.json").exists():
            self.run_command("megatron_sov", command, "tiny-solar-open", "--data", f"{folder}-shards",
                             "--run", folder, "--resume", *options, *format_settings(
                                 *SETTINGS, f"train.seed={self.seed}", f"optim.lr={LR[command]}"))
        return folder

    def run_arm(self, arm: str) -> None:
        """Run the incomplete commands of an arm: data, training, and answers to the held-out problems."""
        self.write_data()
        folder = self.train("pretrain", "base", *format_settings(*MODEL))
        if arm != "without":
            folder = self.train("sft", arm, "--from", folder)
        if not (folder / "answers.jsonl").exists():
            self.run_command("megatron_sov", "generate", folder, "--prompts", self.folder / "asked.jsonl",
                             "--chat", "--max-new-tokens", "48", "--output", folder / "answers.jsonl")

    def read_accuracy(self, arm: str) -> float | None:
        """Return the percentage of right answers of an arm, or None if the arm is incomplete."""
        file = self.folder / ("base" if arm == "without" else arm) / "answers.jsonl"
        if not file.exists():
            return None
        right = [re.findall(r"\\boxed\{(\d+)\}", str(row["response"]))[-1:] == [str(row["answer"])]
                 for row in read_rows(file)]
        return 100 * sum(right) / len(right)


def print_report(work: Path) -> None:
    """Print the accuracy of each seed and arm, the mean of each arm, and `kept` minus `unchecked`."""
    print(f"{describe_machine()}; one process of one thread\n"
          f"right answers to {NUM_HELD_OUT} held-out problems, %")
    accuracies: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for file in sorted(work.glob("seed-*/made/summary.json")):
        seed, summary = int(file.parts[-3].removeprefix("seed-")), json.loads(file.read_text())
        for arm in ARMS:
            if (accuracy := SeedRun(seed, work).read_accuracy(arm)) is not None:
                accuracies[arm][seed] = accuracy
        print(f"seed {seed}: {summary['num_kept']} solutions kept of {summary['num_samples']}; "
              + ", ".join(f"{arm} {of_seeds[seed]:.0f}" for arm, of_seeds in accuracies.items()
                          if seed in of_seeds))
    for arm, of_seeds in accuracies.items():
        if of_seeds:
            print(f"  {arm:<10} {format_over_seeds([*of_seeds.values()], '5.1f')}  ({len(of_seeds)} seeds)")
    gaps = [accuracies["kept"][seed] - unchecked for seed, unchecked in accuracies["unchecked"].items()
            if seed in accuracies["kept"]]
    if gaps:
        print(f"  kept minus unchecked, paired by seed: {format_over_seeds(gaps, '+.1f')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of all files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--print", dest="only_print", action="store_true", help="only print stored results")
    args = parser.parse_args()
    if not args.only_print:
        for seed in args.seeds:
            for arm in args.arms:
                SeedRun(seed, args.work).run_arm(arm)
    print_report(args.work)


if __name__ == "__main__":
    main()
