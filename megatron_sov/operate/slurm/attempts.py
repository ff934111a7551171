"""Decides at the start and end of a job script whether the job runs: `python -m
megatron_sov.operate.slurm.attempts`.

The program does not call Slurm: the script passes Slurm's data and executes the answer, so the program also
runs in a container. The answer is one line on stdout: `run`, `wait`, `requeue NODE,...` (nodes to exclude) or
`exit CODE`. Messages go to stderr, the job's log.

Every start of a job script is an attempt with a `begin` and an `end` event in `attempts.jsonl`. A dead node
or preemption prevents the `end`; the next attempt then writes it. A new submission has a new job id and an
empty history.
"""

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
from megatron_sov.operate.slurm.node_report import NodeReport
from megatron_sov.runs.checkpoints import CHECKPOINTS_FOLDER
from megatron_sov.runs.folder import ATTEMPTS, FAILURE, ROUNDS
from megatron_sov.runs.lock import delete_lock, read_lock
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

LINE = re.compile(r"^srun: error: (?P<node>[^\s:]+): tasks? (?P<ranks>[\d,\-]+): (?P<message>.*)$",
                  re.MULTILINE)
EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
LAST_LINES = 15
RUN, WAIT = "run", "wait"
STOP_REASONS = {"": "its ranks were asked to stop", "limit": "its time limit came near",
                "way": "it had to make way for another job",
                "cancel": "it was cancelled, or put back by hand"}
"""Value of `--asked` -> reason in messages."""


@dataclass(frozen=True)
class JobAttempt:
    """One start of a job script."""

    restart: int
    """`SLURM_RESTART_COUNT`."""
    nodes: tuple[str, ...]
    progress: int
    """`measure_progress` at the start."""
    end: dict[str, Any] | None
    """`end` event; None: still running, or interrupted."""


class AttemptHistory:
    """Attempts by one job, from `attempts.jsonl`."""

    def __init__(self, folder: Path, job: str) -> None:
        self._file, self._job = folder / ATTEMPTS, job
        # attempts.jsonl contains every job of the run
        records = [r for r in read_events(self._file) if r.get("job") == job]
        ends = {r["restart"]: r for r in records if r["event"] == "end"}
        self.attempts = [JobAttempt(r["restart"], tuple(r["nodes"]), r["progress"], ends.get(r["restart"]))
                         for r in records if r["event"] == "begin"]

    def find_interrupted(self, restart: int) -> JobAttempt | None:
        """Return the attempt before `restart` if its outcome is missing or `cancelled`.

        Slurm never restarts a cancelled job, so a restart means a requeue, for example after a node without
        the script died.
        """
        # an attempt cannot know the end of a later attempt
        earlier = [a for a in self.attempts if a.restart < restart]
        if not earlier:
            return None
        last = earlier[-1]
        return last if not last.end or last.end["outcome"] == "cancelled" else None

    def count_strikes(self) -> Counter[str]:
        """Count the failures attributed to each node."""
        return Counter(node for a in self.attempts if a.end is not None for node in a.end["blamed"])

    def list_excluded(self, max_strikes: int) -> list[str]:
        """Return sick nodes, and nodes with at least `max_strikes` failures."""
        sick = {node for a in self.attempts if a.end is not None for node in a.end["sick"]}
        return sorted(sick | {node for node, count in self.count_strikes().items() if count >= max_strikes})

    def count_failures(self) -> int:
        """Count the attempts since the last progress, except attempts with `sick` nodes."""
        count = 0
        for attempt in reversed(self.attempts):
            if attempt.end is None:
                continue
            # progress resets the count, so a run may fail once a day for weeks
            if attempt.end["progress"] > attempt.progress:
                break
            if not attempt.end["sick"]:
                count += 1
        return count

    def record_begin(self, restart: int, nodes: list[str], progress: int) -> None:
        self._write_event("begin", restart, nodes=nodes, progress=progress)

    def record_end(self, restart: int, outcome: str, reason: str, progress: int, *,
                   blamed: list[str] | None = None, sick: list[str] | None = None) -> None:
        """Write an attempt's `end` event. `outcome`: complete, gate, mistake, cancelled, stopped, crash,
        hang, corruption, cut_off or sick_nodes; `reason`: one sentence; `blamed`: nodes with the first
        failure; `sick`: nodes that failed the preflight, or computed wrong values."""
        self._write_event("end", restart, outcome=outcome, reason=reason, progress=progress,
                          blamed=blamed or [], sick=sick or [])

    def _write_event(self, event: str, restart: int, **fields: Any) -> None:
        log = EventLog(self._file)
        log.write(event, job=self._job, restart=restart, **fields)
        log.close()
        self.__init__(self._file.parent, self._job)  # type: ignore[misc]  # read the file again


def measure_progress(target: Path) -> int:
    """Return a number that grows with every new output of a stage. `target`: a run's folder (counts the steps
    in each stage's newest checkpoint, and published rounds), an artifact's folder (counts files in hidden,
    unfinished neighbours), or a rollout store (counts its parts)."""
    parts = sum(1 for pattern in ("rollouts/*", "rewards/*/*", f"{ROUNDS}/[0-9]*")
                for _ in target.glob(f"{pattern}/{MANIFEST}"))
    # an incomplete artifact is stored in hidden neighbours of its target
    hidden = (path for folder in target.parent.glob(f".{target.name}*") for path in folder.rglob("*"))
    return _count_saved_steps(target) + parts + sum(path.is_file() for path in hidden)


def _count_saved_steps(target: Path) -> int:
    steps = 0
    for folder in (target, *target.glob("stages/*")):
        # a sum over stages also grows from stage to stage
        steps += max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*") if p.name[5:].isdecimal()),
                     default=0)
    return steps


@dataclass(frozen=True)
class RankFailure:
    """First failed rank in a step; later failures usually follow from a lost peer."""

    node: str
    rank: int
    message: str
    """Message from srun: "Exited with exit code 1", "Killed"."""
    exit_code: int | None
    """None: ended by a signal."""

    def __str__(self) -> str:
        ended = f"was ended by a signal ({self.message})"
        if self.exit_code is not None:
            ended = f"ended with exit code {self.exit_code}"
        return f"rank {self.rank} on {self.node} {ended}"


def find_first_failure(srun_log: str) -> RankFailure | None:
    """Return the first failure in srun's log; a user error takes precedence over lost peers."""
    failures = [_parse_failure(match) for match in LINE.finditer(srun_log)]
    user_errors = [failure for failure in failures if failure.exit_code == ExitCode.USER_ERROR]
    return next(iter(user_errors + failures), None)


def _parse_failure(match: re.Match[str]) -> RankFailure:
    code = EXIT_CODE.search(match["message"])
    return RankFailure(match["node"], int(re.split("[-,]", match["ranks"])[0]), match["message"].strip(),
                       int(code[1]) if code else None)


def read_last_lines(log: Path) -> str:
    """Return the last `LAST_LINES` lines in a rank's log, indented; progress bars in their last state."""
    if not log.is_file():
        return ""
    with open(log, encoding="utf-8", errors="replace", newline="\n") as f:
        lines = deque((line.rstrip("\r\n").rpartition("\r")[2] for line in f), LAST_LINES)
    return "\n".join(f"    {line}" for line in lines if line.strip())


def find_sick_nodes(folder: Path, nodes: list[str], limits: dict[str, Any]) -> dict[str, str]:
    """Return node -> reason from the `NodeReport`s; key "all nodes": a problem without a known node.
    `folder`: contains the `rank-N.json` reports; `nodes`: the tested nodes; `limits`: fields of
    `PreflightConfig`, `num_gpus` and `ranks_per_node`."""
    reports = [NodeReport(**json.loads(file.read_text(encoding="utf-8")))
               for file in sorted(folder.glob("rank-*.json"))]
    sick: dict[str, str] = {}
    written = Counter(r.node for r in reports)
    for node in nodes:
        if written[node] < limits["ranks_per_node"]:
            sick[node] = f"{written[node]} of {limits['ranks_per_node']} ranks came to look at it"
    if not reports:
        return {"all nodes": "no rank came to look at its node (see the pre-flight logs)"}
    # relative to the median: one limit for every GPU model
    usual_s = statistics.median(r.matmul_s for r in reports)
    usual_exchange_s = statistics.median(r.exchange_s for r in reports)
    slowest = max(reports, key=lambda r: r.exchange_s)
    log_message(f"slowest exchange: {slowest.exchange_s * 1e3:.2f} ms on {slowest.node}, median "
                f"{usual_exchange_s * 1e3:.2f} ms; slowest all-to-all of a group of experts: "
                f"{max(r.alltoall_s for r in reports) * 1e3:.2f} ms")
    # integers sum exactly, so a checksum that differs from the majority is a hardware fault
    usual_checksum = Counter(r.checksum for r in reports).most_common(1)[0][0]
    # a rank may see only its own GPU, so count UUIDs per node too
    gpu_uuids = {node: {r.gpu_uuid for r in reports if r.node == node and r.gpu_uuid} for node in written}
    for r in reports:
        problem = _describe_problem(r, limits, usual_s, usual_exchange_s, usual_checksum,
                                    max(r.num_gpus, len(gpu_uuids[r.node])))
        if problem:
            # later problems on a node usually follow from the first
            sick.setdefault(r.node, f"rank {r.rank}: {problem}")
    # one hung rank blocks every rank, so a hang alone does not reveal the sick node
    if not sick and any(r.error or r.allreduce_s is None for r in reports):
        errors = Counter(r.error for r in reports if r.error).most_common(1)
        sick["all nodes"] = f"messages between the ranks failed ({errors[0][0] if errors else 'a hang'})"
    return sick


def _describe_problem(r: NodeReport, limits: dict[str, Any], usual_s: float, usual_exchange_s: float,
                      usual_checksum: float, num_gpus: int) -> str:
    """Return the first violated limit in a report, or "". `limits`: see `find_sick_nodes`; `usual_s` and
    `usual_exchange_s`: medians over the ranks; `usual_checksum`: checksum of the majority; `num_gpus`: GPUs
    visible to the node's ranks together."""
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
        (r.exchange_s <= limits["max_exchange_ratio"] * usual_exchange_s,
         f"an exchange with its fastest partner takes {r.exchange_s * 1e3:.2f} ms, the others' median is "
         f"{usual_exchange_s * 1e3:.2f} ms")]
    return next((sentence for holds, sentence in rules if not holds), "")


@dataclass(frozen=True, kw_only=True)
class AttemptOptions:
    """Answer a question from a job script."""

    action: Annotated[Literal["begin", "preflight", "end"], Flag("QUESTION")]
    """Question: begin, preflight or end."""
    folder: Annotated[Path, Flag("FOLDER")]
    """Folder for the job's records."""
    target: Path
    """Folder for the run or artifact."""
    done: Path
    """File that exists when the stage is complete."""
    write_done: bool = False
    """Write --done, because the stage's command does not write it."""
    max_failures: int
    """Limit on consecutive attempts without progress."""
    max_strikes: int
    """Limit on failures attributed to a node before its exclusion."""
    min_nodes: int
    """Smallest number of nodes to continue with."""
    nodes: Annotated[str, Flag(value="NODE,...")]
    usable: Annotated[str, Flag(value="NODE,...")] = ""
    """Working nodes in the partition."""
    down: Annotated[str, Flag(value="NODE,...")] = ""
    """Nodes that are down in the cluster."""
    logs: Path = Path()
    """Question end: folder with srun.log and rank-N.log."""
    code: int = 0
    """Question end: exit code of srun."""
    asked: Literal["", "limit", "way", "cancel"] = ""
    """Question end: reason for a stop request."""
    reports: Path = Path()
    """Question preflight: folder with the reports."""
    limits: str = "{}"
    """Question preflight: limits as JSON."""


class AttemptedJob:
    """Job that runs the calling script: `AttemptOptions`, node lists, `SLURM_JOB_ID` and history."""

    def __init__(self, options: AttemptOptions) -> None:
        self.options = options
        self.nodes, self.usable, self.down = (
            text.replace(",", " ").split() for text in (options.nodes, options.usable, options.down))
        self.number = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.history = AttemptHistory(options.folder, self.number)

    def measure_progress(self) -> int:
        return measure_progress(self.options.target)

    def decide_restart(self) -> str:
        """Return `requeue` with the nodes to exclude, or `exit` after too many failures."""
        failures = self.history.count_failures()
        excluded = self.history.list_excluded(self.options.max_strikes)
        # before the node count: a job without progress stops on any number of nodes
        if failures >= self.options.max_failures:
            ended = [a.end for a in self.history.attempts if a.end is not None]
            log_message(f"stops here: {failures} attempts in a row left nothing new, the last by this: "
                        f"{ended[-1]['reason']}; see the logs, fix the fault and submit again")
            return f"exit {ExitCode.CRASH}"
        # Slurm would queue a job forever if too few nodes remain
        remaining = [node for node in self.usable if node not in excluded]
        if excluded and self.usable and len(remaining) < self.options.min_nodes:
            log_message(f"stops here: without {', '.join(excluded)} the partition has {len(remaining)} "
                        f"usable nodes, and the job needs {self.options.min_nodes}; repair them, or submit "
                        "again with fewer --nodes")
            return f"exit {ExitCode.CRASH}"
        if excluded:
            log_message(f"goes on without {', '.join(excluded)}")
        return f"requeue {','.join(excluded)}".strip()


def log_message(text: str) -> None:
    print(f"job: {text}", file=sys.stderr, flush=True)


def begin_attempt(job: AttemptedJob, queue: str) -> str:
    """Record an attempt's `begin`, and the missing `end` if Slurm interrupted the previous attempt. `queue`:
    Slurm's jobs that hold nodes, a line "NUMBER STATE" each; ignored if `job` is missing in it.
    """
    # Slurm may restart a complete job
    if job.options.done.is_file():
        log_message(f"{job.options.done} exists: there is nothing left to do")
        return "exit 0"
    if (lock_answer := _clear_run_locks(job, queue)) is not None:
        return lock_answer
    interrupted = job.history.find_interrupted(job.restart)
    if interrupted is not None:
        # preemption is not a node's fault, so only nodes that are down are blamed
        dead = sorted(set(interrupted.nodes) & set(job.down))
        reason = (f"{', '.join(dead)} went down" if dead
                  else "Slurm took it away (preempted, cancelled or put back by hand)")
        job.history.record_end(interrupted.restart, "cut_off", reason, job.measure_progress(), blamed=dead)
        log_message(f"attempt {interrupted.restart + 1} was cut off: {reason}")
    # Slurm may assign an excluded node after a requeue
    excluded = sorted(set(job.history.list_excluded(job.options.max_strikes)) & set(job.nodes))
    job.history.record_begin(job.restart, job.nodes, job.measure_progress())
    log_message(f"attempt {job.restart + 1} begins on {', '.join(job.nodes)}; "
                f"saved so far: {_describe_progress(job)}")
    if excluded:
        job.history.record_end(job.restart, "sick_nodes", f"{', '.join(excluded)} must not be used",
                               job.measure_progress())
        return job.decide_restart()
    # interrupted attempts count as failures: otherwise Slurm could requeue a job forever
    if interrupted is not None and (answer := job.decide_restart()).startswith("exit"):
        job.history.record_end(job.restart, "crash", "too many attempts left nothing new",
                               job.measure_progress())
        return answer
    return RUN


def _describe_progress(job: AttemptedJob) -> str:
    if (job.options.target / CHECKPOINTS_FOLDER).is_dir():
        return f"step {_count_saved_steps(job.options.target)}"
    count = job.measure_progress()
    return f"{count} files" if count else "nothing"


def _clear_run_locks(job: AttemptedJob, queue: str) -> str | None:
    """Delete locks from ended jobs; return `wait` or `exit` if another job holds a lock on the run."""
    states = dict(line.split()[:2] for line in queue.splitlines() if len(line.split()) >= 2)
    # a queue without this job is unreliable: keep the locks
    if job.number not in states:
        return None
    for folder in (job.options.target, *job.options.target.glob("stages/*")):
        holder = read_lock(folder)
        # without a Slurm job id, a process outside Slurm may hold the lock
        if holder is None or not holder["slurm_job"] or holder["slurm_job"] == job.number:
            continue
        state = states.get(holder["slurm_job"])
        # a job that left the queue cannot return
        if state is None:
            delete_lock(folder)
        elif state == "COMPLETING":
            return WAIT
        else:
            log_message(f"{folder} is in use by job {holder['slurm_job']}, which is {state}; "
                        "wait for it or cancel it")
            return f"exit {ExitCode.USER_ERROR}"
    return None


def judge_preflight(job: AttemptedJob) -> str:
    """Record sick nodes from the preflight reports, and return the answer to the script."""
    sick = find_sick_nodes(job.options.reports, job.nodes, json.loads(job.options.limits))
    for node, why in sick.items():
        log_message(f"{node} is not fit: {why}")
    if not sick:
        return RUN
    # the key "all nodes" excludes no node
    sick_names = [node for node in sick if node in job.nodes]
    reason = "; ".join(f"{node}: {why}" for node, why in sick.items())
    job.history.record_end(job.restart, "sick_nodes", reason, job.measure_progress(), sick=sick_names)
    return job.decide_restart()


def end_attempt(job: AttemptedJob) -> str:
    """Record an attempt's outcome in `attempts.jsonl`, and return the answer to the script."""
    options, done = job.options, job.options.done
    # exit code 0 completes a stage without a manifest
    if options.write_done and options.code == 0 and not options.asked:
        write_atomically(done, format_json({"job": job.number}))
    log = options.logs / "srun.log"
    failure = find_first_failure(log.read_text(errors="replace")) if log.is_file() else None

    def record_outcome(outcome: str, reason: str, blamed: list[str] | None = None,
                       sick: list[str] | None = None) -> None:
        job.history.record_end(job.restart, outcome, reason, job.measure_progress(), blamed=blamed, sick=sick)
        log_message(f"attempt {job.restart + 1}: {outcome}, {reason}")

    # before the exit code: srun may fail after the stage is complete
    if done.is_file():
        record_outcome("complete", f"{done} exists")
        return "exit 0"
    # a failed gate fails again in another attempt
    failure_files = (options.target / FAILURE, *options.target.glob(f"stages/*/{FAILURE}"))
    if gate := next((f for f in failure_files if f.is_file()), None):
        record_outcome("gate", str(json.loads(gate.read_text(encoding="utf-8"))["failure"]))
        return f"exit {ExitCode.GATE_FAILED}"
    # the user cancelled the job, or Slurm requeues it
    if options.asked == "cancel":
        record_outcome("cancelled", f"{STOP_REASONS[options.asked]}; saved so far: {_describe_progress(job)}")
        return f"exit {ExitCode.STOPPED}"
    # exit code 0 without completion: the ranks saved and stopped early
    if options.asked or options.code == 0:
        record_outcome("stopped", f"{STOP_REASONS[options.asked]}; saved so far: {_describe_progress(job)}")
        return job.decide_restart()
    if failure is None:
        record_outcome("crash", f"srun ended with {options.code} and named no rank (see {log})")
        return job.decide_restart()
    last_lines = read_last_lines(options.logs / f"rank-{failure.rank}.log")
    print(last_lines, file=sys.stderr, flush=True)
    lines = [line.strip() for line in last_lines.splitlines()]
    if failure.exit_code == ExitCode.STOPPED:  # the stage waits for another stage's output
        record_outcome("stopped", lines[-1] if lines else "it waits for others")
        return job.decide_restart()
    if failure.exit_code == ExitCode.USER_ERROR:
        sentence = next((line for line in reversed(lines) if line.startswith("error:")),
                        "a setting, the data or the disk needs a change")
        record_outcome("mistake", f"{failure}: {sentence}")
        return f"exit {ExitCode.USER_ERROR}"
    if failure.exit_code == ExitCode.GATE_FAILED:  # a check of a folder fails on every node
        record_outcome("gate", lines[-1] if lines else str(failure))
        return f"exit {ExitCode.GATE_FAILED}"
    # the event names the faulty hosts; the first rank to exit may run on a healthy host
    if failure.exit_code == ExitCode.CORRUPTION:
        record_outcome("corruption", f"a rank computed wrongly, see {options.target / EVENTS}",
                       sick=_find_corrupt_nodes(job))
    elif failure.exit_code == ExitCode.HANG:  # the first rank to time out is not the hung rank
        record_outcome("hang", f"the ranks stood still; their stacks are in {options.target / 'hang'}")
    else:
        record_outcome("crash", str(failure), [failure.node])
    return job.decide_restart()


def _find_corrupt_nodes(job: AttemptedJob) -> list[str]:
    """Return the nodes in the run's last `sdc` event; [] if the event names at least half the job's nodes."""
    events = [e["hosts"] for e in read_events(job.options.target / EVENTS) if e["event"] == "sdc"]
    if not events:
        return []
    # a host may be a full domain name, a node is its first part
    hosts = {host.split(".")[0] for host in events[-1]} | set(events[-1])
    corrupt = [node for node in job.nodes if node in hosts]
    return corrupt if 2 * len(corrupt) < len(job.nodes) else []


def main(argv: list[str] | None = None) -> int:
    """Answer one question from a job script on stdout; return 0."""
    parser = Parser(prog="python -m megatron_sov.operate.slurm.attempts")
    add_options(parser, AttemptOptions)
    answers: dict[str, Callable[[AttemptedJob], str]] = {
        "begin": lambda job: begin_attempt(job, sys.stdin.read()), "preflight": judge_preflight,
        "end": end_attempt}
    try:
        job = AttemptedJob(read_options(AttemptOptions, parser.parse_args(argv)))
        print(answers[job.options.action](job), flush=True)
    except UserError as e:
        log_message(str(e))
        print(f"exit {ExitCode.USER_ERROR}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
