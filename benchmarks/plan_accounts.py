"""A tiny run's plan against what happened, on this machine's processor, before and after calibration.

    python benchmarks/plan_accounts.py [--work DIR] > benchmarks/results/plan_accounts.txt

Two small runs teach the processor's speed (`megatron-sov plan --calibrate`); then others, of other widths,
depths, lengths, batches and layouts, keep their plans by what was learned, and are measured against them.
With --work the runs stay there, and one that is complete is not done again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import make_data

from megatron_sov.plan.calibration.calibrate import calibrate
from megatron_sov.plan.calibration.expected import PARAMETERS
from megatron_sov.publish.report.judgements import accounts_tables
from megatron_sov.publish.report.run_data import read_run

COMMON = ("model.vocab_size=368", "train.num_threads=1", "train.eval_every_steps=0", "data.max_epochs=0",
          "data.heldout_tokens=128", "model.max_position_tokens=1024", "train.checkpoint_every_steps=1000",
          "train.micro_batch_size=4", "train.steps=60")
TEACHERS = {
    "narrow": ("model.hidden_size=64", "model.num_layers=4", "seq=64", "train.global_batch_size=8"),
    "wide": ("model.hidden_size=256", "model.num_layers=4", "seq=256", "train.global_batch_size=8"),
}
"""Runs that are learned from."""
JUDGED = {
    "deeper": (1, ("model.hidden_size=128", "model.num_layers=8", "seq=128", "train.global_batch_size=8")),
    "longer": (1, ("model.hidden_size=128", "model.num_layers=4", "seq=512", "train.global_batch_size=4")),
    "larger batch": (1, ("model.hidden_size=192", "model.num_layers=4", "seq=128",
                         "train.global_batch_size=32")),
    "two processes": (2, ("model.hidden_size=192", "model.num_layers=4", "seq=128",
                          "train.global_batch_size=16")),
}
"""Processes and settings of the runs that are predicted."""


def settings(chosen: tuple[str, ...]) -> list[str]:
    """Return the --set options of a run."""
    found = []
    for setting in (*COMMON, *chosen):
        key, _, value = setting.partition("=")
        phase = f'data.phases=[{{"name": "main", "seq_len": {value}}}]'
        found += ["--set", phase if key == "seq" else setting]
    return found


def train(data: Path, run: Path, nproc: int, chosen: tuple[str, ...], parameters: Path | None) -> None:
    """Train a run that is not there yet, by the parameters of a file where one is given."""
    if (run / "complete.json").is_file():
        return
    told = {PARAMETERS: str(parameters)} if parameters is not None else {}
    subprocess.run([sys.executable, "-W", "ignore", "-m", "megatron_sov", "pretrain", "tiny-qwen3", "--data",
                    str(data), "--run", str(run), "--nproc", str(nproc), *settings(chosen)],
                   check=True, env=os.environ | told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> int:
    """Train, learn, train by what was learned, and print plans beside measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        data = make_data(work)
        for name, chosen in TEACHERS.items():
            train(data, work / name, 1, chosen, None)
        learned = work / "parameters.json"
        print(calibrate([work / name for name in TEACHERS], learned).rpartition("\n")[0])
        print("\nruns that were predicted with what these taught: planned, measured, error")
        for name, (nproc, chosen) in JUDGED.items():
            folder = work / name.replace(" ", "-")
            train(data, folder, nproc, chosen, learned)
            print(f"\n{name}: {', '.join(chosen)}")
            for table in accounts_tables(read_run(folder)):
                for row in table.rows:
                    print("  " + " | ".join(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
