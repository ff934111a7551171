"""The log files of a run: which there are, in order of the run's starts, and their lines,
now and as they grow.

Under Slurm every start of a job writes `RUN/slurm/logs/<job>-<restart>/`: a file for each rank, srun's own
words, and the check of the nodes; the job's script writes `RUN/slurm/<job>.log`; jobs that judge an export do
the same beside it.  Processes that hung leave their stacks in `RUN/hang`, exports and evaluations beside
training write logs of their own.  What a run on one machine tells goes to its terminal; the events, which
every run has, tell of warnings, stops and restarts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.obs.events import EVENTS
from megatron_sov.obs.incidents import KINDS, describe, is_incident

JOB_LOGS = "slurm"
OF_A_RANK = re.compile(r"rank-0*(\d+)\.(?:log|txt)$")
OF_AN_ATTEMPT = re.compile(r"^(\d+(?:_\d+)?)-(\d+)$")
TOLD = {"run_start": "the run starts from step {resumed_from}, with {num_ranks} rank(s)",
        "stop": "the run stops: {reason}", "run_end": "the run is complete"}
"""Event -> how it is told where it has no `text` of its own and is no incident."""
READ_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class LogFile:
    """One log file."""

    path: Path
    label: str
    """What its lines are marked with: attempt and process."""
    rank: int | None
    """Whose it is; None: no rank's."""


@dataclass(frozen=True)
class Line:
    """One line of one log file."""

    label: str
    text: str


def log_files(run: Path) -> list[LogFile]:
    """Return a run's log files: job scripts and attempts in the order of their starts,
    then what was written beside."""
    found = _of_jobs(run / JOB_LOGS, "")
    found += [LogFile(p, f"{p.name.partition('-rank-')[0]} {_who(p)} hangs", _rank(p))
              for p in sorted(run.glob("hang/*.txt"))]
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


def _told(raw: str) -> str | None:
    """Return what a line of the events says to people, or None: most are for programs."""
    try:
        event = json.loads(raw)
        kind, step = event["event"], event.get("step", event.get("resumed_from", 0))
    except (ValueError, TypeError, KeyError):
        return None
    known = {"reason": "no reason given", "num_ranks": "?", "resumed_from": 0, **event}
    words = describe(event) if is_incident(event) else event.get("text") or event.get("error")
    if words is None and kind not in TOLD:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(event.get("time_s") or 0)))
    return f"{when} UTC step {step}: " + (TOLD[kind].format_map(known) if words is None
                                          else f"{KINDS.get(kind, kind)}: {words}")


class Tail:
    """Reads whole lines of one file as it grows."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._offset = 0
        self._rest = b""

    def lines(self, whole: bool = False) -> Iterator[Line]:
        """Yield the lines that are complete and new; of the events, those that say something to people.

        Args:
            whole: also the last one, which has no end yet.
        """
        for raw in self._raw(whole):
            # of a progress bar, what it showed last
            text = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            said = _told(text) if self.file.path.name == EVENTS else text
            if said is not None:
                yield Line(self.file.label, "".join(c if c.isprintable() or c == "\t" else "·" for c in said))

    def _raw(self, whole: bool) -> Iterator[bytes]:
        try:
            with open(self.file.path, "rb") as f:
                f.seek(self._offset)
                while block := f.read(READ_BYTES):
                    self._offset += len(block)
                    *complete, self._rest = (self._rest + block).split(b"\n")
                    yield from complete
                    if len(self._rest) > LONGEST_LINE_BYTES:  # a file that is no text
                        yield self._rest
                        self._rest = b""
        except OSError:  # it was deleted, as an export's log is when the export is there
            return
        if whole and self._rest:
            rest, self._rest = self._rest, b""
            yield rest
