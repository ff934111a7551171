"""Computing time is a process's own: what it waits for others is not in it."""

from __future__ import annotations

from typing import Any

import pytest


def measured() -> list[Any]:
    """Runs inside ranks: rank 1 takes 0.4 s longer before all meet; returns the times, and what is made of them."""
    import time

    import torch
    import torch.distributed as dist

    from megatron_sov.config import GuardConfig, ParallelConfig
    from megatron_sov.mcore.parallel import world
    from megatron_sov.train.guards.stragglers import Stragglers

    class Events:
        def write(self, event: str, **fields: Any) -> None:
            found.append([event, fields])

    found: list[Any] = []
    place = world.join(ParallelConfig())
    stragglers = Stragglers(GuardConfig(straggler_every_steps=2))
    clock = stragglers.clock
    assert clock is not None
    seconds = []
    for step in (1, 2):
        dist.barrier()
        clock.start()
        time.sleep(0.1 + 0.4 * place.rank)
        dist.all_reduce(torch.ones(4))
        clock.stop()
        seconds.append(clock.seconds())
        stragglers.report(step, Events())  # type: ignore[arg-type]
    world.leave()
    return [seconds, found]


@pytest.mark.distributed
def test_the_slow_process_is_named_and_those_that_wait_for_it_are_not(ranks: Any, job: Any) -> None:
    ((fast, found), (slow, other)) = ranks(job(__file__, "measured", 2))[0]
    assert all(0.1 <= s < 0.3 for s in fast) and all(0.5 <= s < 0.8 for s in slow), (fast, slow)
    assert found == other, "all processes know, rank 0 writes"
    (measured_event, fields), (alarm_event, alarm) = found
    assert (measured_event, alarm_event) == ("compute_time", "alarm")
    assert fields["step"] == 2 and fields["slow"] == [1] and fields["median_s"] == pytest.approx(sum(fast) / 2)
    assert fields["seconds"]["1"] == pytest.approx(sum(slow) / 2) and alarm["rank"] == 1 and alarm["kind"] == "slow process"
