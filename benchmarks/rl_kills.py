"""Jobs of reinforcement learning that are killed again and again lose nothing, do nothing twice, and end as
if left alone.

    python benchmarks/rl_kills.py --start RUN --prompts FILE.jsonl [--kills 20] [--seed 0]

`rl generate`, `rl reward` and `rl train` work on one store at the same time, in rounds one after the other.
First they are left alone.  Then each of them is killed (SIGKILL to all of its processes) at moments drawn
over the work of a round, while the others run on, and started anew with the same command; half of the kills
of `generate` and `reward` wait until it has claimed a piece.  When a run is complete it is looked at, and
another one begins until all kills are spent.  Looked at are

  store    `rl store verify`; the last attempts are each response that the rounds ask for, once
  rounds   each group of a round stands in its manifest once; all files have the bytes of the undisturbed
           run's
  weights  all files of the last checkpoints have the bytes of the undisturbed run's
  lengths  of responses of pieces that a kill interrupted: beside the same ones of the undisturbed run, and
           beside all (the largest distance of the two distributions)

Jobs are forks of one process that has imported everything, so that kills meet their work.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from kills import final

from megatron_sov import cli
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.inspection import check
from megatron_sov.rollouts.prompts import PromptList, pieces, read_prompts, round_prompts
from megatron_sov.rollouts.rows import Rollout, later, part_name
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.work.progress.locks import holders

JOBS = ("generate", "reward", "train")
ROLLOUT = RolloutConfig(rounds=4, prompts_per_round=16, samples_per_prompt=8, piece_prompts=8,
                        steps_per_round=2, max_new_tokens=12, max_prompt_tokens=64, lease_s=3.0)
SETTINGS = ("optim.lr=2e-3", "train.num_threads=1", "train.micro_batch_size=8", "train.global_batch_size=8",
            'data.phases=[{"name": "main", "seq_len": 128}]', "policy.method=gspo",
            "train.eval_every_steps=0", "train.keep_checkpoints=0")
REWARD = f"{Path(__file__).with_name('rl_reward.py')}:Exact"
HEAVY = ("infer.decoder.generator", "infer.engines.target", "post.policy", "post.rl.feed", "post.rl.generate",
         "post.rl.publish", "post.rl.responses", "train.stages.stage", "commands.rl.rounds")
"""What jobs import when they need it."""
WARM = ("megatron_sov", "megatron", "torch", "pyarrow", "numpy", "transformers", "tokenizers", "jinja2")
"""Packages whose modules `warm_by` imports."""
PATIENCE_S, LIMIT_S, POLL_S = 300, 1200, 0.05
AT_WORK_S = 0.5
"""Longest time from a claim to a kill that waits for one."""


@dataclass
class Place:
    """Where jobs work together."""

    folder: Path
    start: Path
    """The run or checkpoint that they start from."""
    prompts: Path
    """With what the reward needs."""

    @property
    def store(self) -> Path:
        """Return the store's folder."""
        return self.folder / "store"

    @property
    def run(self) -> Path:
        """Return the run's folder."""
        return self.folder / "run"


def words_of(job: str, place: Place, rollout: RolloutConfig) -> list[str]:
    """Return what stands behind `rl generate`, `rl reward` or `rl train`."""
    if job == "reward":
        return ["--store", str(place.store), "--reward", REWARD, "--lease", str(rollout.lease_s),
                "--workers", "1"]
    asked = {name: getattr(rollout, name) for name in (
        "rounds", "prompts_per_round", "samples_per_prompt", "piece_prompts", "steps_per_round",
        "max_new_tokens", "max_prompt_tokens", "lease_s")}
    chosen = [*SETTINGS, *(f"rollout.{name}={value}" for name, value in asked.items())]
    return ["tiny-solar-open", "--store", str(place.store), "--prompts", str(place.prompts), "--from",
            str(place.start), "--run", str(place.run), *(["--reward", REWARD] if job == "train" else []),
            *(word for setting in chosen for word in ("--set", setting))]


@dataclass
class Doing(Place):
    """The three jobs over one store and one run."""

    killed: Counter[str] = field(default_factory=Counter)
    """Job -> kills."""
    working: Counter[str] = field(default_factory=Counter)
    """Job -> kills that met it at a piece that it had claimed, or between a run's start and its end."""
    interrupted: set[str] = field(default_factory=set)
    """Pieces that were being written at a kill."""

    def argv(self, job: str) -> list[str]:
        """Return the command, which begins the job's work or goes on with it."""
        alone = {"reward": ["--wait", "1"], "generate": ["--nproc", "1", "--wait", str(PATIENCE_S)],
                 "train": ["--nproc", "1", "--resume", "--wait", str(PATIENCE_S)]}
        return ["rl", job, *words_of(job, self, ROLLOUT), *alone[job]]

    def begin(self, job: str) -> int:
        """Start a job; returns its process."""
        return fork_command(self.argv(job), self.folder / f"{job}.log")

    def go(self, kills: dict[str, int], drawn: random.Random, within_s: float) -> None:
        """Let the jobs work until the run is complete, killing each as often as is asked.

        Args:
            kills: what is left for each job; counted down.
            drawn: gives the moments.
            within_s: how long after its start a job is killed at most.

        Raises:
            SystemExit: a job failed, or they do not come to an end.
        """
        self.folder.mkdir()
        running: dict[str, tuple[int, float]] = {}
        patient = set[str]()
        began_s, ended = time.monotonic(), set[str]()
        while {"generate", "train"} - ended:
            for job in JOBS:
                if job == "reward" and not (self.store / "store.json").exists():
                    continue
                if job not in running and job not in ended:
                    dies_s = drawn.uniform(0, within_s) if kills[job] else LIMIT_S
                    running[job] = self.begin(job), time.monotonic() + dies_s
                    patient ^= {job} & {"generate", "reward"}
            time.sleep(POLL_S)
            for job, (pid, dies_s) in list(running.items()):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del running[job]
                    self._ended(job, ended)
                elif kills[job] and time.monotonic() >= dies_s and (job not in patient or self._held(pid)):
                    time.sleep(drawn.uniform(0, AT_WORK_S))
                    self._kill(job, pid)
                    kills[job] -= 1
                    del running[job]
            if time.monotonic() - began_s > LIMIT_S:
                raise SystemExit(f"{self.folder}: not at its end after {LIMIT_S} s: {running}")
        for pid, _ in running.values():
            kill_all(pid)

    def _ended(self, job: str, ended: set[str]) -> None:
        """Note that a job has come to its end by itself; rewards end whenever all is judged."""
        log = (self.folder / f"{job}.log").read_text(errors="replace")
        if "error:" in log or "Traceback" in log:
            raise SystemExit(f"{job} failed:\n{log[-3000:]}")
        is_complete = {"generate": f"rounds 1 to {ROLLOUT.rounds} are written" in log, "reward": False,
                       "train": (self.run / "complete.json").exists()}
        if is_complete[job]:
            ended.add(job)

    def _kill(self, job: str, pid: int) -> None:
        """Kill a job, and note what it was at."""
        held = self._held(pid)
        kill_all(pid)
        self.killed[job] += 1
        self.working[job] += bool(held) or (job == "train" and (self.run / "events.jsonl").exists())
        self.interrupted |= {name for name in held if name.startswith("round-")}

    def _held(self, pid: int) -> list[str]:
        """Return what a job has claimed at this moment."""
        family = {pid, *(process.pid for process in family_of(pid))}
        return [h.name for h in holders(self.store / "claims") if h.pid in family and not h.is_released
                ] if (self.store / "store.json").exists() else []


def fork_command(argv: Sequence[str], log: Path, imported: Path | None = None) -> int:
    """Start a command in a fork of this process, in a group of processes of its own; returns its process.

    Args:
        argv: what stands behind `megatron-sov`.
        log: file for what it says.
        imported: file for the names of the modules that it has imported, if it ends well.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            code = cli.main(argv)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if imported is not None and not code:
        imported.write_text(" ".join(sys.modules))
    os._exit(code)


def warm_by(imported: Path) -> None:
    """Import what a command has imported, so that the next ones need not; `imported`: see `fork_command`."""
    for name in imported.read_text().split():
        if name.partition(".")[0] in WARM and name not in sys.modules:
            with contextlib.suppress(ImportError):  # a stand-in that a command has made
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks need not copy it


def family_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(pid: int) -> None:
    """Kill a process with all that it has started."""
    family = family_of(pid)
    for process in family:
        process.kill()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    psutil.wait_procs(family, timeout=30)


def responses(store: RolloutStore, columns: Sequence[str] = ("tokens", "finish_reason", "response")
              ) -> dict[tuple[int, str, int], Rollout]:
    """Return the last attempts by round, prompt and sample."""
    rows = later([row for part in store.parts() for row in store.read_rollouts(part.name, columns)])
    found = {(row.round, row.key.prompt, row.key.sample): row for row in rows}
    assert len(found) == len(rows), "a response is there twice, by two policies"
    return found


def round_files(run: Path) -> dict[str, str]:
    """Return the hashes of all files of the published rounds."""
    return {f"{folder.name}/{name}": file.digest for folder in sorted((run / "rounds").glob("[0-9]" * 4))
            for name, file in read_manifest(folder).files.items()}


def distance(some: Sequence[int], others: Sequence[int]) -> float:
    """Return the largest distance of two distributions of lengths (Kolmogorov and Smirnov's)."""
    if not len(some) or not len(others):
        return 0.0
    at = np.union1d(some, others)
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (some, others)]
    return float(np.abs(shares[0] - shares[1]).max())


class Expected:
    """What the undisturbed jobs left."""

    def __init__(self, whole: Place, asked: PromptList,
                 rollout: RolloutConfig = ROLLOUT) -> None:
        self.rollout = rollout
        self.responses = responses(RolloutStore.open(whole.store))
        self.rounds, self.checkpoints = round_files(whole.run), final(whole.run)
        self.asked = {(number, prompt.id, sample) for number in range(1, rollout.rounds + 1)
                      for prompt in round_prompts(asked, rollout, number)
                      for sample in range(rollout.samples_per_prompt)}
        self.pieces = {part_name(number, piece.number): {(number, prompt.id) for prompt in piece.prompts}
                       for number in range(1, rollout.rounds + 1)
                       for piece in pieces(round_prompts(asked, rollout, number), number,
                                           rollout.piece_prompts)}

    def problems(self, done: Place) -> list[str]:
        """Return what is not as it should be."""
        store = RolloutStore.open(done.store)
        checked, found = check(store), responses(store)
        rows = sum(part.num_rows for part in store.parts())
        groups = [sum(read_manifest(folder).content["groups"].values())
                  for folder in sorted((done.run / "rounds").glob("[0-9]" * 4))]
        rules = [(not checked.problems, f"rl store verify: {checked.problems[:3]}"),
                 (set(found) == self.asked, f"{len(set(found) ^ self.asked)} responses are lost or too many"),
                 (rows == len(self.asked), f"{rows} rows for {len(self.asked)} responses"),
                 (groups == [self.rollout.prompts_per_round] * self.rollout.rounds,
                  f"groups of the rounds: {groups}"),
                 (round_files(done.run) == self.rounds, "the rounds differ from the undisturbed ones"),
                 # a job that is asked to stop leaves more of them
                 (self.checkpoints.items() <= final(done.run).items(),
                  "the checkpoints differ from the undisturbed ones")]
        return [problem for holds, problem in rules if not holds]

    def lengths(self, names: set[str]) -> tuple[list[tuple[int, str, int]], list[int]]:
        """Return the responses of pieces, and their lengths in the undisturbed run."""
        wanted = set().union(*(self.pieces[name] for name in names)) if names else set()
        keys = [key for key in sorted(self.responses) if key[:2] in wanted]
        return keys, [len(self.responses[key].tokens) for key in keys]


def main() -> int:
    """Do everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--start", type=Path, required=True, help="run or checkpoint to start from")
    parser.add_argument("--prompts", type=Path, required=True, help="with answers, for rl_reward.py")
    parser.add_argument("--kills", type=int, default=20, help="of each job (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args()
    for name in HEAVY:
        importlib.import_module(f"megatron_sov.{name}")
    drawn, sound, doing = random.Random(args.seed), True, 0
    left, killed, working = dict.fromkeys(JOBS, args.kills), Counter[str](), Counter[str]()
    interrupted_now: list[int] = []
    interrupted_whole: list[int] = []
    num_pieces = 0
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}; {args.kills} kills "
          f"of each job, seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Doing(Path(folder) / "whole", args.start, args.prompts)
        began_s = time.monotonic()
        whole.go(dict.fromkeys(JOBS, 0), drawn, 0)
        length_s = time.monotonic() - began_s
        expected = Expected(whole, read_prompts(args.prompts))
        print(f"undisturbed: {ROLLOUT.rounds} rounds of {ROLLOUT.prompts_per_round} prompts with "
              f"{ROLLOUT.samples_per_prompt} responses, {ROLLOUT.steps_per_round} steps each, in "
              f"{length_s:.1f} s", flush=True)
        while any(left.values()):
            done = Doing(Path(folder) / f"doing-{doing}", args.start, args.prompts)
            doing += 1
            done.go(left, drawn, length_s / ROLLOUT.rounds)
            problems = expected.problems(done)
            sound = sound and not problems
            killed, working = killed + done.killed, working + done.working
            found = responses(RolloutStore.open(done.store))
            keys, lengths = expected.lengths(done.interrupted)
            num_pieces += len(done.interrupted)
            interrupted_whole += lengths
            interrupted_now += [len(found[key].tokens) for key in keys if key in found]
            print(f"  killed so far: {', '.join(f'{job} {killed[job]}' for job in JOBS)}; at the end: "
                  f"{'; '.join(problems) or 'nothing lost, nothing twice, all bytes as undisturbed'}",
                  flush=True)
    every = [len(row.tokens) for row in expected.responses.values()]
    met = ", ".join(f"{job} {working[job]} of {killed[job]}" for job in JOBS)
    print(f"kills that met work under way: {met}")
    print(f"lengths of the {len(interrupted_now)} responses of {num_pieces} pieces that a kill interrupted, "
          f"largest distance of distributions: to the same ones undisturbed "
          f"{distance(interrupted_now, interrupted_whole):.4f}, to all {len(every)} "
          f"{distance(interrupted_now, every):.4f}")
    print("nothing was lost, done twice or changed" if sound else "NOT SO")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
