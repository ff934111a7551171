"""One rank of solar-open-102b at expert parallel size 64, in a group of 512 of which the others are mirror
images: memory against the account, and TFLOP/s step by step of what can be switched on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from setting import Failed, Setting

RECIPE, NUM_RANKS, RANK = "solar-open-102b", 512, 5
LAYOUT = ("parallel.ep=64", "parallel.zero1=true", "train.micro_batch_size=1")
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
LADDER = (
    ("all off", ("gpu.rope_fusion=off", "gpu.permute_fusion=off", "gpu.swiglu_fusion=off",
                 "gpu.grad_accumulation_fusion=off", "train.recompute=true")),
    ("fused kernels", ("gpu.grad_accumulation_fusion=off", "train.recompute=true")),
    ("fused gradient sums", ("train.recompute=true",)),
    ("selective recomputation", SELECTIVE),
    ("FP8", (*SELECTIVE, "train.fp8=blockwise", "train.fp8_pad_routed_tokens=true")),
)
"""What is switched on, one after another, by settings."""
MEMORY_LIMIT = 0.1
"""Largest relative difference of the peak from the account."""
STEPS = 6
DRY = ("tiny-solar-open", 8, 3, ("parallel.ep=4", "parallel.zero1=true", "train.micro_batch_size=1"))


def one(words: list[str], dry: bool, trace: str) -> dict[str, Any]:
    """Build the rank, do some steps and return the figures; runs in a process of its own."""
    import mirror

    recipe, num_ranks, rank, layout = DRY if dry else (RECIPE, NUM_RANKS, RANK, LAYOUT)
    mirror.install(rank, num_ranks)
    if dry:
        import with_double

        with_double.install()
    import torch
    from one_rank import OneRank

    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import train_flops_per_token
    from megatron_sov.train.stages.announcement import memory_of

    config = apply_settings(recipes.get(recipe), [*layout, *words])
    runner = OneRank(config, rank, num_ranks)
    seconds = [runner.step(number)[1] for number in range(1, STEPS + 1)][2:]
    if trace:
        with torch.profiler.profile() as profile:
            runner.step(STEPS + 1)
        profile.export_chrome_trace(trace)
    seq_len = config.data.phases[0].seq_len
    flops = train_flops_per_token(config.model, seq_len) * seq_len * config.train.micro_batch_size
    account = memory_of(config, runner.world.size)
    peak = 0 if dry else torch.cuda.max_memory_allocated()
    return {"step s": min(seconds), "TFLOP/s": flops / min(seconds) / 1e12, "peak bytes": peak,
            "account bytes": account.allocated}


def measure(setting: Setting) -> dict[str, Any]:
    """Return the figures of each step of the ladder.

    Raises:
        Failed: a step cannot be done, or its peak is not what the account says.
    """
    figures, problems = {}, []
    # on a CPU most steps of the ladder are one and the same
    for number, (name, words) in enumerate(LADDER[-1:] if setting.dry else LADDER):
        if setting.dry and any(word.startswith(("train.fp8=", "gpu.")) for word in words):
            words = tuple(w for w in words if not w.startswith(("train.fp8", "gpu.")))
        trace = setting.out / f"big_rank-{number}.trace.json" if not setting.dry else ""
        call = [sys.executable, __file__, json.dumps(list(words)), str(int(setting.dry)), str(trace)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            problems.append(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else '?'}")
            continue
        figures[name] = found = json.loads(done.stdout.strip().splitlines()[-1])
        apart = found["peak bytes"] / found["account bytes"] - 1
        if not setting.dry and abs(apart) > MEMORY_LIMIT:
            problems.append(f"{name}: the peak is {apart:+.0%} from the account")
    if problems:
        raise Failed("; ".join(problems), **figures)
    return figures


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(one(json.loads(sys.argv[1]), sys.argv[2] == "1", sys.argv[3])))
