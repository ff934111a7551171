"""One rank of solar-open-102b with 64-way expert parallelism on one GPU: peak memory against the estimate of
`plan`, and TFLOP/s as features are switched on one after another.

The other 511 ranks are mirror images (`mirror.py`): every rank sends the same data as this rank, so
collectives are copies on the GPU without communication time.
"""

import contextlib
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from setting import Cost, Figures, Setting, fail_on, largest

RECIPE, NUM_RANKS, RANK = "solar-open-102b", 512, 5
LAYOUT = ("parallel.ep=64", "parallel.zero1=true", "train.micro_batch_size=1", "train.fp8=none")
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
"""The recipe's settings; the first steps of the ladder switch them off."""
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
ALONE = tuple(word.replace("true", "false") for word in OVERLAP)
GRAPHS = "graphs of routers"
GATHERED = "weights in 8 bits"
"""Step whose losses are not compared: every mirror image sends the same shard of the quantized weights, so
the gathered weights are wrong."""
LADDER = (
    ("all off", (*ALONE, "gpu.rope_fusion=off", "gpu.router_fusion=off", "gpu.permute_fusion=off",
                 "gpu.swiglu_fusion=off", "gpu.grad_accumulation_fusion=off", "train.recompute=true")),
    ("fused kernels", (*ALONE, "gpu.grad_accumulation_fusion=off", "train.recompute=true")),
    ("fused gradient sums", (*ALONE, "train.recompute=true")),
    ("overlapped messages", (*OVERLAP, "train.recompute=true")),
    ("selective recomputation", (*OVERLAP, *SELECTIVE)),
    (GRAPHS, (*OVERLAP, *SELECTIVE, 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]')),
    ("FP8", (*OVERLAP, *SELECTIVE, "train.fp8=blockwise", "train.fp8_pad_routed_tokens=true")),
    (GATHERED, (*OVERLAP, *SELECTIVE, "train.fp8=blockwise", "train.fp8_pad_routed_tokens=true",
                "train.fp8_weights=true")),
)
"""(name, settings) of the steps. Each adds a feature to the step before, except that CUDA graphs of routers
are switched off again."""
MEMORY_LIMIT = 0.1
"""Largest relative difference between the measured and the estimated peak."""
LOSS_LIMIT = 2e-2
"""Largest relative difference between a loss and that of the ladder's first step.

All steps compute the same from the same weights and tokens, up to rounding. Mirror images amplify rounding:
if it routes one token to another expert, all tokens sorted after that token receive other rows (`mirror.py`).
In a dry run the fused rotation changes losses by 0.116 %; without token exchange by 0.004 %, in float32 not
at all.
"""
NUM_KERNELS = 25
"""Slowest kernels of a step that are reported."""
STEPS, DRY_STEPS = 6, 3
"""Training steps per step of the ladder; the first two are not timed. Times of a dry run have no meaning."""
DRY = ("tiny-solar-open", 8, 3, (
    "parallel.ep=4", "parallel.zero1=true", "train.micro_batch_size=1", "train.precision=bf16",
    "model.expert_ffn_dim=128", 'data.phases=[{"name": "main", "seq_len": 256}]'))
"""Recipe, processes, rank and layout of a dry run, with widths that are multiples of an FP8 block."""


def choose_rank(dry: bool) -> tuple[str, int, int, tuple[str, ...]]:
    """Return the recipe, the number of ranks, the rank and the layout."""
    return DRY if dry else (RECIPE, NUM_RANKS, RANK, LAYOUT)


def prepare(dry: bool) -> None:
    """Join the group of mirrored ranks, and import training."""
    import mirror

    _, num_ranks, rank, _ = choose_rank(dry)
    mirror.install(rank, num_ranks)
    if dry:
        import commands

        commands.install_double()
    import one_rank  # noqa: F401


def run_ladder_step(words: list[str], dry: bool) -> dict[str, Any]:
    """Build the rank with settings, run some training steps, and return the figures."""
    import mirror
    import torch
    from one_rank import OneRank

    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import compute_train_flops_per_token
    from megatron_sov.plan.footprint.memory import build_account

    recipe, num_ranks, rank, layout = choose_rank(dry)
    config = apply_settings(recipes.get(recipe), [*layout, *words])
    start_s = time.monotonic()
    runner = OneRank(config, rank, num_ranks)
    built_s = time.monotonic() - start_s
    losses, times_s = zip(*(runner.step(number) for number in range(1, (DRY_STEPS if dry else STEPS) + 1)),
                          strict=True)
    seconds = min(times_s[2:])
    seq_len = config.data.phases[0].seq_len
    flops = compute_train_flops_per_token(config.model, seq_len) * seq_len * config.train.micro_batch_size
    # memory depends on the number of tokens routed to local experts, which the layout does not determine
    routed = seq_len * config.train.micro_batch_size * config.model.num_experts_per_token
    imbalance = mirror.MOST["rows"] / routed
    account = build_account(config, num_ranks, 0, seq_len, imbalance)
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {"build s": built_s, "step s": seconds, "TFLOP/s": flops / seconds / 1e12, "peak bytes": peak,
            "imbalance": imbalance, "account bytes": account.allocated, "losses": losses,
            **({} if dry else {"ms of kernels": profile_kernels(lambda: runner.step(STEPS + 1))})}


def profile_kernels(step: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Return kernel -> (milliseconds, launches) in a step: "all", and the slowest kernels."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3, sum(e.count for e in events)
    return {"all": total} | {e.key[:100]: (e.self_device_time_total / 1e3, e.count)
                             for e in events[:NUM_KERNELS]}


def print_result(words: list[str], dry: bool) -> None:
    """Print the figures or the error of a ladder step as a line of JSON."""
    try:
        result: dict[str, Any] = run_ladder_step(words, dry)
    except Exception as e:  # after any error the other steps still run
        result = {"problem": format_error_chain(e)}
    print(json.dumps(result), flush=True)


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


def cost(setting: Setting) -> Cost:
    """Estimate the cost of this part: process starts, steps and floating-point operations."""
    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import compute_train_flops_per_token

    recipe, _, _, layout = choose_rank(setting.dry)
    config = apply_settings(recipes.get(recipe), list(layout))
    seq_len, steps = config.data.phases[0].seq_len, len(LADDER) * (STEPS + 1)
    return Cost(starts=len(LADDER), steps=2 * steps,
                flops=compute_train_flops_per_token(config.model, seq_len) * seq_len * steps)


def start_processes(names: list[str], dry: bool) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield (name, process) for each step of the ladder.

    A process imports training while the steps before it run, and then waits for its settings. In a dry run
    one process has all steps.
    """
    process: subprocess.Popen[str] | None = None
    for name in names:
        if process is None or not dry:
            process = subprocess.Popen([sys.executable, "-W", "ignore", __file__, str(int(dry))], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        yield name, process


def request_result(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Send a step's settings to its process, and return the figures."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # the process has ended; its exit code is reported below
        process.stdin.write(json.dumps(dict(LADDER)[name]) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    return dict(json.loads(line)) if line else {"problem": f"exit code {process.wait()}"}


def measure(setting: Setting) -> Figures:
    """Yield the figures of each ladder step. Each has the GPU to itself; a dry run uses a fork.

    Raises:
        Failed: a step fails, its peak memory differs from the account, or its losses differ.
    """
    problems: list[str] = []
    first: list[float] = []
    names = [name for name, _ in LADDER if not (setting.dry and name == GRAPHS)]
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(process)
                     for name, process in start_processes(names, setting.dry)}
        for name in names:
            result = request_result(processes[name], name)
            if not setting.dry:
                processes[name].communicate()  # its end frees the GPU memory for the next step
            yield name, result
            if "problem" in result:
                problems.append(f"{name}: {result['problem']}")
                continue
            difference = result["peak bytes"] / result["account bytes"] - 1
            if not setting.dry and abs(difference) > MEMORY_LIMIT:
                problems.append(f"{name}: the peak is {difference:+.0%} from the account")
            first = first or result["losses"]
            worst = largest(abs(a / b - 1) for a, b in zip(result["losses"], first, strict=True))
            if not worst <= LOSS_LIMIT and name != GATHERED:  # not <=: the difference may be NaN
                problems.append(f"{name}: losses are {worst:.1%} from those of {LADDER[0][0]}")
    if setting.dry:
        yield "not in a dry run", ["the peak of memory", "times of kernels", "the sizes of solar-open-102b",
                                   GRAPHS]
    fail_on(problems)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    is_dry = sys.argv[1] == "1"
    prepare(is_dry)
    for words in map(json.loads, sys.stdin):
        if is_dry:  # this process runs several steps, each in a fork with clean state
            child = multiprocessing.get_context("fork").Process(target=print_result, args=(words, is_dry))
            child.start()
            child.join()
        else:
            print_result(words, is_dry)
            break  # the next step's process needs the GPU memory
