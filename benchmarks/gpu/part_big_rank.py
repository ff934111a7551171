"""One rank of solar-open-102b at expert-parallel size 64, in a group of 512 mirrored ranks: memory against
the account, and TFLOP/s as features are switched on."""

from __future__ import annotations

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
"""The recipe's; the first steps of the ladder do without."""
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
ALONE = tuple(word.replace("true", "false") for word in OVERLAP)
GRAPHS = "graphs of routers"
GATHERED = "weights in 8 bits"
"""Its losses are its own: mirror images gather quantised weights, of which each has the same part."""
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
"""What is switched on, one after another, by settings; graphs of routers alone are switched off again."""
MEMORY_LIMIT = 0.1
"""Largest relative difference of the peak from the account."""
LOSS_LIMIT = 2e-2
"""Largest relative difference of a step's loss from that of the first step of the ladder: all compute the
same from the same weights and tokens, and differ by what rounding makes of it.  That is more here than
elsewhere: where rounding sends one token to another expert, mirror images send other rows to all that are
sorted behind it (`mirror`).  Of the dry run's 0.116 % with the fused rotation 0.004 % are left where no
tokens are exchanged, and nothing in float32."""
NUM_KERNELS = 25
"""That are told of a step."""
STEPS, DRY_STEPS = 6, 3
"""Steps that are timed less two; a dry run's seconds say nothing."""
DRY = ("tiny-solar-open", 8, 3, (
    "parallel.ep=4", "parallel.zero1=true", "train.micro_batch_size=1", "train.precision=bf16",
    "model.expert_ffn_dim=128", 'data.phases=[{"name": "main", "seq_len": 256}]'))
"""Recipe, processes, rank and layout of a dry run; FP8 asks for widths of whole blocks."""


def place(dry: bool) -> tuple[str, int, int, tuple[str, ...]]:
    """Return the recipe, the number of ranks, the rank and the layout."""
    return DRY if dry else (RECIPE, NUM_RANKS, RANK, LAYOUT)


def prepare(dry: bool) -> None:
    """Join the mirrored group, and import what a rank needs."""
    import mirror

    _, num_ranks, rank, _ = place(dry)
    mirror.install(rank, num_ranks)
    if dry:
        import commands

        commands.install_double()
    import one_rank  # noqa: F401


def one(words: list[str], dry: bool) -> dict[str, Any]:
    """Build the rank, do some steps and return the figures."""
    import mirror
    import torch
    from one_rank import OneRank

    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import compute_train_flops_per_token
    from megatron_sov.plan.footprint.memory import build_account

    recipe, num_ranks, rank, layout = place(dry)
    config = apply_settings(recipes.get(recipe), [*layout, *words])
    start_s = time.monotonic()
    runner = OneRank(config, rank, num_ranks)
    built_s = time.monotonic() - start_s
    losses, times_s = zip(*(runner.step(number) for number in range(1, (DRY_STEPS if dry else STEPS) + 1)),
                          strict=True)
    seconds = min(times_s[2:])
    seq_len = config.data.phases[0].seq_len
    flops = compute_train_flops_per_token(config.model, seq_len) * seq_len * config.train.micro_batch_size
    # the bytes of tokens routed to local experts, which the layout does not determine
    routed = seq_len * config.train.micro_batch_size * config.model.num_experts_per_token
    imbalance = mirror.MOST["rows"] / routed
    account = build_account(config, num_ranks, 0, seq_len, imbalance)
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {"build s": built_s, "step s": seconds, "TFLOP/s": flops / seconds / 1e12, "peak bytes": peak,
            "imbalance": imbalance, "account bytes": account.allocated, "losses": losses,
            **({} if dry else {"ms of kernels": kernels(lambda: runner.step(STEPS + 1))})}


def kernels(step: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Return the milliseconds and the number of launches of the kernels that take longest in a step."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    result = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in result) / 1e3, sum(e.count for e in result)
    return {"all": total} | {e.key[:100]: (e.self_device_time_total / 1e3, e.count)
                             for e in result[:NUM_KERNELS]}


def tell(words: list[str], dry: bool) -> None:
    """Print the figures or the error of a ladder step as a line of JSON."""
    try:
        found: dict[str, Any] = one(words, dry)
    except Exception as e:  # the other steps are to be tried as well
        found = {"problem": whole(e)}
    print(json.dumps(found), flush=True)


def whole(error: BaseException) -> str:
    """Return the chain of errors and their places, first error first: an error during CUDA graph capture is
    followed by one that only says that the capture is invalid."""
    before, place = error.__cause__ or error.__context__, traceback.extract_tb(error.__traceback__)[-1]
    said = str(error).partition("\n")[0]
    told = f"{type(error).__name__}: {said} ({Path(place.filename).name}:{place.lineno})"
    return f"{whole(before)}; then {told}" if before else told


def cost(setting: Setting) -> Cost:
    """Estimate the cost of the part: it fills memory of the size of the rank, and times steps."""
    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import compute_train_flops_per_token

    recipe, _, _, layout = place(setting.dry)
    config = apply_settings(recipes.get(recipe), list(layout))
    seq_len, steps = config.data.phases[0].seq_len, len(LADDER) * (STEPS + 1)
    return Cost(starts=len(LADDER), steps=2 * steps,
                flops=compute_train_flops_per_token(config.model, seq_len) * seq_len * steps)


def begun(names: list[str], dry: bool) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield the process of each step of the ladder, which imports while those before it run, and then waits
    for its turn; in a dry run all steps are one process'."""
    process: subprocess.Popen[str] | None = None
    for name in names:
        if process is None or not dry:
            process = subprocess.Popen([sys.executable, "-W", "ignore", __file__, str(int(dry))], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        yield name, process


def told(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Return the figures of a step of the ladder, whose turn it is."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit code says so
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
    with contextlib.ExitStack() as open_ones:
        processes = {name: open_ones.enter_context(process) for name, process in begun(names, setting.dry)}
        for name in names:
            result = told(processes[name], name)
            if not setting.dry:
                processes[name].communicate()  # its memory is the next one's
            yield name, result
            if "problem" in result:
                problems.append(f"{name}: {result['problem']}")
                continue
            apart = result["peak bytes"] / result["account bytes"] - 1
            if not setting.dry and abs(apart) > MEMORY_LIMIT:
                problems.append(f"{name}: the peak is {apart:+.0%} from the account")
            first = first or result["losses"]
            worst = largest(abs(a / b - 1) for a, b in zip(result["losses"], first, strict=True))
            if not worst <= LOSS_LIMIT and name != GATHERED:
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
        if is_dry:  # several are this process'
            child = multiprocessing.get_context("fork").Process(target=tell, args=(words, is_dry))
            child.start()
            child.join()
        else:
            tell(words, is_dry)
            break  # another step's has the memory next
