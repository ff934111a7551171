"""Connection to a restricted process that reads untrusted files and is reused for many files.

The process sends JSON and numbers. No message is executed or unpickled, and a process that crashes, hangs or
sends invalid messages becomes a `BadRecord` for the file.
"""

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
"""Clock time per processor time for a file, because processes share a machine."""
END_LIMIT_S = 120.0
"""Time for the kernel to report a process's exit code."""
FILES_PER_PROCESS = 2000
"""Files until a process is replaced, because parsers leak memory."""
_ROOT = str(Path(__file__).parents[2])
_CODE = ("import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
         "from {module} import main; main(int(sys.argv[1]))")
_VARIABLES = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


@dataclass(frozen=True)
class ReaderWording:
    """Words for error messages."""

    program: str
    """Name of the reading program, e.g. "parser"."""
    verb: str
    """E.g. "read"."""
    option: str
    """Option that raises the time limit, e.g. "--max-time"."""


class ReaderEnded(BadRecord):
    """The process ended or must be ended."""


class ReaderProcess:
    """A process that reads files through `main(fd)` of a module."""

    def __init__(self, module: str, root: str, limits: dict[str, Any], time_s: float,
                 wording: ReaderWording) -> None:
        """Start the process.

        Args:
            module: module with `main(fd)`.
            root: folder of readable files.
            limits: entries of the first message, in addition to `readable`.
            time_s: processor time per file.
            wording: words for error messages.
        """
        self.num_files = 0
        self._time_s, self._wording = time_s, wording
        self._path = _build_import_path()
        self._child = start_interpreter([sys.executable, "-c", _CODE.format(module=module)],
                                        [json.dumps(self._path)], _VARIABLES)
        self.channel = self._child.channel
        self.channel.settimeout(START_LIMIT_S)
        send_message(self.channel, {"readable": [root, *self._path], **limits})

    @property
    def needs_replacement(self) -> bool:
        """Whether the process read `FILES_PER_PROCESS` files, or `sys.path` changed after its start, e.g. for
        an installed format."""
        return self.num_files >= FILES_PER_PROCESS or self._path != _build_import_path()

    @contextlib.contextmanager
    def open_exchange(self) -> Iterator[socket.socket]:
        """Return a context manager for the messages about one file, which yields the channel.

        Call `reset_timeout` before each further message. Raises `ReaderEnded`: the process ended, timed out,
        or sent an invalid message."""
        self.num_files += 1
        wording = self._wording
        try:
            self.reset_timeout()
            yield self.channel
        except TimeoutError:
            raise ReaderEnded(
                "time", f"took longer than {CLOCK_FACTOR * self._time_s:g} s to {wording.verb}; "
                        f"raise {wording.option}, or leave it out") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ReaderEnded(wording.program, f"made its {wording.program} send an invalid answer ({e}); "
                                               "leave it out") from None
        except (EOFError, OSError):
            raise self._explain_exit() from None

    def reset_timeout(self) -> None:
        self.channel.settimeout(START_LIMIT_S + CLOCK_FACTOR * self._time_s)

    def _explain_exit(self) -> ReaderEnded:
        code = self._child.exit_code(END_LIMIT_S) or 0
        wording = self._wording
        # the reader's timer of processor time ends the process by SIGPROF
        if code == -signal.SIGPROF:
            return ReaderEnded("time", f"took more than {self._time_s:g} s of processor time to "
                                       f"{wording.verb}; raise {wording.option}, or leave it out")
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ReaderEnded("crash", f"ended its {wording.program} ({cause}); leave it out")

    def end(self) -> None:
        self._child.end()


def _build_import_path() -> list[str]:
    """Return `sys.path` for the process, with this package first."""
    return [_ROOT, *(path for path in map(os.path.abspath, filter(None, sys.path)) if path != _ROOT)]
