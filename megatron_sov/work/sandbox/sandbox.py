"""The sandbox: programs of a model run where they can do no harm."""

from __future__ import annotations

import os
import queue
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from megatron_sov.errors import UserError, list_problems
from megatron_sov.work.sandbox.command import PYTHON, run_in_command
from megatron_sov.work.sandbox.enclosure import Unavailable
from megatron_sov.work.sandbox.program import Limits, Outcome, Program
from megatron_sov.work.sandbox.readable import folders_of
from megatron_sov.work.sandbox.worker import Worker

ENCLOSURES = ("namespaces", "landlock")
"""What the kernel may give, the stronger one first."""
LANGUAGES: Mapping[str, tuple[str, ...]] = {"bash": ("bash", "{file}")}
"""Beside python; those whose command is installed."""
DEFAULT_LIMITS = Limits()
_WAITING_PER_WORKER = 4


class Sandbox:
    """Runs programs; a context, since its servers have to end. Threads may share one.

    Args:
        limits: for programs that have none of their own.
        enclosure: `namespaces`, `landlock`, or `auto`: the first of them that this machine gives.
        workers: programs that run at a time.
        command: an own command instead, which programs are run by: gVisor, bubblewrap, Apptainer.
        languages: language -> command that runs a program in it; `{file}` stands for the program.

    Raises:
        UserError: a setting breaks a rule, or the machine gives no enclosure.
    """

    enclosure: str
    """`namespaces`, `landlock` or `command`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS, *, enclosure: str = "auto", workers: int = 1,
                 command: Sequence[str] = (), languages: Mapping[str, Sequence[str]] = {}) -> None:
        problems = limits.problems() + _problems(enclosure, workers, command)
        if problems:
            raise UserError(list_problems("sandbox", problems))
        self._limits, self._command = limits, tuple(command)
        known = {**LANGUAGES, **{name: tuple(parts) for name, parts in languages.items()}}
        self._languages = {name: parts for name, parts in known.items() if command or shutil.which(parts[0])}
        self._free: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None
        self._num_workers, self._closed = workers, False
        self._workers: list[Worker] = []
        if command:
            self.enclosure = "command"
            for _ in range(workers):
                self._free.put(None)
        else:
            self._start(enclosure)

    def _start(self, wanted: str) -> None:
        """Start the first worker, which shows what the machine gives; the others start with their work."""
        readable = sorted({folder for parts in self._languages.values()
                           for folder in folders_of(shutil.which(parts[0]) or parts[0])})
        reasons = []
        for name in ENCLOSURES if wanted == "auto" else (wanted,):
            first = Worker(name, readable)
            try:
                first.start()
            except Unavailable as e:
                reasons.append(f"{name}: {e}")
                continue
            self.enclosure = name
            self._workers = [first, *(Worker(name, readable)
                                      for _ in range(self._num_workers - 1))]
            for worker in self._workers:
                self._free.put(worker)
            return
        raise UserError(list_problems("sandbox: this machine cannot enclose a program", reasons,
                                      "allow one of them, or set `command` to one that encloses programs"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all servers, behind the programs that they run."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Return what becomes of a program.

        Args:
            program: what to run.
            limits: for this program, instead of the sandbox's.

        Raises:
            UserError: a limit breaks a rule.
        """
        if limits is not None and (problems := limits.problems()):
            raise UserError(list_problems("limits", problems))
        if self._closed:
            raise RuntimeError("this sandbox has been closed")
        reason = program.problem() or self._language_problem(program.language)
        if reason:
            return Outcome("refused", None, "", "", reason, 0.0, 0.0)
        worker = self._free.get()
        try:
            command = self._languages.get(program.language)
            if worker is None:
                return run_in_command(self._command, command or PYTHON, program, limits or self._limits)
            return worker.run(program, limits or self._limits, command)
        finally:
            self._free.put(worker)

    def run_many(self, programs: Iterable[Program]) -> Iterator[Outcome]:
        """Yield what becomes of programs, in their order; as many run at a time as there are workers."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers)
        waiting: deque[Future[Outcome]] = deque()
        for program in programs:
            waiting.append(self._pool.submit(self.run, program))
            if len(waiting) >= _WAITING_PER_WORKER * self._num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _language_problem(self, language: str) -> str:
        if language == "python" or language in self._languages:
            return ""
        return (f"language = {language!r}: there is no command for it here; there are "
                f"{', '.join(['python', *self._languages])}")


def machine_enclosure() -> str:
    """Return which enclosure this machine gives to the user that asks.

    Raises:
        UserError: none; with the reasons.
    """
    with Sandbox() as sandbox:
        return sandbox.enclosure


def _problems(enclosure: str, workers: int, command: Sequence[str]) -> list[str]:
    p = []
    if enclosure not in ("auto", "command", *ENCLOSURES):
        p.append(f"enclosure = {enclosure!r} must be auto, command or one of {', '.join(ENCLOSURES)}")
    if workers < 1:
        p.append(f"workers = {workers} must be at least 1")
    if command and enclosure not in ("auto", "command"):
        p.append(f"enclosure = {enclosure!r} with a command of your own: set one of them")
    if enclosure == "command" and not command:
        p.append("enclosure = 'command' needs `command`")
    if command and shutil.which(command[0], path=os.environ.get("PATH", os.defpath)) is None:
        p.append(f"command: {command[0]!r} is not installed, or not on the PATH")
    return p
