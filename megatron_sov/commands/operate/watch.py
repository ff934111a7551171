"""`megatron-sov watch PATH [PATH ...] [--http [HOST:]PORT]`: runs and work on rows while they go on, in the
terminal or as a page that renews itself."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Le

from megatron_sov.base.errors import UserError, how_to_install, visible
from megatron_sov.base.settings import Flag, add_options, read_options

LOCAL = "127.0.0.1"
CLEAR = "\x1b[H\x1b[J"
"""Moves a terminal's cursor to the first place and clears what is below."""
MAX_SIDE_BY_SIDE = 8
"""Runs of one page, one for each colour."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Look at runs and at work on rows while they go on."""

    paths: Annotated[tuple[Path, ...], Flag("PATH")]
    """Run folders, or outputs of sov-data run, sov-data synth and other commands on rows; they need not be
    there yet."""
    http: Annotated[str | None, Flag(value="[HOST:]PORT")] = None
    """Show a page at this address in place of a table in the terminal (host: 127.0.0.1; port 0: any)."""
    every: Annotated[float, Gt(0), Le(3600)] = 2.0
    """Seconds between two looks of the table."""


add_arguments = partial(add_options, cls=WatchOptions)


def run(typed: argparse.Namespace) -> int:
    """Show what is asked for until it is complete, or until Ctrl-C.

    Raises:
        UserError: a path is a file, the address is none, or it cannot be listened on.
    """
    args = read_options(WatchOptions, typed)
    paths = list(dict.fromkeys(args.paths))
    if files := [path for path in paths if path.is_file()]:
        raise UserError(f"{files[0]}: is a file; name a run folder, or the --output of a command on rows")
    if len(paths) > MAX_SIDE_BY_SIDE:
        raise UserError(f"watch: shows at most {MAX_SIDE_BY_SIDE} folders at a time, and there are "
                        f"{len(paths)}; name fewer")
    if args.http is None:
        return _in_terminal(paths, args.every)
    host, port = address_of(args.http)
    try:
        from megatron_sov.publish.live.server import LiveBoard, LivePage
    except ModuleNotFoundError as e:
        if e.name != "aiohttp":
            raise
        raise UserError("aiohttp, which speaks HTTP, is not installed for this Python; "
                        f"{how_to_install('serve')}") from None
    from megatron_sov.commands.operate.run_state import RunStateReader

    page = LivePage(LiveBoard(paths, RunStateReader), host, port)
    page.serve(lambda: print(_where(page.url, host, page.port), flush=True))
    return 0


def address_of(typed: str) -> tuple[str, int]:
    """Return host and port of [HOST:]PORT.

    Raises:
        UserError: it is no such address.
    """
    host, _, port = typed.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"--http {typed}: the port must be a number from 0 to 65535; type --http 8080, or "
                        "--http HOST:8080")
    return host.strip("[]") or LOCAL, int(port)


def _where(url: str, host: str, port: int) -> str:
    """Return how the page is reached: here, and from another machine."""
    import getpass
    import socket

    if host not in (LOCAL, "localhost", "::1"):
        return (f"{url}\nAnyone who has this address can read the page, and the connection is not encrypted. "
                "Ctrl-C ends it.")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        user = "USER"
    return (f"{url}\nFrom another machine: ssh -L {port}:{host}:{port} {user}@{socket.gethostname()}\n"
            "Then open the same address there. Ctrl-C ends it.")


def _in_terminal(paths: Sequence[Path], every_s: float) -> int:
    """Show a table that renews itself, until all is complete."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    shown = ""
    try:
        while True:
            began_s = time.monotonic()
            text, is_over = _table(paths)
            if is_terminal:
                print(CLEAR + text, flush=True)
            elif text != shown:
                print(text, flush=True)
            shown = text
            if is_over:
                return 0
            # reading long runs again and again must not take a core
            time.sleep(max(every_s, 5 * (time.monotonic() - began_s)))
    except KeyboardInterrupt:
        return 0


def _table(paths: Sequence[Path]) -> tuple[str, bool]:
    """Return how all stand, and whether all is complete."""
    from megatron_sov.commands.operate.run_state import in_full, read_state
    from megatron_sov.commands.operate.run_table import format_runs
    from megatron_sov.publish.live.watched import WatchedWork, is_work

    lines, over = [], []
    states = [read_state(path) for path in paths if path.is_dir() and not is_work(path)]
    if states:
        lines.append(in_full(states[0]) if len(paths) == 1 else format_runs(states))
        over += [state.state == "complete" for state in states]
    for path in paths:
        if is_work(path):
            work = WatchedWork(path)
            work.look()
            of = f" of {work.num_items:,}" if work.num_items else ""
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in work.rejected.most_common(3))
            lines.append(f"{path}: {'complete' if work.is_complete else 'at work'}, {work.num_done:,}{of} "
                         f"{work.unit} done, {work.kept:,} rows kept, {work.rejected.total():,} rejected"
                         + (f" ({reasons})" if reasons else ""))
            over.append(work.is_complete)
        elif not path.is_dir():
            lines.append(f"{path}: nothing is there yet")
            over.append(False)
    return visible("\n".join(lines)), all(over)
