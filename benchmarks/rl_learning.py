"""What reinforcement learning teaches a small model: GSPO, AGAPO and MGPO on questions that it mostly answers
wrong, asked in wordings that no round has seen, beside rewards drawn by lot and beside fine-tuning on right
responses of the start.

Usage: python benchmarks/rl_learning.py --work FOLDER [--seeds 0 1 2] [--arms gspo best_of_n agapo ...]
       python benchmarks/rl_learning.py --work FOLDER --print

Sums, larger numbers and turned words in eight wordings.  The model comes from our own fine-tuning, on
answers of which a third are right and half are wrong in one way: so it knows the language, has seen what is
right, and says something else.  Rounds ask four of the wordings; the other four are asked before and after,
greedily.

best_of_n, the baseline that could win: the start answers the same prompts, as many responses in all as the
rounds write.  It is fine-tuned on a right one to each prompt that has one, in as many steps as there are
rounds and over as many documents, at each of three rates, which are shown beside each other.

Everything runs through the ordinary commands on one process of one thread.  A run that is complete is not run
again, and `--print` writes a table of what there is, so that seeds can be added.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_runs import ALWAYS, MODEL, SeedFolder, parser_of, rows_of, run, tokens_a_document, words, write
from seeds import over_seeds, print_beside

HERE = Path(__file__).parent
SETTINGS = (*ALWAYS, "guards.sigma=0", rows_of(128))
START_STEPS, START_LR = 700, 4e-3
ROUNDS, LR = 40, 1e-3
PROMPTS, SAMPLES = 32, 8
OPTIM = ("optim.min_lr=2e-4", "optim.weight_decay=0", "optim.warmup_steps=0")
POLICY = (f"rollout.rounds={ROUNDS}", f"rollout.prompts_per_round={PROMPTS}",
          f"rollout.samples_per_prompt={SAMPLES}", "rollout.piece_prompts=32", "rollout.max_new_tokens=12",
          "rollout.max_prompt_tokens=64", f"optim.lr={LR}", *OPTIM,
          "train.num_threads=1",
          "train.global_batch_size=8", "train.micro_batch_size=8", "train.eval_every_steps=0",
          rows_of(128))
ARMS: dict[str, tuple[str, ...]] = {
    "gspo": ("policy.method=gspo",),
    "agapo": ("policy.method=agapo", "policy.clip_high=4"),
    "mgpo": ("policy.method=mgpo", "policy.mgpo_lambda=1", "policy.clip_low=0.2", "policy.clip_high=0.2"),
    "gspo_bf16": ("policy.method=gspo", "train.precision=bf16"),
    "shuffled": ("policy.method=gspo",),
    "cached": ("policy.method=gspo", f"rollout.rounds={ROUNDS // 2}", "rollout.steps_per_round=4"),
    "stale": ("policy.method=gspo", "rollout.max_staleness=2"),
}
"""Arm -> its settings, with numbers of ours where the authors published none; gspo_bf16: the engine rounds
otherwise than the trainer, as on a GPU; shuffled: rewards drawn by lot; cached: half of the responses,
several steps over each; stale: responses of a policy that is up to two rounds old."""
BEST, RATES, ROWS = "best_of_n", ("5e-4", "1e-3", "2e-3"), 72
"""ROWS: of a step of fine-tuning, which has as many documents as a round, so that there are as many steps."""
LIFT_POINTS, SHUFFLED_POINTS, NEAR_POINTS = 30.0, 3.0, 2.0
"""Asked for: of gspo, also in bf16, agapo and mgpo more than before; of shuffled no more than this; of cached
and stale no further below gspo than this."""
RIGHT, WRONG = 0.35, 0.5
"""Shares of the right answer, and of the one wrong one that stands for all questions of its kind."""
NUM_CHATS, NUM_ASKED = 6000, 160


@dataclass(frozen=True)
class Kind:
    """A kind of question."""

    wordings: tuple[str, ...]
    """Those at even places are asked in rounds, the others before and after."""

    def question(self, rng: random.Random) -> tuple[dict[str, Any], str, str, list[str]]:
        """Return what fills the wordings, the right answer, the wrong one, and others."""
        raise NotImplementedError


class Sum(Kind):
    """The sum of two digits; wrong is one more."""

    def question(self, rng: random.Random) -> tuple[dict[str, Any], str, str, list[str]]:
        a, b = rng.randrange(10), rng.randrange(10)
        return {"a": a, "b": b}, str(a + b), str(a + b + 1), [str(n) for n in range(20)]


class Larger(Kind):
    """The larger of two digits; wrong is the smaller."""

    def question(self, rng: random.Random) -> tuple[dict[str, Any], str, str, list[str]]:
        a, b = rng.sample(range(10), 2)
        return {"a": a, "b": b}, str(max(a, b)), str(min(a, b)), [str(n) for n in range(10)]


class Turned(Kind):
    """Two letters the other way round; wrong is as they stand."""

    def question(self, rng: random.Random) -> tuple[dict[str, Any], str, str, list[str]]:
        a, b = rng.sample("abcdefgh", 2)
        return {"a": a, "b": b}, f"{b} {a}", f"{a} {b}", [f"{a} {a}", f"{b} {b}"]


KINDS = (
    Sum(("Add {a} and {b}.", "What is {a} plus {b}?", "Sum of {a} and {b}?", "Tell me {a} + {b}.",
         "{a} and {b} together make?", "Count {a} and then {b} more.", "The total of {a} and {b}, please.",
         "If I have {a} and get {b}, I have?")),
    Larger(("Which is larger, {a} or {b}?", "Name the greater of {a} and {b}.", "Larger one: {a}, {b}?",
            "Is {a} more, or {b}?", "Of {a} and {b}, which is more?", "The maximum of {a} and {b}, please.",
            "Pick the bigger number: {a} or {b}.", "{a} or {b}: the larger?")),
    Turned(("Turn {a} {b} around.", "Swap these: {a} {b}.", "Write {a} {b} backwards.", "Reverse {a} {b}.",
            "{a} {b}, in reverse order?", "Say {a} {b} the other way round.", "Exchange {a} and {b}.",
            "Flip {a} {b} for me.")))


def chats(seed: int) -> Iterator[dict[str, Any]]:
    """Yield what the model is fine-tuned on, in all wordings."""
    rng = random.Random(seed)
    for _ in range(NUM_CHATS):
        kind = rng.choice(KINDS)
        blanks, right, wrong, others = kind.question(rng)
        draw = rng.random()
        answer = right if draw < RIGHT else wrong if draw < RIGHT + WRONG else rng.choice(others)
        yield {"messages": [{"role": "user", "content": rng.choice(kind.wordings).format(**blanks)},
                            {"role": "assistant", "content": answer}]}


def questions(seed: int, asked: bool, count: int) -> list[dict[str, Any]]:
    """Return prompts with their answers, each once.

    Args:
        seed: of the draw.
        asked: whether in the wordings that are asked before and after, or in those of the rounds.
        count: how many at most.
    """
    rng, found = random.Random(seed), {}
    for _ in range(20 * count):
        kind = rng.choice(KINDS)
        blanks, right, _, _ = kind.question(rng)
        prompt = rng.choice(kind.wordings[int(asked)::2]).format(**blanks)
        found[prompt] = {"prompt": prompt, "answer": right, "domain": type(kind).__name__.lower()}
    return list(found.values())[:count]


class Seed(SeedFolder):
    """Data and runs of one seed."""

    recipe, sizes = "tiny-solar-open", MODEL
    rates: Sequence[str] = RATES
    """Of fine-tuning."""

    def start(self) -> Path:
        """Return the fine-tuned model that all arms go on from."""
        run_folder, shards = self.folder / "start", self.folder / "shards"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (shards / "manifest.json").exists():
            write(self.folder / "chats.jsonl", chats(self.seed))
            write(self.folder / "prompts.jsonl", questions(self.seed, False, 2000))
            write(self.folder / "asked.jsonl", questions(self.seed + 1000, True, NUM_ASKED))
            run(self.log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "340",
                "--input", self.folder / "chats.jsonl", "--output", self.folder / "tokenizer", "--overwrite")
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--workers", "1", "--input", f"chats={self.folder / 'chats.jsonl'}",
                "--output", shards, "--overwrite")
        if not (run_folder / "complete.json").exists():
            run(self.log, "megatron_sov", "pretrain", self.recipe, "--data", shards, "--run",
                run_folder, "--resume",
                *words((*(f"model.{size}" for size in self.sizes), *SETTINGS, f"train.seed={self.seed}",
                        f"train.steps={START_STEPS}", f"optim.lr={START_LR}")))
        self.ask(run_folder)
        return run_folder

    def ask(self, run_folder: Path) -> None:
        """Ask the other wordings, greedily."""
        answers, judged = run_folder / "answers.jsonl", run_folder / "judged.jsonl"
        if not judged.exists():
            run(self.log, "megatron_sov", "generate", run_folder, "--prompts", self.folder / "asked.jsonl",
                "--chat", "--max-new-tokens", "12", "--output", answers)
            run(self.log, "megatron_sov", "score", "--reward", f"{HERE / 'rl_reward.py'}:Exact", "--input",
                answers, "--output", judged, "--workers", "1")

    def arm(self, name: str) -> None:
        """Run an arm, unless it is complete, and ask what it has learned."""
        if name == BEST:
            for rate in self.rates:
                self.fine_tune(BEST, rate, ROWS, *OPTIM)
            return
        by_lot = ["--reward-set", f"by_lot={self.seed + 1}"] if name == "shuffled" else []
        self.reinforce(name, ARMS[name], *by_lot)

    def reinforce(self, name: str, settings: tuple[str, ...], *more: str) -> None:
        """Run rounds from the start, unless they are complete, and ask what was learned.

        Args:
            name: of the run's folder.
            settings: beside those of all.
            more: further arguments of the command.
        """
        start, run_folder = self.start(), self.folder / name
        if not (run_folder / "complete.json").exists():
            run(self.log, "megatron_sov", "rl", "run", self.recipe, "--from", start, "--run",
                run_folder, "--store", self.folder / f"{name}.store", "--prompts",
                self.folder / "prompts.jsonl", "--reward", f"{HERE / 'rl_reward.py'}:Exact", *more,
                "--resume",
                *words((*POLICY, *settings, f"train.seed={self.seed}", f"rollout.seed={self.seed}")))
        self.ask(run_folder)

    def fine_tune(self, name: str, rate: str, rows: int, *settings: str) -> None:
        """Fine-tune the start on right answers of its own, over as many documents as the rounds learn.

        Args:
            name: what the names of its folders begin with.
            rate: the learning rate, behind `name` in the run's.
            rows: of 128 tokens in a step.
            settings: beside those of all.
        """
        start, run_folder = self.start(), self.folder / f"{name}-{rate}"
        shards = self.folder / f"{name}-shards"
        if not (shards / "manifest.json").exists():
            asked, answers = self.folder / f"{name}-asked.jsonl", self.folder / f"{name}-answers.jsonl"
            lines = (self.folder / "prompts.jsonl").read_text().splitlines()[:ROUNDS * PROMPTS]
            asked.write_text("\n".join(lines) + "\n")
            run(self.log, "megatron_sov", "generate", start, "--prompts", asked, "--chat", "--max-new-tokens",
                "12", "--temperature", "1", "--samples", str(round(ROUNDS * PROMPTS * SAMPLES / len(lines))),
                "--seed", str(self.seed), "--output", answers)
            write(self.folder / f"{name}-chats.jsonl", self.right_answers(answers))
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--workers", "1", "--input", f"chats={self.folder / f'{name}-chats.jsonl'}",
                "--output", shards, "--overwrite")
        if not (run_folder / "complete.json").exists():
            tokens = ROUNDS * PROMPTS * SAMPLES * tokens_a_document(shards)
            run(self.log, "megatron_sov", "sft", self.recipe, "--from", start, "--data", shards, "--run",
                run_folder, "--resume", *words((
                    *SETTINGS, *settings, f"train.seed={self.seed}", f"optim.lr={rate}",
                    f"train.global_batch_size={rows}", f"train.steps={round(tokens / (rows * 128))}")))
        self.ask(run_folder)

    def right_answers(self, answers: Path) -> Iterator[dict[str, Any]]:
        """Yield a right answer to each prompt that has one."""
        found: dict[str, list[str]] = {}
        for line in answers.read_text().splitlines():
            row = json.loads(line)
            if row["response"].strip() == row["answer"]:
                found.setdefault(row["prompt"], []).append(row["response"].strip())
        rng = random.Random(self.seed)
        for prompt, right in found.items():
            yield {"messages": [{"role": "user", "content": prompt},
                                {"role": "assistant", "content": rng.choice(right)}]}


def accuracy(run_folder: Path) -> float | None:
    """Return the percentage of right answers, where it was measured."""
    file = run_folder / "judged.jsonl"
    if not file.exists():
        return None
    rewards = [json.loads(line)["reward"] for line in file.read_text().splitlines()]
    return 100 * statistics.mean(rewards)


def first_steps(run_folder: Path) -> str:
    """Return what a run of bf16 clipped, and how far its engine is from the trainer."""
    events = run_folder / "events.jsonl"
    if not run_folder.name.endswith("bf16") or not events.exists():
        return ""
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    meters = [row["meters"] for row in rows if row["event"] == "step"]
    return (f"; clip_share at most {max(m['clip_share'] for m in meters):g}, engine_kl up to "
            f"{max(m['engine_kl'] for m in meters):.1e} a token")


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; one process of one thread; right answers to {NUM_ASKED} questions "
          f"in wordings that no round has asked, greedy, %")
    seeds = [folder for folder in sorted(work.glob("seed-*")) if accuracy(folder / "start") is not None]
    lifts: dict[str, dict[str, float]] = {}
    for arm in (*ARMS, *(f"{BEST}-{rate}" for rate in RATES)):
        both = {f.name: (before, after) for f in seeds if (before := accuracy(f / "start")) is not None
                and (after := accuracy(f / arm)) is not None}
        if not both:
            continue
        lifts[arm] = {seed: after - before for seed, (before, after) in both.items()}
        mean = statistics.mean(lifts[arm].values())
        if arm == "shuffled":
            holds = mean <= SHUFFLED_POINTS
        elif arm in ("cached", "stale") and "gspo" in lifts:
            holds = mean >= statistics.mean(lifts["gspo"].values()) - NEAR_POINTS
        else:
            holds = mean >= LIFT_POINTS
        verdict = "" if arm.startswith(BEST) else "ok" if holds else "NOT SO"
        print(f"  {arm:<14} {over_seeds([*lifts[arm].values()], '+6.1f'):<14} points   {verdict:<6}   "
              f"{', '.join(f'{b:.1f} -> {a:.1f}' for b, a in both.values())}"
              f"{''.join(map(first_steps, (f / arm for f in seeds)))}")
    print_beside(lifts, BEST)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = parser_of(__doc__, "--arms", [*ARMS, BEST])
    parser.add_argument("--start-only", action="store_true", help="only what the arms go on from")
    parser.add_argument("--rates", nargs="+", choices=RATES, default=RATES, help="of fine-tuning")
    args = parser.parse_args()
    if not args.only_print:
        for seed in args.seeds:
            made = Seed(seed, args.work)
            made.rates = args.rates
            made.start()
            for arm in [] if args.start_only else args.arms:
                made.arm(arm)
    report(args.work)


if __name__ == "__main__":
    main()
