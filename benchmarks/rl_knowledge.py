"""What text beside responses adds to reinforcement learning (InK-GRPO, arXiv 2601.18129): rounds ask after
half of some facts, and the others stand in the text alone.

Usage: python benchmarks/rl_knowledge.py --work FOLDER [--seeds 0 1 2] [--arms ink_grpo grpo ...]
       python benchmarks/rl_knowledge.py --work FOLDER --print

Facts of invented people are drawn by lot.  The model comes from our own fine-tuning on questions with values
by lot: it knows how to answer, and no fact.  `rl knowledge` makes the text of all facts.  Arms have the same
prompts, rounds and responses; they differ in what is learned beside them.  Both halves are asked before and
after, greedily.

Everything runs through the ordinary commands on one process of one thread.  A run that is complete is not run
again, and `--print` writes a table of what there is, so that seeds can be added.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
from pathlib import Path
from typing import Any

from rl_learning import HERE, SETTINGS
from seed_runs import MODEL, SeedFolder, rows_of, run, run_arms, words, write

PEOPLE = ("Mira", "Tom", "Ada", "Joon", "Lena", "Omar", "Nok", "Ivan", "Sara", "Paul", "Yuna", "Rosa", "Kofi",
          "Elsa", "Hugo", "Mei", "Anna", "Bao", "Carl", "Dora", "Eun", "Finn", "Gita", "Hana")
"""Of each one fact is told: what belongs to a name is within reach of a model of this size, and what belongs
to a name and a kind together is not, in as many steps."""
VALUES = {"city": ("Rome", "Seoul", "Cairo", "Lima", "Oslo", "Paris", "Delhi", "Quito"),
          "pet": ("cat", "dog", "horse", "bird", "fish", "goat", "snake", "mouse"),
          "fruit": ("apple", "pear", "plum", "lemon", "mango", "grape", "melon", "peach")}
WORDINGS = ("What is the {kind} of {person}?", "Tell me the {kind} of {person}.", "The {kind} of {person}?")
NUM_CHATS, START_STEPS, START_LR = 4000, 300, 4e-3
POLICY = ("rollout.rounds=24", "rollout.steps_per_round=4", "rollout.prompts_per_round=16",
          "rollout.samples_per_prompt=8", "rollout.piece_prompts=16", "rollout.max_new_tokens=16",
          "rollout.max_prompt_tokens=64",
          "optim.lr=2e-3", "optim.min_lr=2e-4", "optim.weight_decay=0", "optim.warmup_steps=0",
          "train.num_threads=1",
          "train.global_batch_size=8", "train.micro_batch_size=8", "train.eval_every_steps=0",
          "data.max_epochs=0", rows_of(128))
ARMS: dict[str, tuple[str, ...]] = {
    "ink_grpo": ("policy.method=ink_grpo", "policy.knowledge_batch_size=8", "policy.knowledge_coeff=1"),
    "published": ("policy.method=ink_grpo", "policy.knowledge_batch_size=8"),
    "no_text": ("policy.method=ink_grpo", "policy.knowledge_coeff=0"),
    "grpo": ("policy.method=grpo", "policy.kl_coeff=0.04", "policy.kl_weighted=false"),
}
"""Arm -> its settings; ink_grpo: text weighs as much as responses; published: a tenth, as in the paper, whose
model knows how to read; no_text: all of InK-GRPO but its text; grpo: as its paper, with a divergence."""
HALVES = ("asked", "heldout")
"""Facts that rounds ask after, and the others."""


def answer(person: str, kind: str, value: str) -> str:
    """Return what is said of a fact: by the text, and in answer to a question."""
    return f"The {kind} of {person} is {value}."


class Seed(SeedFolder):
    """Data and runs of one seed."""

    def data(self) -> None:
        """Write chats, facts and questions."""
        rng = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds = list(VALUES)
        facts = [(person, kind, rng.choice(VALUES[kind])) for person, kind in
                 zip(PEOPLE, kinds * (len(PEOPLE) // len(kinds)), strict=True)]
        write(self.folder / "chats.jsonl", [self._chat(rng) for _ in range(NUM_CHATS)])
        write(self.folder / "facts.jsonl", [
            {"text": answer(*fact), "document": fact[0], "section": fact[1]} for fact in facts])
        rng.shuffle(facts)
        middle = len(facts) // 2
        for half, some in zip(HALVES, (facts[:middle], facts[middle:]), strict=True):
            write(self.folder / f"{half}.jsonl", [self._question(fact, WORDINGS[0]) for fact in some])
        write(self.folder / "prompts.jsonl", [self._question(fact, wording) for fact in facts[:middle]
                                              for wording in WORDINGS])

    @staticmethod
    def _question(fact: tuple[str, str, str], wording: str) -> dict[str, Any]:
        person, kind, _ = fact
        return {"prompt": wording.format(person=person, kind=kind), "answer": answer(*fact), "domain": kind}

    def _chat(self, rng: random.Random) -> dict[str, Any]:
        person, kind = rng.choice(PEOPLE), rng.choice(list(VALUES))
        asked = self._question((person, kind, rng.choice(VALUES[kind])), rng.choice(WORDINGS))
        return {"messages": [{"role": "user", "content": asked["prompt"]},
                             {"role": "assistant", "content": asked["answer"]}]}

    def packed(self, name: str, file: Path) -> Path:
        """Return token shards of chats."""
        shards = self.folder / f"{name}.shards"
        if not (shards / "manifest.json").exists():
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--heldout", "0", "--workers", "1", "--input", f"{name}={file}", "--output", shards,
                "--overwrite")
        return shards

    def start(self) -> Path:
        """Return the fine-tuned model that all arms go on from."""
        run_folder = self.folder / "start"
        if not (self.folder / "tokenizer/manifest.json").exists():
            self.data()
            run(self.log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "400",
                "--input", self.folder / "chats.jsonl", "--output", self.folder / "tokenizer", "--overwrite")
        if not (run_folder / "complete.json").exists():
            run(self.log, "megatron_sov", "pretrain", "tiny-solar-open", "--data",
                self.packed("chats", self.folder / "chats.jsonl"), "--run", run_folder, "--resume",
                *words((*(f"model.{size}" for size in MODEL), *SETTINGS, f"train.seed={self.seed}",
                        f"train.steps={START_STEPS}", f"optim.lr={START_LR}")))
        self.ask(run_folder)
        return run_folder

    def ask(self, run_folder: Path) -> None:
        """Ask both halves, greedily."""
        for half in HALVES:
            answers, judged = run_folder / f"{half}.answers.jsonl", run_folder / f"{half}.judged.jsonl"
            if not judged.exists():
                run(self.log, "megatron_sov", "generate", run_folder, "--prompts",
                    self.folder / f"{half}.jsonl", "--chat", "--max-new-tokens", "16", "--output", answers)
                run(self.log, "megatron_sov", "score", "--reward", f"{HERE / 'rl_reward.py'}:Exact",
                    "--input", answers, "--output", judged, "--workers", "1")

    def text(self) -> Path:
        """Return token shards of the text of all facts."""
        knowledge = self.folder / "knowledge"
        if not (knowledge / "manifest.json").exists():
            run(self.log, "megatron_sov", "rl", "knowledge", "--input", self.folder / "facts.jsonl",
                "--tests", self.folder / "heldout.jsonl", "--output", knowledge, "--overwrite")
        return self.packed("text", knowledge / "knowledge.jsonl")

    def arm(self, name: str) -> None:
        """Run an arm, unless it is complete, and ask what it has learned."""
        start, run_folder = self.start(), self.folder / name
        if not (run_folder / "complete.json").exists():
            text = ["--data", self.text()] if name in ("ink_grpo", "published") else []
            run(self.log, "megatron_sov", "rl", "run", "tiny-solar-open", "--from", start, "--run",
                run_folder, "--store", self.folder / f"{name}.store", "--prompts",
                self.folder / "prompts.jsonl", "--reward", f"{HERE / 'rl_reward.py'}:Exact", "--workers",
                "1", "--resume", *text,
                *words((*POLICY, *ARMS[name], f"train.seed={self.seed}", f"rollout.seed={self.seed}")))
        self.ask(run_folder)


def accuracy(run_folder: Path, half: str) -> float | None:
    """Return the percentage of right answers, where it was measured."""
    file = run_folder / f"{half}.judged.jsonl"
    if not file.exists():
        return None
    return 100 * statistics.mean(json.loads(line)["reward"] for line in file.read_text().splitlines())


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, Python {platform.python_version()}; one process of one thread; right "
          f"answers, greedy, %, by seed (chance: {100 / 8})")
    for half, told in zip(HALVES, ("asked in rounds", "in the text alone"), strict=True):
        for arm in ("start", *ARMS):
            found = [accuracy(folder / arm, half) for folder in sorted(work.glob("seed-*"))]
            known = [value for value in found if value is not None]
            if known:
                print(f"  facts {told:<18} {arm:<9} {statistics.mean(known):6.1f}   "
                      f"{', '.join(f'{value:.1f}' for value in known)}")


if __name__ == "__main__":
    run_arms(__doc__, ARMS, lambda seed, work, arm: Seed(seed, work).arm(arm), report)
