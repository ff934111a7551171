"""A process that reads files of others and is kept for the next file; what becomes of it is told as a bad
record.

What it sends is JSON and numbers: nothing that a file could make of it is ever run or unpickled here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.documents import BadRecord
from megatron_sov.work.processes.channel import send_message
from megatron_sov.work.processes.children import start_interpreter

START_LIMIT_S = 120.0
CLOCK_FACTOR = 10.0
"""Times on the clock for the processor time that a file may take: processes share a machine."""
END_LIMIT_S = 120.0
"""For the kernel to say how a process has ended."""
FILES_EACH = 2000
"""Files that one process reads: what parsers leak stays small."""
_ROOT = str(Path(__file__).parents[2])
_CODE = ("import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
         "from {module} import main; main(int(sys.argv[1]))")
_VARIABLES = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


@dataclass(frozen=True)
class Wording:
    """What sentences about files call things."""

    program: str
    """What reads them, as "parser"."""
    verb: str
    """What it does, as "read"."""
    option: str
    """What allows more time, as "--max-time"."""


class ReaderEnded(BadRecord):
    """The process is not to be asked again."""


def _import_path() -> list[str]:
    """Return where a reader finds modules: our package first, before anything in the path of this process."""
    return [_ROOT, *(p for p in map(os.path.abspath, filter(None, sys.path)) if p != _ROOT)]


class KeptReader:
    """One such process."""

    def __init__(self, module: str, root: str, limits: dict[str, Any], time_s: float,
                 wording: Wording) -> None:
        """Start it.

        Args:
            module: whose `main(fd)` it runs.
            root: folder whose files it may read.
            limits: further words of its first message.
            time_s: processor time that a file may take.
            wording: of sentences.
        """
        self.num_files = 0
        self._time_s, self._wording = time_s, wording
        self._path = _import_path()
        self._child = start_interpreter([sys.executable, "-c", _CODE.format(module=module)],
                                        [json.dumps(self._path)], _VARIABLES)
        self.channel = self._child.channel
        self.channel.settimeout(START_LIMIT_S)
        send_message(self.channel, {"readable": [root, *self._path], **limits})

    @property
    def is_worn(self) -> bool:
        """Whether another one should take over: it has read many files, or imports from other places than
        this process does by now, where an installed format may be."""
        return self.num_files >= FILES_EACH or self._path != _import_path()

    @contextlib.contextmanager
    def asking(self) -> Iterator[socket.socket]:
        """Give the channel for the messages about one file; whoever waits longer than for one, sets its
        timeout anew by `wait_again`.

        Raises:
            ReaderEnded: the process has gone, takes too long, or sends what it should not.
        """
        self.num_files += 1
        words = self._wording
        try:
            self.wait_again()
            yield self.channel
        except TimeoutError:
            raise ReaderEnded("time", f"took longer than {CLOCK_FACTOR * self._time_s:g} s to {words.verb}; "
                                      f"raise {words.option}, or leave it out") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ReaderEnded(words.program, f"made its {words.program} send what is no answer ({e}); "
                                             "leave it out") from None
        except (EOFError, OSError):
            raise self._gone() from None

    def wait_again(self) -> None:
        self.channel.settimeout(START_LIMIT_S + CLOCK_FACTOR * self._time_s)

    def _gone(self) -> ReaderEnded:
        code = self._child.exit_code(END_LIMIT_S) or 0
        words = self._wording
        # the reader sets a timer of processor time, whose signal ends it
        if code == -signal.SIGPROF:
            return ReaderEnded("time", f"took more than {self._time_s:g} s of processor time to "
                                       f"{words.verb}; raise {words.option}, or leave it out")
        said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ReaderEnded("crash", f"ended its {words.program} ({said}); leave it out")

    def end(self) -> None:
        self._child.end()
