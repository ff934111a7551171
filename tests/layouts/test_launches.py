"""Limits the operations that a training step launches and the values that it copies from the device.

A GPU is busy only while the host runs ahead: each launch costs some microseconds, and each copy to the host
waits for all previously launched operations.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sov.train.loop import train_step
from tests.layouts.layout_run import build_small_config, build_trainer, find_caller

FETCHES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
SYNCING = ("aten.nonzero", "aten.masked_select", "aten.unique", "aten.bincount", "aten.repeat_interleave")
OPERATIONS = {"tiny-solar-open": 820, "tiny-k-exaone": 880}
"""Limit of launches per additional layer and micro-batch: forward, backward and its share of the update; the
CPU update processes whole vectors and remainders separately."""
PER_ROUTED_LAYER = {"moe_utils.py:permute": 2, "moe_utils.py:sort_chunks_by_idxs": 6, "experts.py:forward": 1}
"""Copies by Megatron-Core per MoE layer and micro-batch: numbers of tokens per expert."""
PER_MICRO_BATCH = {"data_objective.py:prepare": 1, "data_objective.py:_count_mtp_targets": 1,
                   "objective.py:with_denominators": 1}
"""Copies per row of counts that are already on the host, see test_data_batches.py."""
PER_STEP = {"values.py:sum_dict": 2, "loop.py:train_step": 1, "forward_backward.py:compute_gradients": 5,
            "collectives.py:all_reduce_dp": 2, "collectives.py:all_reduce_world": 1,
            "collectives.py:broadcast_from_last_stage": 1, "optimizer.py:_compute_grad_norm": 1}
"""Sums over processes, losses and the gradient norm."""


def count_launches(recipe: str, settings: list[str], data: str) -> dict[str, Any]:
    """Return launches and copies of the second training step."""
    fetches: Counter[str] = Counter()

    class Operations(TorchDispatchMode):
        """Counts operations, and operations whose output size the host must know."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            name = str(func)
            by_mask = name.startswith("aten.index.") and any(
                torch.is_tensor(t) and t.dtype == torch.bool for t in tree_leaves(args[1]))
            if by_mask or name.startswith(SYNCING):
                fetches[find_caller()] += 1
            return func(*args, **(kwargs or {}))

    def count_fetches(method: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_fetch(self: Any, *args: Any, **kwargs: Any) -> Any:
            fetches[find_caller()] += 1
            return method(self, *args, **kwargs)

        return count_and_fetch

    config = build_small_config(recipe, settings, [data], "lm")
    trainer = build_trainer(config)
    train_step(trainer)
    with pytest.MonkeyPatch.context() as patched, Operations() as seen:
        for name in FETCHES:
            patched.setattr(torch.Tensor, name, count_fetches(getattr(torch.Tensor, name)))
        train_step(trainer)
    return {"operations": seen.count, "fetches": fetches, "routed_layers": config.model.num_moe_layers(),
            "micro_batches": config.train.global_batch_size // config.train.micro_batch_size}


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize("recipe", OPERATIONS)
def test_a_step_starts_no_more_operations_and_fetches_no_more_numbers(
        recipe: str, ranks: Any, job: Any, packed_data: Any) -> None:
    (fewer,), (more,) = ranks(*(job(__file__, "count_launches", 1, {
        "recipe": recipe, "settings": [f"model.num_layers={n}", "model.num_experts=8"],
        "data": str(packed_data.text)}) for n in (2, 4)))
    count = more["micro_batches"]
    assert (more["operations"] - fewer["operations"]) / (2 * count) <= OPERATIONS[recipe]
    limits = ({name: n * count * more["routed_layers"] for name, n in PER_ROUTED_LAYER.items()}
              | {name: n * count for name, n in PER_MICRO_BATCH.items()} | PER_STEP)
    excess = {name: n for name, n in more["fetches"].items() if n > limits.get(name, 0)}
    assert excess == {}, "these functions make the host wait for the device"
