"""Simulated processes: collectives return torch's results, and deadlocks raise an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.engine.parallel.simulated_messages import CallSite, Deadlock
from megatron_sov.engine.parallel.simulated_world import SimulatedRanks
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import ParallelConfig

cpu_shims.prepare_without_gpu()


def everything(place: ParallelWorld) -> dict[str, list[float]]:
    """Call every collective once with values that identify the sender."""
    rank, size = place.rank, place.size
    mine = torch.arange(3.0) + 10 * rank
    found: dict[str, Any] = {}
    for name, op in {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "mean": dist.ReduceOp.AVG}.items():
        found[name] = mine.clone()
        dist.all_reduce(found[name], op)
    found["broadcast"] = mine.clone()
    dist.broadcast(found["broadcast"], src=1)
    gathered = [torch.empty(3) for _ in range(size)]
    dist.all_gather(gathered, mine)
    found["gathered"] = torch.cat(gathered)
    found["together"] = torch.empty(3 * size)
    dist.all_gather_into_tensor(found["together"], mine)
    found["scattered"] = torch.empty(1)
    dist.reduce_scatter_tensor(found["scattered"], torch.arange(float(size)) + 10 * rank)
    # rank r sends s + 1 rows to rank s
    sizes = [to + 1 for to in range(size)]
    found["exchanged"] = torch.empty((rank + 1) * size)
    dist.all_to_all_single(found["exchanged"], torch.full((sum(sizes),), float(rank)), [rank + 1] * size,
                           sizes)
    found["objects"] = torch.tensor([float(value) for value in _objects(rank, size)])
    found["next"] = torch.empty(3)
    work = dist.isend(mine, (rank + 1) % size)
    dist.recv(found["next"], (rank - 1) % size)
    assert work is not None
    work.wait()
    return {name: tensor.tolist() for name, tensor in found.items()}


def _objects(rank: int, size: int) -> list[Any]:
    values: list[Any] = [None] * size
    dist.all_gather_object(values, rank)
    return values


def test_collectives_return_their_defined_results() -> None:
    mine = [torch.arange(3.0) + 10 * rank for rank in range(3)]
    result = SimulatedRanks(3).run(ParallelConfig(), everything)

    for rank, results in enumerate(result):
        expected = {
            "sum": sum(mine[1:], mine[0]), "max": mine[2], "mean": mine[1], "broadcast": mine[1],
            "gathered": torch.cat(mine), "together": torch.cat(mine),
            "scattered": torch.tensor([3.0 * rank + 30]),
            "exchanged": torch.arange(3.0).repeat_interleave(rank + 1), "objects": torch.arange(3.0),
            "next": mine[(rank - 1) % 3]}
        assert results == {name: value.tolist() for name, value in expected.items()}


def test_each_process_has_its_own_rank_and_groups() -> None:
    def place_of(place: ParallelWorld) -> tuple[Any, ...]:
        from megatron.core import parallel_state

        dist.barrier()  # lets the other ranks run
        return (place.rank, dist.get_rank(), parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(), place.dp_rank,
                dist.get_process_group_ranks(parallel_state.get_data_parallel_group()))

    result = SimulatedRanks(8).run(ParallelConfig(tp=2, pp=2), place_of)

    # tensor-parallel ranks are adjacent, then data-parallel ranks, then stages
    assert result == [(rank, rank, rank % 2, rank // 4, rank // 2 % 2,
                       [rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2]) for rank in range(8)]
    assert not dist.is_initialized()


def test_a_deadlock_names_each_waiting_process_and_call() -> None:
    def waits(place: ParallelWorld) -> None:
        if place.rank:
            dist.all_reduce(torch.ones(1))

    with pytest.raises(Deadlock, match="2 of 3 processes"):
        SimulatedRanks(3).run(ParallelConfig(), waits)


def test_mismatched_calls_are_reported() -> None:
    def differ(place: ParallelWorld) -> None:
        if place.rank:
            dist.barrier()
        else:
            dist.all_reduce(torch.ones(1))

    with pytest.raises(Deadlock, match="rank 1 calls barrier"):
        SimulatedRanks(2).run(ParallelConfig(), differ)


def test_an_error_of_one_process_ends_all() -> None:
    def fails(place: ParallelWorld) -> None:
        if place.rank == 1:
            raise KeyError("mine")
        dist.barrier()

    with pytest.raises(KeyError, match="mine"):
        SimulatedRanks(3).run(ParallelConfig(), fails)


def test_places_are_counted() -> None:
    ranks = SimulatedRanks(2)
    ranks.run(ParallelConfig(), lambda place: dist.barrier())

    assert ranks.sites == {CallSite("barrier", "WORLD", "outside of the library"): 2}


def test_an_unreceived_message_is_reported() -> None:
    def send_only(place: ParallelWorld) -> None:
        if place.rank == 0:
            dist.isend(torch.ones(1), 1)

    def call_without_waiting(place: ParallelWorld) -> None:
        if place.rank == 0:
            dist.all_reduce(torch.ones(1), async_op=True)

    with pytest.raises(Deadlock, match="rank 0 of WORLD"):
        SimulatedRanks(2).run(ParallelConfig(), send_only)
    with pytest.raises(Deadlock, match="allreduce SUM over WORLD"):
        SimulatedRanks(2).run(ParallelConfig(), call_without_waiting)


def send(mine: torch.Tensor, is_first: bool) -> None:
    dist.send(mine, 1) if is_first else dist.recv(mine, 0)


@pytest.mark.each("other", [torch.zeros(4, 2), torch.zeros(4, dtype=torch.float64)])
@pytest.mark.each("call", [
    send, lambda mine, is_first: dist.all_reduce(mine), lambda mine, is_first: dist.broadcast(mine, 0),
    lambda mine, is_first: dist.all_gather([torch.empty_like(mine) for _ in range(2)], mine)])
def test_messages_of_other_size_or_dtype_are_reported(call: Callable[[torch.Tensor, bool], None],
                                                      other: torch.Tensor) -> None:
    """torch's copy would broadcast and convert them."""
    with pytest.raises(Deadlock, match="call pass different"):
        SimulatedRanks(2).run(ParallelConfig(), lambda place: call(
            torch.zeros(4) if place.rank == 0 else other.clone(), place.rank == 0))


@pytest.mark.parametrize("call", [
    lambda mine, rank: dist.all_reduce(mine, [dist.ReduceOp.SUM, dist.ReduceOp.MAX][rank]),
    lambda mine, rank: dist.broadcast(mine, rank)])
def test_mismatched_reductions_or_sources_are_reported(call: Callable[[torch.Tensor, int], None]) -> None:
    with pytest.raises(Deadlock, match=r"(allreduce MAX|broadcast from 1)"):
        SimulatedRanks(2).run(ParallelConfig(), lambda place: call(torch.zeros(4), place.rank))
