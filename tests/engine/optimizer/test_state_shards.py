"""Optimizer state: ranges of parameters that a process updates under ZeRO-1, and the number of updates."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

from megatron_sov.engine.optimizer.state_shards import (
    allow_float64, iter_rectangles, list_shards, set_update_count)
from tests.tiny import tiny_model


def restore_update_count(fused: bool) -> dict[str, Any]:
    """Set the number of updates to 5: in torch's AdamW, which then takes a step, or in a double of a fused
    Adam. Returns kinds of state before, counts of groups, counts of parameters, and shapes of moments."""
    from torch.optim import AdamW, Optimizer

    class FusedAdamDouble(Optimizer):
        """Counts updates by group instead of by parameter, like Transformer Engine's `FusedAdam`."""

    class MegatronOptimizerDouble:
        def __init__(self, inner: Optimizer) -> None:
            self.optimizer = inner

    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    megatron_optimizer = MegatronOptimizerDouble(FusedAdamDouble(parameters, {"lr": 0.1})
                                                 if fused else AdamW(parameters, lr=0.1))
    states_before = [sorted(s.state()) for s in list_shards(megatron_optimizer)]
    set_update_count(list_shards(megatron_optimizer), 5)
    states = [megatron_optimizer.optimizer.state[p] for p in parameters]
    own_counts = [s["step"] for s in states if "step" in s]
    if not fused:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        megatron_optimizer.optimizer.step()
    return {"states_before": states_before,
            "groups": [g.get("step") for g in megatron_optimizer.optimizer.param_groups],
            "own_counts": [float(t) for t in own_counts],
            "shapes": [[list(s[name].shape) for name in ("exp_avg", "exp_avg_sq")] for s in states]}


@pytest.mark.distributed
def test_every_parameter_counts_its_own_updates_and_fused_optimizers_count_in_groups(ranks, job) -> None:
    (plain,), (fused,) = ranks(job(__file__, "restore_update_count", 1, {"fused": False}),
                               job(__file__, "restore_update_count", 1, {"fused": True}))
    shapes = [[[2, 3], [2, 3]], [[4], [4]]]
    assert plain == {"states_before": [["exp_avg", "exp_avg_sq"]] * 2, "groups": [None],
                     "own_counts": [6.0, 6.0], "shapes": shapes}
    assert fused == {"states_before": [["exp_avg", "exp_avg_sq"]] * 2, "groups": [5], "own_counts": [],
                     "shapes": shapes}


def describe_zero1_shards(precision: str) -> dict[str, Any]:
    """Inside ranks: describe the state of both data-parallel processes under ZeRO-1 before the first step.

    Returns the size of each parameter and, for each rank: its range of each parameter, the number of state
    shards that it owns, their dtypes, and the kinds of state.
    """
    from megatron_sov.engine.optimizer.optimizer import Optimizer

    config, model = tiny_model("tiny-k-exaone", f"train.precision={precision}", layout={"zero1": True})
    optimizer = Optimizer(model, config.optim, config.parallel)
    names = {id(p): name for name, p in model.named_parameters()}
    local_ranges = {names[id(s.parameter)]: [s.start, s.stop] for s in optimizer.shards}
    owned = [shard for shard in optimizer.state_shards() if shard.owned]
    dtypes = sorted({str(shard.data.dtype) for shard in owned})
    kinds = sorted({shard.key.split("/")[0] for shard in owned})
    results_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results_by_rank, (local_ranges, len(owned), dtypes, kinds))
    return {"sizes": {names[id(p)]: p.numel() for p in model.parameters()},
            "results_by_rank": results_by_rank}


@pytest.mark.deep
@pytest.mark.distributed
def test_zero1_assigns_disjoint_parameter_ranges(ranks, job) -> None:
    cases = (("fp32", ["exp_avg", "exp_avg_sq"], "float32"),
             ("bf16", ["exp_avg", "exp_avg_sq", "master"], "float32"),
             ("fp64", ["exp_avg", "exp_avg_sq"], "float64"))
    results = ranks(*(job(__file__, "describe_zero1_shards", 2, {"precision": precision})
                      for precision, *_ in cases))
    for (precision, kinds, dtype), (result, _) in zip(cases, results, strict=True):
        num_updated = []
        for ranges, num_blocks, dtypes, names in result["results_by_rank"]:
            assert names == kinds and dtypes == [f"torch.{dtype}"]
            assert num_blocks >= len(kinds) * len(ranges)
            num_updated.append(sum(stop - start for start, stop in ranges.values()))
        num_elements = sum(result["sizes"].values())
        assert sum(num_updated) == num_elements, precision
        assert max(num_updated) < 0.55 * num_elements, "apart from padding, the halves have equal sizes"
        for name, size in result["sizes"].items():
            by_start = sorted(ranges[name] for ranges, *_ in result["results_by_rank"] if name in ranges)
            assert by_start[0][0] == 0 and by_start[-1][1] == size
            assert all(first[1] == second[0] for first, second in pairwise(by_start))


# Rectangles of flat ranges against numpy's element order.

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(shape=SHAPES, data=st.data())
def test_an_element_range_is_a_few_ordered_rectangles(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    result = list(iter_rectangles(shape, start, stop))
    elements = [numbers[tuple(slice(low, low + n) for low, n in zip(offset, sizes, strict=True))].ravel()
                for offset, sizes in result]
    assert np.concatenate([*elements, np.empty(0, int)]).tolist() == list(range(start, stop))
    assert len(result) <= 2 * len(shape) - 1
    assert all(rectangle.size for rectangle in elements)


def test_megatron_core_takes_float64_for_float32() -> None:
    with allow_float64():
        assert torch.zeros(1, dtype=torch.float64).type().endswith("FloatTensor")
