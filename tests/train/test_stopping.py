"""A signal that asks for a stop is remembered, and ends nothing by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from megatron_sov.train.stopping import StopFlag
stop = StopFlag()
before = stop.reason
os.kill(os.getpid(), int(sys.argv[1]))
print(before, stop.reason)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_sets_the_flag(number: signal.Signals) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(int(number))], capture_output=True, text=True,
                          env=os.environ, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["None", number.name]), done.stderr
