"""What reinforcement learning teaches a small model that calls tools: arithmetic by the calculator, facts by
search, over two turns, on goals that no round has had.

Usage: python benchmarks/rl_tools.py --work FOLDER [--seeds 0 1 2] [--worlds calculator retrieval]
                                     [--methods gspo grpo ink_grpo]
       python benchmarks/rl_tools.py --work FOLDER --print

The model comes from our own fine-tuning on scripted episodes, played by the environments themselves.  In most
of them one step is wrong: the answer is a guess without a call, or the call asks for something else: it can
play, and mostly fails.  Rounds give it tasks; others are played before and after, greedily, as `tools run`
scores them: sums that were in no episode, and facts of other documents.

InK-GRPO learns the documents that rounds search beside their responses (`rl knowledge`), as its paper does
with those of a law; GRPO is the same without them.  Both are for retrieval alone.

Everything runs through the ordinary commands on one process of one thread.  A run that is complete is not run
again, and `--print` writes a table of what there is, so that seeds can be added.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_runs import ALWAYS, MODEL, SeedFolder, parser_of, rows_of, run, words, write

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.judge.tools.environment import Environment
from megatron_sov.judge.tools.registry import make, order

TEMPLATE = (
    "{% if tools %}<|begin|>system<|content|>{{ messages[0].content }}{% for tool in tools %}"
    " {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}): "
    "{{ tool.function.description }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if not (tools and m.role == 'system') %}"
    "<|begin|>{{ m.role }}<|content|>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant<|content|>{% endif %}")
"""Names the tools and their arguments, and leaves the types out: prompts of 60 tokens instead of 300."""
TOKENIZER = {
    "split_pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "normalization": "none",
    "special_tokens": {"<|startoftext|>": 0, "<|endoftext|>": 1, "<|begin|>": 2, "<|content|>": 3,
                       "<|end|>": 4},
    "num_special_ids": 8, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
START = (*ALWAYS, rows_of(256), "train.steps=500", "optim.lr=4e-3")
MAX_PROMPT, MAX_RESPONSE, MAX_TURN, MAX_TURNS = 128, 120, 48, 3
METHODS = {"gspo": (), "grpo": ("policy.method=grpo", "policy.kl_coeff=0.04", "policy.kl_weighted=false"),
           "ink_grpo": ("policy.method=ink_grpo", "policy.knowledge_batch_size=8")}
"""Method -> its settings."""
POLICY = ("policy.method=gspo", "rollout.rounds=25", "rollout.prompts_per_round=16",
          "rollout.samples_per_prompt=8", "rollout.piece_prompts=16",
          f"rollout.max_new_tokens={MAX_RESPONSE}", f"rollout.max_prompt_tokens={MAX_PROMPT}",
          "optim.lr=5e-4", "optim.min_lr=2e-4", "optim.weight_decay=0", "optim.warmup_steps=0",
          "train.num_threads=1",
          "train.global_batch_size=8", "train.micro_batch_size=8", "train.eval_every_steps=0",
          rows_of(256))
RIGHT, GUESSED = 0.3, 0.6
"""Shares of scripted episodes that reach their goal, and that answer without a call; the others call for
something else."""
NUM_EPISODES, NUM_ASKED = 4000, 80
"""Scripted, of each world; sums that are asked before and after."""
LIFT_POINTS = 25.0
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
PEOPLE = ("Mira", "Tom", "Ada", "Joon", "Lena", "Omar", "Nok", "Ivan", "Sara", "Paul", "Yuna", "Rosa", "Kofi",
          "Elsa", "Hugo", "Mei", "Lars", "Nina", "Raj", "Vera")
FACTS = {"city": ("Rome", "Seoul", "Cairo", "Lima", "Oslo", "Paris", "Delhi", "Quito"),
         "pet": ("cat", "dog", "horse", "bird", "fish", "goat", "snake", "mouse"),
         "fruit": ("apple", "pear", "plum", "lemon", "mango", "grape", "melon", "peach")}
NUM_CORPORA = 6
"""Of drawn facts, that scripted episodes are played with; rounds have one of their own, and what is asked
before and after another."""


@dataclass(frozen=True)
class Goal:
    """A task, and what a script may do in it."""

    task: dict[str, Any]
    call: dict[str, Any]
    """The right one: name and arguments."""
    wrong_call: dict[str, Any]
    guess: str
    """An answer that nobody has looked up."""


def calculation(a: int, sign: str, b: int, rng: random.Random) -> Goal:
    """Return a sum, difference or product."""
    def call(word: str) -> dict[str, Any]:
        return {"name": "calculate", "arguments": {"expression": f"{a} {SIGNS[word]} {b}"}}

    value = {"plus": a + b, "minus": a - b, "times": a * b}[sign]
    other = rng.choice([word for word in SIGNS if word != sign])
    return Goal({"question": f"What is {a} {sign} {b}?", "answer": str(value), "domain": sign}, call(sign),
                call(other), str(rng.randrange(2, 80)))


def fact(person: str, kind: str, value: str, rng: random.Random) -> Goal:
    """Return a question after what the documents say of a person."""
    def call(asked: str) -> dict[str, Any]:
        return {"name": "search", "arguments": {"query": f"{person} {asked}"}}

    other = rng.choice([name for name in FACTS if name != kind])
    return Goal({"question": f"What is the {kind} of {person}?", "answer": value, "domain": kind},
                call(kind), call(other), rng.choice(FACTS[kind]))


def facts(file: Path, rng: random.Random) -> list[Goal]:
    """Write documents of drawn facts; returns what can be asked of them."""
    drawn = [(person, kind, rng.choice(values)) for person in PEOPLE for kind, values in FACTS.items()]
    write(file, [{"id": f"{person} {kind}", "text": value} for person, kind, value in drawn])
    return [fact(person, kind, value, rng) for person, kind, value in drawn]


def scripted(world: Environment, goal: Goal, rng: random.Random) -> dict[str, Any]:
    """Return an episode as a chat, whose results are those of the environment."""
    seen, draw = world.reset(goal.task), rng.random()
    messages: list[dict[str, Any]] = [{"role": "system", "content": seen.system},
                                      {"role": "user", "content": seen.user}]
    answer = goal.guess
    if not RIGHT <= draw < RIGHT + GUESSED:
        call = goal.call if draw < RIGHT else goal.wrong_call
        result = world.call(call["name"], call["arguments"])
        told = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        answer = result if isinstance(result, str) else result[0]["text"]
        messages += [{"role": "assistant", "content": "",
                      "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
                     {"role": "tool", "tool_call_id": "c1", "content": told}]
    messages.append({"role": "assistant", "content": f"The answer is {answer}"})
    return {"messages": messages, "tools": list(world.tools())}


class Seed(SeedFolder):
    """Data and runs of one seed."""

    def settings(self, world: str, corpus: str) -> dict[str, Any]:
        """Return the environment's, of which `retrieval` has documents."""
        return {} if world == "calculator" else {"corpus": str(self.folder / f"{corpus}.jsonl"), "top_k": 1}

    def data(self) -> None:
        """Write episodes, tasks and documents."""
        rng = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        sums = [(a, sign, b) for a in range(10) for sign in SIGNS for b in range(10)]
        rng.shuffle(sums)
        asked, others = ([calculation(*one, rng) for one in some] for some in (
            sums[:NUM_ASKED], sums[NUM_ASKED:]))
        write(self.folder / "calculator.asked.jsonl", [goal.task for goal in asked])
        write(self.folder / "calculator.tasks.jsonl", [goal.task for goal in others])
        for name in ("tasks", "asked"):
            goals = facts(self.folder / f"{name}.corpus.jsonl", rng)
            write(self.folder / f"retrieval.{name}.jsonl", [goal.task for goal in goals])
        write(self.folder / "episodes.jsonl", self.episodes(others, rng))

    def episodes(self, sums: list[Goal], rng: random.Random) -> Iterator[dict[str, Any]]:
        """Yield scripted episodes of both worlds."""
        calculator = make(order("calculator", {}))[0]
        libraries = []
        for number in range(NUM_CORPORA):
            goals = facts(self.folder / f"scripts-{number}.jsonl", rng)
            libraries.append((make(order("retrieval", self.settings("retrieval", f"scripts-{number}")))[0],
                              goals))
        for _ in range(NUM_EPISODES):
            yield scripted(calculator, rng.choice(sums), rng)
            library, goals = rng.choice(libraries)
            yield scripted(library, rng.choice(goals), rng)

    def start(self, *settings: str) -> Path:
        """Return the fine-tuned model that both worlds go on from, trained by other settings where some are
        given."""
        run_folder, shards = self.folder / "start", self.folder / "shards"
        if not (shards / "manifest.json").exists():
            self.data()
            (self.folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            run(self.log, "tokenizer.cli", "train", "--preset", "custom", "--config",
                self.folder / "tokenizer.json", "--vocab-size", "512", "--input",
                self.folder / "episodes.jsonl", "--output", self.folder / "tokenizer", "--overwrite")
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--workers", "1", "--input", f"episodes={self.folder / 'episodes.jsonl'}",
                "--output", shards, "--overwrite")
        if not (run_folder / "complete.json").exists():
            run(self.log, "megatron_sov", "pretrain", "tiny-solar-open", "--data", shards, "--run",
                run_folder, "--resume",
                *words((*(f"model.{size}" for size in MODEL), *START, f"train.seed={self.seed}",
                        *settings)))
        return run_folder

    def play(self, world: str, run_folder: Path) -> None:
        """Play what is asked before and after, greedily."""
        output = run_folder / f"{world}.episodes"
        if not (output / "manifest.json").exists():
            run(self.log, "megatron_sov", "tools", "run", world, run_folder, "--tasks",
                self.folder / f"{world}.asked.jsonl", "--output", output, "--limits", "train", "--parallel",
                "20", *self.limits(), "--limit", f"max_prompt_tokens={MAX_PROMPT}",
                "--limit", f"max_response_tokens={MAX_RESPONSE}",
                *(word for name, value in self.settings(world, "asked.corpus").items()
                  for word in ("--set", f"{name}={value}")))

    @staticmethod
    def limits() -> list[str]:
        """Return the limits of an episode that are no settings of `rollout`."""
        return ["--limit", f"max_turns={MAX_TURNS}", "--limit", f"max_turn_tokens={MAX_TURN}"]

    def text(self) -> Path:
        """Return token shards of the documents that rounds search."""
        knowledge, shards = self.folder / "knowledge", self.folder / "knowledge.shards"
        if not (shards / "manifest.json").exists():
            documents = map(json.loads, (self.folder / "tasks.corpus.jsonl").read_text().splitlines())
            write(self.folder / "sections.jsonl", [
                {"text": f"{document['id']}: {document['text']}", "document": document["id"],
                 "section": "all"}
                for document in documents])
            run(self.log, "megatron_sov", "rl", "knowledge", "--input", self.folder / "sections.jsonl",
                "--tests", self.folder / "retrieval.asked.jsonl", "--output", knowledge, "--overwrite")
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--heldout", "0", "--workers", "1", "--input",
                f"text={knowledge / 'knowledge.jsonl'}", "--output", shards, "--overwrite")
        return shards

    def world(self, name: str, method: str) -> None:
        """Train in a world by a method, unless it is done, and play before and after."""
        start, run_folder = self.start(), self.folder / run_name(name, method)
        self.play(name, start)
        if not (run_folder / "complete.json").exists():
            text = ["--data", self.text()] if method == "ink_grpo" else []
            run(self.log, "megatron_sov", "rl", "run", "tiny-solar-open", "--from", start, "--run",
                run_folder, "--store", run_folder.with_suffix(".store"), "--prompts",
                self.folder / f"{name}.tasks.jsonl", "--environment", name, "--reward", "environment",
                "--batch-size", "64", "--workers", "1", "--resume", *text, *self.limits(),
                *(word for key, value in self.settings(name, "tasks.corpus").items()
                  for word in ("--env-set", f"{key}={value}")),
                *words((*POLICY, *METHODS[method], f"train.seed={self.seed}", f"rollout.seed={self.seed}")))
        self.play(name, run_folder)


def run_name(world: str, method: str) -> str:
    """Return the name of a run's folder."""
    return world if method == "gspo" else f"{world}-{method}"


def reached(run_folder: Path, world: str) -> float | None:
    """Return the percentage of goals reached, where it was measured."""
    folder = run_folder / f"{world}.episodes"
    return 100 * read_manifest(folder).content["mean_reward"] if folder.exists() else None


def report(work: Path, worlds: list[str]) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, Python {platform.python_version()}; one process of one thread; goals "
          f"reached on tasks that no round has had, greedy, %; asked for: {LIFT_POINTS:+.0f} points")
    for world, method in [(world, method) for world in worlds for method in METHODS]:
        both = [(reached(folder / "start", world), reached(folder / run_name(world, method), world))
                for folder in sorted(work.glob("seed-*"))]
        done = [(before, after) for before, after in both if before is not None and after is not None]
        if done:
            told = ", ".join(f"{before:.1f} -> {after:.1f}" for before, after in done)
            lift = statistics.mean(after - before for before, after in done)
            print(f"  {world:<11} {method:<9}{lift:+6.1f} points   {told}")


def main() -> None:
    """Run what is missing, or print the table."""
    parser = parser_of(__doc__, "--worlds", ("calculator", "retrieval"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["gspo"])
    args = parser.parse_args()
    if args.methods != ["gspo"] and args.worlds != ["retrieval"]:
        parser.error("--methods other than gspo are for --worlds retrieval alone")
    if not args.only_print:
        for seed in args.seeds:
            for world, method in [(world, method) for world in args.worlds for method in args.methods]:
                Seed(seed, args.work).world(world, method)
    report(args.work, args.worlds)


if __name__ == "__main__":
    main()
