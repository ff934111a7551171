"""One rank of solar-open-102b with 64-way expert parallelism on one GPU: TFLOP/s, host time and peak memory
of a feature, against the estimate of `plan`.

The other 511 ranks are mirror images (`mirror.py`): every rank sends the same data as this rank, so
collectives are copies on the GPU without communication time.
"""

import traceback
from pathlib import Path
from typing import Any, NamedTuple

from setting import Figures, Setting, fail_on, find_largest

RECIPE, NUM_RANKS, RANK = "solar-open-102b", 512, 5
LAYOUT = ("parallel.ep=64", "parallel.zero1=true", "train.micro_batch_size=1", "train.fp8=none")
EVEN = "gpu.force_even_routing=on"
"""With mirror images, learned routing gives experts 0 to 8 times their tokens, in each layer another size."""
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
SELECTIVE = (*OVERLAP, "train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
ALONE = tuple(word.replace("true", "false") for word in OVERLAP)
EXPERT_OVERLAP = ("parallel.expert_overlap=micro_batches", "parallel.delay_weight_grads=true")
HALF = "model.num_layers=24"
"""With overlap a second micro-batch waits: all 48 layers would exceed the memory of an H200."""
ROUTER_GRAPHS = 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]'
FP8 = ("train.fp8_pad_routed_tokens=true", EVEN)


class Case(NamedTuple):
    """Settings of a rung, and the micro-batches per step of the steps that are timed."""

    settings: tuple[str, ...]
    micro_batches: tuple[int, ...] = (1, 4)
    """The difference of both is the time of three micro-batches without the update."""
    reference: str = "selective"
    """Rung with nearly equal losses; "": the losses differ."""


CASES = {
    "selective": Case((*SELECTIVE, EVEN), reference=""),
    "fixed_segments": Case((*SELECTIVE, EVEN)),
    "recompute": Case((*OVERLAP, "train.recompute=true", EVEN)),
    "micro_batch_2": Case((*SELECTIVE, "train.micro_batch_size=2", EVEN), reference=""),
    # random logits cannot be drawn in a graph, so these four route by their routers
    "learned_routing": Case((*SELECTIVE, HALF), reference=""),
    "router_graphs": Case((*SELECTIVE, HALF, ROUTER_GRAPHS), reference="learned_routing"),
    "overlap": Case((*SELECTIVE, HALF, *EXPERT_OVERLAP), (4,), reference=""),
    "overlap_graphs": Case((*SELECTIVE, HALF, *EXPERT_OVERLAP, ROUTER_GRAPHS), (4,), reference="overlap"),
    "tensorwise": Case((*SELECTIVE, "train.fp8=tensorwise", *FP8)),
    "blockwise": Case((*SELECTIVE, "train.fp8=blockwise", *FP8)),
    # every mirror image sends the same shard of the 8-bit weights, so the gathered weights are wrong
    "fp8_weights": Case((*SELECTIVE, "train.fp8=blockwise", "train.fp8_weights=true", *FP8), reference=""),
    "unfused_sums": Case((*ALONE, "gpu.grad_accumulation_fusion=off", "train.recompute=true", EVEN)),
    "all_off": Case((*ALONE, "gpu.rope_fusion=off", "gpu.router_fusion=off", "gpu.permute_fusion=off",
                     "gpu.swiglu_fusion=off", "gpu.grad_accumulation_fusion=off", "train.recompute=true",
                     EVEN)),
}
"""Case of a rung -> its settings."""
MEMORY_LIMIT = 0.1
"""Largest relative difference between the measured and the estimated peak."""
LOSS_LIMIT = 2e-2
"""Largest relative difference between a loss and that of the reference rung.

Both compute the same from the same weights and tokens, up to rounding. Mirror images amplify rounding: if it
routes one token to another expert, all tokens sorted after that token receive other rows (`mirror.py`).
"""
STEPS, WARM_STEPS = 5, 2
"""Steps per number of micro-batches, and those of them that are not timed."""
DRY = ("tiny-solar-open", 8, 3, (
    "parallel.ep=4", "parallel.zero1=true", "train.micro_batch_size=1", "train.precision=bf16",
    "model.expert_ffn_dim=128", 'data.phases=[{"name": "main", "seq_len": 256}]'))
"""Recipe, processes, rank and layout of a dry run, with widths that are multiples of an FP8 block."""


def choose_rank(dry: bool) -> tuple[str, int, int, tuple[str, ...]]:
    """Return the recipe, the number of ranks, the rank and the layout."""
    return DRY if dry else (RECIPE, NUM_RANKS, RANK, LAYOUT)


def prepare(setting: Setting) -> None:
    """Join the group of mirrored ranks, and import training."""
    import mirror

    _, num_ranks, rank, _ = choose_rank(setting.dry)
    mirror.install(rank, num_ranks)
    if setting.dry:
        import commands

        commands.install_double()
    import one_rank  # noqa: F401


def measure(setting: Setting, case: str) -> Figures:
    """Yield the figures of a rung.

    Raises:
        Failed: the rank does not train, its peak memory differs from the account, or its losses differ.
    """
    figures: dict[str, Any] = {}
    try:
        for name, value in measure_rank(setting, CASES[case]):
            figures[name] = value
            yield name, value
    except Exception as e:
        fail_on([format_error_chain(e)])
    problems = []
    difference = figures.get("peak bytes", figures["account bytes"]) / figures["account bytes"] - 1
    if abs(difference) > MEMORY_LIMIT:
        problems.append(f"the peak is {difference:+.0%} from the account")
    reference = setting.read_results().get(f"big_rank.{CASES[case].reference}", {}).get("figures", {})
    if expected := reference.get("losses"):
        worst = find_largest(abs(loss / expected_loss - 1)
                             for loss, expected_loss in zip(figures["losses"], expected, strict=True))
        if not worst <= LOSS_LIMIT:  # not >: the difference may be NaN
            problems.append(f"losses are {worst:.1%} from those of {CASES[case].reference}")
    if setting.dry:
        yield "not in a dry run", ["kernels, driver calls, memory and the sizes of solar-open-102b"]
    fail_on(problems)


def measure_rank(setting: Setting, case: Case) -> Figures:
    """Build the rank, run its steps and yield the figures."""
    import mirror
    import torch
    from host_time import count_allocations, count_waits, profile_device, profile_functions
    from one_rank import OneRank

    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import compute_train_flops_per_token
    from megatron_sov.plan.footprint.memory import build_account

    recipe, num_ranks, rank, layout = choose_rank(setting.dry)
    settings = [word for word in case.settings if not (setting.dry and word == HALF)]
    config = apply_settings(recipes.get(recipe), [*layout, *settings])
    seq_len, rows = config.data.phases[0].seq_len, config.train.micro_batch_size
    flops = compute_train_flops_per_token(config.model, seq_len) * seq_len * rows
    runner = OneRank(config, rank, num_ranks)
    number, losses = 0, []
    for count in case.micro_batches:
        seconds = []
        with count_waits() as waits, count_allocations() as allocations:
            for _ in range(STEPS):
                number += 1
                loss, step_s = runner.step(number, count)
                losses.append(loss)
                seconds.append(step_s)
        best_s = min(seconds[WARM_STEPS:])
        yield f"{count} micro-batches", {"step s": best_s, "all s": seconds, "waits": dict(waits),
                                         "TFLOP/s": count * flops / best_s / 1e12, "allocator": allocations}
    yield "losses", losses
    # memory depends on the number of tokens routed to local experts, which the layout does not determine
    imbalance = mirror.MOST["rows"] / (seq_len * rows * config.model.num_experts_per_token)
    yield "imbalance", imbalance
    yield "account bytes", build_account(config, num_ranks, 0, seq_len, imbalance).allocated
    count = case.micro_batches[0]
    if not setting.dry:
        yield "peak bytes", torch.cuda.max_memory_allocated()
        yield "device", profile_device(lambda: runner.step(number + 1, count))
    yield "functions", profile_functions(lambda: runner.step(number + 2, count))


def format_error_chain(error: BaseException) -> str:
    """Return the chain of errors with their places in the code, first error first.

    The last error may say nothing: after an error during the capture of a CUDA graph, a second one says that
    the capture is invalid.
    """
    cause = error.__cause__ or error.__context__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).partition("\n")[0]
    line = f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"
    return f"{format_error_chain(cause)}; then {line}" if cause else line
