"""What a run folder says about its run, as values and in words; apart from `status`, whose `--help` needs
none of it."""

from __future__ import annotations

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
    CHECKPOINTS_FOLDER, RUN, check_folder_kind, checkpoint_step, latest_checkpoint)
from megatron_sov.runs.folder import (
    ATTEMPTS, COMPLETION, CONFIG, JOBS, ROUNDS, STAGES, SUBMISSIONS, RunFolder, list_submitted_jobs,
    read_last_log_line)
from megatron_sov.runs.lock import find_living_holder
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.figures import parse_number, parse_whole_number
from megatron_sov.runs.obs.history import COMPLETE, INCIDENT_NAMES, UNFINISHED, Attempt, Attempts, is_incident
from megatron_sov.runs.obs.meters import HeldoutFigures, format_step, read_headline
from megatron_sov.work.clusters import client

SUBMITTED = f"{JOBS}/{SUBMISSIONS}"
"""Where a run folder has the submissions of its jobs; the first file of a run that Slurm is to start."""
RECENT_STEPS = 50
"""Steps whose speed is the run's present one."""
SILENT_AFTER_STEPS, SILENT_AFTER_S = 10, 60.0
"""A living run is called silent after so many times its time of a step, and not before so many seconds."""
TOLD_ELSEWHERE = ("restart", "failure", "fault")
"""Incidents that are not counted: how each start ended stands beside it,
and faults on purpose were asked for."""
MAX_DEPTH = 3
"""How deep a folder is searched for runs."""


# What Slurm's side knows about a run: how its jobs' attempts ended, and whether a job of it waits or runs.


def explain(run: Path, attempts: list[Attempt]) -> None:
    """Give attempts that ended without a word, or by a signal,
    the reason that their job's script recorded."""
    # what the job's script knows: a rank that was killed cannot say why
    ends = [(parse_number(r.get("time_s")), str(r.get("outcome")), str(r.get("reason")))
            for r in read_events(run / JOBS / ATTEMPTS) if r["event"] == "end"]
    for i, attempt in enumerate(attempts):
        began_s = parse_number(attempt.start.get("time_s"))
        after_s = parse_number(attempts[i + 1].start.get("time_s")) if i + 1 < len(attempts) else float("inf")
        # the last end between this start and the next one is this attempt's
        for outcome, reason in [words for time_s, *words in ends if began_s <= time_s < after_s][-1:]:
            # the run's own words go first: a process that was killed could write none
            if attempt.outcome == UNFINISHED:
                attempt.outcome = f"{outcome}: {reason}"
            elif attempt.outcome.startswith("stopped: "):
                attempt.outcome += f" ({reason})"


def why_not_begun(run: Path) -> str:
    """Return how the last job of a run ended that never came to training, as its log says;
    empty where it has none."""
    jobs = list_submitted_jobs(run / JOBS)
    words = read_last_log_line(run / JOBS, jobs[-1]) if jobs else ""
    return f"job {jobs[-1]}: {words}" if words else ""


def living_job(run: Path) -> str:
    """Return which job of a run waits or runs, in words; empty where there is none,
    or Slurm does not answer."""
    try:
        states = client.read_active_states(list_submitted_jobs(run / JOBS))
    # a status has to work on machines without Slurm
    except UserError:
        return ""
    return next((f"job {job} is {state.lower()}" for job, state in states.items()), "")


@dataclass(frozen=True)
class RunStart:
    """One start of a run's processes."""

    began_s: float
    from_step: int
    to_step: int | None
    num_ranks: int
    outcome: str


@dataclass
class RunState:
    """A run as it is now."""

    path: Path
    stage: str = ""
    """pretrain, extend or sft."""
    recipe: str = ""
    phase: str = ""
    state: str = "not started"
    """running, stopping, silent, waiting, complete, stopped, gate failed, ended, not started."""
    why: str = ""
    """Why it is in that state, for people."""
    step: int = 0
    num_steps: int = 0
    tokens: int = 0
    loss: float = math.nan
    heldout_bits_per_byte: float = math.nan
    """Of the newest evaluation, over the bytes of all held-out sources."""
    told: str = ""
    """What the last step gave, by the objective's headline meters."""
    headline: dict[str, float] = field(default_factory=dict)
    """Headline meter -> its value in the last step that has it."""
    heldout: str = ""
    """Held-out figures before the first step and of the last evaluation."""
    tokens_per_s: float = math.nan
    """Median over the present attempt's last steps."""
    eta_s: float = math.nan
    """Seconds to the last step, at the speed of the last steps with all that came between them;
    NaN unless it runs."""
    checkpoint: str = ""
    """The newest one, from the run's folder."""
    checkpoint_step: int = 0
    checkpoint_age_s: float = math.nan
    last_event_age_s: float = math.nan
    starts: list[RunStart] = field(default_factory=list)
    warnings: int = 0
    incidents: dict[str, int] = field(default_factory=dict)
    """Kind of incident -> how many there were in the whole life of the run,
    but for those of `TOLD_ELSEWHERE`."""

    @property
    def restarts(self) -> int:
        """Starts after the first one."""
        return max(0, len(self.starts) - 1)


def find_runs(path: Path) -> list[Path]:
    """Return the run folders that a path means: itself with the stages of an extension, or earlier rounds,
    or those in a folder of runs.

    Raises:
        UserError: there is none.
    """
    if _is_run(path):
        before = [*(path / STAGES).glob("*"), *(path / ROUNDS).glob("*/run")]
        found = [*sorted(p for p in before if _is_run(p)), path]
    else:
        found = sorted({p for depth in range(1, MAX_DEPTH + 1) for name in (CONFIG, EVENTS, SUBMITTED)
                        for file in path.glob("/".join(["*"] * depth + [name]))
                        if _is_run(p := file.parents[name.count("/")])})
    if not found:
        check_folder_kind(path, (RUN,), "a run")
        raise UserError(f"{path}: holds no run ({CONFIG} and {EVENTS}), nor do the folders in it; "
                        "pass the folder of a training command's --run, or one that holds such folders")
    return found


def _is_run(path: Path) -> bool:
    """Return whether a folder holds a run's events, or settings or jobs of one that has no events yet."""
    if (path / EVENTS).is_file() or (path / SUBMITTED).is_file():
        return True
    try:
        return "recipe" in json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


class RunStateReader:
    """Takes a run's events in one by one, and says how the run stands whenever it is asked.

    Args:
        path: the run's folder; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._so_far = path, RunState(path)
        self._attempts = Attempts()
        self._recent: deque[tuple[int, float, float, float]] = deque(maxlen=RECENT_STEPS)
        self._last_s = math.nan
        self._meters, self._is_comparable = read_headline({})
        self._heldout = HeldoutFigures()

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        state = self._so_far
        self._attempts.add(event)
        self._heldout.add(event)
        self._last_s = parse_number(event.get("time_s"))
        if event["event"] == "run_start":
            # speeds of an earlier start say nothing about this one
            self._recent.clear()
            state.recipe = str(event.get("recipe") or state.recipe)
            state.num_steps = parse_whole_number(event.get("num_steps")) or state.num_steps
            state.step = parse_whole_number(event.get("resumed_from"))
            self._meters, self._is_comparable = read_headline(event)
        elif event["event"] == "step" and event.get("step") is not None:
            # of the last steps alone: the speed of now, whatever the curriculum did before
            self._recent.append((parse_whole_number(event["step"]), self._last_s,
                                 parse_number(event.get("tokens_per_s")),
                                 parse_number(event.get("step_time_s"))))
            state.step, state.loss = parse_whole_number(event["step"]), parse_number(event.get("loss"))
            state.told = format_step(event, self._meters, comparable=self._is_comparable)
            state.headline |= {m.name: m.value(event) for m in self._meters if math.isfinite(m.value(event))}
            state.tokens, state.phase = parse_whole_number(event.get("tokens")), str(event.get("phase") or "")
        elif event["event"] == "skip" and "meters" in event:  # a round of which no group learns
            state.step = parse_whole_number(event["step"])
            state.told = format_step(event, self._meters, comparable=False)
            state.headline |= {m.name: m.value(event) for m in self._meters if math.isfinite(m.value(event))}
        elif event["event"] == "eval":
            state.heldout_bits_per_byte = _overall_bits_per_byte(event.get("heldout"))
        elif event["event"] == "needle" and event.get("when") == "before":  # only an extension asks then
            state.stage = "extend"
        state.warnings += event["event"] == "warning"
        if is_incident(event) and event["event"] not in TOLD_ELSEWHERE:
            state.incidents[event["event"]] = state.incidents.get(event["event"], 0) + 1

    def state(self, now_s: float | None = None) -> RunState:
        """Return how the run stands.

        Args:
            now_s: Unix time; the current one by default.

        Raises:
            UserError: its settings are damaged.
        """
        now_s = time.time() if now_s is None else now_s
        # copies: reasons are added to them, and the next call adds its own
        attempts = [replace(attempt) for attempt in self._attempts.all]
        state = replace(self._so_far, incidents=dict(self._so_far.incidents))
        config = self._add_settings(state)
        # The loss of pairs counts chosen and rejected responses alike.
        has_loss = config is None or config.objective.name != "preference"
        state.heldout = self._heldout.text(self._meters, (lambda source: has_loss))
        state.last_event_age_s = now_s - self._last_s
        explain(self._path, attempts)
        _judge(state, attempts, self._recent, now_s)
        state.starts = [_start(a) for a in attempts]
        alive = state.state in ("running", "stopping", "silent", "waiting")
        if alive and state.state != "waiting":
            state.tokens_per_s, state.eta_s = _speed(state, self._recent, now_s)
        _find_checkpoint(state, now_s)
        return state

    def progress(self) -> str:
        """Return how far the run is and what its last step gave, on one line."""
        return f"step {_progress(self._so_far)}{_measured(self._so_far)}"

    def _add_settings(self, state: RunState) -> RunConfig | None:
        config = RunFolder(self._path).config()
        if config is not None:
            state.recipe = state.recipe or config.recipe
            state.num_steps = state.num_steps or config.num_steps()
            if not state.stage:
                state.stage = ("extend" if _extends(self._path, config)
                               else objectives.BUILT_IN.get(config.objective.name, "pretrain"))
        return config


def _overall_bits_per_byte(heldout: Any) -> float:
    """Return all bits over all bytes of an evaluation's sources; NaN if a source lacks a figure."""
    sources = [row for row in heldout.values() if isinstance(row, dict)] if isinstance(heldout, dict) else []
    bits = [parse_number(row.get("loss")) * parse_number(row.get("tokens")) for row in sources]
    num_bytes = [b / per_byte if (per_byte := parse_number(row.get("bits_per_byte"))) > 0 else math.nan
                 for b, row in zip(bits, sources, strict=True)]
    return sum(bits) / sum(num_bytes) if sum(num_bytes) > 0 else math.nan


def read_run_state(path: Path, now_s: float | None = None) -> RunState:
    """Read a run folder; arguments and errors as of `RunStateReader.state`."""
    reader = RunStateReader(path)
    for event in read_events(path / EVENTS):
        reader.add(event)
    return reader.state(now_s)


def _extends(path: Path, config: RunConfig) -> bool:
    """Return whether a run's settings, or its place, are those of an extension."""
    return (path.parent.name == STAGES or (path / STAGES).is_dir() or bool(config.extend.stages)
            or bool(config.extend.gate.every_steps) or any(p.name == PHASE for p in config.data.phases))


def _start(attempt: Attempt) -> RunStart:
    start = attempt.start
    return RunStart(parse_number(start.get("time_s")), parse_whole_number(start.get("resumed_from")),
                 attempt.last_step,
                 parse_whole_number(start.get("num_ranks")), attempt.outcome)


def _judge(state: RunState, attempts: list[Attempt], recent: deque[tuple[int, float, float, float]],
           now_s: float) -> None:
    """Say whether the run lives, and if not, why."""
    folder, holder = RunFolder(state.path), find_living_holder(state.path)
    outcome = attempts[-1].outcome if attempts else ""
    if holder is not None:
        step_times_s = [row[3] for row in recent if math.isfinite(row[3])]
        # by its own steps: a step of a large model may take minutes
        patience_s = max(SILENT_AFTER_S,
                         SILENT_AFTER_STEPS * statistics.median(step_times_s) if step_times_s else 0.0)
        silent = state.last_event_age_s > patience_s
        state.state = "silent" if silent else "running"
        state.why = f"process {holder['pid']} on {holder['host']}" + (" lives, and writes nothing"
                                                                      if silent else "")
        # the lock is held, and no event of this start is written yet
        if not attempts or (outcome != UNFINISHED and outcome != COMPLETE):
            state.why += ", starting"
        elif attempts[-1].stopping and outcome == UNFINISHED:
            state.state, state.why = "stopping", f"{attempts[-1].stopping}; {state.why}"
    # the lock comes first: a living process may be writing on a run that was complete
    elif (folder.path / COMPLETION).is_file():
        state.state, state.why = "complete", f"at step {(folder.completion() or {}).get('step')}"
    elif (failure := folder.failure()) is not None:
        state.state, state.why = "gate failed", failure.partition("\n")[0]
    elif folder.held() is not None:
        state.state, state.why = "waiting", "its last checkpoint is not judged yet"
    # Slurm is asked only where the folder alone says nothing
    elif job := living_job(folder.path):
        state.state, state.why = "waiting", job
    elif outcome.startswith("stopped: "):
        state.state, state.why = "stopped", f"{outcome.removeprefix('stopped: ')}, everything is saved"
    elif attempts:
        state.state, state.why = ("ended",
                                  "killed, or its machine went down" if outcome == UNFINISHED else outcome)
    else:
        state.why = why_not_begun(folder.path)


def _speed(state: RunState, recent: deque[tuple[int, float, float, float]],
           now_s: float) -> tuple[float, float]:
    """Return tokens a second and the seconds to the last step; NaN without enough steps."""
    speeds = [row[2] for row in recent if math.isfinite(row[2])]
    tokens_per_s = statistics.median(speeds) if speeds else math.nan
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return tokens_per_s, math.nan
    # wall time between steps, with evaluations and checkpoints in it, and not the steps' own time
    wall_s = (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])
    # less what has passed since the last event, or the figure would stand still between steps
    return tokens_per_s, max(0.0, (state.num_steps - state.step) * wall_s - (now_s - recent[-1][1]))


def _find_checkpoint(state: RunState, now_s: float) -> None:
    newest = latest_checkpoint(state.path / CHECKPOINTS_FOLDER)
    if newest is not None:
        state.checkpoint = f"{CHECKPOINTS_FOLDER}/{newest.name}"
        state.checkpoint_step = checkpoint_step(newest)
        state.checkpoint_age_s = now_s - newest.stat().st_mtime


# The same in words, for a terminal.

def format_run_state(state: RunState) -> str:
    lines = [f"{state.path}: {', '.join(w for w in (state.stage, state.recipe) if w)}".rstrip(": "),
             f"  state       {state.state}{f' ({state.why})' if state.why else ''}"
             f"{_ago(', last event', state.last_event_age_s)}",
             "  step        "
             f"{_progress(state)}{f', phase {state.phase}' if state.phase else ''}{_measured(state)}"]
    if state.heldout:
        lines.append(f"  held-out    {state.heldout.replace('held-out ', '')}")
    if math.isfinite(state.tokens_per_s):
        left = f", {format_duration(state.eta_s)} left" if math.isfinite(state.eta_s) else ""
        lines.append(f"  speed       {state.tokens_per_s:,.0f} tokens/s{left}")
    lines.append(f"  checkpoint  {state.checkpoint or 'none yet'}{_ago(',', state.checkpoint_age_s)}")
    counted = {"warning": state.warnings,
               **{INCIDENT_NAMES[kind]: count for kind, count in state.incidents.items()}}
    if told := ", ".join(f"{count:,} x {name}" for name, count in counted.items() if count):
        lines.append(f"  incidents   {told} (megatron-sov logs {shlex.quote(str(state.path))})")
    return "\n".join([*lines, *_starts(state)])


def _progress(state: RunState) -> str:
    share = f" ({state.step / state.num_steps:.0%})" if state.num_steps else ""
    return f"{state.step:,} of {state.num_steps:,}{share}"


def _measured(state: RunState) -> str:
    tokens = f", {format_count(state.tokens)} tokens" if state.tokens else ""
    return tokens + (f", {state.told}" if state.told else "")


def _ago(before: str, age_s: float) -> str:
    return f"{before} {format_duration(max(0.0, age_s))} ago" if math.isfinite(age_s) else ""


def _starts(state: RunState) -> list[str]:
    rows = []
    for i, start in enumerate(state.starts, 1):
        began = (time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start.began_s))
                 if math.isfinite(start.began_s) else "–")
        reached = "no step" if start.to_step is None else f"step {start.to_step:,}"
        rows.append(f"    {i:>3}  {began}  from step {start.from_step:,} to {reached}, {start.num_ranks:,} "
                    f"process{'' if start.num_ranks == 1 else 'es'}: {start.outcome}")
    return [f"  starts      {len(state.starts):,}", *rows] if rows else []
