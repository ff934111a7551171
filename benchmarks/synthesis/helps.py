"""Shared code of benchmarks that fine-tune small models on synthesized data: a base model, fine-tuned on
the accepted samples, or on the same number of accepted and rejected ones."""

from __future__ import annotations

import json
import os
import platform
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from seed_runs import MODEL, SeedFolder, run, words, write
from seeds import over_seeds

ARMS = ("without", "kept", "unchecked")


def records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of JSON lines."""
    return map(json.loads, file.read_text().splitlines())


class Taught(SeedFolder, ABC):
    """Data and runs of one seed."""

    settings: ClassVar[Sequence[str]]
    """Of training."""
    steps: ClassVar[Mapping[str, int]]
    """Of `base`, and of the fine-tuning `sft`."""
    lr: ClassVar[Mapping[str, float]]
    """Likewise."""

    @abstractmethod
    def make_data(self) -> None:
        """Write prompts and training data, and let a scripted model generate samples, unless already done."""

    @abstractmethod
    def measure(self, name: str) -> None:
        """Measure a run, unless that is done."""

    @property
    def has_data(self) -> bool:
        """Whether all data lie there."""
        return (self.folder / "unchecked-shards/manifest.json").exists()

    def write_arms(self, draw: random.Random, *fields: str) -> None:
        """Write the accepted samples of the run in `made`, and the same number of all samples, with the given
        fields."""
        kept = list(records(self.folder / "made/kept.jsonl"))
        everything = [*kept, *(row["record"] for row in records(self.folder / "made/rejected.jsonl"))]
        for name, rows in (("kept", kept), ("unchecked", draw.sample(everything, len(kept)))):
            write(self.folder / f"{name}.jsonl", ({field: one[field] for field in fields} for one in rows))

    def pack(self, *tokenizer: str | Path) -> None:
        """Train a tokenizer on the base model's data, and pack all three.

        Args:
            tokenizer: more arguments of its training.
        """
        run(self.log, "tokenizer.cli", "train", *tokenizer, "--input", self.folder / "base.jsonl", "--output",
            self.folder / "tokenizer", "--overwrite")
        for name in ("base", *ARMS[1:]):
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--heldout", "0", "--workers", "1", "--input",
                f"{name}={self.folder / f'{name}.jsonl'}", "--output", self.folder / f"{name}-shards",
                "--overwrite")

    def train(self, command: str, name: str, *more: str | Path) -> Path:
        """Train on the data of a name, unless it is done; returns the run."""
        folder, stage = self.folder / name, "base" if name == "base" else "sft"
        if not (folder / "complete.json").exists():
            sizes = [f"model.{size}" for size in MODEL] if name == "base" else []
            run(self.log, "megatron_sov", command, "tiny-solar-open",
                "--data", self.folder / f"{name}-shards", "--run", folder, "--resume", *more,
                *words([*sizes, *self.settings, f"train.seed={self.seed}",
                        f"train.steps={self.steps[stage]}", f"optim.lr={self.lr[stage]}"]))
        return folder

    def do(self, name: str) -> None:
        """Run the unfinished work of one arm."""
        self.make_data()
        base = self.train("pretrain", "base")
        if name != "without":
            self.train("sft", name, "--from", base)
        self.measure(run_of(name))


def run_of(name: str) -> str:
    """Return the run of an arm."""
    return "base" if name == "without" else name


def report_shares(work: Path, title: str, what: str, arms: Iterable[str],
                  share_of: Callable[[Path, str], float | None]) -> None:
    """Print a percentage for each seed and arm that there is, its mean over seeds, and how far the first arm
    that was taught is from the others, seed by seed.

    Args:
        work: a folder for each seed.
        title: what is measured.
        what: the synthesis makes.
        arms: in order.
        share_of: returns the percentage of a seed's folder and an arm; None: it was not measured yet.
    """
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; one process of one thread each")
    print(title)
    found: dict[str, dict[str, float]] = {name: {} for name in arms}
    for folder in sorted(work.glob("seed-*")):
        if not (folder / "made/summary.json").exists():
            continue
        shares = {name: share for name in found if (share := share_of(folder, name)) is not None}
        summary = json.loads((folder / "made/summary.json").read_text())
        print(f"{folder.name}: {summary['num_kept']} {what} kept of {summary['num_samples']}; "
              + ", ".join(f"{name} {share:.0f}" for name, share in shares.items()))
        for name, share in shares.items():
            found[name][folder.name] = share
    for name, shares_of in found.items():
        if shares_of:
            print(f"  {name:<10} {over_seeds([*shares_of.values()], '5.1f')}  ({len(shares_of)} seeds)")
    _, kept, *others = found
    for name in others:
        apart = [found[kept][seed] - share for seed, share in found[name].items() if seed in found[kept]]
        if apart:
            print(f"  {kept} less {name}, seed by seed: {over_seeds(apart, '+.1f')}")
