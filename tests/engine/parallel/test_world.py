"""A process's place in the layout, and its groups."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig


def place(layout: dict[str, int]) -> list[int | bool]:
    """Return this process's ranks and sizes in `layout`, which it joins after leaving another layout."""
    world.join_world(ParallelConfig(pp=2))
    world.leave_world()
    w = world.join_world(ParallelConfig(**layout))
    return [w.rank, w.size, w.dp_rank, w.dp_size, w.first_stage, w.last_stage, w.is_main]


def test_store_keys_of_one_join_do_not_affect_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import torch.distributed as dist

    store = dist.HashStore()
    monkeypatch.delenv(world.STORE_PORT, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    first, second = (world._create_rendezvous(0, 1, datetime.timedelta(seconds=1)) for _ in range(2))
    assert (first.add("gpu/one", 1), second.add("gpu/one", 1)) == (1, 1)


@pytest.mark.distributed
def test_a_process_knows_its_place_and_can_take_another(ranks, job) -> None:
    (places,) = ranks(job(__file__, "place", 4, {"layout": {"tp": 2}}))
    assert places == [[0, 4, 0, 2, True, True, True], [1, 4, 0, 2, True, True, False],
                      [2, 4, 1, 2, True, True, False], [3, 4, 1, 2, True, True, False]]


def joining(timeout_s: float) -> list[Any]:
    """Return what `join_world` requests on a simulated GPU: GPU, default group, and the library's groups."""
    from megatron.core import parallel_state

    asked: list[Any] = []

    class Asked(Exception):
        """Ends the call after the requests."""

    def take(store: Any, rank: int, size: int, needs_bytes: int, timeout: Any) -> torch.device:
        asked.append([rank, size, needs_bytes, timeout.total_seconds()])
        return torch.device("cuda", 3)

    def groups(*sizes: Any, **given: Any) -> None:
        asked.append([given["create_gloo_process_groups"], given["distributed_timeout_minutes"]])
        raise Asked

    with (mock.patch.object(world, "on_gpu", lambda: True), mock.patch.object(world, "select_gpu", take),
          mock.patch.object(world.dist, "init_process_group", lambda backend, **given: asked.append(
              [backend, "device_id" in given, given["timeout"].total_seconds()])),
          mock.patch.object(world.dist, "get_world_size", lambda: 1),
          mock.patch.object(parallel_state, "initialize_model_parallel", groups), pytest.raises(Asked)):
        world.join_world(ParallelConfig(timeout_s=timeout_s), 7)
    return asked


@pytest.mark.distributed
def test_gpu_groups_are_not_split_from_the_world_and_gloo_creates_none(ranks: Any, job: Any) -> None:
    """A default group bound to a device would make every process take part in every `new_group`."""
    ((asked,),) = ranks(job(__file__, "joining", 1, {"timeout_s": 90.0}))
    assert asked == [[0, 1, 7, 90.0], ["nccl", False, 90.0], [False, 2]]


def joined(num_ranks: int, layout: dict[str, int], places: list[int]) -> list[Any]:
    """Return, for the ranks `places` in a world without communication, how many new groups have the rank, and
    the members of the library's groups."""
    from torch import distributed as dist

    found = []
    for place in places:
        dist.init_process_group("fake", rank=place, world_size=num_ranks, store=FakeStore())
        with (mock.patch.dict("os.environ", RANK=str(place), WORLD_SIZE=str(num_ranks)),
              mock.patch.object(dist, "new_group", wraps=dist.new_group) as made):
            world.join_world(ParallelConfig(**layout))
        taken = sum(place in call.kwargs["ranks"] for call in made.call_args_list)
        found.append([taken, members_by_name()])
        world.leave_world()
    return found


def members_by_name() -> dict[str, Any]:
    """Return the members of each library group of this process."""
    from megatron.core import parallel_state
    from torch import distributed as dist

    return {name: dist.get_process_group_ranks(group) for name, group in sorted(vars(parallel_state).items())
            if name.endswith(("_GROUP", "_GROUP_WITH_CP")) and isinstance(group, dist.ProcessGroup)}


def unshared(num_ranks: int, layout: dict[str, int], places: list[int]) -> list[Any]:
    """Return the members of the library's groups if Megatron-Core creates them itself, each separately."""
    from megatron.core import parallel_state
    from torch import distributed as dist

    found = []
    for place in places:
        dist.init_process_group("fake", rank=place, world_size=num_ranks, store=FakeStore())
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=layout["pp"], context_parallel_size=layout.get("cp", 1),
            expert_model_parallel_size=layout["ep"], expert_tensor_parallel_size=1,
            create_gloo_process_groups=False)
        found.append(members_by_name())
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "layout"), [
    (480, {"pp": 2, "ep": 8}), (1024, {"pp": 8, "ep": 64, "cp": 2})])
def test_a_rank_joins_few_group_creations_and_has_the_library_groups(ranks: Any, job: Any, num_ranks: int,
                                                                     layout: dict[str, int]) -> None:
    places = [0, num_ranks // 2 + 3]  # the second may be in no embedding group
    given = {"num_ranks": num_ranks, "layout": layout, "places": places}
    ((shared,),), ((alone,),) = (ranks(job(__file__, name, 1, given)) for name in ("joined", "unshared"))
    assert [members for _, members in shared] == alone
    assert all(taken <= 11 for taken, _ in shared), [taken for taken, _ in shared]


def on_main(fail: bool) -> list[Any]:
    """Call `run_on_main` with an action that may fail; return the result, and the rank if it acted."""
    place = world.join_world(ParallelConfig())
    asked: list[int] = []

    def action() -> str:
        asked.append(place.rank)
        if fail:
            raise UserError("the disk is full")
        return "answer"

    try:
        outcome = world.run_on_main(place, action)
    except UserError as e:
        outcome = f"refused: {e}"
    world.leave_world()
    return [outcome, asked]


@pytest.mark.distributed
def test_every_rank_hears_of_an_answer_and_of_a_failure(ranks: Any, job: Any) -> None:
    answered, refused = ranks(job(__file__, "on_main", 2, {"fail": False}),
                              job(__file__, "on_main", 2, {"fail": True}))
    assert answered == [["answer", [0]], ["answer", []]]
    assert refused == [["refused: the disk is full", [0]], ["refused: the disk is full", []]]
