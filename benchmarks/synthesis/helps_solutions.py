"""Effect of model-written solutions on a small model, with and without checks of the solutions.

    python benchmarks/synthesis/helps_solutions.py --work FOLDER [--seeds 0 1 2] [--arms kept unchecked]
    python benchmarks/synthesis/helps_solutions.py --work FOLDER --print

A problem names a number and asks whether it is odd (1) or even (0).  The base model has seen such problems
with answers by lot.  A scripted writer solves other ones in several ways; where the number begins with a
digit above 5 it is mistaken in three of four draws.  `sov-data synth solutions` asks for eight solutions
of each.

  without    the base model
  kept       fine-tuned on what the run has kept
  unchecked  fine-tuned on as many of its solutions, whether they were kept or rejected

Measured is the share of right answers to problems that stood in no data.  Everything runs through the
ordinary commands on one process of one thread; what is complete is not run again.
"""

import hashlib
import os
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from seed_runs import ALWAYS, rows_of, run, run_arms, write
from synthesis.endpoint import MODEL as WRITER, ScriptedEndpoint, serving
from synthesis.helps import ARMS, Taught, records, report_shares, run_of

NUM_BASE, NUM_PROBLEMS, NUM_ASKED = 300, 400, 100
SETTINGS = (*ALWAYS, rows_of(96))
"""No conversation is longer than a row: one whose tail is left out teaches no answer."""
STEPS = {"base": 200, "sft": 200}
LR = {"base": 4e-3, "sft": 3e-3}
MISTAKEN, LAST_RIGHT_DIGIT = 0.75, 5
"""Share of draws in which the writer is wrong, where the number begins with a larger digit."""
WAYS = ("The end of {} tells it. \\boxed{{{}}}", "Halves of {} leave this: \\boxed{{{}}}",
        "Count {} in twos, see \\boxed{{{}}}", "Pairs of {} are made, over is \\boxed{{{}}}")


def spaced(number: int) -> str:
    """Return a number digit by digit, as the model reads it."""
    return " ".join(str(number))


def problems(seed: int) -> list[int]:
    """Return all numbers of three digits, in an order by the seed."""
    result = list(range(100, 1000))
    random.Random(seed).shuffle(result)
    return result


def question(number: int) -> str:
    """Return the problem's text."""
    return f"Is {spaced(number)} odd, 1, or even, 0?"


def reply(request: Mapping[str, Any]) -> str:
    """Return the writer's solution, by the request's seed."""
    text = str(request["messages"][-1]["content"])
    match = re.search(r"Is (\d) (\d) (\d) odd", text)
    assert match is not None, text
    drawn = hashlib.sha256(f"{match[0]} {request.get('seed')}".encode()).digest()
    is_mistaken = int(match[1]) > LAST_RIGHT_DIGIT and drawn[0] < 256 * MISTAKEN
    return WAYS[drawn[1] % len(WAYS)].format(" ".join(match.groups()), int(match[3]) % 2 ^ is_mistaken)


class Seed(Taught):
    """Data and runs of one seed."""

    settings, steps, lr = SETTINGS, STEPS, LR

    def make_data(self) -> None:
        """Write problems, have the writer solve some, and pack, unless that is done."""
        if self.has_data:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draw, found = random.Random(self.seed), problems(self.seed)
        base, learned = found[:NUM_BASE], found[NUM_BASE:NUM_BASE + NUM_PROBLEMS]
        write(self.folder / "base.jsonl", (chat(number, draw.randrange(2), draw.randrange(4))
                                           for number in base))
        write(self.folder / "problems.jsonl", ({"problem": question(number), "answer": number % 2}
                                               for number in learned))
        write(self.folder / "asked.jsonl", ({"prompt": question(number), "answer": number % 2}
                                            for number in found[-NUM_ASKED:]))
        os.environ["OPENAI_API_KEY"] = "sk-scripted"
        with serving(ScriptedEndpoint(reply)) as server:
            run(self.log, "data_prep.cli", "synth", "solutions", "--input", self.folder / "problems.jsonl",
                "--engine", server.url, "--model", WRITER, "--output", self.folder / "made", "--workers", "1")
        self.write_arms(draw, "messages")
        self.pack("--preset", "solar-open", "--vocab-size", "330")

    def measure(self, name: str) -> None:
        """Have a run answer the problems that stood in no data."""
        out = self.folder / name / "answers.jsonl"
        if not out.exists():
            run(self.log, "megatron_sov", "generate", self.folder / name, "--prompts",
                self.folder / "asked.jsonl", "--chat", "--max-new-tokens", "48", "--output", out)


def chat(number: int, said: int, way: int) -> dict[str, Any]:
    """Return a problem with an answer."""
    return {"messages": [{"role": "user", "content": question(number)},
                         {"role": "assistant", "content": WAYS[way].format(spaced(number), said)}]}


def arm(seed: int, work: Path, name: str) -> None:
    """Run the unfinished work of one arm."""
    Seed(seed, work).do(name)


def share_right(folder: Path, name: str) -> float | None:
    """Return the percentage of right answers, where it was measured."""
    file = folder / run_of(name) / "answers.jsonl"
    if not file.exists():
        return None
    right = [re.findall(r"\\boxed\{(\d+)\}", str(row["response"]))[-1:] == [str(row["answer"])]
             for row in records(file)]
    return 100 * sum(right) / len(right)


def report(work: Path) -> None:
    """Print the stored results."""
    report_shares(work, f"right answers to {NUM_ASKED} problems that stood in no data, %",
                  "solutions", ARMS, share_right)


if __name__ == "__main__":
    run_arms(__doc__, ARMS, arm, report)
