"""One rank of a large run does a training step at full size, on a GPU without memory.

Usage: python benchmarks/gpu/fake_rank.py [RECIPE GPU RANKS [SETTING ...]]

Model, gradient buffers and optimizer are those of training, made of the double of Transformer Engine, in a
group that sends nothing; then come the micro-batches of a step, the sums over processes, clipping and the
update.  It fails where a tensor of the host is among those of the GPU, where shapes do not fit, and where the
host waits for the device in a place that is not in `ALLOWED`.  Without arguments these are the recommended
layouts of `CASES`; settings come on top of a recommended layout.  The first, a middle and the last pipeline
stage are tried.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import fake_gpu
import torch
from setting import DOUBLE, ROOT

CASES: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("solar-open-102b", "h100", 512, ()), ("solar-open-102b", "b200", 480, ("train.fp8=mxfp8",)),
    ("k-exaone-236b", "b200", 512, ()))
"""Recipe, GPU, number of processes, settings beside the recommended layout."""
CAPABILITY = {"h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}
"""GPU -> what it says of itself."""
ALLOWED = {
    "forward_backward.py:compute_gradients": "a stage's losses, once a step",
    "collectives.py:all_reduce_dp": "their sum over processes",
    "collectives.py:broadcast_from_last_stage": "their sum for the other stages",
    "collectives.py:to_comm_device": "the way there of both",
    "optimizer.py:_compute_grad_norm": "the norm of gradients, which the guard is asked about",
    "cuda_graphs.py:_start_capturing": "all kernels, before graphs are captured",
    "cuda_graphs.py:_finish_capturing": "all kernels, behind that",
    "token_dispatcher.py:_maybe_dtoh_and_synchronize": "how many tokens go where, in each layer with experts",
}
"""File and function that may have the host wait -> what for."""


def prepare() -> None:
    """Permanently import what training needs, for a GPU without memory and with the double."""
    fake_gpu.install()
    sys.path[:0] = [str(DOUBLE), str(ROOT)]
    _give_kernels_shapes()
    import megatron_sov.engine  # noqa: F401  before the library, for which it replaces kernels of triton

    compile_, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
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

    fake_gpu.CAPTURE["is under way"] = recording.is_recording
    from megatron_sov.engine.parallel.gpu_libraries import FP8_FUNCTIONS

    for name in FP8_FUNCTIONS.values():
        setattr(te, name, lambda return_reason=False: (True, "") if return_reason else True)
    import one_rank

    one_rank.wait = lambda: None  # for its clock
    one_rank._made_there = lambda parts, seed, num_threads: (
        (part, torch.empty(part.target.shape, device=part.target.device)) for part in parts)


def _as_it_is(function: Any = None, **settings: Any) -> Any:
    return (lambda f: f) if function is None else function


def _give_kernels_shapes() -> None:
    """Make the double's kernels that read GPU values return results of the correct shape instead."""
    from transformer_engine.pytorch import permutation
    from transformer_engine.pytorch.attention import dot_product_attention as attention
    from transformer_engine.pytorch.module import layernorm_linear, norm

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float,
                 size: tuple[int, int]) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        weights = (q * k.repeat_interleave(groups, 1)).sum(-1, keepdim=True) + cu_seqlens.sum()
        return weights.to(q.dtype) * v.repeat_interleave(groups, 1)

    def zeros(like: torch.Tensor, count: int, times: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(count, dtype=torch.long, device=like.device),) * times

    class Norm(torch.autograd.Function):
        """A norm that saves the same tensors as the real one."""

        @staticmethod
        def forward(ctx: Any, inp: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(inp, weight, inp.new_empty(inp.numel() // len(weight), dtype=torch.float32))
            return torch.empty_like(inp)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            inp, weight, _ = ctx.saved_tensors
            return torch.empty_like(inp), torch.empty_like(weight)

    norm.normalise = layernorm_linear.normalise = lambda inp, weight, *others: Norm.apply(inp, weight)
    attention.attended_documents = attended
    permutation._rows = lambda inp, routing_map, num_out_tokens, probs=None: zeros(
        inp + routing_map.sum(), num_out_tokens, 2)
    permutation._row_id_map = lambda routing_map, expert, token: routing_map.new_zeros(
        len(routing_map), 2 * routing_map.shape[1] + 1, dtype=torch.int32)
    permutation._taken = lambda row_id_map, num_rows: zeros(row_id_map, num_rows, 3)
    permutation.moe_sort_chunks_by_index = lambda inp, split_sizes, sorted_index: (
        inp * (split_sizes + sorted_index).sum().ne(-1))


def _send_unevenly(imbalance: float) -> None:
    """Have experts of this process get so many times their even share of tokens, in every layer."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    asked = Dispatcher._maybe_dtoh_and_synchronize

    def ask(dispatcher: Any, point: str, counts: Any = None) -> Any:
        counts = asked(dispatcher, point, counts)
        if point == dispatcher.cuda_dtoh_point:
            dispatcher.output_splits = (dispatcher.output_splits * imbalance).astype(int)
            counts = (counts * imbalance).long()
            if not dispatcher.config.moe_permute_fusion:
                dispatcher.num_global_tokens_per_local_expert = (
                    dispatcher.num_global_tokens_per_local_expert * imbalance).long()
        return counts

    Dispatcher._maybe_dtoh_and_synchronize = ask


def step(recipe: str, gpu: str, num_ranks: int, settings: Sequence[str], stage: int,
         imbalance: float = 1.0) -> dict[str, Any]:
    """Do two steps of the first process of a pipeline stage in this process, which is none afterwards: the
    first one makes the optimizer's moments.

    Returns:
        The parameters that it holds, processor seconds, who waited how often in the first step, and the most
        bytes that were allocated in the second one, beside those of plan's account.
    """
    import torch.distributed as dist
    from one_rank import OneRank
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformer_engine.pytorch import placement

    from megatron_sov.engine.optimizer import parameter_groups
    from megatron_sov.plan.footprint.memory import build_account

    config = configured(recipe, gpu, num_ranks, settings)
    p, rank = config.parallel, stage * num_ranks // config.parallel.pp
    fake_gpu.CAPABILITY["capability"] = CAPABILITY[gpu]
    placement.CHIP = placement.Chip(CAPABILITY[gpu])
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    # patterns of names match on some stage
    patterns = {group.pattern for group in config.optim.groups}
    parameter_groups.gather_objects = lambda value, group=None: [(patterns, True)]
    tokens = config.data.phases[0].seq_len * config.train.micro_batch_size // p.cp // (p.tp if p.sp else 1)
    begun = time.process_time()
    if imbalance != 1:
        _send_unevenly(imbalance)
    with fake_gpu.used(tokens * config.model.num_experts_per_token) as ledger:
        runner = OneRank(config, rank, num_ranks)
        fake_gpu.WAITS.clear()
        runner.step(1, p.pp)
        waits = dict(fake_gpu.WAITS)
        ledger.peak = 0
        runner.step(2, p.pp)
    rows = p.pp * config.train.micro_batch_size * num_ranks // p.ranks_per_replica
    account = build_account(replace(config, train=replace(config.train, global_batch_size=rows)), num_ranks,
                            stage, config.data.phases[0].seq_len, imbalance)
    return {"parameters": sum(weight.numel() for weight in runner.model.parameters()),
            "seconds": time.process_time() - begun, "waits": waits, "peak bytes": ledger.peak,
            "account bytes": account.allocated}


def configured(recipe: str, gpu: str, num_ranks: int, settings: Sequence[str]) -> Any:
    """Return a recipe in its recommended layout, where it has one, with settings on top; where DeepEP is to
    carry tokens, which has no double, the exchange of all with all does."""
    from megatron_sov.engine.parallel.gpu_libraries import DEEP_EP_NAMES
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended_layouts import get_recommended_settings

    config = recipes.get(recipe)
    config = apply_settings(config, [*get_recommended_settings(config, num_ranks, gpu), *settings])
    doubled = config.parallel.expert_dispatcher not in DEEP_EP_NAMES
    return config if doubled else apply_settings(config, ["parallel.expert_dispatcher=alltoall"])


def tried(*case: Any) -> dict[str, Any]:
    """Run `step` in a fork of this process; return its result, or its `problem`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        try:
            found = step(*case)
        except Exception as e:  # after any error the other cases still run
            found = {"problem": f"{type(e).__name__}: {e}".splitlines()[0], "trace": traceback.format_exc()}
        there.send(json.dumps(found))

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        found: dict[str, Any] = json.loads(here.recv())
    except EOFError:
        found = {"problem": "the process has ended"}
    process.join()
    if others := sorted(found.get("waits", {}).keys() - ALLOWED.keys()):
        found["problem"] = f"waits for the device in {', '.join(others)}"
    return found


def main() -> int:
    """Print a line for each stage; returns 1 if one has failed."""
    recipe, gpu, num_ranks, *settings = sys.argv[1:] or ("", "", 0)
    cases = [(recipe, gpu, int(num_ranks), tuple(settings))] if recipe else CASES
    print(f"one rank's step at its own sizes on a GPU without memory: {platform.machine()}, "
          f"torch {torch.__version__}; processor seconds\n", flush=True)
    prepare()
    failed = False
    for case in cases:
        config = configured(*case)
        p = config.parallel
        print(f"{case[0]} on {case[2]} {case[1]}: tp {p.tp}, pp {p.pp}, vpp {p.vpp}, cp {p.cp}, ep {p.ep}, "
              f"{p.expert_dispatcher}, expert_overlap {p.expert_overlap}", *case[3], flush=True)
        for stage in sorted({0, p.pp // 2, p.pp - 1}):
            result = tried(*case, stage)
            failed |= "problem" in result
            told = (f"{result['parameters'] / 1e9:6.2f} B parameters  {result['seconds']:5.0f} s  "
                    f"at most {result['peak bytes'] / 1e9:6.2f} GB allocated, the account says "
                    f"{result['account bytes'] / 1e9:6.2f}" if "parameters" in result else "")
            print(f"  stage {stage + 1:>2} of {p.pp:<2} {told}  "
                  f"{result.get('problem', 'sound')}", flush=True)
            for name, count in sorted(result.get("waits", {}).items()):
                print(f"      {count:>5} waits  {name}: {ALLOWED.get(name, 'NOT ALLOWED')}", flush=True)
            if "trace" in result:
                print(result["trace"], file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
