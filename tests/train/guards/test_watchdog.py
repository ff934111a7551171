"""A step that stands still ends the process with its own exit code and leaves its stacks;
a slow evaluation does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_sov.errors import ExitCode

PROGRAM = """
import ctypes, json, sys, time
from pathlib import Path
from types import SimpleNamespace
from megatron_sov.train.guards import watchdog

case, folder = sys.argv[1], Path(sys.argv[2])
watchdog.MAX_GRACE_S = 0.5 if case == "lock" else 600.0  # a busy machine must not end it first
dog = watchdog.Watchdog(folder, 0, 0.0 if case == "off" else 0.4,
                        lambda step, places: (folder / "told.json").write_text(json.dumps([step, places])))
now_s = [0.0]
if case not in ("hang", "lock"):  # time passes where it is watched or not, however busy the machine is
    watchdog.time = SimpleNamespace(monotonic=lambda: now_s[0], sleep=time.sleep)
def stands_still():
    now_s[0] += 1000.0
    time.sleep(1.0 if case != "hang" else 3600)
if case == "lock":
    dog.begin(3)
    ctypes.PyDLL(None).sleep(3600)  # holds Python's lock all the time
if case in ("hang", "off"):
    dog.begin(3)
elif case == "paused":
    dog.begin(3)
    with dog.paused():
        stands_still()
    assert dog._watched[0] == 3
    dog.end()
else:
    dog.end()
stands_still()
dog.close()
"""


def test_a_hang_is_told_and_ended_and_what_may_take_long_is_not_watched(tmp_path: Path) -> None:
    cases = {"hang": ExitCode.HANG, "lock": ExitCode.CRASH, "off": ExitCode.OK, "evaluation": ExitCode.OK,
             "paused": ExitCode.OK}
    started = {}
    for case in cases:
        (tmp_path / case).mkdir()
        started[case] = subprocess.Popen([sys.executable, "-c", PROGRAM, case, str(tmp_path / case)],
                                         stderr=subprocess.PIPE, text=True)
    said = {case: process.communicate(timeout=600)[1] for case, process in started.items()}
    assert {case: process.returncode for case, process in started.items()} == cases
    step, places = json.loads((tmp_path / "hang" / "told.json").read_text())
    assert step == 3 and list(places.values()) == [[0]]
    stacks = (tmp_path / "hang" / "hang" / "step-3-rank-00000.txt").read_text()
    assert "rank 0 stood still in step 3 for 0.4 s" in stacks and "in stands_still" in stacks
    assert "made no progress for guards.hang_timeout_s = 0.4" in said["hang"]
    assert "Timeout" in said["lock"], "faulthandler's own thread needs no lock"
