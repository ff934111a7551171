"""Plain values between processes: everybody's by rank, and rank 0's for all."""

from __future__ import annotations

from typing import Any

import pytest


def exchanged() -> list[Any]:
    """Runs inside ranks: what this process gets of all, of its own group, and of rank 0."""
    import torch.distributed as dist

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.parallel import world
    from megatron_sov.mcore.parallel.object_collectives import broadcast_object, gather_objects

    place = world.join(ParallelConfig())
    alone = [dist.new_group([rank]) for rank in range(place.size)][place.rank]
    found = [gather_objects({"rank": place.rank}), gather_objects(place.rank, alone),
             broadcast_object(f"of {place.rank}")]
    world.leave()
    return found


@pytest.mark.distributed
def test_values_come_by_rank_from_the_processes_that_are_meant(ranks: Any, job: Any) -> None:
    (found,) = ranks(job(__file__, "exchanged", 2))
    assert found == [[[{"rank": 0}, {"rank": 1}], [rank], "of 0"] for rank in range(2)]
