"""Run training steps of one rank of a large run at full size on a CPU, with GPU tensors that have no memory.

    python benchmarks/gpu/fake_rank.py [RECIPE GPU RANKS [SETTING ...]]

The GPU's tensors are torch's fake tensors (`fake_gpu.py`), which have shapes but no values. Model, gradient
buffers and optimizer are those of training, with the double of Transformer Engine and a process group that
sends nothing. Two steps run: forward and backward of all micro-batches, sums over processes, clipping and
update.

A case fails if an operation mixes CPU and GPU tensors, if shapes do not match, or if the host waits for the
device in a function that is not in `ALLOWED`. The peak of allocated bytes is printed next to the estimate of
`plan`. Settings are applied on top of the recommended layout; without arguments, `CASES` run. For each case,
the first, the middle and the last pipeline stage run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import fake_gpu
import torch
from setting import DOUBLE, ROOT

CASES: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("solar-open-102b", "h100", 512, ()), ("solar-open-102b", "b200", 480, ("train.fp8=mxfp8",)),
    ("k-exaone-236b", "b200", 512, ()))
"""(recipe, GPU, number of processes, settings on top of the recommended layout)."""
CAPABILITY = {"h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}
"""GPU -> CUDA compute capability."""
ALLOWED = {
    "forward_backward.py:compute_gradients": "the losses of a stage, once per step",
    "collectives.py:all_reduce_dp": "the sum of losses over processes",
    "collectives.py:broadcast_from_last_stage": "the sum of losses for the other stages",
    "collectives.py:to_comm_device": "the copy of losses to the device of both",
    "optimizer.py:_compute_grad_norm": "the gradient norm, which the guard checks",
    "cuda_graphs.py:_start_capturing": "all kernels, before CUDA graphs are captured",
    "cuda_graphs.py:_finish_capturing": "all kernels, after CUDA graphs are captured",
    "token_dispatcher.py:_maybe_dtoh_and_synchronize": "tokens per expert, in each layer with experts",
}
"""FILE:FUNCTION in which the host may wait for the device -> what it waits for."""


def prepare() -> None:
    """Patch torch and libraries for fake GPU tensors, and import training with the double.

    The patches are not undone, so cases run in forks of this process (`run_case`).
    """
    fake_gpu.install()
    sys.path[:0] = [str(DOUBLE), str(ROOT)]
    give_kernels_shapes()
    import megatron_sov.engine  # noqa: F401  it replaces triton kernels of megatron-core, so it goes first

    compile_ = torch.compile
    torch.compile = skip_compiler  # type: ignore[assignment]
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.multi_token_prediction  # noqa: F401

    torch.compile = compile_
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.cuda.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import recording

    fake_gpu.CAPTURE["is_recording"] = recording.is_recording
    from megatron_sov.engine.parallel.gpu_libraries import FP8_FUNCTIONS

    for name in FP8_FUNCTIONS.values():
        setattr(te, name, lambda return_reason=False: (True, "") if return_reason else True)
    import one_rank

    one_rank.wait = lambda: None  # it would count as a wait of training
    one_rank._draw_on_device = lambda parts, seed, num_threads: (
        (part, torch.empty(part.target.shape, device=part.target.device)) for part in parts)


def skip_compiler(function: Any = None, **options: Any) -> Any:
    """Replace `torch.compile`, whose guards would read values."""
    return function or (lambda inner: inner)


def give_kernels_shapes() -> None:
    """Replace kernels of the double that read GPU values by ones that return results of the right shape.
    Autograd saves and frees the same tensors as with the real kernels."""
    from transformer_engine.pytorch import permutation
    from transformer_engine.pytorch.attention import dot_product_attention as attention
    from transformer_engine.pytorch.module import layernorm_linear, norm

    class Kernel(torch.autograd.Function):
        """Saves its inputs for backward, and returns a tensor with the first input's dtype."""

        @staticmethod
        def forward(ctx: Any, shape: Sequence[int], *inputs: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*inputs)
            return inputs[0].new_empty(shape)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            return None, *map(torch.empty_like, ctx.saved_tensors)

    def attend(q: Any, k: Any, v: Any, cu_seqlens: Any, *others: Any) -> Any:
        sums = q.new_empty(q.shape[:2], dtype=torch.float32) + cu_seqlens.sum()
        return Kernel.apply(sums.shape + v.shape[2:], q, k, v, sums)

    def normalize(inp: Any, weight: Any, *others: Any) -> Any:
        return Kernel.apply(inp.shape, inp, weight, inp.new_empty(inp.shape[:-1], dtype=torch.float32))

    def zeros(like: torch.Tensor, count: int, times: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(count, dtype=torch.long, device=like.device),) * times

    norm.normalize = layernorm_linear.normalize = normalize
    attention.attend_documents = attend
    permutation._order_rows = lambda inp, routing_map, num_out_tokens, probs=None: zeros(
        inp + routing_map.sum(), num_out_tokens, 2)
    permutation._row_id_map = lambda routing_map, expert, token: routing_map.new_zeros(
        len(routing_map), 2 * routing_map.shape[1] + 1, dtype=torch.int32)
    permutation._find_rows = lambda row_id_map, num_rows: zeros(row_id_map, num_rows, 3)
    permutation.moe_sort_chunks_by_index = lambda inp, split_sizes, sorted_index: (
        inp * (split_sizes + sorted_index).sum().ne(-1))


def _send_unevenly(imbalance: float) -> None:
    """Multiply the number of tokens that experts of this process get in every layer by `imbalance`."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    original = Dispatcher._maybe_dtoh_and_synchronize

    def count_tokens(dispatcher: Any, point: str, counts: Any = None) -> Any:
        counts = original(dispatcher, point, counts)
        if point == dispatcher.cuda_dtoh_point:
            dispatcher.output_splits = (dispatcher.output_splits * imbalance).astype(int)
            counts = (counts * imbalance).long()
            if not dispatcher.config.moe_permute_fusion:
                dispatcher.num_global_tokens_per_local_expert = (
                    dispatcher.num_global_tokens_per_local_expert * imbalance).long()
        return counts

    Dispatcher._maybe_dtoh_and_synchronize = count_tokens


@contextlib.contextmanager
def use_rank(config: Any, gpu: str, num_ranks: int, rank: int) -> Iterator[tuple[Any, fake_gpu.Ledger]]:
    """Build a rank on the fake GPU; yield it with the memory ledger."""
    import torch.distributed as dist
    from one_rank import OneRank
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformer_engine.pytorch import placement, recording

    from megatron_sov.engine.optimizer import parameter_groups

    p = config.parallel
    fake_gpu.CAPABILITY["capability"] = CAPABILITY[gpu]
    placement.CHIP = placement.Chip(CAPABILITY[gpu])
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    # a pattern of parameter names need not match on this stage, and other stages are not there to ask
    patterns = {group.pattern for group in config.optim.groups}
    parameter_groups.gather_objects = lambda value, group=None: [(patterns, True)]
    tokens = config.data.phases[0].seq_len * config.train.micro_batch_size // p.cp // (p.tp if p.sp else 1)
    with fake_gpu.use_fake_gpu(tokens * config.model.num_experts_per_token) as ledger:
        # a replay would compute nothing, and recorded operators would hold all their tensors
        recording.CapturedOperators._note = lambda graph, *operation: ledger.reserve(*operation)
        yield OneRank(config, rank, num_ranks), ledger


def step(recipe: str, gpu: str, num_ranks: int, settings: Sequence[str], stage: int,
         imbalance: float = 1.0) -> dict[str, Any]:
    """Run two steps as the first process of a pipeline stage; the first step allocates the optimizer's state.

    The process group of this process cannot be used afterwards.

    Args:
        recipe, gpu, num_ranks, settings: as in CASES.
        stage: pipeline stage, from 0.
        imbalance: tokens of the local experts in every layer, in even shares.

    Returns:
        Parameters of the process, processor seconds, waits of the host in the first step by FILE:FUNCTION,
        and the peak of allocated bytes in the second step beside the estimate of `plan`.
    """
    from megatron_sov.plan.footprint.memory import build_account

    config = build_config(recipe, gpu, num_ranks, settings)
    p = config.parallel
    begin_s = time.process_time()
    if imbalance != 1:
        _send_unevenly(imbalance)
    with use_rank(config, gpu, num_ranks, stage * num_ranks // p.pp) as (runner, ledger):
        fake_gpu.WAITS.clear()
        runner.step(1, p.pp)
        waits = dict(fake_gpu.WAITS)
        ledger.peak = 0
        runner.step(2, p.pp)
    rows = p.pp * config.train.micro_batch_size * num_ranks // p.ranks_per_replica
    account = build_account(replace(config, train=replace(config.train, global_batch_size=rows)), num_ranks,
                            stage, config.data.phases[0].seq_len, imbalance)
    return {"parameters": sum(weight.numel() for weight in runner.model.parameters()),
            "seconds": time.process_time() - begin_s, "waits": waits, "peak bytes": ledger.peak,
            "account bytes": account.allocated}


def build_config(recipe: str, gpu: str, num_ranks: int, settings: Sequence[str]) -> Any:
    """Return a recipe in its recommended layout, if it has one, with settings on top.

    DeepEP has no double: expert_dispatcher=alltoall replaces it.
    """
    from megatron_sov.engine.parallel.gpu_libraries import DEEP_EP_NAMES
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended_layouts import find_recommended

    config = recipes.get(recipe)
    config = apply_settings(config, [*(find_recommended(config, num_ranks, gpu) or ()), *settings])
    if config.parallel.expert_dispatcher in DEEP_EP_NAMES:
        return apply_settings(config, ["parallel.expert_dispatcher=alltoall"])
    return config


def run_case(*case: Any) -> dict[str, Any]:
    """Run `step` in a fork of this process; return its result, or its `problem`."""
    result = run_in_fork(step, *case)
    if others := sorted(result.get("waits", {}).keys() - ALLOWED.keys()):
        result["problem"] = f"waits for the device in {', '.join(others)}"
    return result


def run_in_fork(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a fork of this process; return its result, or its `problem`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(report_problem, function, *arguments).result()
        except BrokenProcessPool:
            return {"problem": "the process has ended"}


def report_problem(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function; return its result, or its `problem`: after any error the other cases still run."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as e:
        return {"problem": f"{type(e).__name__}: {e}".splitlines()[0], "trace": traceback.format_exc()}


def main() -> int:
    """Print the result of each stage; return 1 if one failed."""
    recipe, gpu, num_ranks, *settings = sys.argv[1:] or ("", "", 0)
    cases = [(recipe, gpu, int(num_ranks), tuple(settings))] if recipe else CASES
    print(f"one rank's step at its own sizes on a GPU without memory: {platform.machine()}, "
          f"torch {torch.__version__}; processor seconds\n", flush=True)
    prepare()
    failed = False
    for case in cases:
        config = build_config(*case)
        p = config.parallel
        print(f"{case[0]} on {case[2]} {case[1]}: tp {p.tp}, pp {p.pp}, vpp {p.vpp}, cp {p.cp}, ep {p.ep}, "
              f"{p.expert_dispatcher}, expert_overlap {p.expert_overlap}", *case[3], flush=True)
        for stage in sorted({0, p.pp // 2, p.pp - 1}):
            result = run_case(*case, stage)
            failed |= "problem" in result
            figures = ""
            if "parameters" in result:
                figures = (f"{result['parameters'] / 1e9:6.2f} B parameters  {result['seconds']:5.0f} s  "
                           f"at most {result['peak bytes'] / 1e9:6.2f} GB allocated, the account says "
                           f"{result['account bytes'] / 1e9:6.2f}")
            print(f"  stage {stage + 1:>2} of {p.pp:<2} {figures}  "
                  f"{result.get('problem', 'sound')}", flush=True)
            for name, count in sorted(result.get("waits", {}).items()):
                print(f"      {count:>5} waits  {name}: {ALLOWED.get(name, 'NOT ALLOWED')}", flush=True)
            if "trace" in result:
                print(result["trace"], file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
