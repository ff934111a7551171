"""Uneven pipelines against every way to cut some layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.config import ParallelConfig
from megatron_sov.plan.search.space import LEAST_GAIN, uneven

MODEL = recipes.get("k-exaone-236b").model


def slowest(stages: Sequence[int], beside: float) -> float:
    return max(*stages[:-1], stages[-1] + beside)


@pytest.mark.parametrize("beside", [0.0, 0.4, 1.7, 3.0, 6.5])
def test_no_other_cut_has_a_faster_slowest_stage(beside: float) -> None:
    for layers, pp in itertools.product(range(2, 11), (2, 3, 4)):
        every = [cut for cut in itertools.product(range(1, layers + 1), repeat=pp) if sum(cut) == layers]
        found = uneven(layers, pp, 1, beside)
        if found:
            assert slowest(found, beside) == min(slowest(cut, beside) for cut in every)
            assert sorted(found[:-1]) == list(found[:-1]), "larger stages come late"
        elif every:  # equal stages, which are as good but for little
            assert min(slowest(cut, beside) for cut in every) >= (1 - LEAST_GAIN) * (layers // pp + beside)


def played(pp: int, vpp: int, runs: Sequence[int], beside: float, num_micro_batches: int) -> float:
    """Return the length of a step, a layer's forward pass being 1 and its backward pass 2: the
    library's order of passes (`megatron.core.pipeline_parallel.schedules`, 0.16.1), each begun when its input
    is there."""
    total, length = num_micro_batches * vpp, list(runs)
    orders: list[Iterator[tuple[int, int, int]]] = []
    done: dict[tuple[int, int, int], float] = {}
    for stage in range(pp):
        ahead = min(pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp, total)
        forward = [(0, run, mb) for group in range(0, num_micro_batches, pp) for run in range(vpp)
                   for mb in range(group, group + pp)]
        backward = [(1, vpp - 1 - run, mb) for _, run, mb in forward]
        pairs = [one for pair in zip(forward[ahead:], backward, strict=False) for one in pair]
        orders.append(iter([*forward[:ahead], *pairs, *backward[total - ahead:]]))
    now, waiting = [0.0] * pp, [next(order, None) for order in orders]
    while any(waiting):
        for stage in range(pp):
            while (one := waiting[stage]) is not None:
                back, run, mb = one
                place = run * pp + stage
                before = (0, place - 1, mb) if not back else (1, place + 1, mb)
                if back and place == pp * vpp - 1:
                    before = (0, place, mb)
                if before[1] >= 0 and before not in done:
                    break
                work = (1 + back) * (length[place] + beside * (place == pp * vpp - 1))
                now[stage] = done[back, place, mb] = max(now[stage], done.get(before, 0.0)) + work
                waiting[stage] = next(orders[stage], None)
    return max(now)


@pytest.mark.parametrize(("pp", "vpp", "beside"), [(8, 1, 3.2), (8, 2, 3.2), (4, 2, 3.2), (4, 4, 3.2),
                                                   (2, 4, 2.2), (16, 1, 2.0)])
def test_a_schedule_that_is_played_takes_what_a_plan_says(pp: int, vpp: int, beside: float) -> None:
    """The slowest stage for each micro-batch, and the bubble: (pp - 1) / vpp of what a mean stage takes."""
    runs = uneven(48, pp, vpp, beside)
    for layers in filter(None, (runs, (48 // pp // vpp,) * (pp * vpp))):
        stages = [sum(layers[stage::pp]) + beside * (stage == pp - 1) for stage in range(pp)]
        planned = 3 * (64 * max(stages) + (pp - 1) / vpp * sum(stages) / pp)
        assert played(pp, vpp, layers, beside, 64) == pytest.approx(planned, rel=0.015)


def test_runs_of_very_different_lengths_are_not_proposed() -> None:
    """Runs of one layer and of two: a fifth longer than planned."""
    assert uneven(48, 16, 2, 2.0) == () and uneven(48, 8, 4, 3.2) == ()
    runs, stages = (1,) * 15 + (1,) + (2,) * 14 + (3, 1), [3.0] * 14 + [4.0, 4.0]
    assert played(16, 2, runs, 2.0, 64) > 1.1 * 3 * (64 * max(stages) + 15 / 2 * sum(stages) / 16)


@pytest.mark.parametrize(("pp", "vpp", "beside"), [(8, 1, 4.5), (4, 2, 2.2), (5, 1, 0.0), (4, 4, 3.0)])
def test_training_takes_what_is_proposed(pp: int, vpp: int, beside: float) -> None:
    parallel = ParallelConfig(pp=pp, vpp=vpp, pipeline_layout=uneven(48, pp, vpp, beside))
    assert parallel.pipeline_layout and parallel.problems(replace(MODEL, num_layers=48), pp) == []
    of_stages = [len(parallel.layers_of_stage(stage, 48)) for stage in range(pp)]
    assert slowest(of_stages, beside) <= -(-48 // pp) + beside


def test_the_head_is_on_the_last_run_of_the_last_stage() -> None:
    # 10 layers and 2.2 layers' worth beside: 6, and 4 with the head
    assert uneven(48, 4, 2, 2.2) == (6, 6, 6, 6, 6, 7, 7, 4)


def test_where_there_is_nothing_to_gain_stages_stay_equal() -> None:
    assert uneven(48, 4, 1, 0.0) == () and uneven(48, 4, 2, 0.05) == ()
    assert uneven(4, 8, 1, 1.0) == (), "fewer layers than stages"
