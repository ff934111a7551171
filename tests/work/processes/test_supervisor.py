"""Supervised commands: their descendants end with the command and with the process that owns it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_sov.work.processes.supervisor import NOT_STARTED, SupervisedCommand
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("cwd")

# children as engines have them: one of the command's group, one that left it and lost its parent
TREE = """
import json, os, subprocess, sys, time
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
between = '''import subprocess, sys
print(subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=2).pid)'''
child = subprocess.Popen(sleeps).pid
orphan = int(subprocess.check_output([sys.executable, "-c", between, "sleep", "600"], text=True).split()[0])
with open("told.new", "w") as file:
    json.dump([os.getpid(), child, orphan], file)
os.rename("told.new", "told.json")
time.sleep(600)
"""
OWNER = """
import os, sys, time
from megatron_sov.work.processes.supervisor import SupervisedCommand
kept = SupervisedCommand([sys.executable, "-c", sys.argv[1]], os.environ, sys.stderr)
time.sleep(600)
"""


def read_pids() -> list[int]:
    """Wait for the process tree; return the pids."""
    wait_until(lambda: Path("told.json").exists())
    pids: list[int] = json.loads(Path("told.json").read_text())
    assert all(map(psutil.pid_exists, pids))
    return pids


def start_command(program: str) -> SupervisedCommand:
    with open("log", "wb") as out:
        return SupervisedCommand([sys.executable, "-c", program], os.environ, out)


def test_all_processes_end_with_killed_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, TREE])
    pids = read_pids()
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_killed_command_ends_descendants() -> None:
    command = start_command(TREE)
    pids = read_pids()
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: not command.is_alive)
    assert not any(map(psutil.pid_exists, pids))


def test_command_may_clean_up_within_patience() -> None:
    # the command ends at once when it is asked, its child a little later
    command = start_command("""
import signal, subprocess, sys, time
child = "import time; open('begun', 'w'); time.sleep(0.3); open('removed', 'w')"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
""")
    wait_until(lambda: Path("begun").exists())
    command.end(patience_s=60)
    assert Path("removed").exists() and not command.is_alive
    command.end()


def test_the_library_path_of_this_python_reaches_only_the_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where LD_LIBRARY_PATH names the folder of libpython."""
    Path("python").write_text(f'#!/bin/sh\n[ "$LD_LIBRARY_PATH" = /ours ] && exec {sys.executable} "$@"\n')
    Path("python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(Path("python").resolve()))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/ours")
    for environment, expected in (({}, "none"), ({"LD_LIBRARY_PATH": "/theirs"}, "/theirs")):
        command = SupervisedCommand(["/bin/sh", "-c", "echo ${LD_LIBRARY_PATH-none}"], environment, None)
        assert command.stdout.read().decode() == f"{expected}\n"
        command.end()


def test_missing_program_is_reported() -> None:
    with open("log", "wb") as out:
        command = SupervisedCommand(["/no/program"], os.environ, out)
    wait_until(lambda: not command.is_alive)
    assert command._keeper.returncode == NOT_STARTED
    assert Path("log").read_text() == "/no/program: No such file or directory\n"
