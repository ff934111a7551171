"""`world.join_world`: a process's rank in each dimension of the layout, and its process groups."""

import datetime
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig


def join_second_layout(layout: dict[str, int]) -> list[int | bool]:
    """Join and leave another layout, then join `layout`. Return [rank, size, dp_rank, dp_size, first_stage,
    last_stage, is_main] of this process."""
    world.join_world(ParallelConfig(pp=2))
    world.leave_world()
    joined = world.join_world(ParallelConfig(**layout))
    return [joined.rank, joined.size, joined.dp_rank, joined.dp_size, joined.first_stage, joined.last_stage,
            joined.is_main]


def test_store_keys_of_one_join_do_not_affect_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.delenv(world.STORE_PORT, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    first, second = (world._create_rendezvous(0, 1, datetime.timedelta(seconds=1)) for _ in range(2))
    assert (first.add("gpu/one", 1), second.add("gpu/one", 1)) == (1, 1)


@pytest.mark.distributed
def test_a_process_can_join_a_second_layout(ranks, job) -> None:
    (places,) = ranks(job(__file__, "join_second_layout", 4, {"layout": {"tp": 2}}))
    assert places == [[0, 4, 0, 2, True, True, True], [1, 4, 0, 2, True, True, False],
                      [2, 4, 1, 2, True, True, False], [3, 4, 1, 2, True, True, False]]


def record_gpu_calls(timeout_s: float) -> list[list[Any]]:
    """Join a world on a double of a GPU.

    Returns the arguments of the calls that select the GPU, start NCCL and create Megatron-Core's groups.
    """
    from megatron.core import parallel_state

    calls: list[list[Any]] = []

    class GroupsCreated(Exception):
        """Leaves `join_world` at its last call, because no NCCL group exists on this machine."""

    def select_gpu(store: Any, rank: int, size: int, needs_bytes: int, timeout: Any) -> torch.device:
        calls.append([rank, size, needs_bytes, timeout.total_seconds()])
        return torch.device("cuda", 3)

    def init_process_group(backend: str, **options: Any) -> None:
        calls.append([backend, "device_id" in options, options["timeout"].total_seconds()])

    def initialize_model_parallel(*sizes: Any, **options: Any) -> None:
        calls.append([options["create_gloo_process_groups"], options["distributed_timeout_minutes"]])
        raise GroupsCreated

    with (mock.patch.object(world, "on_gpu", lambda: True),
          mock.patch.object(world, "select_gpu", select_gpu),
          mock.patch.object(world.dist, "init_process_group", init_process_group),
          mock.patch.object(world.dist, "get_world_size", lambda: 1),
          mock.patch.object(parallel_state, "initialize_model_parallel", initialize_model_parallel),
          pytest.raises(GroupsCreated)):
        world.join_world(ParallelConfig(timeout_s=timeout_s), 7)
    return calls


@pytest.mark.distributed
def test_gpu_groups_are_not_split_from_the_world_and_gloo_creates_none(ranks: Any, job: Any) -> None:
    """With a default group bound to a device, every process takes part in every `new_group`."""
    ((calls,),) = ranks(job(__file__, "record_gpu_calls", 1, {"timeout_s": 90.0}))
    assert calls == [[0, 1, 7, 90.0], ["nccl", False, 90.0], [False, 2]]


def create_groups(num_ranks: int, layout: dict[str, int], tested_ranks: list[int]) -> list[Any]:
    """Let `join_world` create the groups of some ranks, in a world without communication.

    Returns, for each tested rank, the number of created groups that contain it, and the members of its
    Megatron-Core groups.
    """
    results = []
    for rank in tested_ranks:
        dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
        with (mock.patch.dict("os.environ", RANK=str(rank), WORLD_SIZE=str(num_ranks)),
              mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group):
            world.join_world(ParallelConfig(**layout))
        num_created = sum(rank in call.kwargs["ranks"] for call in new_group.call_args_list)
        results.append([num_created, get_group_members()])
        world.leave_world()
    return results


def get_group_members() -> dict[str, list[int]]:
    """Return the ranks in each of this process's groups, by the name of the variable in `parallel_state`."""
    from megatron.core import parallel_state

    return {name: dist.get_process_group_ranks(group) for name, group in sorted(vars(parallel_state).items())
            if name.endswith(("_GROUP", "_GROUP_WITH_CP")) and isinstance(group, dist.ProcessGroup)}


def create_megatron_groups(num_ranks: int, layout: dict[str, int], tested_ranks: list[int]) -> list[Any]:
    """Let Megatron-Core create the same groups by itself; return their members for each tested rank.

    Megatron-Core creates one group per variable, even if two variables have the same members.
    """
    from megatron.core import parallel_state

    members = []
    for rank in tested_ranks:
        dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=layout["pp"], context_parallel_size=layout.get("cp", 1),
            expert_model_parallel_size=layout["ep"], expert_tensor_parallel_size=1,
            create_gloo_process_groups=False)
        members.append(get_group_members())
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return members


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "layout"), [
    (480, {"pp": 2, "ep": 8}), (1024, {"pp": 8, "ep": 64, "cp": 2})])
def test_a_rank_creates_few_groups_with_the_members_of_megatron_core(ranks: Any, job: Any, num_ranks: int,
                                                                     layout: dict[str, int]) -> None:
    tested_ranks = [0, num_ranks // 2 + 3]  # rank 0 is in an embedding group; the second rank may be in none
    arguments = {"num_ranks": num_ranks, "layout": layout, "tested_ranks": tested_ranks}
    ((results,),) = ranks(job(__file__, "create_groups", 1, arguments))
    ((expected,),) = ranks(job(__file__, "create_megatron_groups", 1, arguments))
    assert [members for _, members in results] == expected
    assert max(num_created for num_created, _ in results) <= 11


def run_on_main(fail: bool) -> list[Any]:
    """Inside ranks: rank 0 returns a value or raises an error.

    Returns the value or error that this rank receives, and the ranks that ran the action in this process.
    """
    place = world.join_world(ParallelConfig())
    acting_ranks: list[int] = []

    def action() -> str:
        acting_ranks.append(place.rank)
        if fail:
            raise UserError("the disk is full")
        return "value"

    try:
        outcome = world.run_on_main(place, action)
    except UserError as e:
        outcome = f"error: {e}"
    return [outcome, acting_ranks]


@pytest.mark.distributed
def test_every_rank_receives_the_value_or_error_of_rank_0(ranks: Any, job: Any) -> None:
    values, errors = ranks(job(__file__, "run_on_main", 2, {"fail": False}),
                           job(__file__, "run_on_main", 2, {"fail": True}))
    assert values == [["value", [0]], ["value", []]]
    assert errors == [["error: the disk is full", [0]], ["error: the disk is full", []]]
