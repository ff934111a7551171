"""Whose time it was: a program's that computes or sleeps, or a machine's that has no processor for it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import Sandbox

LIMITS = Limits(wall_s=1, cpu_s=20, memory_bytes=256 << 20)
LAST_IN_LINE = """
import os, time
os.sched_setaffinity(0, {{{core}}})
os.setpriority(os.PRIO_PROCESS, 0, 10)
if os.path.exists("/proc/self/autogroup"):  # else each session has as much as any other
    open("/proc/self/autogroup", "w").write("10")
"""
"""A program that gets what others leave of one core; only a command of one's own lets it ask for that."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, command=("env",), languages={"python": (sys.executable, "-IS", "{file}")}) as made:
        yield made


@pytest.fixture
def busy_core() -> Iterator[int]:
    core = min(os.sched_getaffinity(0))
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        until = time.monotonic() + 3 * LIMITS.wall_s  # a killed program needs a processor to die, too
        while time.monotonic() < until:
            pass
        os._exit(0)
    yield core
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


WORK = """
import threading
def work():
    while time.process_time() < 0.25: pass
threading.Thread(target=work).start()
"""


def test_the_time_that_a_program_waits_for_a_processor_is_not_its_own(sandbox: Sandbox, busy_core: int
                                                                      ) -> None:
    outcome = sandbox.run(Program(LAST_IN_LINE.format(core=busy_core) + WORK))
    assert outcome.status == "ok" and outcome.wall_s > LIMITS.wall_s and outcome.starved_s, outcome


def test_a_program_that_sleeps_is_not_starved(sandbox: Sandbox, busy_core: int) -> None:
    outcome = sandbox.run(Program("import time; time.sleep(0.1); open('x', 'w').write('x'); time.sleep(60)"))
    assert outcome.status == "timeout"
    assert outcome.wall_s - outcome.starved_s > LIMITS.wall_s / 3, outcome


def test_what_a_command_itself_takes_counts(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program("import time; x = bytearray(b'x' * (100 << 20)); time.sleep(5)"),
                          Limits(wall_s=20, memory_bytes=64 << 20))
    assert outcome.status == "memory", "env has become the program"
