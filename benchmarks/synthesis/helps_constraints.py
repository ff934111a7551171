"""What answers that keep a constraint teach a small model, with the checks of `autoif` and without them.

    python benchmarks/synthesis/helps_constraints.py --work FOLDER [--seeds 0 1 2] [--arms kept unchecked]
    python benchmarks/synthesis/helps_constraints.py --work FOLDER --print

A prompt asks for two numbers and sets a constraint: to end with a word, to begin with it, to use it twice, or
to leave it out.  The base model has seen such prompts with answers that keep another constraint than theirs.
A scripted writer is asked by `sov-data synth autoif`, and keeps the constraint in two of five draws.

  without    the base model
  kept       fine-tuned on what the run has kept
  unchecked  fine-tuned on as many of its answers, whether they were kept or rejected

Measured, by the reward `constraint`, is the share of answers that keep constraints that stood in no data: of
each kind with words that were seen in the others alone.  Everything runs through the ordinary commands on one
process of one thread; what is complete is not run again.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from seed_runs import ALWAYS, rows_of, run, run_arms, write
from synthesis.endpoint import MODEL as WRITER, ScriptedEndpoint, serving
from synthesis.graded import grade, graded_in
from synthesis.helps import ARMS, Taught, records, report_shares, run_of

from data_prep.synth.generators.autoif.texts import in_user_turn, texts_of

NUM_BASE, NUM_QUERIES, NUM_ASKED = 800, 500, 120
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grape", "hazel", "iris", "jade", "koala",
         "lilac", "maple", "nectar", "olive", "pearl")
NUM_HELDOUT = 4
"""Words of each kind of constraint, that stand in no data with it."""
SETTINGS = (*ALWAYS, rows_of(128))
STEPS = {"base": 300, "sft": 200}
LR = {"base": 4e-3, "sft": 2e-3}
KEPT_SHARE = 0.4
"""Of the writer's draws, in which it keeps the constraint."""
KINDS: Mapping[str, tuple[str, str, str]] = {
    "end": ('End the answer with "{w}".', "{text} {w}", "response.rstrip().endswith({w!r})"),
    "begin": ('Begin the answer with "{w}".', "{w} {text}", "response.lstrip().startswith({w!r})"),
    "twice": ('Use "{w}" two times.', "{w} {text} {w}", "response.count({w!r}) == 2"),
    "none": ('Do not use "{w}".', "{text}", "{w!r} not in response")}
"""Kind -> the constraint, an answer that keeps it, and the function that checks it."""
TEXT = "These are the numbers that you asked for: {a} and then {b}."


def split(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the constraints that stand in the data, and those that do not, as (kind, word)."""
    shuffled = random.Random(seed).sample(WORDS, len(WORDS))
    unseen = [(kind, shuffled[NUM_HELDOUT * place + i]) for place, kind in enumerate(KINDS)
              for i in range(NUM_HELDOUT)]
    return [(kind, word) for kind in KINDS for word in WORDS if (kind, word) not in unseen], unseen


def query(a: int, b: int) -> str:
    """Return a user's prompt."""
    return f"Please tell me the numbers {a} and {b}."


def answer(kind: str, word: str, a: int, b: int) -> str:
    """Return an answer that keeps a constraint."""
    return KINDS[kind][1].format(text=TEXT.format(a=a, b=b), w=word)


def constraint(kind: str, word: str) -> dict[str, Any]:
    """Return a constraint as the generator `constraints` keeps one."""
    said, _, check = KINDS[kind]
    return {"prompt": said.format(w=word),
            "functions": [f"def evaluate(response):\n    return {check.format(w=word)}"]}


def numbers(draw: random.Random) -> tuple[int, int]:
    """Return the two numbers of a prompt."""
    return draw.randrange(10, 100), draw.randrange(10, 100)


def another(kind: str, word: str, draw: random.Random) -> tuple[str, str]:
    """Return a constraint of a kind that breaks this one; what leaves a word out is broken by using it."""
    return draw.choice([other for other in KINDS if other not in (kind, "twice")]
                       if kind != "none" else ["end", "begin", "twice"]), word


def reply(request: Mapping[str, Any]) -> str:
    """Return the writer's answer, by the request's seed; the judge finds each good."""
    if graded := graded_in(request):
        return grade(9, graded)
    system, asked = (request["messages"][place]["content"] for place in (0, -1))
    a, b = map(int, re.findall(r"\d+", asked)[:2])
    said = system[system.rindex(":") + 1:].strip()
    word = re.findall(r'"(.*?)"', said)[0]
    kind = next(kind for kind, (words_of, _, _) in KINDS.items() if words_of.format(w=word) == said)
    drawn = hashlib.sha256(f"{said} {a} {b} {request.get('seed')}".encode()).digest()
    if drawn[0] >= 256 * KEPT_SHARE:
        kind, word = another(kind, word, random.Random(drawn))
    return answer(kind, word, a, b)


class Seed(Taught):
    """Data and runs of one seed."""

    settings, steps, lr = SETTINGS, STEPS, LR

    def make_data(self) -> None:
        """Write prompts, have the writer answer some, and pack, unless that is done."""
        if self.has_data:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draw, (seen, unseen) = random.Random(self.seed), split(self.seed)
        texts = texts_of("en")
        write(self.folder / "base.jsonl", self._by_lot(draw, seen))
        write(self.folder / "constraints.jsonl", (constraint(*one) for one in seen))
        write(self.folder / "queries.jsonl", ({"prompt": text} for text in dict.fromkeys(
            query(*numbers(draw)) for _ in range(NUM_QUERIES))))
        asked = []
        for number in range(NUM_ASKED):
            wanted = constraint(*draw.choice(unseen))
            turn, = in_user_turn(query(*numbers(draw)), wanted["prompt"], texts, self.seed, number)
            asked.append({"prompt": turn["content"], "functions": wanted["functions"]})
        write(self.folder / "asked.jsonl", asked)
        os.environ["OPENAI_API_KEY"] = "sk-scripted"
        with serving(ScriptedEndpoint(reply)) as server:
            run(self.log, "data_prep.cli", "synth", "autoif", "--input", self.folder / "queries.jsonl",
                "--set", f"constraints={self.folder / 'constraints.jsonl'}", "--set", "language=en", "--set",
                "system_share=0", "--engine", server.url, "--model", WRITER, "--output",
                self.folder / "made", "--workers", "1")
        self.write_arms(draw, "messages")
        self.pack("--preset", "solar-open", "--vocab-size", "400")

    def _by_lot(self, draw: random.Random, seen: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield prompts with answers that keep a constraint by lot."""
        texts = texts_of("en")
        for number in range(NUM_BASE):
            (a, b), (kind, word) = numbers(draw), draw.choice(seen)
            asked = constraint(kind, word)["prompt"]
            said = answer(draw.choice(list(KINDS)), word, a, b)
            turn, = in_user_turn(query(a, b), asked, texts, "base", number)
            yield {"messages": [turn, {"role": "assistant", "content": said}]}

    def measure(self, name: str) -> None:
        """Have a run answer prompts whose constraints stood in no data, and check the answers."""
        answers, out = self.folder / name / "answers.jsonl", self.folder / name / "scored.jsonl"
        if out.exists():
            return
        run(self.log, "megatron_sov", "generate", self.folder / name, "--prompts",
            self.folder / "asked.jsonl", "--chat", "--max-new-tokens", "48", "--output", answers)
        asked = records(self.folder / "asked.jsonl")
        rows = [{"response": row["response"], "functions": one["functions"]}
                for one, row in zip(asked, records(answers), strict=True)]
        write(self.folder / name / "rows.jsonl", rows)
        run(self.log, "megatron_sov", "score", "--reward", "constraint", "--input",
            self.folder / name / "rows.jsonl", "--output", out, "--workers", "1")


def arm(seed: int, work: Path, name: str) -> None:
    """Do what is not done of one arm."""
    Seed(seed, work).do(name)


def share_kept(folder: Path, name: str) -> float | None:
    """Return the percentage of answers that keep their constraint, where it was measured."""
    file = folder / run_of(name) / "scored.jsonl"
    if not file.exists():
        return None
    rewards = [row["reward"] == 1 for row in records(file)]
    return 100 * sum(rewards) / len(rewards)


def report(work: Path) -> None:
    """Print what there is."""
    report_shares(work, f"answers to {NUM_ASKED} prompts that keep a constraint that stood in no data, %",
                  "answers", ARMS, share_kept)


if __name__ == "__main__":
    run_arms(__doc__, ARMS, arm, report)
