"""What checkpoints cost a run of reinforcement learning, side by side.

    python benchmarks/rl_checkpoints.py --start RUN --prompts FILE.jsonl [--rounds 20] [--set key=value] ...

The same `rl run` at three rhythms: a checkpoint behind each round that is waited for, one behind each round
in the background, and one in ten rounds.  The runs take turns, a run of each rhythm after the other, so that
what else the machine does falls on all alike.  Told are the seconds from round to round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from megatron_sov.runs.obs.events import read_events

REWARD = f"{Path(__file__).with_name('rl_reward.py')}:Exact"
ARMS = {"each round, waited for": ("train.checkpoint_every_steps=1", "train.async_save=false"),
        "each round, in the background": ("train.checkpoint_every_steps=1",),
        "one in 10 rounds": ("train.checkpoint_every_steps=10",)}
SETTINGS = ("rollout.prompts_per_round=4", "rollout.samples_per_prompt=4", "rollout.piece_prompts=4",
            "rollout.max_new_tokens=12", "rollout.max_prompt_tokens=64", "data.phases.0.seq_len=128",
            "policy.method=gspo", "train.eval_every_steps=0", "train.num_threads=1", "optim.lr=1e-4")


def times(args: argparse.Namespace, run: Path, arm: tuple[str, ...]) -> list[float]:
    """Train a run; return the seconds from the beginning of each round to that of the next."""
    settings = [*SETTINGS, f"rollout.rounds={args.rounds}", *args.settings, *arm]
    subprocess.run([sys.executable, "-m", "megatron_sov.cli", "rl", "run", "--from", str(args.start),
                    "--prompts", str(args.prompts), "--reward", REWARD, "--workers", "1", "--plain",
                    "--store", f"{run}-store", "--run", str(run),
                    *(word for setting in settings for word in ("--set", setting))],
                   check=True, stderr=subprocess.DEVNULL)
    began = [event["time_s"] for event in read_events(run / "events.jsonl") if event["event"] == "round"]
    return [after - before for before, after in pairwise(began)]


def main() -> int:
    """Do everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--start", type=Path, required=True, help="run or checkpoint to start from")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20, help="of a run (default %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="at each rhythm (default %(default)s)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}", flush=True)
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for number in range(args.runs):
            for i, (name, arm) in enumerate(ARMS.items()):
                found[name] += times(args, Path(folder) / f"{number}-{i}", arm)
        [newest, *_] = sorted((Path(folder) / "0-0/checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    print(f"a checkpoint has {size / 1e6:,.0f} MB; {args.runs} runs of {args.rounds} rounds at each rhythm, "
          f"load {os.getloadavg()[0]:.1f} at the end")
    whole = statistics.mean(found["one in 10 rounds"])
    for name, seconds in found.items():
        mean = statistics.mean(seconds)
        print(f"{name:30s} {mean:6.2f} s a round (median {statistics.median(seconds):.2f}), "
              f"{mean / whole:.2f} times that of one in 10")
    return 0


if __name__ == "__main__":
    sys.exit(main())
