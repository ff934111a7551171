"""A run of reinforcement learning that plays tools, by policies that are two rounds old, with the experts of
its tokens replayed: killed again and again it ends as if left alone.

    python benchmarks/replay_kills.py --work FOLDER [--layouts one tp2 ep2] [--kills 50] [--seed 0]

A tiny mixture of experts, fine-tuned on scripted episodes (rl_tools.py), plays sums with a calculator in
rounds of `rl run`, whose rewards are drawn by lot (lot_world.py).  At each layout it is left alone first.
Then the same run is done under SIGKILL of all its processes, at points of its work that are drawn over the
whole of it, each start a little behind its point (a start that finds its point behind it is killed while it
starts).  Where it comes to its end before its last points, another one is killed for the rest, until there
were so many.  Held together are

  store    `rl store verify`; each response once, with tokens, policies, routes and reward of the run that was
           left alone
  rounds   all files of all rounds have the same bytes: tokens, log-probabilities, advantages, routes
  weights  all files of the last checkpoints have the same bytes: weights, moments, counters

Runs are forks of one process that has imported everything, so that kills meet their work.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rl_tools
from kills import count, final
from rl_kills import HEAVY, family_of, fork_command, kill_all, responses, round_files, warm_by
from seed_runs import rows_of, words

from megatron_sov.rollouts.inspection import check
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import read_events
from megatron_sov.work.progress.locks import holders

LAYOUTS: dict[str, tuple[str, ...]] = {
    "one": (), "tp2": ("parallel.tp=2", "parallel.sp=true"),
    "ep2": ("parallel.ep=2", "train.micro_batch_size=1"), "pp2": ("parallel.pp=2",)}
"""Layout -> its settings; all but the first have two processes."""
SETTINGS = ("rollout.rounds=6", "rollout.prompts_per_round=2", "rollout.samples_per_prompt=3",
            "rollout.piece_prompts=1", "rollout.max_new_tokens=80", "rollout.max_prompt_tokens=128",
            "rollout.max_staleness=2", "policy.method=gspo", "policy.router_replay=true", "optim.lr=5e-4",
            "optim.warmup_steps=0", "train.num_threads=1", "train.global_batch_size=2",
            "train.micro_batch_size=2", "train.eval_every_steps=0", "train.keep_checkpoints=0",
            "train.checkpoint_every_steps=2", rows_of(208))
WORLD = Path(__file__).with_name("lot_world.py")
START_STEPS = 100
NUM_EPISODES = 800
POLL_S, LIMIT_S = 0.05, 1800


@dataclass(frozen=True)
class ToolRun:
    """A run in a folder of its own."""

    folder: Path
    start: Path
    tasks: Path
    environment: str
    """FILE.py:NAME."""
    layout: str

    @property
    def run(self) -> Path:
        """Return the run's folder."""
        return self.folder / "run"

    @property
    def store(self) -> Path:
        """Return its store."""
        return self.folder / "store"

    def argv(self) -> list[str]:
        """Return the command, which begins the run or goes on with it."""
        chosen = LAYOUTS[self.layout]
        return ["rl", "run", "tiny-solar-open", "--from", str(self.start), "--run", str(self.run), "--store",
                str(self.store), "--prompts", str(self.tasks), "--environment", self.environment, "--reward",
                "environment", "--workers", "1", "--resume", "--limit", "max_turns=2", "--limit",
                "max_turn_tokens=46", "--nproc", "2" if chosen else "1", *words((*SETTINGS, *chosen))]

    @property
    def log(self) -> Path:
        """Return what its commands have said."""
        return self.folder / "log"

    @property
    def imported(self) -> Path:
        """Return what tells which modules they have needed."""
        return self.folder / "imported"

    def begin(self, argv: list[str]) -> int:
        """Start a command; returns its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return fork_command(argv, self.log, self.imported)

    def progress(self) -> int:
        """Return how much is done: parts that are written, parts that are judged, steps."""
        parts = sum(1 for _ in self.store.glob("r*/**/manifest.json"))
        events = self.run / "events.jsonl"
        told = read_events(events) if events.is_file() else ()
        return parts + len({event["step"] for event in told if event["event"] == "step"})

    def to_its_end(self, argv: list[str]) -> float:
        """Run a command to its end; returns its seconds.

        Raises:
            SystemExit: it failed, or does not end.
        """
        began_s = time.monotonic()
        pid = self.begin(argv)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(POLL_S)
            if time.monotonic() - began_s > LIMIT_S:
                kill_all(pid)
                raise SystemExit(f"{self.log}: not at its end after {LIMIT_S} s")
        self._refuse(ended[1])
        return time.monotonic() - began_s

    def _refuse(self, status: int) -> None:
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"ended with exit code {code}:\n"
                             f"{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self, point: float, after_s: float) -> str:
        """Start the run, and kill it some time behind a point of its work; returns what it did then, or an
        empty text where it came to its end before."""
        starts = count(self.run, "run_start") if self.run.exists() else 0
        pid = self.begin(self.argv())
        dies_s = None
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._refuse(status)
                return ""
            if dies_s is None and self.progress() >= point:
                dies_s = time.monotonic() + after_s
            if dies_s is not None and time.monotonic() >= dies_s:
                break
            time.sleep(POLL_S)
        told = self._at(pid, starts)
        kill_all(pid)
        return told

    def _at(self, pid: int, starts: int) -> str:
        family = {pid, *(process.pid for process in family_of(pid))}
        if (self.store / "store.json").exists() and any(
                not h.is_released and h.pid in family for h in holders(self.store / "claims")):
            return "playing or judging"
        if any((self.run / "checkpoints").glob(".*")):
            return "saving"
        has_begun = self.run.exists() and count(self.run, "run_start") > starts
        return "training" if has_begun else "starting"


def content(done: ToolRun) -> dict[str, Any]:
    """Return all that a run has made, as values that are the same to the bit or not."""
    store = RolloutStore.open(done.store)
    found: dict[str, Any] = {"store": tuple(check(store).problems)}
    for version in store.versions():
        for part in store.parts():
            for row in store.read_rewards(version, part.name):
                found["reward", row.key.prompt, row.key.sample, part.round] = row.reward, row.components
    for place, row in responses(store, ("tokens", "finish_reason", "logprobs", "versions", "routes")).items():
        found[place] = (row.key.policy, row.finish_reason, *(
            None if column is None else column.tobytes()
            for column in (row.tokens, row.logprobs, row.versions, row.routes)))
    return found | round_files(done.run) | final(done.run)


def describe(whole: ToolRun, length_s: float) -> str:
    """Return what a run that was left alone has done, in one line."""
    episodes = responses(RolloutStore.open(whole.store), ("tokens", "versions", "finish_reason"))
    called = sum(len(row.spans) > 1 for row in episodes.values())
    events = list(read_events(whole.run / "events.jsonl"))
    stale = Counter(e["means"]["staleness_steps"] for e in events if e["event"] == "round")
    shares = [e["meters"]["replayed_routes"] for e in events if e["event"] == "step"]
    return (f"{whole.layout}: {' '.join(LAYOUTS[whole.layout]) or 'one process'}; alone in {length_s:.0f} s, "
            f"{whole.progress()} parts and steps, {len(episodes)} episodes of which {called} called a tool; "
            f"rounds by staleness in steps {dict(sorted(stale.items()))}; routes replayed of "
            f"{min(shares):.0%} to {max(shares):.0%} of a step's tokens")


def survives(whole: ToolRun, kills: int, seed: int) -> bool:
    """Do a run alone, and again under kills, as often as it takes to reach their number; prints what came of
    it, and returns whether all was equal."""
    drawn = random.Random(f"{whole.layout}-{seed}")
    length_s, total, expected = whole.to_its_end(whole.argv()), whole.progress(), content(whole)
    print(describe(whole, length_s), flush=True)
    warm_by(whole.imported)
    done, sound, number = 0, True, 0
    while done < kills:
        number += 1
        killed = replace(whole, folder=whole.folder.with_name(f"{whole.layout}-killed-{number}"))
        moments = Counter[str]()
        for point in sorted(drawn.uniform(0, total) for _ in range(kills - done)):
            if not (at := killed.kill(point, drawn.uniform(0, length_s / total))):
                break
            moments[at] += 1
        if not (killed.run / "complete.json").exists():
            killed.to_its_end(killed.argv())
        done += moments.total()
        sound &= is_as_left_alone(killed, expected, moments)
    return sound


def is_as_left_alone(killed: ToolRun, expected: dict[str, Any], moments: Counter[str]) -> bool:
    """Print what came of a run that was killed; returns whether all was equal."""
    found = content(killed)
    other = sorted(str(name) for name in expected.keys() | found.keys()
                   if expected.get(name) != found.get(name))
    sound = not other and not found["store"]
    print(f"  killed {moments.total()} times: {', '.join(f'{n} {at}' for at, n in moments.most_common())}; "
          + (f"all {len(found)} responses, rewards and files as left alone, to the bit" if sound else
             f"NOT SO: {len(other)} differ, {other[:5]} {found['store']}"), flush=True)
    return sound


def main() -> int:
    """Do all layouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="the model to start from is kept there")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=["one", "tp2", "ep2"])
    parser.add_argument("--kills", type=int, default=50, help="at each layout (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    rl_tools.NUM_EPISODES = NUM_EPISODES
    maker = rl_tools.Seed(0, args.work)
    maker.start_steps = START_STEPS
    start = maker.start()
    for name in HEAVY:
        importlib.import_module(f"megatron_sov.{name}")
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}; {args.kills} kills "
          f"at each layout, seed {args.seed}", flush=True)
    # alone in a folder: what else of a file's folder is loaded counts as its code
    (world := args.work.absolute() / "world").mkdir(exist_ok=True)
    shutil.copy(WORLD, world)
    tasks, environment = maker.folder / "calculator.tasks.jsonl", f"{world / WORLD.name}:ByLot"
    sound = [survives(ToolRun(args.work / f"{layout}-whole", start, tasks, environment, layout), args.kills,
                      args.seed) for layout in args.layouts]
    print("nothing was lost or changed by a kill" if all(sound) else "NOT SO")
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
