"""Ranges of parameters that a process updates, and the number of updates."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

from megatron_sov.engine.optimizer.state_shards import (
    allow_float64, iter_rectangles, list_shards, set_update_count)
from megatron_sov.engine.parallel import cpu_shims, library_patches
from megatron_sov.engine.parallel.simulated_world import SimulatedRanks
from megatron_sov.model.config import ParallelConfig
from tests.tiny import tiny_model


def counted(fused: bool) -> dict[str, Any]:
    """Return the number of updates after a restore, in torch's Adam or in an optimizer that counts in its
    groups.
    """
    from torch.optim import AdamW, Optimizer

    class Fused(Optimizer):
        """Counts as transformer_engine.pytorch.optimizers.FusedAdam does: in the group, from the first update
        on."""

    class Library:
        def __init__(self, inner: Optimizer) -> None:
            self.optimizer = inner

    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    library = Library(Fused(parameters, {"lr": 0.1}) if fused else AdamW(parameters, lr=0.1))
    made = [sorted(s.state()) for s in list_shards(library)]
    set_update_count(list_shards(library), 5)
    states = [library.optimizer.state[p] for p in parameters]
    own = [s["step"] for s in states if "step" in s]
    if not fused:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        library.optimizer.step()
    return {"made": made, "groups": [g.get("step") for g in library.optimizer.param_groups],
            "own": [float(t) for t in own],
            "shapes": [[list(s[name].shape) for name in ("exp_avg", "exp_avg_sq")] for s in states]}


@pytest.mark.distributed
def test_every_parameter_counts_its_own_updates_and_fused_optimizers_count_in_groups(ranks, job) -> None:
    (plain,), (fused,) = ranks(job(__file__, "counted", 1, {"fused": False}),
                               job(__file__, "counted", 1, {"fused": True}))
    shapes = [[[2, 3], [2, 3]], [[4], [4]]]
    assert plain == {"made": [["exp_avg", "exp_avg_sq"]] * 2, "groups": [None], "own": [6.0, 6.0],
                     "shapes": shapes}
    assert fused == {"made": [["exp_avg", "exp_avg_sq"]] * 2, "groups": [5], "own": [], "shapes": shapes}


def zero1_shards(precision: str) -> dict[str, Any]:
    """Return the ranges of both data-parallel processes under ZeRO-1 before the first step."""

    from megatron_sov.engine.optimizer.optimizer import Optimizer

    config, model = tiny_model("tiny-k-exaone", f"train.precision={precision}", layout={"zero1": True})
    optimizer = Optimizer(model, config.optim, config.parallel)
    names = {id(p): name for name, p in model.named_parameters()}
    mine = {names[id(s.parameter)]: [s.start, s.stop] for s in optimizer.shards}
    blocks = [(b.key, b.offset, b.shape, str(b.data.dtype)) for b in optimizer.state_shards() if b.owned]
    everyones: list[Any] = [None] * dist.get_world_size()
    names_of_state = {key.split("/")[0] for key, *_ in blocks}
    dist.all_gather_object(everyones, (mine, len(blocks), sorted({dtype for *_, dtype in blocks}),
                                       sorted(names_of_state)))
    return {"sizes": {names[id(p)]: p.numel() for p in model.parameters()}, "everyones": everyones}


@pytest.mark.deep
@pytest.mark.distributed
def test_zero1_assigns_disjoint_parameter_ranges(ranks, job) -> None:
    cases = (("fp32", ["exp_avg", "exp_avg_sq"], "float32"),
             ("bf16", ["exp_avg", "exp_avg_sq", "master"], "float32"),
             ("fp64", ["exp_avg", "exp_avg_sq"], "float64"))
    results = ranks(*(job(__file__, "zero1_shards", 2, {"precision": precision}) for precision, *_ in cases))
    for (precision, kinds, dtype), (result, _) in zip(cases, results, strict=True):
        updated = []
        for ranges, num_blocks, dtypes, names in result["everyones"]:
            assert names == kinds and dtypes == [f"torch.{dtype}"]
            assert num_blocks >= len(kinds) * len(ranges)
            updated.append(sum(stop - start for start, stop in ranges.values()))
        whole = sum(result["sizes"].values())
        assert sum(updated) == whole, precision
        assert max(updated) < 0.55 * whole, "the halves are even but for padding"
        for name, size in result["sizes"].items():
            spans = sorted(ranges[name] for ranges, *_ in result["everyones"] if name in ranges)
            assert spans[0][0] == 0 and spans[-1][1] == size and all(a[1] == b[0] for a, b in pairwise(spans))


# Rectangles of flat ranges against numpy's element order.


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(shape=SHAPES, data=st.data())
def test_an_element_range_is_a_few_ordered_rectangles(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    result = list(iter_rectangles(shape, start, stop))
    taken = [numbers[tuple(slice(o, o + n) for o, n in zip(place, extent, strict=True))].ravel()
             for place, extent in result]
    assert np.concatenate([*taken, np.empty(0, int)]).tolist() == list(range(start, stop))
    assert len(result) <= 2 * len(shape) - 1
    assert all(part.size for part in taken)


def test_processes_that_take_turns_change_the_names_of_types_once() -> None:
    cpu_shims.prepare_without_gpu()
    library_patches.patch_defects()
    before, number = torch.Tensor.type, torch.zeros(1, dtype=torch.float64)
    own_names = number.type()

    def named(_: Any) -> list[Any]:
        with allow_float64:
            found = [torch.Tensor.type]
            torch.distributed.barrier()
            return [*found, torch.Tensor.type, number.type()]

    changed = SimulatedRanks(3).run(ParallelConfig(), named)
    assert changed == [[changed[0][0]] * 2 + [own_names.replace("Double", "Float")]] * 3
    assert torch.Tensor.type is before
