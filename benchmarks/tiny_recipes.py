"""The post-training of VibeThinker-1.5B and of Typhoon-S in tiny form, each from one command.

Usage: python benchmarks/tiny_recipes.py vibethinker --work FOLDER
       python benchmarks/tiny_recipes.py typhoon --work FOLDER

  vibethinker  a base, its context lengthened in three gated stages, fine-tuned; the best checkpoint of each
               domain found by pass@k, merged, the merge measured; MGPO on mathematics, on longer mathematics
               and on code (arXiv 2511.06221)
  typhoon      the 8B: a base, fine-tuned on part of the chats, and taught by a teacher that had all of them;
               the 4B: trained on chats, text of the documents made, and learned beside rounds by InK-GRPO
               (arXiv 2601.18129)

Structure and order are those of the recipes, sizes are tiny, questions those of rl_learning.py and of the
claim `typhoon-s/knowledge` of paper_claims.py: a start that has read and answered facts of known
people, and facts of 48 others, half of which no round asks after.  Each line of output is a step with its
seconds; the same command goes on where it was killed, inside of a step too, and passes over what is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claims.facts import PEOPLE, STRANGERS, WORDINGS, FactChats, FactReading, asked, drawn, told
from rl_learning import HERE, KINDS, POLICY, chats, questions
from seed_runs import rows_of, run, words, write

REWARD = f"{HERE / 'rl_reward.py'}:Exact"
ONE_THREAD = ("train.num_threads=1", "train.eval_every_steps=0", "data.max_epochs=0")
SHORT = (*ONE_THREAD, "train.global_batch_size=8")
BASE_STEPS, SFT_STEPS, STAGE_STEPS = 60, 600, 10
LEARNED = (*ONE_THREAD, "guards.sigma=0", "train.global_batch_size=16", "train.micro_batch_size=8",
           "optim.lr=4e-3", rows_of(128), f"train.steps={SFT_STEPS}")
"""Fine-tuning that has seen enough for rounds to have something to choose from."""
MGPO = ("policy.mgpo_lambda=1", "policy.clip_low=0.2", "policy.clip_high=0.2")
"""What VibeThinker's authors did not publish."""
STAGES = (("math-16k", 16, 6), ("math-32k", 16, 12), ("code", 8, 12))
"""Stage -> its rounds, and the tokens of a response."""
INK = ("policy.method=ink_grpo", "policy.knowledge_batch_size=8", "policy.knowledge_coeff=1",
       "rollout.rounds=24", "rollout.steps_per_round=4", "rollout.prompts_per_round=16",
       "rollout.samples_per_prompt=8", "rollout.piece_prompts=16", "rollout.max_new_tokens=16",
       "rollout.max_prompt_tokens=64", "train.global_batch_size=8", "train.micro_batch_size=8",
       "optim.lr=1e-3", "optim.min_lr=2e-4", "optim.weight_decay=0", "optim.warmup_steps=0", rows_of(128))
"""Rate and weight of the text are those of the claim `knowledge`, and so are sizes and steps of its start."""
READER = ("model.vocab_size=512", "model.hidden_size=64", "model.num_layers=2", "optim.weight_decay=0",
          "train.steps=300")
ALONE = ("train.global_batch_size=8", "train.micro_batch_size=8", "train.steps=58", "guards.sigma=0",
         "optim.lr=1e-3", "optim.min_lr=2e-4", "optim.weight_decay=0", "optim.warmup_steps=0", rows_of(128))
"""As much text as rounds learn (60 % of their 96 steps), and no rewards: the baseline that could win."""
NUM_READ = 6000
VOCABULARY, LONG_CHATS = "464", 400


class Road:
    """Steps in a folder, each of which is passed over once it is done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        folder.mkdir(parents=True, exist_ok=True)

    def step(self, done: str, *arguments: str | Path) -> Path:
        """Run a command, unless the file that it leaves last is there; returns that file's folder."""
        return self.made(done, lambda: run(self.log, *arguments))

    def made(self, done: str, make: Callable[[], object]) -> Path:
        """Make something, unless the file that is written last is there; returns that file's folder."""
        file, began_s = self.folder / done, time.monotonic()
        if file.exists():
            print(f"  {done:<34} done before", flush=True)
        else:
            make()
            print(f"  {done:<34} {time.monotonic() - began_s:6.1f} s", flush=True)
        return file.parent

    def tokenizer(self) -> Path:
        """Return the tokenizer of the chats."""
        return self.step("tokenizer/manifest.json", "tokenizer.cli", "train", "--preset", "solar-open",
                         "--vocab-size", VOCABULARY, "--input", self.folder / "chats.jsonl", "--output",
                         self.folder / "tokenizer", "--overwrite")

    def packed(self, name: str, form: str = "chat", heldout: str = "0.02") -> Path:
        """Return token shards of a file."""
        return self.step(f"{name}.shards/manifest.json", "data_prep.cli", "pack", "--tokenizer",
                         self.folder / "tokenizer", "--format", form, "--heldout", heldout, "--workers", "1",
                         "--input", f"{name}={self.folder / name}.jsonl", "--output",
                         self.folder / f"{name}.shards", "--overwrite")

    def trained(self, name: str, *arguments: str | Path, settings: tuple[str, ...] = SHORT) -> Path:
        """Return a run's folder."""
        return self.step(f"{name}/complete.json", "megatron_sov", *arguments, "--run", self.folder / name,
                         "--resume", *words(settings))

    def rounds(self, name: str, recipe: str, start: Path, *more: str | Path,
               settings: tuple[str, ...] = ()) -> Path:
        """Return a run of reinforcement learning."""
        return self.trained(name, "rl", "run", recipe, "--from", start, "--store",
                            self.folder / f"{name}.store", "--prompts", self.folder / "prompts.jsonl",
                            "--reward", REWARD, "--workers", "1", *more,
                            settings=(*ONE_THREAD, *settings))

    def right(self, name: str, target: Path, asked: Path) -> None:
        """Tell how many questions a model answers rightly, greedily."""
        answers, judged = self.folder / f"{name}.answers.jsonl", self.folder / f"{name}.judged.jsonl"

        def ask() -> None:
            run(self.log, "megatron_sov", "generate", target, "--prompts", asked, "--chat",
                "--max-new-tokens", "16", "--output", answers)
            run(self.log, "megatron_sov", "score", "--reward", REWARD, "--input", answers, "--output", judged,
                "--workers", "1")

        self.made(judged.name, ask)
        rewards = [json.loads(line)["reward"] for line in judged.read_text().splitlines()]
        print(f"      right answers, {name}: {statistics.mean(rewards):.1%} of {len(rewards)}", flush=True)


def vibethinker(road: Road) -> None:
    """Lengthen, fine-tune, probe, merge, and learn by three stages of rounds."""
    folder, domains = road.folder, [type(kind).__name__.lower() for kind in KINDS]

    def data() -> None:
        rows = list(chats(0))
        write(folder / "chats.jsonl", rows)
        said = [" ".join(m["content"] for m in row["messages"]) for row in rows]
        write(folder / "text.jsonl", ({"text": "\n".join(said[i:i + LONG_CHATS])}
                                      for i in range(0, len(said), LONG_CHATS)))
        write(folder / "prompts.jsonl", questions(0, False, 400))
        problems = questions(1000, True, 150)
        write(folder / "problems.jsonl", problems)
        for domain in domains:
            write(folder / f"{domain}.jsonl", (row for row in problems if row["domain"] == domain))

    road.made("problems.jsonl", data)
    road.tokenizer()
    text, asked = road.packed("text", "text"), folder / "problems.jsonl"
    base = road.trained("base", "pretrain", "tiny-qwen2", "--data", text, settings=(
        *SHORT, f"train.steps={BASE_STEPS}"))
    longer = road.trained("longer", "extend", "tiny-vibethinker", "--from", base, "--data", text, settings=(
        *ONE_THREAD, "train.global_batch_size=2", "train.micro_batch_size=1",
        *(f"extend.stages.{i}.{name}={STAGE_STEPS}" for i in range(3) for name in ("steps", "max_steps")),
        f"extend.gate.every_steps={STAGE_STEPS}", "extend.gate.loss_tolerance_nats=5", "needle.samples=2"))
    tuned = road.trained("sft", "sft", "tiny-vibethinker", "--from", longer, "--data", road.packed("chats"),
                         settings=(*LEARNED, "train.keep_checkpoints=0", "train.keep_every_steps=0",
                                   f"train.checkpoint_every_steps={SFT_STEPS // 4}"))
    probe = [*(f"{domain}={folder / domain}.jsonl" for domain in domains), "--reward", REWARD, "--samples",
             "8", "--k", "4", "--max-new-tokens", "12", "--chat", "--workers", "1"]
    road.step("probe/table/manifest.json", "megatron_sov", "ssp", "probe", tuned, "--problems", *probe,
              "--output", folder / "probe")
    merged = road.step("merged/manifest.json", "megatron_sov", "ssp", "fuse", folder / "probe", "--output",
                       folder / "merged", "--overwrite")
    road.step("probe-merged/table/manifest.json", "megatron_sov", "ssp", "probe", merged, "--problems",
              *probe, "--output", folder / "probe-merged")
    road.right("merged", merged, asked)
    model = merged
    for name, rounds, tokens in STAGES:
        model = road.rounds(name, f"tiny-vibethinker-{name}", model, settings=(
            *POLICY, *MGPO, f"rollout.rounds={rounds}", f"rollout.max_new_tokens={tokens}"))
        road.right(f"after-{name}", model, asked)


def facts_data(folder: Path) -> None:
    """Write chats and sentences about known people, facts of others, and questions after these."""
    facts, chats_made = drawn(0, PEOPLE + STRANGERS), FactChats(904, NUM_READ).do({})
    middle = len(facts) // 2

    def questions_of(some: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
        return [{"prompt": asked(fact, wording), "answer": told(fact), "domain": fact[1]}
                for fact in some for wording in WORDINGS]

    write(folder / "chats.jsonl", chats_made)
    # a sentence alone is an assistant's turn, as `rl knowledge` writes it
    write(folder / "reading.jsonl", ({"messages": [{"role": "assistant", "content": row["text"]}]}
                                     for row in FactReading(905, NUM_READ).do({})))
    write(folder / "facts.jsonl", [{"text": told(fact), "document": fact[0], "section": fact[1]}
                                   for fact in facts])
    write(folder / "prompts.jsonl", questions_of(facts[:middle]))
    write(folder / "heldout.jsonl", questions_of(facts[middle:]))
    write(folder / "some.jsonl", chats_made[:len(chats_made) // 4])


def typhoon(road: Road) -> None:
    """Fine-tune and be taught; then fine-tune and learn text beside rounds."""
    road.made("some.jsonl", lambda: facts_data(road.folder))
    road.tokenizer()
    chat = road.packed("chats")
    taught(road, chat)
    reinforced(road, chat)


def taught(road: Road, chat: Path) -> None:
    """Go the road of the 8B."""
    base = road.trained("base-8b", "pretrain", "tiny-qwen3-8b", "--data", chat, settings=(
        *SHORT, "train.steps=40"))
    some = road.packed("some")
    tuned = road.trained("sft-8b", "sft", "tiny-typhoon-s", "--from", base, "--data", some, settings=(
        *SHORT, "train.steps=60"))
    teacher = road.trained("teacher", "sft", "tiny-typhoon-s", "--from", base, "--data", chat, settings=(
        *SHORT, "train.steps=80"))
    road.trained("opd", "distill", "tiny-typhoon-s", "--from", tuned, "--teacher", teacher, "--data",
                 chat, settings=(*SHORT, "objective.name=distill", "train.steps=30"))


def reinforced(road: Road, chat: Path) -> None:
    """Go the road of the 4B, and tell what it knows before and after."""
    folder, reading = road.folder, road.packed("reading")
    small = road.trained("start-4b", "pretrain", "tiny-qwen3-4b-2507", "--data", f"{chat}:0.6", "--data",
                         f"{reading}:0.4", settings=(*LEARNED, *READER))
    knowledge = road.step("knowledge/manifest.json", "megatron_sov", "rl", "knowledge", "--input",
                          folder / "facts.jsonl", "--tests", folder / "heldout.jsonl", "--output",
                          folder / "knowledge", "--overwrite")
    road.made("laws.jsonl", lambda: (folder / "laws.jsonl").write_bytes(
        (knowledge / "knowledge.jsonl").read_bytes()))
    laws = road.packed("laws", heldout="0")
    halves = {"asked": folder / "prompts.jsonl", "told": folder / "heldout.jsonl"}
    for half, asked_file in halves.items():
        road.right(f"before-{half}", small, asked_file)
    legal = road.rounds("legal", "tiny-typhoon-s-legal", small, "--data", laws, settings=INK)
    alone = road.trained("text-alone", "pretrain", "tiny-qwen3-4b-2507", "--from", small, "--data", laws,
                         settings=(*ONE_THREAD, *ALONE))
    for half, asked_file in halves.items():
        road.right(f"after-{half}", legal, asked_file)
        road.right(f"text-alone-{half}", alone, asked_file)


ROADS = {"vibethinker": vibethinker, "typhoon": typhoon}


def main() -> None:
    """Go a road, or what is left of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("recipe", choices=list(ROADS))
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    began_s = time.monotonic()
    ROADS[args.recipe](Road(args.work / args.recipe))
    print(f"{args.recipe}: {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
