"""Work beside training gives way, ignores what is meant for the run, and ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sov.runs.background import LOWEST_PRIORITY, humble_environment

PARENT = """
import sys, time
from pathlib import Path
from megatron_sov.runs.background import BackgroundProcess
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
def test_it_has_the_lowest_priority_and_ends_with_its_parent(tmp_path: Path,
                                                             ends: Callable[[int], bool]) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path / "state")])

    def wait_for(name: str) -> None:
        deadline_s = time.monotonic() + 600
        while not (tmp_path / name).exists():
            assert time.monotonic() < deadline_s and parent.poll() is None, f"there is no {name}"
            time.sleep(0.02)

    wait_for("state")
    state = json.loads((tmp_path / "state").read_text())
    assert state["nice"] == LOWEST_PRIORITY and state["term"]
    os.kill(state["pid"], signal.SIGTERM)  # what stops the run does not stop its work beside
    (tmp_path / "state.asked").touch()
    wait_for("state.answered")
    parent.kill()
    parent.wait()
    assert ends(state["pid"])


def test_it_does_not_take_itself_for_a_rank_or_a_part_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_JOB_ID", "SBATCH_PARTITION", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    environment = humble_environment()
    assert {"RANK", "SLURM_JOB_ID", "SBATCH_PARTITION", "MASTER_PORT"} & set(environment) == set()
    assert environment["SLURM_CONF"] == "/etc/slurm.conf"  # it says where Slurm is, not which job this is
    assert (environment["KEPT"], environment["CUDA_VISIBLE_DEVICES"]) == ("yes", "")
