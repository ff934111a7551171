"""Named values survive the flat tensor, and sums equal the tensor's."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov.engine.parallel import world
from megatron_sov.engine.parallel.collectives import all_reduce_world
from megatron_sov.engine.parallel.values import (
    broadcast_object, flatten_tensors, gather_objects, sum_dict, unflatten_tensors)
from megatron_sov.model.config import ParallelConfig


def test_packed_values_are_returned_by_name() -> None:
    values = {"loss": torch.tensor(2.5, dtype=torch.float64),
              "by source": torch.arange(6, dtype=torch.float64).view(3, 2),
              "none": torch.zeros(0, 2, dtype=torch.float64)}
    flat = flatten_tensors(values)
    assert flat.tolist() == [2.5, 0, 1, 2, 3, 4, 5]
    result = unflatten_tensors(flat, {name: tuple(value.shape) for name, value in values.items()})
    assert list(result) == list(values) and all(torch.equal(result[name], values[name]) for name in values)


def test_integers_stay_integers() -> None:
    large = torch.tensor([2**62 + 1])
    assert int(unflatten_tensors(flatten_tensors({"a": torch.tensor(3), "b": large}),
                                 {"a": (), "b": (1,)})["b"]) == 2**62 + 1


def test_another_number_of_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="3 numbers"):
        unflatten_tensors(torch.zeros(3), {"a": (), "b": (1,)})


def sums() -> list[Any]:
    """Inside ranks: named values of each rank."""
    place = world.join_world(ParallelConfig())
    result = sum_dict({"rank": float(place.rank), "one": 1.0, "third": 1 / 3}, all_reduce_world)
    world.leave_world()
    return [result[name] for name in ("one", "rank", "third")]


@pytest.mark.distributed
def test_every_process_gets_the_same(ranks: Any, job: Any) -> None:
    (found,) = ranks(job(__file__, "sums", 2))
    assert found == [[2.0, 1.0, 2 / 3]] * 2


# Plain Python values: all ranks' values by rank, and rank 0's value for all.


def exchanged() -> list[Any]:
    """Inside ranks: gathered values of all ranks, of a group, and rank 0's value."""
    place = world.join_world(ParallelConfig())
    alone = [dist.new_group([rank]) for rank in range(place.size)][place.rank]
    found = [gather_objects({"rank": place.rank}), gather_objects(place.rank, alone),
             broadcast_object(f"of {place.rank}")]
    world.leave_world()
    return found


@pytest.mark.distributed
def test_values_come_by_rank_from_the_processes_that_are_meant(ranks: Any, job: Any) -> None:
    (found,) = ranks(job(__file__, "exchanged", 2))
    assert found == [[[{"rank": 0}, {"rank": 1}], [rank], "of 0"] for rank in range(2)]
