"""Sums, gathers and broadcasts of named tensors and Python objects over ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov.engine.parallel import world
from megatron_sov.engine.parallel.collectives import all_reduce_world
from megatron_sov.engine.parallel.values import (
    broadcast_object, flatten_tensors, gather_objects, sum_dict, unflatten_tensors)
from megatron_sov.model.config import ParallelConfig


def test_unflatten_tensors_is_the_inverse_of_flatten_tensors() -> None:
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


def sum_named_values() -> dict[str, float]:
    """Inside ranks: sum three named values over the ranks."""
    place = world.join_world(ParallelConfig())
    return sum_dict({"rank": float(place.rank), "one": 1.0, "third": 1 / 3}, all_reduce_world)


@pytest.mark.distributed
def test_every_rank_gets_the_same_sums(ranks: Any, job: Any) -> None:
    (sums,) = ranks(job(__file__, "sum_named_values", 2))
    assert sums == [{"rank": 1.0, "one": 2.0, "third": 2 / 3}] * 2


def exchange_objects() -> list[Any]:
    """Inside ranks: gather objects over all ranks and over a group of one rank, and broadcast from rank 0."""
    place = world.join_world(ParallelConfig())
    groups = [dist.new_group([rank]) for rank in range(place.size)]  # every rank must create every group
    return [gather_objects({"rank": place.rank}), gather_objects(place.rank, groups[place.rank]),
            broadcast_object(f"from rank {place.rank}")]


@pytest.mark.distributed
def test_objects_are_gathered_in_rank_order_and_broadcast_from_rank_0(ranks: Any, job: Any) -> None:
    (objects,) = ranks(job(__file__, "exchange_objects", 2))
    assert objects == [[[{"rank": 0}, {"rank": 1}], [rank], "from rank 0"] for rank in range(2)]
