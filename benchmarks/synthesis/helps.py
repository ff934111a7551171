"""Shared code for benchmarks that measure whether checks of synthesized data help a small model.

Each seed has three arms: the pretrained base model (`without`), that model fine-tuned on the accepted
samples (`kept`), and that model fine-tuned on equally many samples drawn from all samples, accepted or
rejected (`unchecked`).
"""

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
"""The base model alone; fine-tuned on accepted samples; fine-tuned on a draw from all samples."""


def records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of JSON lines."""
    return map(json.loads, file.read_text().splitlines())


class Taught(SeedFolder, ABC):
    """Data, training runs and measurements for one seed; subclasses make the data and measure."""

    settings: ClassVar[Sequence[str]]
    """`key=value` settings for every training run."""
    steps: ClassVar[Mapping[str, int]]
    """Stage (`base` or `sft`) -> number of training steps."""
    lr: ClassVar[Mapping[str, float]]
    """Stage -> learning rate."""

    @abstractmethod
    def make_data(self) -> None:
        """Write prompts and training data, and let a scripted model generate samples, unless already done."""

    @abstractmethod
    def measure(self, name: str) -> None:
        """Measure a run, unless that is done."""

    @property
    def has_data(self) -> bool:
        """Whether the data are complete: the shards of `unchecked` are written last."""
        return (self.folder / "unchecked-shards/manifest.json").exists()

    def write_arms(self, draw: random.Random, *fields: str) -> None:
        """Write kept.jsonl and unchecked.jsonl from the synthesis run in `made`, with the given fields.

        kept.jsonl holds the accepted samples; unchecked.jsonl holds equally many, drawn from accepted and
        rejected samples.
        """
        kept = list(records(self.folder / "made/kept.jsonl"))
        everything = [*kept, *(row["record"] for row in records(self.folder / "made/rejected.jsonl"))]
        for name, rows in (("kept", kept), ("unchecked", draw.sample(everything, len(kept)))):
            write(self.folder / f"{name}.jsonl", ({field: one[field] for field in fields} for one in rows))

    def pack(self, *tokenizer: str | Path) -> None:
        """Train a tokenizer on base.jsonl, and pack base.jsonl, kept.jsonl and unchecked.jsonl.

        Args:
            tokenizer: further arguments of `sov-tokenizer train`.
        """
        run(self.log, "tokenizer.cli", "train", *tokenizer, "--input", self.folder / "base.jsonl", "--output",
            self.folder / "tokenizer", "--overwrite")
        for name in ("base", *ARMS[1:]):
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.folder / "tokenizer", "--format",
                "chat", "--heldout", "0", "--workers", "1", "--input",
                f"{name}={self.folder / f'{name}.jsonl'}", "--output", self.folder / f"{name}-shards",
                "--overwrite")

    def train(self, command: str, name: str, *more: str | Path) -> Path:
        """Train on the shards of `name`, unless that run is complete; return the run's folder."""
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
    """Return the run whose model an arm measures."""
    return "base" if name == "without" else name


def report_shares(work: Path, title: str, what: str, arms: Iterable[str],
                  share_of: Callable[[Path, str], float | None]) -> None:
    """Print the percentage for each measured seed and arm, each arm's mean over seeds, and the differences
    between the second arm and each later arm, paired by seed.

    Args:
        work: folder with a subfolder `seed-*` for each seed.
        title: what is measured.
        what: plural noun for the samples.
        arms: arms in table order; the second arm is compared with the later arms.
        share_of: returns the percentage for a seed's folder and an arm, or None if not yet measured.
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
        gaps = [found[kept][seed] - share for seed, share in found[name].items() if seed in found[kept]]
        if gaps:
            print(f"  {kept} less {name}, seed by seed: {over_seeds(gaps, '+.1f')}")
