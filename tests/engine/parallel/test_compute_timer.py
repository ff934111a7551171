"""Compute time excludes the time that a process waits for others."""

from pathlib import Path
from typing import Any

import pytest


def time_steps(folder: str) -> list[Any]:
    """Inside ranks: take two steps in which rank 1 computes 0.4 s longer than rank 0, which waits for it.

    Returns:
        For each step, in seconds: the timer's compute time, the whole step and the all-reduce. Last, the
        events that `Stragglers` writes.
    """
    import time
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import GuardConfig, ParallelConfig
    from megatron_sov.train.guards.guards import Stragglers

    class Events:
        def write(self, event: str, **fields: Any) -> None:
            events.append([event, fields])

    events: list[Any] = []
    place = world.join_world(ParallelConfig())
    stragglers = Stragglers(GuardConfig(straggler_every_steps=2, straggler_ratio=1.05))
    clock = stragglers.clock
    assert clock is not None
    computed_s, steps_s, collectives_s = [], [], []
    for step in (1, 2):
        dist.barrier()
        begun_s = time.perf_counter()
        clock.start()
        waiting_file = Path(folder) / f"rank-0-waits-in-{step}"
        if place.is_main:
            time.sleep(0.05)
        else:
            while not waiting_file.exists():
                time.sleep(0.001)
            time.sleep(0.4)
        reduce_begun_s = time.perf_counter()
        waiting_file.touch()
        dist.all_reduce(torch.ones(4))
        collectives_s.append(time.perf_counter() - reduce_begun_s)
        clock.stop()
        steps_s.append(time.perf_counter() - begun_s)
        computed_s.append(clock.seconds())
        stragglers.add_step(step, Events())  # type: ignore[arg-type]
    return [computed_s, steps_s, collectives_s, events]


@pytest.mark.distributed
def test_the_slow_process_is_named_but_waiting_ones_are_not(ranks: Any, job: Any, tmp_path: Path) -> None:
    (fast_rank, slow_rank), = ranks(job(__file__, "time_steps", 2, {"folder": str(tmp_path)}))
    fast, fast_steps, waits, events = fast_rank
    slow, slow_steps, _, slow_rank_events = slow_rank
    for computed_s, step_s, waited_s in zip(fast, fast_steps, waits, strict=True):
        assert 0.05 <= computed_s <= step_s - 0.5 * waited_s and waited_s > 0.2, (fast, fast_steps, waits)
    assert all(0.4 <= computed_s <= step_s for computed_s, step_s in zip(slow, slow_steps, strict=True))
    assert events == slow_rank_events, "all processes compute the same statistics"
    (measured_event, fields), (alarm_event, alarm) = events
    assert (measured_event, alarm_event) == ("compute_time", "alarm")
    assert fields["step"] == 2
    assert fields["slow"] == [1]
    assert fields["median_s"] == pytest.approx(sum(fast) / 2)
    assert fields["seconds"]["1"] == pytest.approx(sum(slow) / 2)
    assert alarm["rank"] == 1
    assert alarm["kind"] == "slow process"
