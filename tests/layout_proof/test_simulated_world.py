"""Simulated processes: collectives return torch's results, and deadlocks raise an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from layout_proof import cpu_shims
from layout_proof.simulated_messages import CallSite, Deadlock
from layout_proof.simulated_world import SimulatedRanks
from megatron_sov.engine.parallel.world import ParallelWorld, form_groups
from megatron_sov.model.config import ParallelConfig

cpu_shims.prepare_without_gpu()


def call_every_collective(place: ParallelWorld) -> dict[str, list[float]]:
    """Call every collective once with values that identify the sender; return each output."""
    rank, size = place.rank, place.size
    local = torch.arange(3.0) + 10 * rank
    outputs: dict[str, Any] = {}
    for name, op in {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "mean": dist.ReduceOp.AVG}.items():
        outputs[name] = local.clone()
        dist.all_reduce(outputs[name], op)
    outputs["broadcast"] = local.clone()
    dist.broadcast(outputs["broadcast"], src=1)
    tensors = [torch.empty(3) for _ in range(size)]
    dist.all_gather(tensors, local)
    outputs["all_gather"] = torch.cat(tensors)
    outputs["all_gather_into_tensor"] = torch.empty(3 * size)
    dist.all_gather_into_tensor(outputs["all_gather_into_tensor"], local)
    outputs["reduce_scatter"] = torch.empty(1)
    dist.reduce_scatter_tensor(outputs["reduce_scatter"], torch.arange(float(size)) + 10 * rank)
    # Every rank sends 1 number to rank 0, 2 to rank 1, and so on; the numbers are the sender's rank.
    send_sizes = [receiver + 1 for receiver in range(size)]
    outputs["all_to_all"] = torch.empty((rank + 1) * size)
    dist.all_to_all_single(outputs["all_to_all"], torch.full((sum(send_sizes),), float(rank)),
                           [rank + 1] * size, send_sizes)
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, rank)
    outputs["objects"] = torch.tensor(objects, dtype=torch.float32)
    outputs["received"] = torch.empty(3)
    work = dist.isend(local, (rank + 1) % size)
    dist.recv(outputs["received"], (rank - 1) % size)
    assert work is not None
    work.wait()
    return {name: tensor.tolist() for name, tensor in outputs.items()}


def test_collectives_return_their_defined_results() -> None:
    inputs = [torch.arange(3.0) + 10 * rank for rank in range(3)]

    ranks = SimulatedRanks(3)
    for rank, outputs in enumerate(ranks.run(form_groups(ParallelConfig()), call_every_collective)):
        expected = {
            "sum": sum(inputs[1:], inputs[0]), "max": inputs[2], "mean": inputs[1], "broadcast": inputs[1],
            "all_gather": torch.cat(inputs), "all_gather_into_tensor": torch.cat(inputs),
            "reduce_scatter": torch.tensor([3.0 * rank + 30]),
            "all_to_all": torch.arange(3.0).repeat_interleave(rank + 1), "objects": torch.arange(3.0),
            "received": inputs[(rank - 1) % 3]}
        assert outputs == {name: value.tolist() for name, value in expected.items()}


def test_each_process_has_its_own_rank_and_groups() -> None:
    def list_ranks(place: ParallelWorld) -> tuple[Any, ...]:
        from megatron.core import parallel_state

        dist.barrier()  # lets the other ranks run
        return (place.rank, dist.get_rank(), parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(), place.dp_rank,
                dist.get_process_group_ranks(parallel_state.get_data_parallel_group()))

    result = SimulatedRanks(8).run(form_groups(ParallelConfig(tp=2, pp=2)), list_ranks)

    # tensor-parallel ranks are adjacent, then data-parallel ranks, then stages
    assert result == [(rank, rank, rank % 2, rank // 4, rank // 2 % 2,
                       [rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2]) for rank in range(8)]
    assert not dist.is_initialized()


@pytest.mark.each(("num_ranks", "call", "error", "message"), [
    (3, lambda rank: rank and dist.all_reduce(torch.ones(1)), Deadlock, "2 of 3 processes"),
    (2, lambda rank: dist.barrier() if rank else dist.all_reduce(torch.ones(1)), Deadlock,
     "rank 1 calls barrier"),
    (2, lambda rank: rank or dist.isend(torch.ones(1), 1), Deadlock, "rank 0 of WORLD"),  # is not received
    (2, lambda rank: rank or dist.all_reduce(torch.ones(1), async_op=True), Deadlock,  # is not waited for
     "allreduce SUM over WORLD"),
    (2, lambda rank: dist.all_reduce(torch.zeros(4), [dist.ReduceOp.SUM, dist.ReduceOp.MAX][rank]), Deadlock,
     "allreduce MAX"),
    (2, lambda rank: dist.broadcast(torch.zeros(4), rank), Deadlock, "broadcast from 1"),
    (3, lambda rank: {}["of rank 1"] if rank == 1 else dist.barrier(), KeyError, "of rank 1"),
])
def test_deadlocks_and_errors_of_one_process_end_all(num_ranks: int, call: Callable[[int], object],
                                                     error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SimulatedRanks(num_ranks).run(form_groups(ParallelConfig()), lambda place: call(place.rank))


def test_call_sites_are_counted() -> None:
    ranks = SimulatedRanks(2)
    ranks.run(form_groups(ParallelConfig()), lambda place: dist.barrier())

    assert ranks.sites == {CallSite("barrier", "WORLD", "outside of Megatron-Core"): 2}


@pytest.mark.each("tensor_of_rank_1", [torch.zeros(4, 2), torch.zeros(4, dtype=torch.float64)])
@pytest.mark.each("call", [
    lambda tensor, rank: dist.send(tensor, 1) if rank == 0 else dist.recv(tensor, 0),
    lambda tensor, rank: dist.all_reduce(tensor),
    lambda tensor, rank: dist.broadcast(tensor, 0),
    lambda tensor, rank: dist.all_gather([torch.empty_like(tensor) for _ in range(2)], tensor)])
def test_messages_of_other_size_or_dtype_are_reported(call: Callable[[torch.Tensor, int], None],
                                                      tensor_of_rank_1: torch.Tensor) -> None:
    """Without the check, `Tensor.copy_` inside the simulation would broadcast shapes and convert dtypes."""
    with pytest.raises(Deadlock, match="call pass different"):
        SimulatedRanks(2).run(form_groups(ParallelConfig()), lambda place: call(
            torch.zeros(4) if place.rank == 0 else tensor_of_rank_1.clone(), place.rank))
