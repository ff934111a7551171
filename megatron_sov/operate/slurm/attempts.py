"""What a job's script asks at its begin, after the nodes were looked at, and at its end: `python -m
megatron_sov.operate.slurm.attempts`.

It talks to no scheduler: the script brings what Slurm knows and does what is answered, so that it runs in a
container too.  One line on standard output is the answer: `run`, `wait`, `requeue NODE,...` (the nodes to
exclude) or `exit CODE`; sentences for people go to standard error, which is the job's log.

Every start of a job's script is an attempt.  It writes `begin` to `attempts.jsonl`, and `end` unless it was
cut off (its node died, or Slurm took it away); the next one then writes the `end` in its place.  A new
submission is a new job, and begins with a clean record.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import MANIFEST, format_json, write_atomically
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.operate.slurm.node_report import Report
from megatron_sov.runs.checkpoints import CHECKPOINTS_FOLDER
from megatron_sov.runs.folder import ATTEMPTS, FAILURE, ROUNDS
from megatron_sov.runs.lock import delete_lock, read_lock
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events


@dataclass(frozen=True)
class JobAttempt:
    """One start of a job's script."""

    restart: int
    """How often Slurm had started the job before."""
    nodes: tuple[str, ...]
    """Where it ran."""
    progress: int
    """What was there when it began: optimizer steps in checkpoints, or files of an unfinished artifact."""
    end: dict[str, Any] | None
    """Its `end`; None: it runs, or was cut off."""

    @property
    def moved(self) -> bool:
        """Whether it left more than it found."""
        return self.end is not None and self.end["progress"] > self.progress


class History:
    """The attempts of one job."""

    def __init__(self, folder: Path, job: str) -> None:
        self._file, self._job = folder / ATTEMPTS, job
        # the file has the attempts of all jobs of this run: a new submission begins with a clean record
        records = [r for r in read_events(self._file) if r.get("job") == job]
        ends = {r["restart"]: r for r in records if r["event"] == "end"}
        self.attempts = [JobAttempt(r["restart"], tuple(r["nodes"]), r["progress"], ends.get(r["restart"]))
                         for r in records if r["event"] == "begin"]

    def cut_off(self, restart: int) -> JobAttempt | None:
        """Return the attempt before `restart`, if it was ended from outside: it wrote no end,
        or took itself for cancelled.

        A cancelled job does not begin again, so this one was put back, as Slurm does when another node than
        the script's dies.
        """
        # of those before, the last: an attempt cannot know how one that began later ended
        before = [a for a in self.attempts if a.restart < restart]
        return before[-1] if before and (before[-1].end
                                         or {"outcome": "cancelled"})["outcome"] == "cancelled" else None

    def strikes(self) -> Counter[str]:
        return Counter(node for a in self.attempts if a.end is not None for node in a.end["blamed"])

    def excluded(self, max_strikes: int) -> list[str]:
        """Return the nodes that the job must not run on any more: sick ones,
        and those with too many failures."""
        # a sick node is left out at once, one that failed only after several strikes
        sick = {node for a in self.attempts if a.end is not None for node in a.end["sick"]}
        return sorted(sick | {node for node, count in self.strikes().items() if count >= max_strikes})

    def failures_in_a_row(self) -> int:
        """Return how many of the last attempts left nothing new, not counting those that
        found a sick node."""
        count = 0
        for attempt in reversed([a for a in self.attempts if a.end is not None]):
            # progress clears the count: a run that fails once a day for weeks is not given up
            if attempt.moved:
                break
            # a sick node is not the run's fault, so it does not use up its attempts
            count += not (attempt.end or {})["sick"]
        return count

    def begin(self, restart: int, nodes: list[str], progress: int) -> None:
        self._write("begin", restart, nodes=nodes, progress=progress)

    def end(self, restart: int, outcome: str, reason: str, progress: int, *, blamed: list[str] | None = None,
            sick: list[str] | None = None) -> None:
        """Record how an attempt ended.

        Args:
            restart: which one.
            outcome: complete, gate, mistake, cancelled, stopped, crash, hang, corruption,
                cut_off or sick_nodes.
            reason: one sentence.
            progress: what is there now.
            blamed: nodes where the failure began.
            sick: nodes that did not pass the pre-flight check, or computed wrongly.
        """
        self._write("end", restart, outcome=outcome, reason=reason, progress=progress, blamed=blamed or [],
                    sick=sick or [])

    def _write(self, event: str, restart: int, **fields: Any) -> None:
        log = EventLog(self._file)
        log.write(event, job=self._job, restart=restart, **fields)
        log.close()
        self.__init__(self._file.parent, self._job)  # type: ignore[misc]  # what was written is what is known


def progress_of(target: Path) -> int:
    """Return a number that grows whenever a stage leaves something new behind.

    Args:
        target: the run's folder (steps of its newest checkpoints count, of all stages of an extension, and
            its published rounds, which are not written again), the artifact's (files of its hidden,
            unfinished neighbours count), or a rollout store (its parts do).
    """
    parts = sum(1 for pattern in ("rollouts/*", "rewards/*/*", f"{ROUNDS}/[0-9]*")
                for _ in target.glob(f"{pattern}/{MANIFEST}"))
    # an artifact under way lies in hidden neighbours of its target until it is complete
    hidden = (path for folder in target.parent.glob(f".{target.name}*") for path in folder.rglob("*"))
    return _saved_steps(target) + parts + sum(path.is_file() for path in hidden)


def _saved_steps(target: Path) -> int:
    steps = 0
    for folder in (target, *target.glob("stages/*")):
        # over all stages: when a stage ends and the next begins, the sum still grows
        steps += max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*") if p.name[5:].isdigit()),
                     default=0)
    return steps


LINE = re.compile(r"^srun: error: (?P<node>[^\s:]+): tasks? (?P<ranks>[\d,\-]+): (?P<how>.*)$", re.MULTILINE)
EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
LAST_LINES = 15
RUN, WAIT = "run", "wait"
ASKED = {"": "its ranks were asked to stop", "limit": "its time limit came near",
         "way": "it had to make way for another job", "cancel": "it was cancelled, or put back by hand"}
"""What asked a job to stop -> in words."""


# What srun says about ranks that failed: which one was first, where, and how.


@dataclass(frozen=True)
class Failure:
    """The first rank of a step that failed; the others only lose their peer and follow."""

    node: str
    rank: int
    how: str
    """As srun says it: "Exited with exit code 1", "Killed"."""
    exit_code: int | None
    """None where a signal ended it."""

    def __str__(self) -> str:
        ended = (f"ended with exit code {self.exit_code}" if self.exit_code is not None
                 else f"was ended by a signal ({self.how})")
        return f"rank {self.rank} on {self.node} {ended}"


def first_failure(srun_log: str) -> Failure | None:
    """Return the failure that srun reports first, or None; a user's mistake goes before ranks that only
    lost their peer by it."""
    found = [_failure(match) for match in LINE.finditer(srun_log)]
    return next((failure for failure in found if failure.exit_code == ExitCode.USER_ERROR),
                found[0] if found else None)


def _failure(match: re.Match[str]) -> Failure:
    code = EXIT_CODE.search(match["how"])
    return Failure(match["node"], int(re.split("[-,]", match["ranks"])[0]), match["how"].strip(),
                   int(code[1]) if code else None)


def last_lines(log: Path) -> str:
    """Return the end of a rank's log, indented; progress bars count as what they showed last."""
    if not log.is_file():
        return ""
    with open(log, encoding="utf-8", errors="replace", newline="\n") as f:
        lines = deque((line.rstrip("\r\n").rpartition("\r")[2] for line in f), LAST_LINES)
    return "\n".join(f"    {line}" for line in lines if line.strip())


def sick_nodes(folder: Path, nodes: list[str], limits: dict[str, Any]) -> dict[str, str]:
    """Return node -> why it is not fit, from the reports of its ranks; under "all nodes" what
    cannot be laid to one.

    Args:
        folder: where the reports lie.
        nodes: the nodes that were looked at.
        limits: fields of `PreflightConfig`, `num_gpus` and `ranks_per_node`.
    """
    reports = [Report(**json.loads(file.read_text(encoding="utf-8")))
               for file in sorted(folder.glob("rank-*.json"))]
    sick: dict[str, str] = {}
    written = Counter(r.node for r in reports)
    for node in nodes:
        if written[node] < limits["ranks_per_node"]:
            sick[node] = f"{written[node]} of {limits['ranks_per_node']} ranks came to look at it"
    if not reports:
        return {"all nodes": "no rank came to look at its node (see the pre-flight logs)"}
    # against the median, so one limit fits every kind of GPU
    usual_s = statistics.median(r.matmul_s for r in reports)
    # whole numbers sum exactly: what most ranks say is right, and any other sum is a defect
    usual_checksum = Counter(r.checksum for r in reports).most_common(1)[0][0]
    # a rank may see its own GPU alone, so a node's GPUs are also counted by their ids
    own = {node: {r.gpu_uuid for r in reports if r.node == node and r.gpu_uuid} for node in written}
    for r in reports:
        problem = _problem(r, limits, usual_s, usual_checksum, max(r.num_gpus, len(own[r.node])))
        if problem:
            # the first problem of a node is told: others mostly follow from it
            sick.setdefault(r.node, f"rank {r.rank}: {problem}")
    # one hung rank stops all: nobody is blamed unless something else shows whose fault it is
    if not sick and any(r.allreduce_s is None for r in reports):
        errors = Counter(r.error for r in reports if r.error).most_common(1)
        sick["all nodes"] = f"the all-reduce did not end ({errors[0][0] if errors else 'it hung'})"
    return sick


def _problem(r: Report, limits: dict[str, Any], usual_s: float, usual_checksum: float, num_gpus: int) -> str:
    """Return what is wrong with a rank's figures, or an empty string.

    Args:
        r: what it found.
        limits: as `sick_nodes` takes them.
        usual_s: the median of all ranks' products.
        usual_checksum: the sum of most of them.
        num_gpus: GPUs of its node, which its ranks see together.
    """
    skew_s, allreduce_s = r.clock_skew_s or 0.0, r.allreduce_s or 0.0
    rules = [
        (num_gpus >= limits["num_gpus"], f"{num_gpus} GPUs, {limits['num_gpus']} wanted"),
        (r.gpu_used_bytes <= limits["max_gpu_used_bytes"],
         f"{r.gpu_used_bytes / 1e9:.1f} GB of its GPU's memory were in use before the start, at most "
         f"{limits['max_gpu_used_bytes'] / 1e9:.1f} GB wanted"),
        (not r.gpu_illness, f"its GPU has {r.gpu_illness}"),
        (not r.transformer_engine_error,
         f"Transformer Engine does not import ({r.transformer_engine_error})"),
        (not r.disk_error, f"disk cannot be written ({r.disk_error})"),
        (r.disk_error or r.free_disk_bytes >= limits["min_free_disk_bytes"],
         f"{r.free_disk_bytes / 1e9:.1f} GB of disk free, {limits['min_free_disk_bytes'] / 1e9:.1f} "
         "GB wanted"),
        (r.checksum == usual_checksum,
         f"a matrix product sums to {r.checksum:g}, on the others to {usual_checksum:g}"),
        (r.matmul_s <= limits["max_matmul_ratio"] * usual_s,
         f"a matrix product takes {r.matmul_s * 1e3:.2f} ms, the others' median is {usual_s * 1e3:.2f} ms"),
        (r.matmul_tflops >= limits["min_matmul_tflops"],
         f"a matrix product runs at {r.matmul_tflops:.2f} TFLOP/s, {limits['min_matmul_tflops']:g} wanted"),
        (abs(skew_s) <= limits["max_clock_skew_s"], f"its clock is {skew_s:+.1f} s off the others"),
        (allreduce_s <= limits["max_allreduce_s"],
         f"the all-reduce took {allreduce_s:.2f} s, at most {limits['max_allreduce_s']:g} s wanted"),
    ]
    # the first rule that does not hold is told
    return next((sentence for holds, sentence in rules if not holds), "")


@dataclass(frozen=True, kw_only=True)
class AttemptOptions:
    """Answer a question of a job's script."""

    action: Annotated[Literal["begin", "preflight", "end"], Flag("QUESTION")]
    """What is asked: begin, preflight or end."""
    folder: Annotated[Path, Flag("FOLDER")]
    """Where the job's records lie."""
    target: Path
    """The run's or artifact's folder."""
    done: Path
    """What exists when the stage is complete."""
    write_done: bool = False
    """The stage's command leaves no such file: write it."""
    max_failures: int
    """Attempts in a row that may leave nothing new."""
    max_strikes: int
    """How often a node may be to blame before it is left out."""
    min_nodes: int
    """Fewest nodes to go on with."""
    nodes: Annotated[str, Flag(value="NODE,...")]
    """Nodes of this attempt."""
    usable: Annotated[str, Flag(value="NODE,...")] = ""
    """Nodes of the partition that work."""
    down: Annotated[str, Flag(value="NODE,...")] = ""
    """Nodes of the cluster that do not."""
    logs: Path = Path()
    """Question end: folder with srun.log and rank-N.log."""
    code: int = 0
    """Question end: exit code of srun."""
    asked: Literal["", "limit", "way", "cancel"] = ""
    """Question end: what asked the job to stop, if anything."""
    reports: Path = Path()
    """Question preflight: folder of the reports."""
    limits: str = "{}"
    """Question preflight: JSON of the limits."""


class AttemptedJob:
    """The job that this script belongs to."""

    def __init__(self, options: AttemptOptions) -> None:
        self.options = options
        self.nodes, self.usable, self.down = (
            text.replace(",", " ").split() for text in (options.nodes, options.usable, options.down))
        self.number = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.history = History(options.folder, self.number)

    def progress(self) -> int:
        return progress_of(self.options.target)

    def again(self) -> str:
        """Return whether and where the job goes on after an attempt that was not its last."""
        # the order matters: a run that gets nowhere stops before nodes are counted
        failures, excluded = self.history.failures_in_a_row(), self.history.excluded(self.options.max_strikes)
        if failures >= self.options.max_failures:
            ended = [a.end for a in self.history.attempts if a.end is not None]
            say(f"stops here: {failures} attempts in a row left nothing new, the last by this: "
                f"{ended[-1]['reason']}; look at the logs, mend it and submit again")
            return f"exit {ExitCode.CRASH}"
        # Slurm would queue a job for nodes that it can never have, and wait for ever
        left = [node for node in self.usable if node not in excluded]
        if excluded and self.usable and len(left) < self.options.min_nodes:
            say(f"stops here: without {', '.join(excluded)} the partition has {len(left)} usable nodes, "
                f"and the job needs {self.options.min_nodes}; mend them, or submit again with fewer --nodes")
            return f"exit {ExitCode.CRASH}"
        if excluded:
            say(f"goes on without {', '.join(excluded)}")
        return f"requeue {','.join(excluded)}".strip()


def say(text: str) -> None:
    print(f"job: {text}", file=sys.stderr, flush=True)


def begin(job: AttemptedJob, queue: str) -> str:
    """Record that an attempt begins, and how the one before ended if it could not say so itself.

    Args:
        job: this job.
        queue: Slurm's jobs that hold nodes, "NUMBER STATE" each; without this job in it nothing is concluded.
    """
    # Slurm may start a job again that was complete: nothing is recorded then
    if job.options.done.is_file():
        say(f"{job.options.done} exists: there is nothing left to do")
        return "exit 0"
    if (held := _held_by_another(job, queue)) is not None:
        return held
    cut_off = job.history.cut_off(job.restart)
    if cut_off is not None:
        # only a node that Slurm calls down is blamed; preemption is nobody's fault
        dead = sorted(set(cut_off.nodes) & set(job.down))
        reason = (f"{', '.join(dead)} went down" if dead
                  else "Slurm took it away (preempted, cancelled or put back by hand)")
        job.history.end(cut_off.restart, "cut_off", reason, job.progress(), blamed=dead)
        say(f"attempt {cut_off.restart + 1} was cut off: {reason}")
    # after a requeue Slurm may still give a node that the job asked to avoid
    excluded = sorted(set(job.history.excluded(job.options.max_strikes)) & set(job.nodes))
    job.history.begin(job.restart, job.nodes, job.progress())
    say(f"attempt {job.restart + 1} begins on {', '.join(job.nodes)}; saved so far: {_saved(job)}")
    if excluded:
        job.history.end(job.restart, "sick_nodes", f"{', '.join(excluded)} must not be used", job.progress())
        return job.again()
    # cut-off attempts count as failures too, or a job that is killed at once would be requeued for ever
    if cut_off is not None and (answer := job.again()).startswith("exit"):
        job.history.end(job.restart, "crash", "too many attempts left nothing new", job.progress())
        return answer
    return RUN


def _saved(job: AttemptedJob) -> str:
    if (job.options.target / CHECKPOINTS_FOLDER).is_dir():
        return f"step {_saved_steps(job.options.target)}"
    count = job.progress()
    return f"{count} files" if count else "nothing"


def _held_by_another(job: AttemptedJob, queue: str) -> str | None:
    """Return what to do while another job works in the run's folder; a lock that an ended job
    left is taken away."""
    states = dict(line.split()[:2] for line in queue.splitlines() if len(line.split()) >= 2)
    # without this job in the list the answer is no answer: nothing is taken away on its word
    if job.number not in states:
        return None
    for folder in (job.options.target, *job.options.target.glob("stages/*")):
        holder = read_lock(folder)
        # a lock without a Slurm job is of a run started by hand, whose process may live
        if holder is None or not holder["slurm_job"] or holder["slurm_job"] == job.number:
            continue
        state = states.get(holder["slurm_job"])
        # Slurm does not know the holder any more, so it cannot come back
        if state is None:
            delete_lock(folder)
        elif state == "COMPLETING":
            return WAIT
        else:
            say(f"{folder} is in use by job {holder['slurm_job']}, which is {state}; "
                "wait for it or cancel it")
            return f"exit {ExitCode.USER_ERROR}"
    return None


def preflight(job: AttemptedJob) -> str:
    """Judge the reports of the nodes."""
    sick = sick_nodes(job.options.reports, job.nodes, json.loads(job.options.limits))
    for node, why in sick.items():
        say(f"{node} is not fit: {why}")
    if not sick:
        return RUN
    # "all nodes" is no node, and excludes none
    named = [node for node in sick if node in job.nodes]
    reason = "; ".join(f"{node}: {why}" for node, why in sick.items())
    job.history.end(job.restart, "sick_nodes", reason, job.progress(), sick=named)
    return job.again()


def end(job: AttemptedJob) -> str:
    """Judge how an attempt ended."""
    options, done = job.options, job.options.done
    # for stages that leave no manifest of their own, exit code 0 is the proof
    if options.write_done and options.code == 0 and not options.asked:
        write_atomically(done, format_json({"job": job.number}))
    log = options.logs / "srun.log"
    failure = first_failure(log.read_text(errors="replace")) if log.is_file() else None

    def ended(outcome: str, reason: str, blamed: list[str] | None = None,
              sick: list[str] | None = None) -> None:
        job.history.end(job.restart, outcome, reason, job.progress(), blamed=blamed, sick=sick)
        say(f"attempt {job.restart + 1}: {outcome}, {reason}")

    # the completion decides, not the exit code: srun may fail after all was saved
    if done.is_file():
        ended("complete", f"{done} exists")
        return "exit 0"
    # a gate that did not pass will not pass by another attempt
    if gate := next((f for f in (options.target / FAILURE, *options.target.glob(f"stages/*/{FAILURE}"))
                     if f.is_file()), None):
        ended("gate", str(json.loads(gate.read_text(encoding="utf-8"))["failure"]))
        return f"exit {ExitCode.GATE_FAILED}"
    # not requeued: the user wants it gone, or Slurm puts it back itself
    if options.asked == "cancel":
        ended("cancelled", f"{ASKED[options.asked]}; saved so far: {_saved(job)}")
        return f"exit {ExitCode.STOPPED}"
    # exit 0 without completion: the ranks stopped early with everything saved
    if options.asked or options.code == 0:
        ended("stopped", f"{ASKED[options.asked]}; saved so far: {_saved(job)}")
        return job.again()
    if failure is None:
        ended("crash", f"srun ended with {options.code} and named no rank (see {log})")
        return job.again()
    shown = last_lines(options.logs / f"rank-{failure.rank}.log")
    print(shown, file=sys.stderr, flush=True)
    lines = [line.strip() for line in shown.splitlines()]
    if failure.exit_code == ExitCode.STOPPED:  # what it waits for has not come: no node is to blame
        ended("stopped", lines[-1] if lines else "it waits for others")
        return job.again()
    if failure.exit_code == ExitCode.USER_ERROR:
        sentence = next((line for line in reversed(lines) if line.startswith("error:")),
                        "a setting, the data or the disk needs a change")
        ended("mistake", f"{failure}: {sentence}")
        return f"exit {ExitCode.USER_ERROR}"
    if failure.exit_code == ExitCode.GATE_FAILED:  # of a check on a folder: another node finds the same
        ended("gate", lines[-1] if lines else str(failure))
        return f"exit {ExitCode.GATE_FAILED}"
    # the rank that died first is not the one that computed wrongly; the event names the hosts
    if failure.exit_code == ExitCode.CORRUPTION:
        ended("corruption", f"a rank computed wrongly, see {options.target / EVENTS}",
              sick=_corrupt_nodes(job))
    elif failure.exit_code == ExitCode.HANG:  # the first to give up is not the one that the others waited for
        ended("hang", f"the ranks stood still; their stacks are in {options.target / 'hang'}")
    else:
        ended("crash", str(failure), [failure.node])
    return job.again()


def _corrupt_nodes(job: AttemptedJob) -> list[str]:
    """Return the nodes that the run's last `corruption` event names; none where they are half of
    the nodes, or more."""
    named = [e["hosts"] for e in read_events(job.options.target / EVENTS) if e["event"] == "sdc"]
    # hosts may be named in full, nodes by their first part
    found = [node for node in job.nodes
             if named and node in {host.split(".")[0] for host in named[-1]} | set(named[-1])]
    return found if 2 * len(found) < len(job.nodes) else []


def main(argv: list[str] | None = None) -> int:
    """Answer one question of a job's script."""
    parser = Parser(prog="python -m megatron_sov.operate.slurm.attempts")
    add_options(parser, AttemptOptions)
    answers: dict[str, Callable[[AttemptedJob], str]] = {
        "begin": lambda job: begin(job, sys.stdin.read()), "preflight": preflight, "end": end}
    try:
        job = AttemptedJob(read_options(AttemptOptions, parser.parse_args(argv)))
        print(answers[job.options.action](job), flush=True)
    except UserError as e:
        say(str(e))
        print(f"exit {ExitCode.USER_ERROR}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
