"""A run that meets faults of every kind at every state ends as the run that met none.

    python benchmarks/soak.py [--steps 1000] [--faults 100] [--seed 0] [--work DIR] >
    benchmarks/results/soak.txt

One command trains a tiny model under `--inject`: kinds, states, steps and processes of the faults are drawn.
The run takes care of itself: it is started once.  Then the run is done again without faults, leaving out by
`data.skip_steps` what the first one's ledger says was refused, and all files of the last checkpoints are
compared.  With --work the runs stay there, and one that is complete is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from kills import make_data

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.runs.checkpoints import latest
from megatron_sov.runs.obs.events import read_events
from megatron_sov.train.guards.fault_injection import STATES, parse

SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
            "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16",
            'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=4",
            "train.micro_batch_size=2", "data.heldout_tokens=128", "train.num_threads=1",
            "train.eval_every_steps=0", "train.hidden_dropout=0.1", "data.max_epochs=0",
            "train.deterministic=true", "optim.lr=1e-3")
SOAKED = ("train.checkpoint_every_steps=10", "train.keep_checkpoints=8", "train.max_restarts=50",
          "guards.hang_timeout_s=10", "guards.probe_every_steps=1")
"""What a run needs that is to survive all this: many checkpoints,
and each step's gradients computed twice."""
STORMS, STORM_STEPS = 3, 4
"""Stretches of steps in each of which a number is not finite, long enough that weights are taken back."""
SLOW = "seconds=0.05,steps=5"
"""Enough to be seen, and short."""


def draw_faults(steps: int, count: int, nproc: int, seed: int) -> list[str]:
    """Return so many faults: storms, then every kind and state about equally often,
    anywhere in the run, on any process."""
    drawn = random.Random(seed)
    places = [(kind, state) for kind, states in STATES.items() for state in states]
    found: list[str] = []
    for _ in range(STORMS):
        first = drawn.randint(20, steps * 9 // 10)
        found += [f"nan@step={first + i},rank={drawn.randrange(nproc)}" for i in range(STORM_STEPS)]
    for i in range(count - len(found)):
        kind, state = places[i] if i < len(places) else drawn.choice(places)
        rank = 0 if kind == "corrupt-checkpoint" else drawn.randrange(nproc)
        # a load needs a checkpoint and a restart after it, a spike what is usual
        step = drawn.randint(80 if kind == "spike" else 1, steps * 9 // 10)
        found.append(f"{kind}@{state}={step},rank={rank}" + (f",{SLOW}" if kind == "slow-rank" else ""))
    return list(dict.fromkeys(found))


def train(data: Path, run: Path, nproc: int, settings: list[str], faults: list[str]) -> list[dict[str, Any]]:
    """Train to the end by one command, unless that was done before; returns the run's events."""
    chosen = [part for s in (*SETTINGS, *settings) for part in ("--set", s)]
    inject = [part for fault in faults for part in ("--inject", fault)]
    with open(run.with_suffix(".log"), "a", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, "-W", "ignore", "-m", "megatron_sov", "pretrain",
                               "tiny-solar-open", "--data", str(data), "--run", str(run), "--nproc",
                               str(nproc), "--resume", *chosen, *inject],
                              stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"{run.name}: exit code {code}\n{run.with_suffix('.log').read_text()[-4000:]}")
    return list(read_events(run / "events.jsonl"))


def took(events: list[dict[str, Any]]) -> str:
    """Return the time from a run's first event to its last one."""
    return f"{events[-1]['time_s'] - events[0]['time_s']:.0f} s"


def final(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hashes of all files of the last checkpoint, and the loop's state without what
    happened on the way."""
    path = latest(run / "checkpoints")
    assert path is not None, f"{run} has no checkpoint"
    hashes = {name: record.digest for name, record in read_manifest(path).files.items()
              if name != "state.json"}
    state = json.loads((path / "state.json").read_text())
    return hashes, {name: value for name, value in state.items() if name not in ("wall_s", "guard")}


def skipped(run: Path, steps: int) -> list[list[int]]:
    """Return the stretches of steps (1-based) that the ledger of the last checkpoint says were left out."""
    history = final(run)[1]["order"]["history"]
    ends = [*(entry["first_step"] for entry in history[1:]), steps]
    return [[entry["first_step"] + 1, end] for entry, end in zip(history, ends, strict=True) if entry["skip"]]


def print_histogram(events: list[dict[str, Any]]) -> None:
    """Print how many faults of each kind came in each state, and what the run did."""
    states = ("start", "load", "step", "save")
    came = Counter((e["kind"], e["state"]) for e in events if e["event"] == "fault")
    print(f"{'fault':<20}" + "".join(f"{state:>7}" for state in states) + f"{'all':>7}")
    for kind in STATES:
        row = [came[kind, state] for state in states]
        cells = "".join(f"{n if state in STATES[kind] else '-':>7}"
                        for state, n in zip(states, row, strict=True))
        print(f"{kind:<20}{cells}{sum(row):>7}")
    codes = Counter(e["exit_code"] for e in events if e["event"] == "restart")
    print(f"started again in place: {sum(codes.values())} times (exit codes "
          + ", ".join(f"{code}: {n}" for code, n in sorted(codes.items())) + ")")
    kinds = Counter(e["event"] for e in events)
    print(f"refused steps: {kinds['skip']}; rollbacks: {kinds['rollback']}; corruption found: "
          f"{kinds['sdc']}; damaged checkpoints set aside: {kinds['damaged_checkpoint']}; "
          f"hangs ended: {codes[76]}; steps done: {kinds['step']}")


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run (default %(default)s)")
    parser.add_argument("--faults", type=int, default=100, help="how many faults (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of the run (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default %(default)s)")
    args = parser.parse_args()
    faults = draw_faults(args.steps, args.faults, args.nproc, args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        data, length = work / "shards", [f"train.steps={args.steps}"]
        if not data.is_dir():
            make_data(work)
        events = train(data, work / "soaked", args.nproc, [*length, *SOAKED], faults)
        print(f"{args.steps} steps on {args.nproc} processes with {len(faults)} faults drawn: {took(events)} "
              f"(load {os.getloadavg()[0]:.1f} at the end)", flush=True)
        print_histogram(events)
        never = {f.name for f in parse(faults, args.nproc)} - {e["fault"]
                                                               for e in events if e["event"] == "fault"}
        if never:
            print(f"never came, since no start or checkpoint followed: {len(never)}", flush=True)
        left_out = skipped(work / "soaked", args.steps)
        events = train(data, work / "by hand", args.nproc,
                       [*length, f"data.skip_steps={json.dumps(left_out)}"], [])
        print(f"without faults, and without the {sum(last - first + 1 for first, last in left_out)} steps "
              f"that its ledger says were left out: {took(events)}")
        ours, theirs = final(work / "soaked"), final(work / "by hand")
        equal = ours == theirs
        print(f"last checkpoints: all {len(ours[0])} files and the loop's state equal: {equal}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
