"""The work of the host per layer and micro-batch has an upper bound, which later changes may only lower."""

import json
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.test_fake_rank import GPU, SELECTIVE, SMALL, run_in_own_process

MICRO_BATCHES, LAYERS = 2, (2, 4)
"""Micro-batches of a step, and the numbers of layers whose difference is counted."""
OVERLAP = (*SELECTIVE, "parallel.expert_overlap=micro_batches", "parallel.delay_weight_grads=true")
GRAPHS = 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]'
KINDS = ("operations", "views", "autograd functions", "Triton launches", "compiled calls", "Python calls")
"""Operations that launch kernels; operations that only change shapes; calls of autograd functions in Python;
launches of permutation kernels in forward passes; calls of functions that `torch.compile` compiles on a GPU;
calls of functions of megatron-core and megatron_sov."""
CASES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "full recomputation": (("train.recompute=true",), (625, 369, 39, 22, 14, 818)),
    "selective recomputation": (SELECTIVE, (492, 291, 25, 11, 11, 626)),
    "router graphs": ((*SELECTIVE, GRAPHS), (362, 224, 16, 7, 9, 515)),
    "overlap": (OVERLAP, (509, 318, 26, 11, 11, 836)),
    "overlap and router graphs": ((*OVERLAP, GRAPHS), (374, 250, 16, 7, 9, 735))}
"""Case -> settings, and the largest number of each of `KINDS` per layer and micro-batch."""
LAUNCHES = {"_row_id_map": 3, "_order_rows": 1, "_find_rows": 1, "moe_sort_chunks_by_index": 2}
"""Function of the double in place of Triton kernels -> launches of Transformer Engine 2.20.2."""


COUNTS: Counter[str] = Counter()


def count_calls(kind: str, function: Any, number: int = 1) -> Any:
    """Return a function that adds `number` to a count before each call."""
    def call(*args: Any, **kwargs: Any) -> Any:
        COUNTS[kind] += number
        return function(*args, **kwargs)
    return call


class CountedOperations(TorchDispatchMode):
    """Counts operations, apart from those that only change shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            COUNTS["views" if func.is_view else "operations"] += 1
        return func(*args, **(kwargs or {}))


def count_python_call(frame: FrameType, event: str, _: Any) -> None:
    """Count the calls of functions of megatron-core and megatron_sov (a function of `sys.setprofile`)."""
    if event == "call" and "/megatron" in frame.f_code.co_filename:
        COUNTS["Python calls"] += 1


def count_step(settings: list[str]) -> dict[str, int]:
    """Return the counts of the second step of a rank on the fake GPU."""
    import fake_rank

    apply = torch.autograd.Function.apply.__func__
    config = fake_rank.build_config("tiny-solar-open", "h100", 2, settings)
    with fake_rank.use_rank(config, "h100", 2, rank=0) as (runner, _):
        runner.step(1, MICRO_BATCHES)
        torch.autograd.Function.apply = classmethod(count_calls("autograd functions", apply))
        COUNTS.clear()
        sys.setprofile(count_python_call)
        with CountedOperations():
            runner.step(2, MICRO_BATCHES)
        sys.setprofile(None)
    return dict(COUNTS)


def count_cases() -> None:
    """Print case -> numbers of `KINDS` per layer and micro-batch, as JSON; patches torch for good."""
    sys.path.append(GPU)
    import fake_rank

    fake_rank.skip_compiler = lambda function=None, **_: (
        count_calls("compiled calls", function) if function else lambda f: count_calls("compiled calls", f))
    give_kernels_shapes = fake_rank.give_kernels_shapes

    def give_counted_kernels() -> None:
        give_kernels_shapes()
        from transformer_engine.pytorch import permutation

        for name, number in LAUNCHES.items():
            setattr(permutation, name, count_calls("Triton launches", getattr(permutation, name), number))

    fake_rank.give_kernels_shapes = give_counted_kernels
    fake_rank.prepare()
    results, parts = {}, (LAYERS[1] - LAYERS[0]) * MICRO_BATCHES
    for case, (settings, _) in CASES.items():
        few, many = (fake_rank.run_in_fork(count_step, [*SMALL, *settings, f"model.num_layers={layers}"])
                     for layers in LAYERS)
        results[case] = many if "problem" in many else {
            kind: (many.get(kind, 0) - few.get(kind, 0)) / parts for kind in KINDS}
    print(json.dumps(results))


@pytest.mark.deep
def test_the_host_works_no_more_per_layer_and_micro_batch_than_its_limits() -> None:
    results = run_in_own_process(__name__, "count_cases", list(CASES))
    found = {case: tuple(result[kind] for kind in KINDS) for case, result in results.items()}
    assert all(number <= limit for case, (_, limits) in CASES.items()
               for number, limit in zip(found[case], limits, strict=True)), found
