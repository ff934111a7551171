"""Limits, programs and outcomes for the sandbox."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "error", "timeout", "memory", "output", "killed", "refused", "infrastructure"]
FILE_NAME = "program.py"
"""Source file in the program's working directory."""
MAX_PROGRAM_BYTES = 16 << 20
"""Largest `source`, `files` and `stdin` together."""
MAX_FILES = 1000
MIN_OPEN_FILES = 8


@dataclass(frozen=True)
class Limits:
    """Limits for a program and its child processes."""

    wall_s: float = 10
    """Clock time in seconds, without `starved_s`."""
    cpu_s: float = 10
    """Processor time in seconds."""
    memory_bytes: int = 512 << 20
    """Address space per process (RLIMIT_AS), and total resident memory."""
    processes: int = 16
    """Processes and threads at a time, including the first."""
    files: int = 64
    """Open files per process (RLIMIT_NOFILE)."""
    file_bytes: int = 16 << 20
    """File size (RLIMIT_FSIZE); in `namespaces` the total size."""
    output_bytes: int = 1 << 20
    """Size of standard output; standard error has the same limit."""

    def problems(self) -> list[str]:
        problems = [f"{name} = {value} must be positive and finite" for name, value in vars(self).items()
                    if not (value > 0 and math.isfinite(value))]
        if self.files < MIN_OPEN_FILES:
            problems.append(f"files = {self.files} must be at least {MIN_OPEN_FILES}: the interpreter opens "
                            "files itself")
        return problems


@dataclass(frozen=True)
class Program:
    """A Python program with input and files."""

    source: str
    stdin: str = ""
    """Text for standard input."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Relative path -> text, in the program's working directory."""

    def find_problem(self) -> str:
        """Return the reason why the sandbox cannot run the program; "" for a valid program."""
        if len(self.files) > MAX_FILES:
            return f"has {len(self.files):,} files; at most {MAX_FILES:,} are taken"
        num_bytes = 0
        for name, text in [("source", self.source), ("stdin", self.stdin), *self.files.items()]:
            if not isinstance(text, str):
                return f"{name} is of type {type(text).__name__}, and must be text"
            try:
                num_bytes += len(text.encode())
            except UnicodeEncodeError:
                return f"{name} has half of a surrogate pair, which no file can hold"
        if num_bytes > MAX_PROGRAM_BYTES:
            return (f"has {num_bytes:,} bytes with its files and input; at most {MAX_PROGRAM_BYTES:,} "
                    "are taken")
        for name in self.files:
            if not _is_inside_path(name):
                return f"files: {name!r} must be a relative path without '..'"
        return ""


def _is_inside_path(name: str) -> bool:
    """Return whether a relative path stays in its folder and is short enough for the kernel."""
    if "\0" in name or len(name) >= 1000:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in name.split("/"))


@dataclass(frozen=True)
class Outcome:
    """Result of a program."""

    status: Status
    """`ok`: exit code 0; `error`: another exit code; `timeout`, `memory`, `output`: over that limit;
    `killed`: ended by a signal; `refused`: invalid program; `infrastructure`: the sandbox failed, and the
    program has no result."""
    exit_code: int | None
    """None unless the program exited by itself."""
    stdout: str
    """Standard output up to the limit, decoded as UTF-8 with replacement characters."""
    stderr: str
    """Standard error, like `stdout`."""
    reason: str
    """One sentence; "" for `ok`."""
    wall_s: float
    """Clock time in seconds."""
    cpu_s: float
    """Processor time in seconds."""
    starved_s: float = 0.0
    """Seconds in `wall_s` without a processor although the program was ready to run; not limited."""
