"""Runs `megatron-sov logs`: lists a run's log files in start order and prints their lines.

Under Slurm each start of a job writes `RUN/slurm/logs/<job>-<restart>/`: a file per rank, srun's output and
the preflight check of the nodes. The job's script writes `RUN/slurm/<job>.log`; jobs that evaluate an export
write the same files next to the export. Hung processes write their stacks to `RUN/hang`.
"""

import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, stop_check
from megatron_sov.commands.operate.runs.logs import LogsOptions
from megatron_sov.commands.operate.runs.run_state import find_runs, read_run_state
from megatron_sov.runs.obs.events import EVENTS, GrowingFile, parse_event
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.history import describe_event

JOB_LOGS = "slurm"
RANK_FILE = re.compile(r"rank-0*(\d+)\.(?:log|txt)$")
ATTEMPT_FOLDER = re.compile(r"^(\d+(?:_\d+)?)-(\d+)$")
POLL_S = 0.5
SILENCE_S = 5.0
"""Seconds without a new line before --follow checks whether the run has ended."""


@dataclass(frozen=True)
class LogFile:
    path: Path
    label: str
    """Attempt and process: prefix of the printed lines."""
    rank: int | None
    """None: not a rank's file."""


@dataclass(frozen=True)
class LogLine:
    label: str
    text: str


def print_logs(options: LogsOptions) -> None:
    """Print a run's lines with start and rank. Raises `UserError`: no run, or no file of --rank."""
    runs = find_runs(options.run)
    if runs[-1] != options.run:
        raise UserError(f"{options.run}: contains runs, but is not a run; pass one of "
                        f"{', '.join(map(str, runs))}",
                        Fix(words={str(options.run): str(max(runs, key=os.path.getmtime))}))
    stop_check()
    ranks = sorted({file.rank for file in list_log_files(options.run) if file.rank is not None})
    if options.rank and not set(options.rank) & set(ranks) and not options.follow:
        advice = (f"ranks with files: {ranks[0]} to {ranks[-1]}" if ranks
                  else "a run on one machine writes to its terminal")
        raise UserError(f"--rank {options.rank[0]}: {options.run} has no file from this rank ({advice}); "
                        "leave --rank out")
    try:
        lines = RunLogReader(options.run, set(options.rank), options.tail).iter_lines(options.follow)
        is_empty = True
        for line in lines:
            is_empty = False
            print(f"[{line.label}] {line.text}", flush=True)
        if is_empty:
            print(f"{options.run}: has no log files: a run on one machine writes to its terminal; "
                  f"`megatron-sov status {options.run}` shows its state", file=sys.stderr)
    except KeyboardInterrupt:
        pass


class RunLogReader:
    """Reads a run's log files, including files that appear later."""

    def __init__(self, run: Path, ranks: set[int], tail_lines: int) -> None:
        self._run, self._ranks, self._tail_lines = run, ranks, tail_lines
        # each `LogTail` stores its offset, so no line is printed twice
        self._tails: dict[Path, LogTail] = {}

    def iter_lines(self, follow: bool) -> Iterator[LogLine]:
        """Yield the existing lines; with `follow`, also new lines until the run ends."""
        # without --follow, print a last line without a newline too
        yield from self._read_new_lines(first=True, whole=not follow)
        last_line_s = time.monotonic()
        while follow:
            time.sleep(POLL_S)
            for line in self._read_new_lines():
                last_line_s = time.monotonic()
                yield line
            # reading the state reads all events: only after a silence
            if time.monotonic() - last_line_s > SILENCE_S and self._has_ended():
                yield from self._read_new_lines(whole=True)
                return

    def _read_new_lines(self, first: bool = False, whole: bool = False) -> Iterator[LogLine]:
        # list the files again: a restart adds files
        for file in list_log_files(self._run):
            if not self._ranks or file.rank in self._ranks:
                tail = self._tails.setdefault(file.path, LogTail(file))
                lines = tail.lines(whole)
                yield from deque(lines, self._tail_lines) if first and self._tail_lines > 0 else lines

    def _has_ended(self) -> bool:
        return read_run_state(self._run).state not in ("running", "silent", "waiting")


class LogTail:
    """Reads new lines from one log file as printable text."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._growing = GrowingFile(file.path)

    def lines(self, whole: bool = False) -> Iterator[LogLine]:
        """Yield complete new lines; from events.jsonl, only events with a text for people. `whole`: also
        yield a last line without a newline."""
        for raw in self._growing.lines(whole):
            if self.file.path.name == EVENTS:
                text = _format_event(raw)
            else:
                # a progress bar separates states by carriage returns: print the last state
                text = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            if text is not None:
                printable = "".join(c if c.isprintable() or c == "\t" else "·" for c in text)
                yield LogLine(self.file.label, printable)


def list_log_files(run: Path) -> list[LogFile]:
    """Return a run's logs: job scripts and attempts in start order, hangs, exports, evaluations, events."""
    files = _list_job_files(run / JOB_LOGS, "")
    for path in sorted(run.glob("hang/*.txt")):
        step = path.name.partition("-rank-")[0]
        files.append(LogFile(path, f"{step} {_format_process(path)} hangs", _parse_rank(path)))
    # logs of background exports and evaluations; deleted once the export is complete
    for folder in ("exports", "evaluations"):
        files += [LogFile(path, f"{folder} {path.stem.removeprefix('.')}", None)
                  for path in sorted(run.glob(f"{folder}/.*.log"), key=_get_order)]
    for records in sorted(run.glob("exports/step-*.slurm"), key=_get_order):
        files += _list_job_files(records, f"{records.stem} ")
    return [*files, LogFile(run / EVENTS, "events", None)]


def _list_job_files(records: Path, prefix: str) -> list[LogFile]:
    """Return the jobs' log files from a folder with records; `prefix` begins their labels."""
    files = [LogFile(path, f"{prefix}job {path.stem}", None)
             for path in sorted(records.glob("*.log"), key=_get_order)]
    attempts = [folder for folder in records.glob("logs/*") if ATTEMPT_FOLDER.match(folder.name)]
    for attempt in sorted(attempts, key=lambda folder: _parse_numbers(folder.name)):
        job, _, restart = attempt.name.partition("-")
        label = f"{prefix}job {job}" + (f" start {int(restart) + 1}" if restart != "0" else "")
        for path in sorted([*attempt.glob("preflight/*.log"), *attempt.glob("*.log")], key=_get_order):
            check = "preflight " if path.parent != attempt else ""
            files.append(LogFile(path, f"{label} {check}{_format_process(path)}", _parse_rank(path)))
    return files


def _parse_numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _get_order(file: Path) -> tuple[bool, bool, tuple[int, ...], str]:
    """Return the sort key for an attempt's files: preflight checks, srun's output, then ranks."""
    is_rank = _parse_rank(file) is not None
    return file.parent.name != "preflight", is_rank, _parse_numbers(file.name), file.name


def _parse_rank(file: Path) -> int | None:
    match = RANK_FILE.search(file.name)
    return int(match[1]) if match else None


def _format_process(file: Path) -> str:
    rank = _parse_rank(file)
    return file.stem if rank is None else f"rank {rank}"


def _format_event(raw: bytes) -> str | None:
    """Format a line from events.jsonl; None for events without a text for people."""
    event = parse_event(raw)
    text = None if event is None else describe_event(event)
    if event is None or text is None:
        return None
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(parse_number(event.get("time_s") or 0)))
    return f"{clock} UTC step {event.get('step', event.get('resumed_from', 0))}: {text}"
