"""A run that is killed again and again, at any moment, ends as the run that was left alone.

    python benchmarks/kills.py [--kills 50] [--nproc 2] [--seed 0]

Trains a tiny model undisturbed, then again under SIGKILL: each start is killed after a time drawn over the
whole length of the undisturbed run, and started anew with --resume; a run that comes to its end is compared
and another one begins.  What the run did when it was killed is read from what it left: `start` (before it
held the folder), `load` (before its first step could begin), `save` (a checkpoint was being written
or deleted), `step`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.runs.checkpoints import damage
from megatron_sov.runs.obs.events import read_events

STATES = ("start", "load", "step", "save")
STEPS = 200
SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
            "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16",
            'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=8",
            "train.micro_batch_size=2", "data.heldout_tokens=128", "train.num_threads=1",
            f"train.steps={STEPS}", "train.checkpoint_every_steps=10", "train.keep_every_steps=50",
            "train.eval_every_steps=50", "train.hidden_dropout=0.1", "data.max_epochs=0", "parallel.ep=2")


def make_data(folder: Path) -> Path:
    """Pack the paragraphs of a module of Python's library; returns the token shards."""
    paragraphs = [p for p in inspect.getsource(argparse).split("\n\n") if p.strip()]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    for command in (["tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "368", "--output",
                     "tokenizer"],
                    ["data_prep.cli", "pack", "--tokenizer", "tokenizer", "--heldout", "0.1", "--workers",
                     "1", "--output", "shards"]):
        subprocess.run([sys.executable, "-m", *command, "--input", "text.jsonl"], cwd=folder, check=True,
                       capture_output=True)
    return folder / "shards"


def command(data: Path, run: Path, nproc: int) -> list[str]:
    """Return the command that starts the run or continues it."""
    chosen = [part for s in SETTINGS for part in ("--set", s)]
    return [sys.executable, "-W", "ignore", "-m", "megatron_sov", "pretrain", "tiny-solar-open", "--data",
            str(data), "--run", str(run), "--nproc", str(nproc), "--resume", *chosen]


def attempt(argv: list[str], run: Path, kill_after_s: float) -> str | None:
    """Start the run and kill all its processes after some time; returns its state then,
    or None where it ended before."""
    began_s, starts = time.time(), count(run, "run_start")
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=kill_after_s)
            if process.returncode:
                raise SystemExit(f"exit code {process.returncode}\n{errors.decode()[-2000:]}")
            return None
        except subprocess.TimeoutExpired:
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            psutil.wait_procs(family, timeout=30)
    lock = run / "lock.json"
    if count(run, "run_start") == starts:
        return "load" if lock.exists() and lock.stat().st_mtime > began_s else "start"
    return "save" if any((run / "checkpoints").glob(".*")) else "step"


def count(run: Path, event: str) -> int:
    """Return how often an event stands in a run's records."""
    return sum(e["event"] == event for e in read_events(run / "events.jsonl"))


def final(run: Path) -> dict[str, str]:
    """Return the hashes of all files of all checkpoints that stayed, of the loop's state without the
    time that it took."""
    found = {}
    for path in sorted((run / "checkpoints").iterdir()):
        if (problem := damage(path)) is not None:
            raise SystemExit(f"{problem}: not whole")
        found |= {f"{path.name}/{name}": r.digest for name, r in read_manifest(path).files.items()
                  if name != "state.json"}
        state = json.loads((path / "state.json").read_text())
        found[f"{path.name}/state"] = json.dumps({k: v for k, v in state.items() if k != "wall_s"},
                                                 sort_keys=True)
    return found


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="how often to kill (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of the run (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times (default %(default)s)")
    args = parser.parse_args()
    drawn, states, equal = random.Random(args.seed), Counter[str](), list[bool]()
    state: str | None = None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = make_data(work)
        start_s = time.monotonic()
        attempt(command(data, work / "whole", args.nproc), work / "whole", 3600)
        length_s, expected = time.monotonic() - start_s, final(work / "whole")
        print(f"undisturbed: {STEPS} steps on {args.nproc} processes in {length_s:.1f} s, "
              f"{count(work / 'whole', 'checkpoint')} checkpoints, {len(expected)} files kept; "
              f"load {os.getloadavg()[0]:.1f}", flush=True)
        while states.total() < args.kills or state is not None:
            run = work / f"run-{len(equal)}"
            after_s = drawn.uniform(0, length_s) if states.total() < args.kills else 3600
            state = attempt(command(data, run, args.nproc), run, after_s)
            if state is None:
                equal.append(final(run) == expected)
            else:
                states[state] += 1
    print(f"killed {states.total()} times at times drawn over its length: "
          f"{', '.join(f'{s} {states[s]}' for s in STATES)}")
    print(f"came to its end {len(equal)} times; all files of all checkpoints as undisturbed: {all(equal)}")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
