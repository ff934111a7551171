"""`megatron-sov logs RUN [--rank N] [--tail N] [--follow]`: the log files of a run, in order of its starts,
and their lines, now and as they grow.

Under Slurm every start of a job writes `RUN/slurm/logs/<job>-<restart>/`: a file for each rank, srun's own
words, and the check of the nodes; the job's script writes `RUN/slurm/<job>.log`; jobs that judge an export do
the same beside it.  Processes that hung leave their stacks in `RUN/hang`, exports and evaluations beside
training write logs of their own.  What a run on one machine tells goes to its terminal; the events, which
every run has, tell of warnings, stops and restarts.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, NotNegativeInt, add_options, read_options
from megatron_sov.runs.obs.events import EVENTS, GrowingFile, parse_event
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.history import describe_event

JOB_LOGS = "slurm"
OF_A_RANK = re.compile(r"rank-0*(\d+)\.(?:log|txt)$")
OF_AN_ATTEMPT = re.compile(r"^(\d+(?:_\d+)?)-(\d+)$")

@dataclass(frozen=True)
class LogFile:
    """One log file."""

    path: Path
    label: str
    """What its lines are marked with: attempt and process."""
    rank: int | None
    """Whose it is; None: no rank's."""


@dataclass(frozen=True)
class LogLine:
    """One line of one log file."""

    label: str
    text: str


def list_log_files(run: Path) -> list[LogFile]:
    """Return a run's log files: job scripts and attempts in the order of their starts,
    then what was written beside."""
    found = _of_jobs(run / JOB_LOGS, "")
    found += [LogFile(p, f"{p.name.partition('-rank-')[0]} {_who(p)} hangs", _rank(p))
              for p in sorted(run.glob("hang/*.txt"))]
    # hidden logs of what runs beside training; they go when an export is complete
    found += [LogFile(p, f"{folder} {p.stem.removeprefix('.')}", None)
              for folder in ("exports", "evaluations")
              for p in sorted(run.glob(f"{folder}/.*.log"), key=_numbers_of)]
    for records in sorted(run.glob("exports/step-*.slurm"), key=_numbers_of):
        found += _of_jobs(records, f"{records.stem} ")
    return [*found, LogFile(run / EVENTS, "events", None)]


def _of_jobs(records: Path, before: str) -> list[LogFile]:
    """Return the log files of the jobs whose records lie in a folder; their labels begin with `before`."""
    found = [LogFile(p, f"{before}job {p.stem}", None)
             for p in sorted(records.glob("*.log"), key=_numbers_of)]
    for attempt in sorted((p for p in records.glob("logs/*") if OF_AN_ATTEMPT.match(p.name)),
                          key=lambda p: _numbers(p.name)):
        job, _, restart = attempt.name.partition("-")
        label = f"{before}job {job}" + (f" start {int(restart) + 1}" if restart != "0" else "")
        found += [LogFile(p, f"{label} {'preflight ' if p.parent != attempt else ''}{_who(p)}", _rank(p))
                  for p in sorted([*attempt.glob("preflight/*.log"), *attempt.glob("*.log")],
                                  key=_numbers_of)]
    return found


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _numbers_of(file: Path) -> tuple[bool, bool, tuple[int, ...], str]:
    """Order the files of one attempt: the check of the nodes first, then srun's words, then the ranks."""
    return file.parent.name != "preflight", _rank(file) is not None, _numbers(file.name), file.name


def _rank(file: Path) -> int | None:
    found = OF_A_RANK.search(file.name)
    return int(found[1]) if found else None


def _who(file: Path) -> str:
    rank = _rank(file)
    return file.stem if rank is None else f"rank {rank}"


def _told(raw: bytes) -> str | None:
    """Return what a line of the events says to people, or None: most are for programs."""
    event = parse_event(raw)
    words = None if event is None else describe_event(event)
    if event is None or words is None:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(parse_number(event.get("time_s") or 0)))
    return f"{when} UTC step {event.get('step', event.get('resumed_from', 0))}: {words}"


class LogTail:
    """Reads lines of one log file as it grows, as people read them."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._growing = GrowingFile(file.path)

    def lines(self, whole: bool = False) -> Iterator[LogLine]:
        """Yield the lines that are complete and new; of the events, those that say something to people.

        Args:
            whole: also the last one, which has no end yet.
        """
        for raw in self._growing.lines(whole):
            # of a progress bar, what it showed last
            said = (_told(raw) if self.file.path.name == EVENTS
                    else raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2])
            if said is not None:
                yield LogLine(self.file.label, "".join(c if c.isprintable() or c == "\t" else "·"
                                                       for c in said))


LOOK_EVERY_S = 0.5
ENDED_AFTER_S = 5.0
"""How long a run that has ended must have written nothing before it is followed no more."""


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Print the logs of runs, and follow them."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    rank: tuple[int, ...] = ()
    """Only what this rank wrote, in all its starts; may be given several times."""
    tail: NotNegativeInt = 0
    """Only the last N lines of each file (default: all)."""
    follow: bool = False
    """Go on with new lines until the run has ended."""


add_arguments = partial(add_options, cls=LogsOptions)


def run(typed: argparse.Namespace) -> int:
    """Print a run's lines, each marked with start and rank.

    Raises:
        UserError: the folder holds no run, or no file is the rank's.
    """
    args = read_options(LogsOptions, typed)
    from megatron_sov.commands.operate.run_state import find_runs

    if find_runs(args.run)[-1] != args.run:
        raise UserError(f"{args.run}: holds runs and is none; name one of them: "
                        f"{', '.join(map(str, find_runs(args.run)))}")
    files = list_log_files(args.run)
    ranks = sorted({f.rank for f in files if f.rank is not None})
    if args.rank and not set(args.rank) & set(ranks) and not args.follow:
        known = (f"ranks with files: {ranks[0]} to {ranks[-1]}" if ranks
                 else "a run on one machine writes to its terminal")
        raise UserError(f"--rank {args.rank[0]}: no file of {args.run} is this rank's ({known}); "
                        "leave --rank out")
    try:
        for line in _Reader(args.run, set(args.rank), args.tail).everything(args.follow):
            print(f"[{line.label}] {line.text}", flush=True)
    except KeyboardInterrupt:
        pass
    return 0


class _Reader:
    """Reads all files of a run, and finds those that come later."""

    def __init__(self, run: Path, ranks: set[int], tail_lines: int) -> None:
        self._run, self._ranks, self._tail_lines = run, ranks, tail_lines
        # a tail for each file keeps its offset, so no line is shown twice
        self._tails: dict[Path, LogTail] = {}

    def everything(self, follow: bool) -> Iterator[LogLine]:
        """Yield the lines that there are, then, if asked, new ones until the run has ended."""
        # without --follow the last line is shown even if it is not complete
        yield from self._look(first=True, whole=not follow)
        quiet_since_s = time.monotonic()
        while follow:
            time.sleep(LOOK_EVERY_S)
            for line in self._look():
                quiet_since_s = time.monotonic()
                yield line
            # the state costs a read of all events, so it is asked only when nothing comes any more
            if time.monotonic() - quiet_since_s > ENDED_AFTER_S and self._has_ended():
                yield from self._look(whole=True)
                return

    def _look(self, first: bool = False, whole: bool = False) -> Iterator[LogLine]:
        # listed again at each look: a restart brings new files
        for file in list_log_files(self._run):
            if not self._ranks or file.rank in self._ranks:
                tail = self._tails.setdefault(file.path, LogTail(file))
                lines = tail.lines(whole)
                yield from deque(lines, self._tail_lines) if first and self._tail_lines > 0 else lines

    def _has_ended(self) -> bool:
        from megatron_sov.commands.operate.run_state import read_run_state

        return read_run_state(self._run).state not in ("running", "silent", "waiting")
