"""What reinforcement learning teaches a small model that calls tools: arithmetic by the calculator, facts by
search, over two turns, on goals that no round has had.

Usage: python benchmarks/rl_tools.py --work FOLDER [--seeds 0 1 2] [--worlds calculator retrieval]
                                     [--methods gspo grpo ink_grpo best_of_n] [--rounds 25]
                                     [--start-steps 500]
       python benchmarks/rl_tools.py --work FOLDER --print

The model comes from our own fine-tuning on scripted episodes, played by the environments themselves.  In most
of them one step is wrong: the answer is a guess without a call, or the call asks for something else: it can
play, and mostly fails.  Rounds give it tasks; others are played before and after, greedily, as `tools run`
scores them: sums that were in no episode, and facts of other documents.

InK-GRPO learns the documents that rounds search beside their responses (`rl knowledge`), as its paper does
with those of a law; GRPO is the same without them.  Both are for retrieval alone.

best_of_n, the baseline that could win: the start plays the rounds' tasks, as many episodes in all as the
rounds write.  It is fine-tuned on those that reach their goal, in as many steps as there are rounds and over
as many episodes, at each of two rates.

Everything runs through the ordinary commands on one process of one thread.  A run that is complete is not run
again, and `--print` writes a table of what there is, so that seeds can be added.
"""

from __future__ import annotations

import json
import platform
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_runs import ALWAYS, MODEL, SeedFolder, parser_of, rows_of, run, tokens_a_document, words, write
from seeds import over_seeds, print_beside
from tokenizers import Tokenizer

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
ROW = 256
START_STEPS, START = 500, (*ALWAYS, rows_of(ROW), "optim.lr=4e-3")
MAX_PROMPT, MAX_RESPONSE, MAX_TURN, MAX_TURNS = 128, 120, 48, 3
METHODS = {"gspo": (), "grpo": ("policy.method=grpo", "policy.kl_coeff=0.04", "policy.kl_weighted=false"),
           "ink_grpo": ("policy.method=ink_grpo", "policy.knowledge_batch_size=8")}
"""Method -> its settings."""
ROUNDS, PROMPTS, SAMPLES, MICRO = 25, 16, 8, 8
OPTIM = ("optim.min_lr=2e-4", "optim.weight_decay=0", "optim.warmup_steps=0")
POLICY = ("policy.method=gspo", f"rollout.prompts_per_round={PROMPTS}",
          f"rollout.samples_per_prompt={SAMPLES}", f"rollout.piece_prompts={PROMPTS}",
          f"rollout.max_new_tokens={MAX_RESPONSE}", f"rollout.max_prompt_tokens={MAX_PROMPT}",
          "optim.lr=5e-4", *OPTIM, "train.num_threads=1", f"train.global_batch_size={MICRO}",
          f"train.micro_batch_size={MICRO}", "train.eval_every_steps=0", rows_of(ROW))
BEST, RATES = "best_of_n", ("5e-4", "1e-3")
RIGHT, GUESSED = 0.3, 0.6
"""Shares of scripted episodes that reach their goal, and that answer without a call; the others call for
something else."""
NUM_EPISODES, NUM_ASKED = 4000, 80
"""Scripted, of each world; sums that are asked before and after."""
LIFT_POINTS = 25.0
CALL = re.compile(r"(.*?)<tool_call>(.*)</tool_call>", re.DOTALL)
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
    messages, draw = opening(world, goal.task), rng.random()
    answer = goal.guess
    if not RIGHT <= draw < RIGHT + GUESSED:
        call = goal.call if draw < RIGHT else goal.wrong_call
        more, result = called(world, call, "")
        messages += more
        answer = result if isinstance(result, str) else result[0]["text"]
    messages.append({"role": "assistant", "content": f"The answer is {answer}"})
    return {"messages": messages, "tools": list(world.tools())}


def opening(world: Environment, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what an episode begins with, as messages."""
    seen = world.reset(task)
    return [{"role": "system", "content": seen.system}, {"role": "user", "content": seen.user}]


def called(world: Environment, call: dict[str, Any], before: str) -> tuple[list[dict[str, Any]], Any]:
    """Return the messages of a call, behind what was said before it, and of its result, and the result."""
    result = world.call(call["name"], call["arguments"])
    told = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return [{"role": "assistant", "content": before,
             "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "c1", "content": told}], result


def played(world: Environment, row: dict[str, Any], turns: list[str]) -> dict[str, Any] | None:
    """Return a model's episode as a chat; None: a turn of it is more than a call.

    Args:
        world: that it was played in.
        row: of the episode, of `tools run`.
        turns: what the model said in each turn.
    """
    messages = opening(world, row["task"])
    for turn in turns[:-1]:
        found = CALL.fullmatch(turn)
        if found is None:
            return None
        messages += called(world, json.loads(found[2]), found[1])[0]
    messages.append({"role": "assistant", "content": turns[-1]})
    return {"messages": messages, "tools": list(world.tools())}


class Seed(SeedFolder):
    """Data and runs of one seed."""

    rounds, start_steps = ROUNDS, START_STEPS
    """Of all methods, and of what they go on from."""

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

    def start(self) -> Path:
        """Return the fine-tuned model that both worlds go on from."""
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
                        f"train.steps={self.start_steps}")))
        return run_folder

    def play(self, world: str, run_folder: Path) -> None:
        """Play what is asked before and after, greedily."""
        self.episodes_of(world, run_folder, "asked", run_folder / f"{world}.episodes", "--concurrent", "20")

    def episodes_of(self, world: str, run_folder: Path, tasks: str, output: Path, *how: str) -> None:
        """Play tasks of a file, over the documents of their kind (`asked`, `tasks`), unless that is done."""
        if not (output / "manifest.json").exists():
            kind = tasks.partition(".")[0]
            run(self.log, "megatron_sov", "tools", "run", world, run_folder, "--tasks",
                self.folder / f"{world}.{tasks}.jsonl", "--output", output, "--limits", "train", *how,
                *self.limits(), "--limit", f"max_prompt_tokens={MAX_PROMPT}",
                "--limit", f"max_response_tokens={MAX_RESPONSE}",
                *(word for name, value in self.settings(world, f"{kind}.corpus").items()
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
                *words((*POLICY, *METHODS[method], f"rollout.rounds={self.rounds}",
                        f"train.seed={self.seed}", f"rollout.seed={self.seed}")))
        self.play(name, run_folder)


    def best_of_n(self, world: str) -> None:
        """Fine-tune the start on its own episodes that reach their goal, unless that is done, and play.

        There are as many steps as rounds, each over as many episodes as a round has.
        """
        start, shards = self.start(), self.folder / f"{world}-{BEST}.shards"
        self.play(world, start)
        if not (shards / "manifest.json").exists():
            tasks = (self.folder / f"{world}.tasks.jsonl").read_text()
            times = round(self.rounds * PROMPTS * SAMPLES / len(tasks.splitlines()))
            (self.folder / f"{world}.tasks.{BEST}.jsonl").write_text(tasks * times)
            episodes = self.folder / f"{world}-{BEST}.episodes"
            self.episodes_of(world, start, f"tasks.{BEST}", episodes, "--temperature", "1", "--seed",
                             str(self.seed), "--concurrent", "64")
            write(self.folder / f"{world}-{BEST}.jsonl", self.right_episodes(world, episodes))
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--heldout", "0", "--workers", "1", "--input",
                f"episodes={self.folder / f'{world}-{BEST}.jsonl'}", "--output", shards, "--overwrite")
        rows = MICRO * round(PROMPTS * SAMPLES * tokens_a_document(shards) / (ROW * MICRO))
        for rate in RATES:
            run_folder = self.folder / run_name(world, f"{BEST}-{rate}")
            if not (run_folder / "complete.json").exists():
                run(self.log, "megatron_sov", "sft", "tiny-solar-open", "--from", start, "--data", shards,
                    "--run", run_folder, "--resume", *words((
                        *ALWAYS, rows_of(ROW), *OPTIM, "guards.sigma=0", f"train.seed={self.seed}",
                        f"optim.lr={rate}", f"train.global_batch_size={rows}",
                        f"train.micro_batch_size={MICRO}", f"train.steps={self.rounds}")))
            self.play(world, run_folder)

    def right_episodes(self, world: str, episodes: Path) -> Iterator[dict[str, Any]]:
        """Yield the episodes that reach their goal, as chats."""
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer/tokenizer.json"))
        library = make(order(world, self.settings(world, "tasks.corpus")))[0]
        for row in map(json.loads, (episodes / "episodes.jsonl").read_text().splitlines()):
            if row["reward"] == 1 and row["end"] == "answered" and not row["faults"]:
                turns = [tokenizer.decode(row["ids"][begin:end]) for begin, end in row["spans"]]
                chat = played(library, row, turns)
                if chat is not None:
                    yield chat


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
    for world in worlds:
        lifts: dict[str, dict[str, float]] = {}
        for method in (*METHODS, *(f"{BEST}-{rate}" for rate in RATES)):
            both = {folder.name: (before, after) for folder in sorted(work.glob("seed-*"))
                    if (before := reached(folder / "start", world)) is not None
                    and (after := reached(folder / run_name(world, method), world)) is not None}
            if both:
                lifts[method] = {seed: after - before for seed, (before, after) in both.items()}
                told = ", ".join(f"{before:.1f} -> {after:.1f}" for before, after in both.values())
                print(f"  {world:<11} {method:<14} {over_seeds([*lifts[method].values()], '+6.1f'):<14} "
                      f"points   {told}")
        if lifts:
            print_beside(lifts, BEST)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = parser_of(__doc__, "--worlds", ("calculator", "retrieval"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, BEST], default=["gspo"])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="and steps of best_of_n")
    parser.add_argument("--start-steps", type=int, default=START_STEPS)
    args = parser.parse_args()
    if args.methods != ["gspo"] and args.worlds != ["retrieval"]:
        parser.error("--methods other than gspo are for --worlds retrieval alone")
    if not args.only_print:
        for seed in args.seeds:
            for world, method in [(world, method) for world in args.worlds for method in args.methods]:
                made = Seed(seed, args.work)
                made.rounds, made.start_steps = args.rounds, args.start_steps
                made.best_of_n(world) if method == BEST else made.world(world, method)
    report(args.work, args.worlds)


if __name__ == "__main__":
    main()
