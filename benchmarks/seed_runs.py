"""Shared code of benchmarks that train small models over seeds: a folder per seed, and single-process
commands that are skipped if complete."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

MODEL = ("vocab_size=512", "hidden_size=64", "num_layers=3", "num_heads=4", "num_kv_heads=2", "head_dim=16",
         "num_experts=4", "num_experts_per_token=2", "expert_ffn_dim=64")
ALWAYS = ("train.num_threads=1", "train.checkpoint_every_steps=100000", "train.eval_every_steps=0",
          "train.global_batch_size=16", "train.micro_batch_size=8", "data.max_epochs=0")


def run(log: Path, *arguments: str | Path) -> None:
    """Run `python -m ARGUMENTS`, and append its output to the file `log`.

    Raises:
        SystemExit: the command failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        code = subprocess.run([sys.executable, "-W", "ignore", "-m", *map(str, arguments)], stdout=out,
                              stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(map(str, arguments))}\nended with exit code {code}; see {log}")


def words(settings: Iterable[str]) -> list[str]:
    """Return the words `--set SETTING` for all settings."""
    return [part for setting in settings for part in ("--set", setting)]


def rows_of(seq_len: int) -> str:
    """Return the setting of a single data phase with rows of `seq_len` tokens."""
    return f'data.phases=[{{"name": "main", "seq_len": {seq_len}}}]'


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class SeedFolder:
    """Folder and log of the data and runs of one seed."""

    def __init__(self, seed: int, work: Path) -> None:
        self.seed, self.folder = seed, work / f"seed-{seed}"
        self.log = self.folder / "log"


def run_arms(description: str | None, arms: Collection[str], arm: Callable[[int, Path, str], object],
             report: Callable[[Path], object]) -> None:
    """Run the incomplete arms and seeds that the command line names, and print the table.

    Args:
        description: subject of the benchmark, for --help.
        arms: names that the command line may select.
        arm: runs the incomplete work of one arm and seed in a folder.
        report: prints the results in the folder.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--print", dest="only_print", action="store_true")
    args = parser.parse_args()
    if not args.only_print:
        for seed in args.seeds:
            for name in args.arms:
                arm(seed, args.work, name)
    report(args.work)
