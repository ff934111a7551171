"""What srun says about ranks that failed: which one was first, where, and how."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.errors import ExitCode

LINE = re.compile(r"^srun: error: (?P<node>[^\s:]+): tasks? (?P<ranks>[\d,\-]+): (?P<how>.*)$", re.MULTILINE)
EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
LAST_LINES = 15


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
