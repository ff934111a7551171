"""State of a run, computed from its folder, and its text for the terminal."""

import itertools
import json
import math
import shlex
import statistics
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_duration
from megatron_sov.model import objectives
from megatron_sov.model.config import RunConfig
from megatron_sov.model.recipes.extension import PHASE
from megatron_sov.runs.checkpoints import (
    CHECKPOINTS_FOLDER, check_run_folder, checkpoint_step, latest_checkpoint)
from megatron_sov.runs.folder import (
    ATTEMPTS, COMPLETION, CONFIG, JOBS, ROUNDS, STAGES, SUBMISSIONS, RunFolder, list_submitted_jobs,
    read_last_log_line)
from megatron_sov.runs.lock import find_living_holder
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.figures import combine_bits_per_byte, parse_number, parse_whole_number
from megatron_sov.runs.obs.history import COMPLETE, INCIDENT_NAMES, UNFINISHED, Attempt, Attempts, is_incident
from megatron_sov.runs.obs.meters import HeldoutFigures, format_step, read_headline
from megatron_sov.work.clusters import client

SUBMITTED = f"{JOBS}/{SUBMISSIONS}"
"""Submissions of a run's jobs; the first file in a submitted run."""
RECENT_STEPS = 50
"""Steps over which the current speed is measured."""
SILENT_AFTER_STEPS, SILENT_AFTER_S = 10, 60.0
"""A running run without events is silent after both limits."""
UNCOUNTED_INCIDENTS = ("restart", "failure", "fault")
"""Incidents that the list of starts shows, and intentional faults."""
MAX_DEPTH = 3
"""Depth limit in the search for runs below a folder."""


def add_slurm_reasons(run: Path, attempts: list[Attempt]) -> None:
    """Add the reasons in the job script's records to attempts that ended by a kill or a signal."""
    ends = [(parse_number(r.get("time_s")), str(r.get("outcome")), str(r.get("reason")))
            for r in read_events(run / JOBS / ATTEMPTS) if r["event"] == "end"]
    for i, attempt in enumerate(attempts):
        began_s = parse_number(attempt.start.get("time_s"))
        after_s = parse_number(attempts[i + 1].start.get("time_s")) if i + 1 < len(attempts) else float("inf")
        # the last end between this start and the next start
        for outcome, reason in [words for time_s, *words in ends if began_s <= time_s < after_s][-1:]:
            # a killed process cannot record an outcome
            if attempt.outcome == UNFINISHED:
                attempt.outcome = f"{outcome}: {reason}"
            elif attempt.outcome.startswith("stopped: "):
                attempt.outcome += f" ({reason})"


def describe_job_end(run: Path) -> str:
    """Return the last log line from the last job of a run that never began training; "": no job."""
    jobs = list_submitted_jobs(run / JOBS)
    line = read_last_log_line(run / JOBS, jobs[-1]) if jobs else ""
    return f"job {jobs[-1]}: {line}" if line else ""


def describe_active_job(run: Path) -> str:
    """Describe a run's waiting or running job; "": none, or no answer from Slurm."""
    try:
        states = client.read_active_states(list_submitted_jobs(run / JOBS))
    except UserError:  # a machine without Slurm
        return ""
    return next((f"job {job} is {state.lower()}" for job, state in states.items()), "")


@dataclass(frozen=True)
class RunStart:
    """A start of a run's processes."""

    began_s: float
    from_step: int
    to_step: int | None
    num_ranks: int
    outcome: str


@dataclass
class RunState:
    path: Path
    stage: str = ""
    """Command, e.g. pretrain."""
    recipe: str = ""
    phase: str = ""
    state: str = "not started"
    """running, stopping, silent, waiting, complete, stopped, gate failed, ended, not started."""
    why: str = ""
    """Reason for `state`."""
    step: int = 0
    num_steps: int = 0
    tokens: int = 0
    loss: float = math.nan
    heldout_bits_per_byte: float = math.nan
    """Newest evaluation, over the bytes in all held-out sources."""
    told: str = ""
    """Headline meters at the last step."""
    headline: dict[str, float] = field(default_factory=dict)
    """Headline meter -> last value."""
    heldout: str = ""
    """Held-out figures before the first step and after the last evaluation."""
    tokens_per_s: float = math.nan
    """Median over the last steps in the current attempt."""
    eta_s: float = math.nan
    """Remaining seconds at the current wall time per step; NaN: not running."""
    checkpoint: str = ""
    """Newest checkpoint, relative to the run's folder."""
    checkpoint_step: int = 0
    checkpoint_age_s: float = math.nan
    last_event_age_s: float = math.nan
    starts: list[RunStart] = field(default_factory=list)
    warnings: int = 0
    incidents: dict[str, int] = field(default_factory=dict)
    """Incident -> count over all starts, without `UNCOUNTED_INCIDENTS`."""

    @property
    def restarts(self) -> int:
        """Starts after the first start."""
        return max(0, len(self.starts) - 1)


def find_runs(path: Path) -> list[Path]:
    """Return the run in `path` after its stages or rounds, or all runs below. Raises `UserError`: none."""
    if _is_run(path):
        parts = [*(path / STAGES).glob("*"), *(path / ROUNDS).glob("*/run")]
        runs = [*sorted(filter(_is_run, parts)), path]
    else:
        folders: set[Path] = set()
        for depth, name in itertools.product(range(1, MAX_DEPTH + 1), (CONFIG, EVENTS, SUBMITTED)):
            files = path.glob("/".join(["*"] * depth + [name]))
            folders |= {file.parents[name.count("/")] for file in files}  # a name may have folders
        runs = sorted(filter(_is_run, folders))
    if not runs:
        check_run_folder(path)
    return runs


def _is_run(path: Path) -> bool:
    """Return whether a folder contains a run's events, settings or jobs."""
    if (path / EVENTS).is_file() or (path / SUBMITTED).is_file():
        return True
    try:
        return "recipe" in json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


class RunStateReader:
    """Computes a run's state from its folder and the events passed to `add`."""

    def __init__(self, path: Path) -> None:
        self._path, self._so_far = path, RunState(path)
        self._attempts = Attempts()
        self._recent: deque[tuple[int, float, float, float]] = deque(maxlen=RECENT_STEPS)
        self._last_s = math.nan
        self._meters, self._is_comparable = read_headline({})
        self._heldout = HeldoutFigures()

    def add(self, event: dict[str, Any]) -> None:
        """Update the state by the next event of the run."""
        state = self._so_far
        self._attempts.add(event)
        self._heldout.add(event)
        self._last_s = parse_number(event.get("time_s"))
        if event["event"] == "run_start":
            # drop the speeds of the previous start
            self._recent.clear()
            state.recipe = str(event.get("recipe") or state.recipe)
            state.num_steps = parse_whole_number(event.get("num_steps")) or state.num_steps
            state.step = parse_whole_number(event.get("resumed_from"))
            self._meters, self._is_comparable = read_headline(event)
        elif event["event"] == "step" and event.get("step") is not None:
            self._recent.append((parse_whole_number(event["step"]), self._last_s,
                                 parse_number(event.get("tokens_per_s")),
                                 parse_number(event.get("step_time_s"))))
            state.step, state.loss = parse_whole_number(event["step"]), parse_number(event.get("loss"))
            state.told = format_step(event, self._meters, comparable=self._is_comparable)
            state.headline |= {m.name: m.value(event) for m in self._meters if math.isfinite(m.value(event))}
            state.tokens, state.phase = parse_whole_number(event.get("tokens")), str(event.get("phase") or "")
        elif event["event"] == "skip" and "meters" in event:  # a round without an advantage
            state.step = parse_whole_number(event["step"])
            state.told = format_step(event, self._meters, comparable=False)
            state.headline |= {m.name: m.value(event) for m in self._meters if math.isfinite(m.value(event))}
        elif event["event"] == "eval":
            state.heldout_bits_per_byte = combine_bits_per_byte(event.get("heldout"))
        # only extensions test needles before training
        elif event["event"] == "needle" and event.get("when") == "before":
            state.stage = "extend"
        state.warnings += event["event"] == "warning"
        if is_incident(event) and event["event"] not in UNCOUNTED_INCIDENTS:
            state.incidents[event["event"]] = state.incidents.get(event["event"], 0) + 1

    def state(self, now_s: float | None = None) -> RunState:
        """Return the state at Unix time `now_s` (default: now). Raises `UserError`: damaged settings."""
        now_s = time.time() if now_s is None else now_s
        # copies, because reasons are added to the attempts
        attempts = [replace(attempt) for attempt in self._attempts.all]
        state = replace(self._so_far, incidents=dict(self._so_far.incidents))
        config = self._add_settings(state)
        # the loss of preferences adds up chosen and rejected responses
        has_loss = config is None or config.objective.name != "preference"
        state.heldout = self._heldout.text(self._meters, (lambda source: has_loss))
        state.last_event_age_s = now_s - self._last_s
        add_slurm_reasons(self._path, attempts)
        _set_state(state, attempts, self._recent, now_s)
        state.starts = [_build_start(a) for a in attempts]
        alive = state.state in ("running", "stopping", "silent", "waiting")
        if alive and state.state != "waiting":
            state.tokens_per_s, state.eta_s = _estimate_speed(state, self._recent, now_s)
        _find_checkpoint(state, now_s)
        return state

    def progress(self) -> str:
        """Format the step and its headline meters as one line."""
        return f"step {_format_progress(self._so_far)}{_format_meters(self._so_far)}"

    def _add_settings(self, state: RunState) -> RunConfig | None:
        config = RunFolder(self._path).config()
        if config is not None:
            state.recipe = state.recipe or config.recipe
            state.num_steps = state.num_steps or config.num_steps()
            if not state.stage:
                state.stage = ("extend" if _is_extension(self._path, config)
                               else objectives.BUILT_IN.get(config.objective.name, "pretrain"))
        return config


def read_run_state(path: Path, now_s: float | None = None) -> RunState:
    """Read a run folder; see `RunStateReader.state`."""
    reader = RunStateReader(path)
    for event in read_events(path / EVENTS):
        reader.add(event)
    return reader.state(now_s)


def _is_extension(path: Path, config: RunConfig) -> bool:
    """Return whether a run is an extension or an extension's stage."""
    return (path.parent.name == STAGES or (path / STAGES).is_dir() or bool(config.extend.stages)
            or bool(config.extend.gate.every_steps) or any(p.name == PHASE for p in config.data.phases))


def _build_start(attempt: Attempt) -> RunStart:
    start = attempt.start
    return RunStart(parse_number(start.get("time_s")), parse_whole_number(start.get("resumed_from")),
                    attempt.last_step, parse_whole_number(start.get("num_ranks")), attempt.outcome)


def _set_state(state: RunState, attempts: list[Attempt], recent: deque[tuple[int, float, float, float]],
               now_s: float) -> None:
    folder, holder = RunFolder(state.path), find_living_holder(state.path)
    outcome = attempts[-1].outcome if attempts else ""
    if holder is not None:
        step_times_s = [row[3] for row in recent if math.isfinite(row[3])]
        # relative to the step time: a step with a large model may take minutes
        patience_s = max(SILENT_AFTER_S,
                         SILENT_AFTER_STEPS * statistics.median(step_times_s) if step_times_s else 0.0)
        silent = state.last_event_age_s > patience_s
        state.state = "silent" if silent else "running"
        state.why = f"process {holder['pid']} on {holder['host']}" + (" is alive, but writes nothing"
                                                                      if silent else "")
        # the lock exists, but not the first event
        if not attempts or (outcome != UNFINISHED and outcome != COMPLETE):
            state.why += ", starting"
        elif attempts[-1].stopping and outcome == UNFINISHED:
            state.state, state.why = "stopping", f"{attempts[-1].stopping}; {state.why}"
    # after the lock: a process may continue a complete run
    elif (folder.path / COMPLETION).is_file():
        state.state, state.why = "complete", f"at step {(folder.completion() or {}).get('step')}"
    elif (failure := folder.failure()) is not None:
        state.state, state.why = "gate failed", failure.partition("\n")[0]
    # query Slurm only if the folder gives no answer
    elif job := describe_active_job(folder.path):
        state.state, state.why = "waiting", job
    elif outcome.startswith("stopped: "):
        state.state, state.why = "stopped", f"{outcome.removeprefix('stopped: ')}, everything is saved"
    elif attempts:
        state.state, state.why = ("ended",
                                  "killed, or its machine went down" if outcome == UNFINISHED else outcome)
    else:
        state.why = describe_job_end(folder.path)


def _estimate_speed(state: RunState, recent: deque[tuple[int, float, float, float]],
                    now_s: float) -> tuple[float, float]:
    """Return tokens per second and remaining seconds; NaN with fewer than two steps."""
    speeds = [row[2] for row in recent if math.isfinite(row[2])]
    tokens_per_s = statistics.median(speeds) if speeds else math.nan
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return tokens_per_s, math.nan
    # wall time, which includes evaluations and checkpoints
    wall_s = (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])
    # minus the time since the last event, so the figure falls between steps
    return tokens_per_s, max(0.0, (state.num_steps - state.step) * wall_s - (now_s - recent[-1][1]))


def _find_checkpoint(state: RunState, now_s: float) -> None:
    newest = latest_checkpoint(state.path / CHECKPOINTS_FOLDER)
    if newest is not None:
        state.checkpoint = f"{CHECKPOINTS_FOLDER}/{newest.name}"
        state.checkpoint_step = checkpoint_step(newest)
        state.checkpoint_age_s = now_s - newest.stat().st_mtime


def format_run_state(state: RunState) -> str:
    phase = f", phase {state.phase}" if state.phase else ""
    lines = [f"{state.path}: {', '.join(w for w in (state.stage, state.recipe) if w)}".rstrip(": "),
             f"  state       {state.state}{f' ({state.why})' if state.why else ''}"
             f"{_format_age(', last event', state.last_event_age_s)}",
             f"  step        {_format_progress(state)}{phase}{_format_meters(state)}"]
    if state.heldout:
        lines.append(f"  held-out    {state.heldout.replace('held-out ', '')}")
    if math.isfinite(state.tokens_per_s):
        remaining = f", {format_duration(state.eta_s)} left" if math.isfinite(state.eta_s) else ""
        lines.append(f"  speed       {state.tokens_per_s:,.0f} tokens/s{remaining}")
    lines.append(f"  checkpoint  {state.checkpoint or 'none yet'}{_format_age(',', state.checkpoint_age_s)}")
    counted = {"warning": state.warnings,
               **{INCIDENT_NAMES[kind]: count for kind, count in state.incidents.items()}}
    if incidents := ", ".join(f"{count:,} x {name}" for name, count in counted.items() if count):
        lines.append(f"  incidents   {incidents} (megatron-sov logs {shlex.quote(str(state.path))})")
    return "\n".join([*lines, *_format_starts(state)])


def _format_progress(state: RunState) -> str:
    share = f" ({state.step / state.num_steps:.0%})" if state.num_steps else ""
    return f"{state.step:,} of {state.num_steps:,}{share}"


def _format_meters(state: RunState) -> str:
    tokens = f", {format_count(state.tokens)} tokens" if state.tokens else ""
    return tokens + (f", {state.told}" if state.told else "")


def _format_age(event: str, age_s: float) -> str:
    return f"{event} {format_duration(max(0.0, age_s))} ago" if math.isfinite(age_s) else ""


def _format_starts(state: RunState) -> list[str]:
    rows = []
    for i, start in enumerate(state.starts, 1):
        began = (time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start.began_s))
                 if math.isfinite(start.began_s) else "–")
        reached = "no step" if start.to_step is None else f"step {start.to_step:,}"
        rows.append(f"    {i:>3}  {began}  from step {start.from_step:,} to {reached}, {start.num_ranks:,} "
                    f"process{'' if start.num_ranks == 1 else 'es'}: {start.outcome}")
    return [f"  starts      {len(state.starts):,}", *rows] if rows else []
