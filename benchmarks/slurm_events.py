"""What happens to a job on a cluster, and what each kind of event costs: real Slurm daemons, virtual nodes
that die and freeze.

    python benchmarks/slurm_events.py [--events abcdef] [--soak 30] [--seed 0]

Needs root and Slurm's daemons (`make slurm`).  First a run on 4 nodes is disturbed once in each of six ways
and compared with the run that was left alone; then one run on 2 nodes goes through many events, drawn at
random, at moments drawn at random.  Lost is the time from the event until the run did a step that it
had not done before.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kills import make_data

from megatron_sov import cli
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.runs.obs.events import final_steps, read_events

STEPS, EVENT_STEP, SOAK_STEPS = 60, 25, 200
PATIENCE_S = 1800.0
ENDED_BADLY = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
            "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16",
            'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=8",
            "train.micro_batch_size=2", "data.heldout_tokens=128", "train.num_threads=1",
            "train.checkpoint_every_steps=5", "train.eval_every_steps=0", "data.max_epochs=0",
            "parallel.ep=2")
PROFILE = """description: virtual nodes of one rank
partition: batch
account: ""
time_limit: "60"
signal_lead_s: 60
gpus_per_node: 0
cpus_per_node: 1
max_strikes: 1000
max_failures: 1000
preflight: {enabled: false}
"""


def virtual_cluster() -> ModuleType:
    """Return the module of the tests that holds the cluster."""
    path = Path(__file__).parents[1] / "tests/operate/slurm/virtual_cluster.py"
    spec = importlib.util.spec_from_file_location("virtual_cluster", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["virtual_cluster"] = module
    spec.loader.exec_module(module)
    return module


class Disturbed:
    """A run on the cluster, and what can be done to it."""

    def __init__(self, cluster: Any, work: Path, name: str, data: Path, steps: int) -> None:
        self.cluster, self.run = cluster, work / name
        self._words = ["tiny-solar-open", "--data", str(data), "--run", str(self.run), "--set",
                       f"train.steps={steps}", *(word for s in SETTINGS for word in ("--set", s))]
        self._profile = str(work / "site.yaml")
        self.job = ""

    def submit(self, nodes: int) -> None:
        """Submit, or submit again."""
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(["submit", "pretrain", "--cluster", self._profile, "--nodes", str(nodes),
                             *self._words])
        assert code == 0, f"submit ended with {code}"
        self.job = [str(r["job"]) for r in read_events(self.run / "slurm/jobs.jsonl")][-1]

    def steps(self) -> list[dict[str, Any]]:
        """Return the events of the run's steps, in the order in which they were done."""
        return [e for e in read_events(self.run / "events.jsonl") if e["event"] == "step"]

    def losses(self) -> list[tuple[int, float]]:
        """Return (step, loss) of every step; of one that was done again, the last."""
        return [(e["step"], e["loss"]) for e in final_steps(list(read_events(self.run / "events.jsonl")))]

    def wait(self, reached: Callable[[], bool]) -> None:
        """Wait while the job lives."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            state = self.cluster.job(self.job)["JobState"]
            log = self.run / f"slurm/{self.job}.log"
            assert state not in ENDED_BADLY, log.read_text() if log.is_file() else state
            assert time.monotonic() < deadline, f"{self.run}: {PATIENCE_S:g} s without what was waited for"
            time.sleep(0.1)

    def finish(self) -> None:
        """Wait until the job has ended well."""
        self.wait(lambda: self.cluster.job(self.job)["JobState"] == "COMPLETED")

    def running_nodes(self) -> list[str]:
        """Return the nodes of the job while it runs, else none."""
        found = self.cluster.job(self.job)
        if found["JobState"] != "RUNNING":
            return []
        return str(self.cluster.run("scontrol", "show", "hostnames", found["NodeList"])).split()

    # events, each on the last node of the job, where it has nodes; they return the nodes to
    # bring back afterwards

    def _until_put_back(self, event: Callable[[str], None]) -> list[str]:
        """Do something to a node, and wait until Slurm has put the job back into the queue for it."""
        nodes, restarts = self.running_nodes(), self.cluster.job(self.job)["Restarts"]
        for node in nodes[-1:]:
            event(node)
            self.wait(lambda: self.cluster.job(self.job)["Restarts"] != restarts
                      or self.cluster.job(self.job)["JobState"] == "COMPLETED")
        return nodes[-1:]

    def node_crash(self) -> list[str]:
        """A node dies with everything on it."""
        return self._until_put_back(self.cluster.crash)

    def time_limit(self) -> list[str]:
        """The signal that Slurm sends before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)
        return []

    def cancel_and_submit(self, nodes: int | None = None) -> list[str]:
        """Somebody cancels the job and submits it again."""
        count = nodes or int(self.cluster.job(self.job)["NumNodes"].split("-")[0])
        self.cluster.run("scancel", self.job)
        self.cluster.wait(self.job, timeout_s=PATIENCE_S)
        while "COMPLETING" in self.cluster.run("squeue", "--noheader", f"--jobs={self.job}", "--format=%T",
                                               check=False):
            time.sleep(0.1)
        self.submit(count)
        return []

    def rank_killed(self) -> list[str]:
        """SIGKILL of one rank, as by a lack of memory; nothing where it has not started yet."""
        for node in self.running_nodes()[-1:]:
            for rank in self.cluster.ranks(node)[-1:]:
                rank.kill()
        return []

    def node_hangs(self) -> list[str]:
        """A node freezes; Slurm has to notice by itself."""
        return self._until_put_back(self.cluster.freeze)

    def fewer_nodes(self) -> list[str]:
        """Cancelled, and submitted again on 2 nodes."""
        return self.cancel_and_submit(2)


EVENTS: dict[str, tuple[str, Callable[[Disturbed], list[str]]]] = {
    "a": ("node crash", Disturbed.node_crash), "b": ("time-limit signal", Disturbed.time_limit),
    "c": ("scancel + resubmit", Disturbed.cancel_and_submit),
    "d": ("SIGKILL of a rank", Disturbed.rank_killed), "e": ("node that hangs", Disturbed.node_hangs),
    "f": ("restart on 2 nodes", Disturbed.fewer_nodes),
}


def left_alone(work: Path, name: str, data: Path, steps: int, nproc: int) -> list[tuple[int, float]]:
    """Run on this machine without Slurm; returns (step, loss) of every step."""
    alone = Disturbed(None, work, name, data, steps)
    subprocess.run([sys.executable, "-W", "ignore", "-m", "megatron_sov", "pretrain", *alone._words,
                    "--nproc", str(nproc)], check=True, stderr=subprocess.DEVNULL)
    return alone.losses()


def one_event(cluster: Any, work: Path, data: Path, letter: str, expected: list[tuple[int, float]]) -> None:
    """Disturb a run on 4 nodes once, and print what it cost."""
    name, event = EVENTS[letter]
    run = Disturbed(cluster, work, f"run-{letter}", data, STEPS)
    start_s = time.time()
    run.submit(4)
    run.wait(lambda: bool(run.steps()) and run.steps()[-1]["step"] >= EVENT_STEP)
    event_s = time.time()
    down = event(run)
    run.finish()
    steps = run.steps()
    starts_s = [e["time_s"] for e in read_events(run.run / "events.jsonl") if e["event"] == "run_start"]
    anew_s = min(s for s in starts_s if s > event_s)
    stood_at = max(e["step"] for e in steps if e["time_s"] < anew_s)
    again = [e for e in steps if e["time_s"] > anew_s and e["step"] <= stood_at]
    back_s = min(e["time_s"] for e in steps if e["time_s"] > anew_s and e["step"] > stood_at)
    losses = run.losses()
    furthest = max(abs(loss - wanted) for (_, loss), (_, wanted) in zip(losses, expected, strict=True))
    verdict = ("every loss equal, bit for bit" if losses == expected
               else f"losses differ by {furthest:.1e} at most")
    print(f"({letter}) {name:19} lost {back_s - event_s:6.1f} s, {len(again):2d} steps done again; "
          f"final loss {losses[-1][1]:.6f}, {verdict}; {time.time() - start_s:.0f} s in all", flush=True)
    for node in down:
        cluster.resume(node)


def soak(cluster: Any, work: Path, data: Path, count: int, seed: int, limit_s: float) -> bool:
    """Drive one run through many events, none after `limit_s`; returns whether it ended as
    the run left alone."""
    expected = left_alone(work, "soak-alone", data, SOAK_STEPS, 2)
    drawn, kinds, moments = random.Random(seed), Counter[str](), Counter[str]()
    run = Disturbed(cluster, work, "soak", data, SOAK_STEPS)
    start_s = time.time()
    run.submit(2)
    for _ in range(count):
        run.wait(lambda: bool(run.running_nodes()))
        if drawn.random() < 0.3:  # while it starts, loads or has just begun
            time.sleep(drawn.uniform(0, 8))
            moment = "in the first seconds of a start"
        else:
            seen = len(run.steps()) + drawn.randint(1, 12)
            run.wait(lambda seen=seen: len(run.steps()) >= min(seen, SOAK_STEPS))  # type: ignore[misc]
            moment = "while it trained"
        finished = bool(run.steps()) and run.steps()[-1]["step"] >= SOAK_STEPS
        if finished or time.time() - start_s > limit_s:
            break
        name, event = EVENTS[drawn.choice("abcde")]
        kinds[name] += 1
        moments[moment] += 1
        print(f"event {kinds.total()}: {name}, {time.time() - start_s:.0f} s after the start",
              file=sys.stderr, flush=True)
        for node in event(run):
            cluster.resume(node)
    run.finish()
    steps, losses = run.steps(), run.losses()
    done = read_manifest(run.run / f"checkpoints/step-{SOAK_STEPS}").files
    alone = read_manifest(work / f"soak-alone/checkpoints/step-{SOAK_STEPS}").files
    same = losses == expected and all(done[name] == alone[name] for name in alone if name != "state.json")
    useful_s, wall_s = sum(e["step_time_s"] for e in final_steps(steps)), time.time() - start_s
    outcomes = Counter(r["outcome"] for r in read_events(run.run / "slurm/attempts.jsonl")
                       if r["event"] == "end")
    print(f"soak: {kinds.total()} events ({', '.join(f'{k} {n}' for k, n in sorted(kinds.items()))}), "
          f"{', '.join(f'{n} {m}' for m, n in sorted(moments.items()))}")
    print(f"  attempts ended: {', '.join(f'{k} {n}' for k, n in sorted(outcomes.items()))}")
    print(f"  {len(losses)} steps, {len(steps) - len(losses)} done again; "
          f"every loss and all files of the last checkpoint as in the run left alone: {same}")
    print(f"  effective training time: {useful_s / wall_s:.1%} of {wall_s:.0f} s", flush=True)
    return same


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", default="".join(EVENTS), help="which of the six (default %(default)s)")
    parser.add_argument("--soak", type=int, default=30, metavar="N",
                        help="events of the soak; 0: none (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the soak (default %(default)s)")
    parser.add_argument("--limit-s", type=float, default=7200,
                        help="no event of the soak comes later (default %(default)s)")
    args = parser.parse_args()
    module = virtual_cluster()
    if (reason := module.why_not()) is not None:
        raise SystemExit(reason)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = make_data(work)
        (work / "site.yaml").write_text(PROFILE)
        with module.VirtualCluster(work / "cluster", num_nodes=6) as cluster:
            os.environ["SLURM_CONF"] = cluster.env["SLURM_CONF"]
            if args.events:
                expected = left_alone(work, "alone", data, STEPS, 4)
                print(f"left alone: {STEPS} steps on 4 ranks, final loss {expected[-1][1]:.6f}; "
                      f"a checkpoint every 5 steps; {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
                      flush=True)
                for letter in args.events:
                    one_event(cluster, work, data, letter, expected)
            if args.soak:
                good = soak(cluster, work, data, args.soak, args.seed, args.limit_s)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
