"""One rank of solar-open-102b at expert parallel size 64, in a group of 512 of which the others are mirror
images: memory against the account, and TFLOP/s step by step of what can be switched on.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

from setting import Cost, Figures, Setting, fail_on, largest

RECIPE, NUM_RANKS, RANK = "solar-open-102b", 512, 5
LAYOUT = ("parallel.ep=64", "parallel.zero1=true", "train.micro_batch_size=1", "train.fp8=none")
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
"""The recipe's; the first steps of the ladder do without."""
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
ALONE = tuple(word.replace("true", "false") for word in OVERLAP)
LADDER = (
    ("all off", (*ALONE, "gpu.rope_fusion=off", "gpu.permute_fusion=off", "gpu.swiglu_fusion=off",
                 "gpu.grad_accumulation_fusion=off", "train.recompute=true")),
    ("fused kernels", (*ALONE, "gpu.grad_accumulation_fusion=off", "train.recompute=true")),
    ("fused gradient sums", (*ALONE, "train.recompute=true")),
    ("overlapped messages", (*OVERLAP, "train.recompute=true")),
    ("selective recomputation", (*OVERLAP, *SELECTIVE)),
    ("FP8", (*OVERLAP, *SELECTIVE, "train.fp8=blockwise", "train.fp8_pad_routed_tokens=true")),
)
"""What is switched on, one after another, by settings."""
MEMORY_LIMIT = 0.1
"""Largest relative difference of the peak from the account."""
LOSS_LIMIT = 2e-2
"""Largest relative difference of a step's loss from that of the first step of the ladder: all compute the
same from the same weights and tokens, and differ by what rounding makes of it.  That is more here than
elsewhere: where rounding sends one token to another expert, mirror images send other rows to all that are
sorted behind it (`mirror`).  Of the dry run's 0.116 % with the fused rotation 0.004 % are left where no
tokens are exchanged, and nothing in float32."""
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
    """Join the group of mirror images, and import what a rank needs."""
    import mirror

    _, num_ranks, rank, _ = place(dry)
    mirror.install(rank, num_ranks)
    if dry:
        import commands

        commands.install_double()
    import one_rank  # noqa: F401


def one(words: list[str], dry: bool, trace: str) -> dict[str, Any]:
    """Build the rank, do some steps and return the figures."""
    import torch
    from one_rank import OneRank

    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import train_flops_per_token
    from megatron_sov.train.stages.announcement import memory_of

    recipe, num_ranks, rank, layout = place(dry)
    config = apply_settings(recipes.get(recipe), [*layout, *words])
    runner = OneRank(config, rank, num_ranks)
    losses, times_s = zip(*(runner.step(number) for number in range(1, (DRY_STEPS if dry else STEPS) + 1)),
                          strict=True)
    seconds = min(times_s[2:])
    if trace:
        with torch.profiler.profile() as profile:
            runner.step(STEPS + 1)
        profile.export_chrome_trace(trace)
    seq_len = config.data.phases[0].seq_len
    flops = train_flops_per_token(config.model, seq_len) * seq_len * config.train.micro_batch_size
    account = memory_of(config, runner.world.size)
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {"step s": seconds, "TFLOP/s": flops / seconds / 1e12, "peak bytes": peak,
            "account bytes": account.allocated, "losses": losses}


def tell(words: list[str], dry: bool, trace: str) -> None:
    """Print the figures of a step of the ladder, or what went wrong, as a line of JSON."""
    try:
        found: dict[str, Any] = one(words, dry, trace)
    except Exception as e:  # the other steps are to be tried as well
        found = {"problem": f"{type(e).__name__}: {e}"}
    print(json.dumps(found), flush=True)


def cost(setting: Setting) -> Cost:
    """Return what the part does: memory of the size of the rank is filled, and steps are timed."""
    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import train_flops_per_token

    recipe, _, _, layout = place(setting.dry)
    config = apply_settings(recipes.get(recipe), list(layout))
    seq_len, steps = config.data.phases[0].seq_len, len(LADDER) * (STEPS + 1)
    return Cost(starts=len(LADDER), steps=2 * steps,
                flops=train_flops_per_token(config.model, seq_len) * seq_len * steps)


def measure(setting: Setting) -> Figures:
    """Yield the figures of each step of the ladder: each has a GPU for itself, in a dry run a fork.

    Raises:
        Failed: a step cannot be done, its peak is not what the account says, or its losses are others.
    """
    problems: list[str] = []
    first: list[float] = []
    for numbers in [range(len(LADDER))] if setting.dry else [[n] for n in range(len(LADDER))]:
        traces = ["" if setting.dry else str(setting.out / f"big_rank-{n}.trace.json") for n in numbers]
        call = [sys.executable, "-W", "ignore", __file__, str(int(setting.dry)),
                json.dumps([[LADDER[n][1], trace] for n, trace in zip(numbers, traces, strict=True)])]
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for name in (LADDER[n][0] for n in numbers):
                line = process.stdout.readline()
                found = json.loads(line) if line else {"problem": f"exit code {process.wait()}"}
                yield name, found
                if "problem" in found:
                    problems.append(f"{name}: {found['problem']}")
                    continue
                apart = found["peak bytes"] / found["account bytes"] - 1
                if not setting.dry and abs(apart) > MEMORY_LIMIT:
                    problems.append(f"{name}: the peak is {apart:+.0%} from the account")
                first = first or found["losses"]
                worst = largest(abs(a / b - 1) for a, b in zip(found["losses"], first, strict=True))
                if not worst <= LOSS_LIMIT:
                    problems.append(f"{name}: losses are {worst:.1%} from those of {LADDER[0][0]}")
    if setting.dry:
        yield "not in a dry run", ["the peak of memory", "traces of kernels", "the sizes of solar-open-102b"]
    fail_on(problems)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    is_dry = sys.argv[1] == "1"
    prepare(is_dry)
    for arguments in json.loads(sys.argv[2]):
        if is_dry:
            child = multiprocessing.get_context("fork").Process(
                target=tell, args=(arguments[0], is_dry, arguments[1]))
            child.start()
            child.join()
        else:
            tell(arguments[0], is_dry, arguments[1])
