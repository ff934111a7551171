"""Background processes: low priority, ignored stop signals, end with the parent."""

import functools
import json
import operator
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.work.processes import children
from megatron_sov.work.processes.background import LOWEST_PRIORITY, background_environment
from megatron_sov.work.processes.pool import map_in_processes
from tests.waiting import wait_until

PARENT = """
import sys, time
from pathlib import Path
from megatron_sov.work.processes.background import BackgroundProcess
child = BackgroundProcess([sys.executable, "-c", sys.argv[1], sys.argv[2]], Path(sys.argv[2] + ".log"))
time.sleep(600)
"""
CHILD = """
import json, os, signal, sys, time
state = {"pid": os.getpid(), "nice": os.nice(0), "term": signal.getsignal(signal.SIGTERM) == signal.SIG_IGN}
with open(sys.argv[1] + ".tmp", "w") as f:
    json.dump(state, f)
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
while not os.path.exists(sys.argv[1] + ".asked"):
    time.sleep(0.01)
open(sys.argv[1] + ".answered", "w").close()
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a child that ends with its parent is Linux's")
def test_background_process_has_lowest_priority_and_ends_with_parent(tmp_path: Path,
                                                                     ends: Callable[[int], bool]) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path / "state")])
    wait_until((tmp_path / "state").exists, lambda: parent.poll() is not None)
    state = json.loads((tmp_path / "state").read_text())
    assert state["nice"] == LOWEST_PRIORITY and state["term"]
    os.kill(state["pid"], signal.SIGTERM)  # a signal that stops the run does not stop its background work
    (tmp_path / "state.asked").touch()
    wait_until((tmp_path / "state.answered").exists, lambda: parent.poll() is not None)
    parent.kill()
    parent.wait()
    assert ends(state["pid"])


def test_background_environment_has_no_rank_or_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_JOB_ID", "SBATCH_PARTITION", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    environment = background_environment()
    assert {"RANK", "SLURM_JOB_ID", "SBATCH_PARTITION", "MASTER_PORT"} & set(environment) == set()
    assert environment["SLURM_CONF"] == "/etc/slurm.conf"  # it says where Slurm is, not which job this is
    assert (environment["KEPT"], environment["CUDA_VISIBLE_DEVICES"]) == ("yes", "")


# A command in its own process: its exit code, and signals that are forwarded to it.


CHILD_COMMAND = """
import os, re, signal, sys, time
if sys.argv[-1] == "code":
    sys.exit(3)
asked = []
for number in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: (asked.append(number), print("asked by", number, flush=True)))
number = getattr(signal, sys.argv[-1])
def is_awaited():
    caught = re.search("SigCgt:(.*)", open(f"/proc/{os.getppid()}/status").read())[1]
    return int(caught, 16) >> (number - 1) & 1
while not is_awaited():
    time.sleep(0.01)
os.kill(os.getppid(), number)
if number == signal.SIGINT:
    time.sleep(0.3)
while number != signal.SIGINT and not asked:
    time.sleep(0.01)
"""


def test_run_command_returns_exit_code_and_forwards_stop(cwd: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capfd) -> None:
    (cwd / "child.py").write_text(CHILD_COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(cwd))
    # the child sends these signals to this process, and one that came too early would end the tests
    old_handlers = {number: signal.signal(number, signal.SIG_IGN)
                    for number in (signal.SIGUSR1, signal.SIGINT)}
    try:
        assert children.run_command(["child", "code"], "x") == 3
        assert capfd.readouterr() == ("", "")
        # the command ends well, and none may follow it
        assert children.run_command(["child", "SIGUSR1"], "continue with --resume") == 75
        assert capfd.readouterr() == (f"asked by {int(signal.SIGUSR1)}\n",
                                      "stopped; continue with --resume\n")
        # SIGINT is not forwarded: a terminal sends it to the command, too
        assert children.run_command(["child", "SIGINT"], "x") == 75
        assert capfd.readouterr().out == ""
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in old_handlers)
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def test_interpreter_may_clean_up_within_patience(tmp_path: Path) -> None:
    program = f"""import socket, sys
socket.socket(fileno=int(sys.argv[1])).recv(1)
open({str(tmp_path / "removed")!r}, "w")"""
    children.start_interpreter([sys.executable, "-c", program], (), {}, patience_s=60).end()
    assert (tmp_path / "removed").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_pool_yields_results_in_order(workers: int) -> None:
    items = ["b", "a", *"xyz" * 10]
    assert list(map_in_processes(operator.methodcaller, ("upper",), items, workers)) == [i.upper()
                                                                                         for i in items]
    assert list(map_in_processes(operator.methodcaller, ("upper",), [], workers)) == []


def test_pool_reports_errors_and_killed_workers() -> None:
    with pytest.raises(AttributeError, match="no attribute 'index'"):
        list(map_in_processes(operator.methodcaller, ("index", "a"), ["a", 1], 2))
    signals = [0, 0, signal.SIGKILL, *[0] * 40]  # signal 0 does nothing
    with pytest.raises(UserError, match="run the same command again"):
        list(map_in_processes(functools.partial, (signal.raise_signal,), signals, 2))
