"""What learning from answers teaches a small model: each preference method ranks held-out pairs right,
shuffled labels teach nothing, and fine-tuning teaches a format, with all weights and with adapters.

Usage: python benchmarks/preference_learning.py --work FOLDER [--seeds 0 1 2] [--methods dpo simper ...]
       python benchmarks/preference_learning.py --work FOLDER --print

A prompt asks for a tone and names two numbers; an answer repeats the numbers and ends politely or curtly.
The base has seen both endings behind both tones, so it ranks about half of the pairs right.

  method    `prefer` on pairs whose better answer has the tone that was asked for
  shuffled  the same with better and worse drawn by lot, measured on the true pairs
  sft       fine-tuning on the better answers alone, in as many steps: the baseline that could win
  format    `sft` on answers in double brackets, `generate` on prompts of their own, `score` by a pattern

Everything runs through the ordinary commands on one process of one thread.  A run that is complete is not run
again, one that was killed goes on, and `--print` writes a table of what there is, so that seeds can be added.
Behind several seeds stand the means of their changes with 95 % intervals (Student's t).
"""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seed_runs import ALWAYS, MODEL, SeedFolder, parser_of, rows_of, run, words
from seeds import over_seeds

METHODS = ("dpo", "ipo", "dpo-norm", "simper", "grouper")
SFT = "sft"
LABELS = ("true", "shuffled")
NUM_PAIRS, NUM_ASKED = 480, 40
LIFT_POINTS, FORMAT_SHARE = 15.0, 0.9
ENDINGS = {"polite": "Thank you for asking.", "curt": "Now go away."}
SETTINGS = (*ALWAYS, rows_of(128))
BASE_STEPS, STEPS = 250, 80
LR = {"base": 4e-3, "prefer": 1e-3, "full": 2e-3, "lora": 1e-2}
FORMATS: dict[str, tuple[str, ...]] = {"full": (), "lora": ("lora.rank=8",)}


def prompts(seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield (prompt, its tone, what an answer begins with), each once, in an order by the seed."""
    found = [(tone, a, b) for tone in ENDINGS for a in range(100) for b in range(10)]
    random.Random(seed).shuffle(found)
    for tone, a, b in found:
        yield f"Be {tone}: name {a} and {b}.", tone, f"They are {a} and {b}."


class Seed(SeedFolder):
    """Data and runs of one seed."""

    def write_rows(self) -> None:
        """Write the base's chats, pairs and groups with true and with shuffled labels, and the format's."""
        rng, asked = random.Random(self.seed), list(prompts(self.seed))
        learned, own = asked[:NUM_PAIRS], asked[-NUM_ASKED:]
        rows: dict[str, list[dict[str, Any]]] = {"base": [], "format": [], "asked": [], SFT: []}
        rows |= {f"{kind}-{labels}": [] for kind in ("pairs", "groups") for labels in LABELS}
        for prompt, tone, begin in learned:
            good, bad = (f"{begin} {ENDINGS[name]}" for name in (tone, *(ENDINGS.keys() - {tone})))
            rows["base"] += [chat(prompt, rng.choice((good, bad)))]
            rows["format"] += [chat(prompt, f"[[ {begin} ]]")]
            rows[SFT] += [chat(prompt, good)]
            for labels in LABELS:
                better, worse = (good, bad) if labels == "true" or rng.random() < 0.5 else (bad, good)
                rows[f"pairs-{labels}"].append({"prompt": prompt, "chosen": better, "rejected": worse})
                rows[f"groups-{labels}"].append({"prompt": prompt, "responses": [
                    {"content": better, "reward": 1}, {"content": worse, "reward": 0}]})
        rows["asked"] = [{"prompt": prompt} for prompt, _, _ in own]
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, lines in rows.items():
            (self.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def make_data(self) -> None:
        """Pack all of them, unless that is done."""
        if (self.folder / "format-shards/manifest.json").exists():
            return
        self.write_rows()
        run(self.log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "340", "--input",
            self.folder / "base.jsonl", "--output", self.folder / "tokenizer", "--overwrite")
        for labels in LABELS:
            run(self.log, "data_prep.cli", "groups", "--input", self.folder / f"groups-{labels}.jsonl",
                "--output", self.folder / f"groups-{labels}", "--overwrite")
        columns = ("--column", "advantage", "--column", "group_share")
        for name, kind, more in (
                ("base", "chat", ()), *((f"pairs-{labels}", "preference", ()) for labels in LABELS),
                *((f"groups-{labels}", "chat", columns) for labels in LABELS), (SFT, "chat", ()),
                ("format", "chat", ())):
            file = (self.folder / name / "groups.jsonl" if more else self.folder / f"{name}.jsonl")
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format", kind,
                *more, "--heldout", "0.2", "--workers", "1", "--input", f"{name}={file}", "--output",
                self.folder / f"{name}-shards", "--overwrite")

    def train(self, command: str, name: str, data: str, *more: str) -> Path:
        """Train, unless it is done; returns the run."""
        folder = self.folder / name
        if not (folder / "complete.json").exists():
            start = [] if name == "base" else ["--from", str(self.folder / "base")]
            sizes = [f"model.{size}" for size in MODEL] if name == "base" else []
            run(self.log, "megatron_sov", command, "tiny-solar-open", "--data",
                self.folder / f"{data}-shards", "--run", folder, "--resume", *start,
                *words([*sizes, *SETTINGS, f"train.seed={self.seed}", *more]))
        return folder

    def share_right(self, run_folder: Path) -> None:
        """Measure the share of true held-out pairs that a run ranks right."""
        out = run_folder / "pairs.json"
        if not out.exists():
            run(self.log, "megatron_sov", "eval", "pairs", run_folder, "--data",
                self.folder / "pairs-true-shards", "--output", out)

    def format_share(self, run_folder: Path) -> None:
        """Measure the share of answers, to prompts of their own, that have the format."""
        answers, out = run_folder / "answers.jsonl", run_folder / "format.jsonl"
        if not out.exists():
            run(self.log, "megatron_sov", "generate", run_folder, "--prompts", self.folder / "asked.jsonl",
                "--chat", "--max-new-tokens", "40", "--output", answers)
            run(self.log, "megatron_sov", "score", "--reward", "format", "--set", r"regex=\[\[ .* \]\]",
                "--input", answers, "--output", out, "--workers", "1")

    def all_runs(self, methods: list[str]) -> None:
        """Do what is not done yet."""
        self.make_data()
        base = self.train("pretrain", "base", "base", f"train.steps={BASE_STEPS}", f"optim.lr={LR['base']}")
        self.share_right(base)
        self.format_share(base)
        for kind, more in FORMATS.items():
            self.format_share(self.train("sft", f"format-{kind}", "format", f"train.steps={STEPS}",
                                         f"optim.lr={LR[kind]}", *more))
        if SFT in methods:
            self.share_right(self.train("sft", f"{SFT}-true", SFT, f"train.steps={STEPS}",
                                        f"optim.lr={LR['prefer']}"))
        for method in (name for name in methods if name != SFT):
            for labels in LABELS:
                data = f"{'groups' if method == 'grouper' else 'pairs'}-{labels}"
                self.share_right(self.train("prefer", f"{method}-{labels}", data, f"train.steps={STEPS}",
                                            f"preference.method={method}", "preference.beta=0.1",
                                            f"optim.lr={LR['prefer']}"))


def chat(prompt: str, answer: str) -> dict[str, Any]:
    """Return a chat of one turn."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def right(run_folder: Path) -> float | None:
    """Return the percentage of pairs that a run ranks right, where it was measured."""
    file = run_folder / "pairs.json"
    if not file.exists():
        return None
    return 100 * next(iter(json.loads(file.read_text()).values()))["chosen_likelier"]


def formatted(run_folder: Path) -> float | None:
    """Return the share of a run's answers that have the format, where it was measured."""
    file = run_folder / "format.jsonl"
    if not file.exists():
        return None
    rewards = [json.loads(line)["reward"] for line in file.read_text().splitlines()]
    return sum(reward == 1 for reward in rewards) / len(rewards)


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; one process of one thread each")
    print(f"held-out pairs ranked right, %; asked for: {LIFT_POINTS:.0f} points more than before with true "
          "labels, not with shuffled ones")
    for folder in sorted(work.glob("seed-*")):
        before = right(folder / "base")
        if before is None:
            continue
        print(f"\n{folder.name}: {before:.1f} before")
        for method in (*METHODS, SFT):
            for labels in LABELS:
                after = right(folder / f"{method}-{labels}")
                if after is not None:
                    holds = (after - before >= LIFT_POINTS) == (labels == "true")
                    verdict = "" if method == SFT else "  ok" if holds else "  NOT SO"
                    print(f"  {method:<9} {labels:<9} {after:5.1f}  {after - before:+6.1f}{verdict}")
        begun = formatted(folder / "base")
        for kind in FORMATS:
            share = formatted(folder / f"format-{kind}")
            if share is not None and begun is not None:
                holds = begun == 0 and share >= FORMAT_SHARE
                print(f"  format, {kind:<6} {begun:4.0%} -> {share:4.0%}  {'ok' if holds else 'NOT SO'}")


    _report_over_seeds(sorted(work.glob("seed-*")))


def _report_over_seeds(folders: list[Path]) -> None:
    """Print what all seeds together say, where there are several."""
    rows: dict[str, list[float]] = {}
    for folder in folders:
        before, begun = right(folder / "base"), formatted(folder / "base")
        for name in (f"{method}-{labels}" for method in (*METHODS, SFT) for labels in LABELS):
            after = right(folder / name)
            if before is not None and after is not None:
                rows.setdefault(f"{name.rpartition('-')[0]:<9} {name.rpartition('-')[2]:<9}", []).append(
                    after - before)
        for kind in FORMATS:
            share = formatted(folder / f"format-{kind}")
            if share is not None and begun is not None:
                rows.setdefault(f"format, {kind:<11}", []).append(100 * (share - begun))
    if any(len(values) > 1 for values in rows.values()):
        print("\nover seeds: points more than before")
        for name, values in rows.items():
            print(f"  {name}  {over_seeds(values, '+6.1f')}  ({len(values)} seeds)")


def main() -> None:
    """Run what is missing, or print the table."""
    args = parser_of(__doc__, "--methods", (*METHODS, SFT)).parse_args()
    if not args.only_print:
        for seed in args.seeds:
            Seed(seed, args.work).all_runs(args.methods)
    report(args.work)


if __name__ == "__main__":
    main()
