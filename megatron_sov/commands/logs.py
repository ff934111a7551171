"""`megatron-sov logs RUN [--rank N] [--grep PATTERN] [--tail N] [--follow]`."""

from __future__ import annotations

import argparse
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.errors import UserError
from megatron_sov.settings import Flag, NotNegativeInt, add_options, read_options

if TYPE_CHECKING:
    from megatron_sov.watch.logs import Line, Tail

LOOK_EVERY_S = 0.5
ENDED_AFTER_S = 5.0
"""How long a run that has ended must have written nothing before it is followed no more."""


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Options of `logs`."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    rank: tuple[int, ...] = ()
    """Only what this rank wrote, in all its starts; may be given several times."""
    grep: Annotated[str | None, Flag(value="PATTERN")] = None
    """Only lines in which this regular expression is found."""
    tail: NotNegativeInt = 0
    """Only the last N lines of each file (default: all)."""
    follow: bool = False
    """Go on with new lines until the run has ended."""


add_arguments = partial(add_options, cls=LogsOptions)


def run(typed: argparse.Namespace) -> int:
    """Print a run's lines, each marked with start and rank.

    Raises:
        UserError: the folder holds no run, the pattern is none, or no file is the rank's.
    """
    args = read_options(LogsOptions, typed)
    from megatron_sov.watch.logs import log_files
    from megatron_sov.watch.state import find_runs

    if find_runs(args.run)[-1] != args.run:
        raise UserError(f"{args.run}: holds runs and is none; name one of them: "
                        f"{', '.join(map(str, find_runs(args.run)))}")
    try:
        wanted = re.compile(args.grep or "")
    except re.error as e:
        raise UserError(f"--grep {args.grep}: is no regular expression ({e}); "
                        "put a backslash before its signs") from None
    files = log_files(args.run)
    ranks = sorted({f.rank for f in files if f.rank is not None})
    if args.rank and not set(args.rank) & set(ranks) and not args.follow:
        known = (f"ranks with files: {ranks[0]} to {ranks[-1]}" if ranks
                 else "a run on one machine writes to its terminal")
        raise UserError(f"--rank {args.rank[0]}: no file of {args.run} is this rank's ({known}); "
                        "leave --rank out")
    try:
        _print(_Reader(args.run, set(args.rank), args.tail).everything(args.follow), wanted)
    except KeyboardInterrupt:
        return 0
    return 0


def _print(lines: Iterable[Line], wanted: re.Pattern[str]) -> None:
    for line in lines:
        if wanted.search(line.text):
            print(f"[{line.label}] {line.text}", flush=True)


class _Reader:
    """Reads all files of a run, and finds those that come later."""

    def __init__(self, run: Path, ranks: set[int], tail_lines: int) -> None:
        self._run, self._ranks, self._tail_lines = run, ranks, tail_lines
        self._tails: dict[Path, Tail] = {}

    def everything(self, follow: bool) -> Iterator[Line]:
        """Yield the lines that there are, then, if asked, new ones until the run has ended."""
        yield from self._look(first=True, whole=not follow)
        quiet_since_s = time.monotonic()
        while follow:
            time.sleep(LOOK_EVERY_S)
            for line in self._look():
                quiet_since_s = time.monotonic()
                yield line
            if time.monotonic() - quiet_since_s > ENDED_AFTER_S and self._has_ended():
                yield from self._look(whole=True)
                return

    def _look(self, first: bool = False, whole: bool = False) -> Iterator[Line]:
        from megatron_sov.watch.logs import Tail, log_files

        for file in log_files(self._run):
            if not self._ranks or file.rank in self._ranks:
                tail = self._tails.setdefault(file.path, Tail(file))
                yield from self._last(tail.lines(whole), first)

    def _last(self, lines: Iterator[Line], first: bool) -> Iterable[Line]:
        return deque(lines, self._tail_lines) if first and self._tail_lines > 0 else lines

    def _has_ended(self) -> bool:
        from megatron_sov.watch.state import read_state

        return read_state(self._run).state not in ("running", "silent", "waiting")
