"""Rounds of reinforcement learning as a chain on a real Slurm, two arrays and a run, whose jobs are
cancelled, asked to stop at their time limit and put back into the queue: they end as the chain that was left
alone.

    python benchmarks/rl_slurm.py [--events 12] [--seed 0]

Needs root and Slurm's daemons (`make slurm`).  Three rounds: two tasks write, two judge, one job trains.
Each event takes a running task, drawn by lot, at a moment drawn by lot:

  cancelled    `scancel`; a stage of which no task lives is submitted again with the same words
  time limit   the signal that Slurm sends before it
  put back     `scontrol requeue`

When the run is complete the store is verified, each response stands there once, and all files of rounds and
checkpoints have the bytes of the chain that was left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kills import SETTINGS, make_data
from rl_kills import Expected, Place, words_of
from seed_runs import write
from slurm_events import PROFILE, virtual_cluster

from megatron_sov import cli
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.runs.obs.events import read_events

ROLLOUT = RolloutConfig(rounds=3, prompts_per_round=8, samples_per_prompt=4, piece_prompts=2,
                        steps_per_round=2, max_new_tokens=12, max_prompt_tokens=64, lease_s=5.0)
STAGES = {"rl-generate": 2, "rl-reward": 2, "rl-train": 0}
"""Stage -> tasks of its array; 0: no array."""
PATIENCE_S, LIMIT_S, POLL_S, TELL_S = 900, 2400, 0.3, 15.0
START_STEPS = 20


@dataclass
class Chain(Place):
    """The three stages over one store and one run."""

    cluster: Any
    profile: Path
    tasks: dict[str, int] = field(default_factory=lambda: dict(STAGES))
    events: Counter[str] = field(default_factory=Counter)
    """"Event, stage" -> how often."""

    def records(self, stage: str) -> Path:
        """Return the folder where a stage's jobs keep their records."""
        return self.run / "slurm" if stage == "rl-train" else Path(f"{self.store}.{stage}.slurm")

    def words(self, stage: str) -> list[str]:
        """Return the arguments of a stage."""
        job = stage.removeprefix("rl-")
        one = ["--nproc", "1"] if job == "generate" else []
        return [*words_of(job, self, ROLLOUT), *one, "--wait", str(PATIENCE_S)]

    def submit(self) -> None:
        """Submit all stages side by side, by one file."""
        self.folder.mkdir()
        file = self.folder / "chain.yaml"
        stages = [{"stage": stage, "after": [], "arguments": shlex.join(self.words(stage)),
                   **({"array": count} if count else {})} for stage, count in self.tasks.items()]
        file.write_text(yaml.safe_dump({"cluster": str(self.profile), "stages": stages}))
        _submit("chain", str(file))

    def again(self, stage: str) -> None:
        """Submit a stage again, of which no task lives."""
        array = ["--array", str(self.tasks[stage])] if self.tasks[stage] else []
        _submit(stage, "--cluster", str(self.profile), *array, *self.words(stage))

    def numbers(self, stage: str) -> list[str]:
        """Return the tasks of a stage's newest job."""
        job = [str(r["job"]) for r in read_events(self.records(stage) / "jobs.jsonl")][-1]
        return [f"{job}_{i}" for i in range(self.tasks[stage])] or [job]

    def states(self, stage: str) -> list[str]:
        """Return the states of these tasks."""
        return [self.cluster.job(number)["JobState"] for number in self.numbers(stage)]

    def is_complete(self) -> bool:
        """Return whether the run is."""
        return (self.run / "complete.json").exists()

    def go(self, events: int, drawn: random.Random, within_s: float) -> None:
        """Submit, and disturb until the run is complete.

        Args:
            events: how many.
            drawn: gives tasks, events and moments.
            within_s: how long after the last event the next one comes at most.

        Raises:
            SystemExit: a job failed, or they do not come to an end.
        """
        began_s = told_s = time.monotonic()
        next_s = began_s + drawn.uniform(0, within_s)
        self.submit()
        while not self.is_complete():
            time.sleep(POLL_S)
            if time.monotonic() - told_s > TELL_S:
                told_s = time.monotonic()
                states = {stage: self.states(stage) for stage in self.tasks}
                _tell(f"{told_s - began_s:.0f} s: {self._done()}; {states}")
            for stage in self.tasks:
                self._keep_alive(stage)
            if events and time.monotonic() >= next_s and self._disturb(drawn):
                events, next_s = events - 1, time.monotonic() + drawn.uniform(0, within_s)
            if time.monotonic() - began_s > LIMIT_S:
                raise SystemExit(f"{self.folder}: not at its end after {LIMIT_S} s\n{self._logs()}")
        for stage in self.tasks:  # rewards wait for more
            self.cluster.run("scancel", self.numbers(stage)[0].partition("_")[0], check=False)
        self._until(lambda: not self._queued(*self.tasks))

    def _keep_alive(self, stage: str) -> None:
        """Submit a stage again whose tasks were cancelled, all of them, before its work was done."""
        found = self.states(stage)
        if bad := {"FAILED", "TIMEOUT", "NODE_FAIL"} & set(found):
            raise SystemExit(f"{stage}: {bad}\n{self._logs()}")
        if "CANCELLED" in found and set(found) <= {"CANCELLED"} and not self._queued(stage):
            self.again(stage)

    def _disturb(self, drawn: random.Random) -> bool:
        """Do something to a running task; returns whether one was there."""
        running = [(stage, number) for stage in self.tasks for number in self.numbers(stage)
                   if self.cluster.job(number)["JobState"] == "RUNNING"]
        if not running:
            return False
        stage, number = drawn.choice(running)
        name, command = drawn.choice((("cancelled", ("scancel",)),
                                      ("time limit", ("scancel", "--batch", "--signal=USR1")),
                                      ("put back", ("scontrol", "requeue"))))
        self.cluster.run(*command, number, check=False)  # it may just have ended by itself
        self.events[f"{name}, {stage}"] += 1
        _tell(f"{name}: {stage} {number}")
        return True

    def _done(self) -> str:
        """Return how far the jobs are."""
        rewards = self.store / "rewards"
        parts = len(list((self.store / "rollouts").glob("*/manifest.json")))
        judged = len(list(rewards.glob("*/*/manifest.json")))
        steps = len(list((self.run / "checkpoints").glob("step-*")))
        return f"{parts} parts written, {judged} judged, {steps} checkpoints"

    def _queued(self, *stages: str) -> bool:
        jobs = ",".join(self.numbers(stage)[0].partition("_")[0] for stage in stages)
        return bool(self.cluster.run("squeue", "--noheader", f"--jobs={jobs}", "--format=%T", check=False))

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self.folder}: {PATIENCE_S} s without an end\n{self._logs()}")
            time.sleep(POLL_S)

    def _logs(self) -> str:
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-2000:]}"
                         for log in sorted(self.folder.rglob("*.log")))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _submit(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["submit", *words])
    if code:
        raise SystemExit(f"submit {shlex.join(words[:4])} ... ended with {code}")


def prepared(work: Path) -> tuple[Path, Path]:
    """Return a model to start from and prompts for it."""
    run = work / "start"
    small = [part for s in SETTINGS if not s.startswith(("parallel.", "train.steps"))
             for part in ("--set", s)]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "megatron_sov", "pretrain", "tiny-solar-open",
                    "--data", str(make_data(work)), "--run", str(run), *small, "--set",
                    f"train.steps={START_STEPS}"], check=True, stderr=subprocess.DEVNULL)
    write(work / "prompts.jsonl", ({"prompt": f"What is {i}?", "answer": str(i)} for i in range(20)))
    return run / f"checkpoints/step-{START_STEPS}", work / "prompts.jsonl"


def main() -> int:
    """Run the chain alone, then disturbed until all events are spent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--events", type=int, default=12, help="in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the events (default %(default)s)")
    args = parser.parse_args()
    module = virtual_cluster()
    if (reason := module.why_not()) is not None:
        raise SystemExit(reason)
    drawn, sound, spent, chains = random.Random(args.seed), True, 0, 0
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}; seed {args.seed}",
          flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start, prompts = prepared(work)
        (work / "site.yaml").write_text(PROFILE)
        with module.VirtualCluster(work / "cluster", num_nodes=5) as cluster:
            os.environ["SLURM_CONF"] = cluster.env["SLURM_CONF"]
            alone = Chain(work / "alone", start, prompts, cluster, work / "site.yaml")
            began_s = time.monotonic()
            alone.go(0, drawn, 0)
            length_s = time.monotonic() - began_s
            expected = Expected(alone, read_prompts(prompts), ROLLOUT)
            print(f"left alone: {ROLLOUT.rounds} rounds of {ROLLOUT.prompts_per_round} prompts with "
                  f"{ROLLOUT.samples_per_prompt} responses, {ROLLOUT.steps_per_round} steps each, in "
                  f"{length_s:.0f} s", flush=True)
            while spent < args.events:
                chain = Chain(work / f"chain-{chains}", start, prompts, cluster, work / "site.yaml")
                chains += 1
                began_s = time.monotonic()
                chain.go(args.events - spent, drawn, length_s / 4)
                problems = expected.problems(chain)
                sound = sound and not problems
                spent += chain.events.total()
                told = "; ".join(f"{name} {count}" for name, count in sorted(chain.events.items()))
                print(f"  disturbed: {told or 'by nothing'}; {time.monotonic() - began_s:.0f} s; at the end: "
                      f"{'; '.join(problems) or 'nothing lost, nothing twice, all bytes as left alone'}",
                      flush=True)
    print("all chains ended as the one that was left alone" if sound else "NOT SO")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
