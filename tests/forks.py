"""Run test files in forks of a process that has imported everything, several at a time:

    python -m pytest -p tests.forks --forks 3 ...

pytest-xdist's processes each import and collect anew, half a minute of a core for each where there are
thousands of tests.  A fork asks for a file of tests when it has done one; they are given out in the order in
which they were collected.  A test that ends its fork has failed, and another fork does the rest of its file.
"""

import atexit
import os
import resource
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe, connection
from typing import Any

import pytest

ONCE = ("cluster", "wheel")
"""Fixtures that one fork creates once: all their tests run in that fork. Two clusters on one machine would
disturb each other, and building a wheel takes half a minute of a core."""
PEAKS = pytest.StashKey[list[int]]()
"""Largest resident memory of each fork that has ended, in MB."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the number of forks."""
    parser.addoption("--forks", type=int, default=0, help="processes that do tests at a time")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all tests in forks if `--forks` is at least 2."""
    if session.config.option.forks < 2 or session.config.option.collectonly:
        return None
    if session.testsfailed and not session.config.option.continue_on_collection_errors:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    _Forks(session).run()
    return True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the memory of the forks, including pages shared with the first process."""
    if peaks := config.stash.get(PEAKS, []):
        terminalreporter.write_line(f"largest memory of each fork: {', '.join(map(str, sorted(peaks)))} MB")


class _Fork:
    """A fork, as the first process sees it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.left: deque[int] = deque()
        """Tests that it was given and has not ended."""


class _Forks:
    """All forks, and the files that are not assigned yet."""

    def __init__(self, session: pytest.Session) -> None:
        self.session, self.config = session, session.config
        together: dict[Any, deque[int]] = {}
        for index, item in enumerate(session.items):
            asked = getattr(item, "fixturenames", ())
            shared = next((name for name in ONCE if name in asked), item.path)
            together.setdefault(shared, deque()).append(index)
        self.files = deque(together.values())
        self.working: dict[Any, _Fork] = {}
        """By the line on which each tells of its tests."""
        self.num_started = 0
        self.peaks = self.config.stash.setdefault(PEAKS, [])

    def run(self) -> None:
        """Return when all tests are done, or raise as pytest does when no more are to be."""
        try:
            for _ in range(min(self.config.option.forks, len(self.files))):
                self._start()
            while self.working:
                # processes started by a fork may keep its pipe open after its end
                ready = connection.wait(list(self.working), timeout=1)
                for line in ready or [line for line, fork in self.working.items() if _has_ended(fork.pid)]:
                    self._read(line)
        finally:
            for line, fork in self.working.items():
                os.kill(fork.pid, signal.SIGKILL)
                os.waitpid(fork.pid, 0)
                line.close()

    def _start(self) -> None:
        near, far = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        if not (pid := os.fork()):
            # otherwise this fork's copies would keep the pipes of ended forks open
            for line in [near, *self.working]:
                line.close()
            _work(self.session, far, self.num_started)
        far.close()
        self.num_started += 1
        self.working[near] = _Fork(pid)

    def _read(self, line: Any) -> None:
        fork = self.working[line]
        try:
            if not line.poll():
                raise EOFError
            what, told = line.recv()
        except (EOFError, ConnectionResetError):
            del self.working[line]
            line.close()
            self._note_end(fork)
        else:
            if what == "next":
                fork.left = self.files.popleft() if self.files else deque()
                line.send(list(fork.left))
            else:
                self._note(fork, what, told)
        if self.session.shouldfail:
            raise self.session.Failed(self.session.shouldfail)
        if self.session.shouldstop:
            raise self.session.Interrupted(self.session.shouldstop)

    def _note(self, fork: _Fork, what: str, told: Any) -> None:
        hook = self.config.hook
        if what == "report":
            hook.pytest_runtest_logreport(report=hook.pytest_report_from_serializable(
                config=self.config, data=told))
        elif what == "warning":
            (text, category, *place), when, nodeid = told
            message = warnings.WarningMessage(text, type(category, (Warning,), {}), *place)
            hook.pytest_warning_recorded.call_historic(kwargs={
                "warning_message": message, "when": when, "nodeid": nodeid, "location": None})
        elif what == "ended":
            item = self.session.items[fork.left.popleft()]
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        else:
            self.peaks.append(told)

    def _note_end(self, fork: _Fork) -> None:
        """Record the end of a fork, and start another for its remaining tests."""
        code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
        if not fork.left and not code:
            return
        was_at_a_test = bool(fork.left)
        item = self.session.items[fork.left.popleft() if was_at_a_test else -1]
        # without a running test, the failure came from teardown of session fixtures or from the fork's start
        self.config.hook.pytest_runtest_logreport(report=pytest.TestReport(
            item.nodeid, item.location, {}, "failed", f"the process has ended with exit code {code}",
            "call" if was_at_a_test else "teardown"))
        if fork.left:
            self.files.appendleft(fork.left)
        if was_at_a_test:
            self._start()


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _work(session: pytest.Session, line: Any, number: int) -> None:
    """Do tests as long as there are some, and end this process."""
    status = 1
    try:
        atexit._clear()
        _begin_anew(session.config, line, number)
        for indices in _given(line):
            for index, following in zip(indices, [*indices[1:], None], strict=True):
                session.config.hook.pytest_runtest_protocol(
                    item=session.items[index],
                    nextitem=_AnyTest(session) if following is None else session.items[following])
                line.send(("ended", None))
        with _captured(session.config):
            session._setupstate.teardown_exact(None)
            atexit._run_exitfuncs()
        line.send(("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (
            20 if sys.platform == "darwin" else 10)))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _given(line: Any) -> Iterator[list[int]]:
    """Yield the tests to run next, one file at a time."""
    while True:
        line.send(("next", None))
        if not (indices := line.recv()):
            return
        yield indices


def _begin_anew(config: pytest.Config, line: Any, number: int) -> None:
    """Give this fork its own output capture, temporary folder and receiver of reports."""
    manager = config.pluginmanager
    manager.unregister(name="terminalreporter")
    capture: Any = manager.getplugin("capturemanager")
    capture._global_capturing = None
    capture.start_global_capturing()
    capture.suspend_global_capture()
    folders: Any = vars(config)["_tmp_path_factory"]
    folders._basetemp = folders.getbasetemp() / f"fork-{number}"
    folders._basetemp.mkdir(mode=0o700)
    manager.register(_Teller(config, line))


@contextmanager
def _captured(config: pytest.Config) -> Iterator[None]:
    """Keep the output of the end of a session off the terminal."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    capture.resume_global_capture()
    try:
        yield
    finally:
        capture.suspend_global_capture()


class _AnyTest:
    """A placeholder test of a session: running it tears down the fixtures of the file before."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session

    def listchain(self) -> list[pytest.Session]:
        return [self._session]


class _Teller:
    """Sends reports and warnings to the first process."""

    def __init__(self, config: pytest.Config, line: Any) -> None:
        self._config, self._line = config, line

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._line.send(("report", self._config.hook.pytest_report_to_serializable(
            config=self._config, report=report)))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str,
                                nodeid: str) -> None:
        w = warning_message
        said = str(w.message), w.category.__name__, w.filename, w.lineno
        self._line.send(("warning", (said, when, nodeid)))
