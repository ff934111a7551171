"""The beginning of a run's work is the process's own, and for a second run of the same process the moment it is noted."""

from __future__ import annotations

import json
import subprocess
import sys
import time

PROGRAM = """
import json, os, time
time.sleep(0.3)
from megatron_sov.obs import process_start as starting
starting.note_beginning()
first = starting.began_s()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, repr(starting.began_s()).encode())
    os._exit(0)
os.wait()
forked, before = float(os.read(read, 100)), time.time()
starting.note_beginning()
print(json.dumps([first, forked, before, starting.began_s()]))
"""


def test_the_first_run_began_with_the_process_and_forks_know_it() -> None:
    started_s = time.time()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first, forked, before, second = json.loads(done.stdout)
    assert abs(first - started_s) < before - started_s and first < before - 0.2  # whole clock ticks, and before the sleep
    assert forked == first and second >= before
