"""A process knows its place in the layout, and its groups."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest


def place(layout: dict[str, int]) -> list[int | bool]:
    """Return this process's place, after it had another one."""
    from megatron_sov.engine.mcore.parallel import world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(pp=2))
    world.leave()
    w = world.join(ParallelConfig(**layout))
    return [w.rank, w.size, w.dp_rank, w.dp_size, w.first_stage, w.last_stage, w.is_main]


def test_what_one_join_leaves_in_a_store_the_next_does_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import torch.distributed as dist

    from megatron_sov.engine.mcore.parallel import world

    kept = dist.HashStore()
    monkeypatch.delenv(world.STORE_PORT, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(kept, 0, 1)]))
    first, second = (world._rendezvous(0, 1, datetime.timedelta(seconds=1)) for _ in range(2))
    assert (first.add("gpu/one", 1), second.add("gpu/one", 1)) == (1, 1)


@pytest.mark.distributed
def test_a_process_knows_its_place_and_can_take_another(ranks, job) -> None:
    (places,) = ranks(job(__file__, "place", 4, {"layout": {"tp": 2}}))
    assert places == [[0, 4, 0, 2, True, True, True], [1, 4, 0, 2, True, True, False],
                      [2, 4, 1, 2, True, True, False], [3, 4, 1, 2, True, True, False]]


def joining(timeout_s: float) -> list[Any]:
    """Return what the groups are asked for on a double of a GPU."""
    import torch
    from megatron.core import parallel_state

    from megatron_sov.engine.mcore.parallel import world
    from megatron_sov.model.config import ParallelConfig

    asked: list[Any] = []

    class Asked(Exception):
        """There is no more to see."""

    def take(store: Any, rank: int, size: int, needs_bytes: int, timeout: Any) -> torch.device:
        asked.append([rank, size, needs_bytes, timeout.total_seconds()])
        return torch.device("cuda", 3)

    def groups(*sizes: Any, **given: Any) -> None:
        asked.append([given["create_gloo_process_groups"], given["distributed_timeout_minutes"]])
        raise Asked

    with (mock.patch.object(world, "on_gpu", lambda: True), mock.patch.object(world, "take_gpu", take),
          mock.patch.object(world.dist, "init_process_group", lambda backend, **given: asked.append(
              [backend, str(given["device_id"]), given["timeout"].total_seconds()])),
          mock.patch.object(parallel_state, "initialize_model_parallel", groups), pytest.raises(Asked)):
        world.join(ParallelConfig(timeout_s=timeout_s), 7)
    return asked


@pytest.mark.distributed
def test_on_gpus_groups_are_bound_to_the_device_and_gloo_makes_none(ranks: Any, job: Any) -> None:
    ((asked,),) = ranks(job(__file__, "joining", 1, {"timeout_s": 90.0}))
    assert asked == [[0, 1, 7, 90.0], ["nccl", "cuda:3", 90.0], [False, 2]]


def on_main(fail: bool) -> list[Any]:
    """Runs inside ranks: rank 0 answers or refuses; returns what each rank saw."""
    from megatron_sov.base.errors import UserError
    from megatron_sov.engine.mcore.parallel import world
    from megatron_sov.model.config import ParallelConfig

    place = world.join(ParallelConfig())
    asked: list[int] = []

    def action() -> str:
        asked.append(place.rank)
        if fail:
            raise UserError("the disk is full")
        return "answer"

    try:
        seen = world.on_main(place, action)
    except UserError as e:
        seen = f"refused: {e}"
    world.leave()
    return [seen, asked]


@pytest.mark.distributed
def test_every_rank_hears_of_an_answer_and_of_a_failure(ranks: Any, job: Any) -> None:
    answered, refused = ranks(job(__file__, "on_main", 2, {"fail": False}),
                              job(__file__, "on_main", 2, {"fail": True}))
    assert answered == [["answer", [0]], ["answer", []]]
    assert refused == [["refused: the disk is full", [0]], ["refused: the disk is full", []]]
