"""What a sandbox is given and what it gives back: limits, a program, what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "error", "timeout", "memory", "output", "killed", "refused", "infrastructure"]
MAX_SOURCE_BYTES = 16 << 20
"""Of a program with its files and its input."""
MAX_FILES = 1000
"""That a program may be given."""


@dataclass(frozen=True)
class Limits:
    """How much a program may take, with all processes that it starts."""

    wall_s: float = 10
    """Seconds by the clock."""
    cpu_s: float = 10
    """Seconds of processors."""
    memory_bytes: int = 512 << 20
    """Address space of each process, and resident memory of all together."""
    processes: int = 16
    """Processes and threads at a time, the first one included."""
    files: int = 64
    """Open files of each process."""
    file_bytes: int = 16 << 20
    """Size of a file; in namespaces that of all its files together."""
    output_bytes: int = 1 << 20
    """Standard output, and as many again of standard error."""

    def problems(self) -> list[str]:
        p = [f"{name} = {value} must be positive and finite" for name, value in vars(self).items()
             if not (value > 0 and math.isfinite(value))]
        if self.files < 8:
            p.append(f"files = {self.files} must be at least 8: an interpreter has some open itself")
        return p


@dataclass(frozen=True)
class Program:
    """A program, what it reads and what lies beside it."""

    source: str
    stdin: str = ""
    """What it reads from standard input."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Relative path -> text, in the folder that it starts in."""
    arguments: tuple[str, ...] = ()
    """Behind its name."""
    language: str = "python"
    """python, or a language that the sandbox has a command for."""

    def problem(self) -> str:
        """Return why this is no program that can be run; empty: it is one."""
        texts = {"source": self.source, "stdin": self.stdin, **self.files,
                 **{f"argument {i}": value for i, value in enumerate(self.arguments)}}
        if len(self.files) > MAX_FILES:
            return f"has {len(self.files):,} files; at most {MAX_FILES:,} are taken"
        size_bytes = 0
        for name, text in texts.items():
            if not isinstance(text, str):
                return f"{name} is of type {type(text).__name__}, and must be text"
            try:
                size_bytes += len(text.encode())
            except UnicodeEncodeError:
                return f"{name} has half of a surrogate pair, which no file can hold"
        if size_bytes > MAX_SOURCE_BYTES:
            return (f"has {size_bytes:,} bytes with its files and input; at most {MAX_SOURCE_BYTES:,} "
                    "are taken")
        if any("\0" in value for value in self.arguments):
            return "an argument has a zero byte, which no argument can hold"
        bad = next((name for name in self.files if not _stays_inside(name)), None)
        return "" if bad is None else f"files: {bad!r} must be a relative path without '..'"


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") and len(part.encode()) < 256
                                    for part in parts) and len(name) < 1000


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    status: Status
    """ok: it ended with exit code 0; error: with another one; timeout, memory, output: it passed that limit;
    killed: a signal ended it; refused: it is none that can be run; infrastructure: the sandbox failed, and
    nothing is known about the program."""
    exit_code: int | None
    """None where it did not end by itself."""
    stdout: str
    """What it wrote, up to the limit; what is no UTF-8 is replaced."""
    stderr: str
    """Likewise."""
    reason: str
    """One sentence for every status but ok."""
    wall_s: float
    """Seconds by the clock."""
    cpu_s: float
    """Seconds of processors, of all its processes that were waited for or seen at work."""
    starved_s: float = 0.0
    """Of `wall_s`, seconds in which it was ready to run and had no processor: the machine's, not its own, and
    not counted by the limit."""
