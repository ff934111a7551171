"""A signal to one process stops all of them after the same step."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest


def agreement(number: int) -> list[Any]:
    """Runs inside ranks: only rank 1 gets the signal."""
    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.checkpoint.save import Saver
    from megatron_sov.mcore.parallel import world
    from megatron_sov.train.stopping import StopFlag

    stop = StopFlag()
    place = world.join(ParallelConfig())
    saver = Saver()
    before = stop.agreed(saver)
    if place.rank == 1:
        os.kill(os.getpid(), number)
    after = stop.agreed(saver)
    world.leave()
    return [before, after, stop.reason]


@pytest.mark.distributed
def test_one_signal_is_everybodys(ranks: Any, job: Any) -> None:
    numbers = {s.name: int(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    found = ranks(*(job(__file__, "agreement", 2, {"number": n}) for n in numbers.values()))
    assert found == [[[False, True, None], [False, True, name]] for name in numbers]
