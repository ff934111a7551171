"""The memory and time that `plan` predicts for one rank of solar-open-102b, compared with measurements on an
H200.

Usage: python benchmarks/h200_account.py > benchmarks/results/h200_account.txt

The measurements in results/h200_ladder.json are from `gpu/part_big_rank.py`: the other 511 ranks are mirror
images, so collectives are copies on the GPU without communication time. The byte counts in `COUNTED` are from
`gpu/fake_rank.py` with the same settings, without a GPU.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sov import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.memory import build_account
from megatron_sov.plan.speed import step
from megatron_sov.plan.speed.parameters import load_default_parameters
from megatron_sov.plan.speed.workload import build_workload
from megatron_sov.work.clusters.chips import CHIPS, default_links

FIGURES = Path(__file__).parent / "results/h200_ladder.json"
RECIPE, NUM_RANKS = "solar-open-102b", 512
STEP, UNFUSED = "overlapped messages", "all off"
"""Names of two measured steps in FIGURES."""
COUNTED = {"even": 55_419_330_048, "even, routes freed": 55_091_387_904, "7.5": 61_762_691_072}
"""Peak bytes of a second step on fake tensors, with megatron-core 0.16.1 and the Transformer Engine double:
even tokens per expert; the same after dispatchers free their routes; and, before that change, with 7.5 times
the even share of tokens in each layer."""
WORKSPACES = 6 * (32 << 20)
"""Bytes of six cuBLAS workspaces: torch's, Transformer Engine's, and the four of its 2.20.2 for expert
streams."""
STAND_INS = 2 * 4096 * (10_240 + 8192 + 2560 + 1280)
"""Bytes of the dummy gradients that Transformer Engine returns for weights whose gradient it has added
itself, one bf16 tensor per weight shape."""
GRADIENTS = 47 * 4096 * 4096 * 2
"""Bytes of the bf16 input gradients of all 48 layers but the first: 4,096 tokens x hidden size 4,096."""
DOCUMENT_TOKENS = 1638
"""Mean length of the document of a token, if four random documents share a row of 4,096 tokens."""
KINDS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("matrix products", ("dense", "experts", "head"), ("nvjet",)),
    ("attention", ("attention",), ("pytorch_flash",)),
    ("permutation of tokens", (), ("_permute", "_unpermute", "_sort_chunks", "_make_chunk")),
    ("activations, rotation, sums, casts", (), (
        "triton_", "fused_rope", "CUDAFunctor_add", "unrolled_elementwise", "FillFunctor<float>")),
    ("copies and fills, mostly in place of messages", (), (
        "Memcpy DtoD", "FillFunctor<c10::BFloat16>", "gpu_kernel_impl_nocast<at::native::direct_co")))
"""(kind of kernel, components of `plan`'s step, parts of kernel names). `plan` has one figure for all kernels
that are limited by memory."""


def build_config() -> RunConfig:
    """Return the settings of the measured step `STEP`, with one micro-batch on each rank."""
    settings = ("parallel.ep=64", "parallel.zero1=true", "train.micro_batch_size=1", "train.fp8=none",
                "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
                "train.recompute=true", f"train.global_batch_size={NUM_RANKS}")
    return apply_settings(recipes.get(RECIPE), list(settings))


def compare_memory(measured: dict[str, Any]) -> Iterator[str]:
    """Yield the lines on bytes: measured, counted and estimated peaks, and the causes of the differences."""
    def estimate_bytes(imbalance: float) -> int:
        return build_account(build_config(), NUM_RANKS, 0, 4096, imbalance).allocated

    peak, buffers = measured[STEP]["peak bytes"], WORKSPACES + STAND_INS
    bytes_per_share = estimate_bytes(9.0) - estimate_bytes(8.0)
    routes = COUNTED["even"] - COUNTED["even, routes freed"]
    yield "peak of allocated GB with overlapped gradient messages"
    for name, size in (
            ("measured", peak), ("account in November 2026, tokens 1.2 times their even share",
                                 measured[STEP]["account bytes"]),
            ("counted on fake tensors, even shares", COUNTED["even"]),
            ("  the same after dispatchers free their routes", COUNTED["even, routes freed"]),
            ("account, even shares", estimate_bytes(1.0)), ("account, 1.2 times", estimate_bytes(1.2)),
            ("counted on fake tensors, 7.5 times, before routes were freed", COUNTED["7.5"]),
            ("account, 7.5 times", estimate_bytes(7.5)),
            ("workspaces and stand-ins for gradients, in the 5 % that `plan` leaves free", buffers)):
        yield f"  {size / 1e9:7.3f}  {name}"
    first_account, products = measured[STEP]["account bytes"], 4096 * (2048 * 6 + 8192 * 4)
    uneven = 0.2 * bytes_per_share
    share = 7.5 + (peak - buffers - COUNTED["7.5"]) / bytes_per_share
    rest = peak - first_account - routes - products - buffers + uneven
    yield format_paragraph(
        f"The first two lines differ by {format_gb(peak - first_account)} GB: {format_gb(routes)} for routes "
        f"that dispatchers held, {format_gb(products)} for products of the head, {format_gb(buffers)} for "
        f"workspaces and stand-ins, less {format_gb(uneven)} in the account for uneven tokens.  The other "
        f"{format_gb(rest)} GB come from a layer whose experts got many tokens "
        f"({bytes_per_share / 1e9:.3f} GB per even share) and from gradients of other layers' inputs, which "
        f"the routes held: {format_gb(GRADIENTS)} if that was the first layer, none if it was the last.  So "
        f"its experts got {share:.1f} to {share + GRADIENTS / bytes_per_share:.1f} times their even share.")
    yield format_paragraph(
        "This imbalance comes from the benchmark: mirror images send a rank 64 times the tokens that it "
        "sends to itself, which is 8.0 times its share if every token chooses one of its two experts, and "
        "routers are untrained.  In 2 of 48 layers its experts got no token.  `part_big_rank.py` now "
        "measures the imbalance, and most of its rungs route evenly.")


def format_gb(size: float) -> str:
    """Format bytes as GB."""
    return f"{size / 1e9:.2f}"


def format_paragraph(text: str) -> str:
    """Return the wrapped lines of a text, after an empty line."""
    return "\n" + textwrap.fill(text, 130)


def compare_kernels(measured: dict[str, Any]) -> Iterator[str]:
    """Yield the lines on milliseconds of a step: predicted and measured, by kind of kernel."""
    chip = CHIPS["h200"]
    config = build_config()
    workload = replace(build_workload(config, config.data.phases[0], NUM_RANKS, chip, default_links(chip)),
                       attention_kernel="portable", document_tokens=DOCUMENT_TOKENS)
    plan_ms = {name: 1e3 * seconds for name, seconds in step.estimate_step(workload).components.items()}
    host_s, stall_s = step._estimate_launch_s(step.Clock(workload, load_default_parameters()))
    figures = dict(measured["ms of kernels"])  # name of a kernel -> milliseconds and events
    total_ms, num_events = figures.pop("all")
    listed = list(figures.values())
    yield f"{'ms of a step':57} {'plan':>8} {'H200':>8} {'events':>9}"
    for kind, components, parts in KINDS:
        of_kind = [figures.pop(name) for name in list(figures) if any(part in name for part in parts)]
        planned = f"{sum(plan_ms[name] for name in components):8.1f}" if components else " " * 8
        yield (f"  {kind:55} {planned} {sum(ms for ms, _ in of_kind):8.1f} "
               f"{sum(events for _, events in of_kind):9,}")
    assert not figures, figures
    yield (f"  {'all other events':55} {'':8} {total_ms - sum(ms for ms, _ in listed):8.1f} "
           f"{num_events - sum(events for _, events in listed):9,}")
    yield f"  {'all kernels limited by memory':55} {plan_ms['memory']:8.1f}"
    on_gpu_ms = sum(plan_ms[name]
                    for name in ("dense", "experts", "head", "attention", "memory", "optimizer"))
    step_ms = 1e3 * measured["step s"]
    yield f"  {'all kernels':55} {on_gpu_ms:8.1f} {total_ms:8.1f} {num_events:9,}"
    yield f"  {'the host alone':55} {1e3 * host_s:8.1f} {step_ms:8.1f}"
    launch_s = max(stall_s, host_s - on_gpu_ms / 1e3)
    predicted_ms = on_gpu_ms + 1e3 * launch_s + plan_ms["other"]
    yield (f"  {'step without messages':55} {predicted_ms:8.1f} {step_ms:8.1f}   plan / H200 - 1: "
           f"{predicted_ms / step_ms - 1:+.1%}")


def compare_host(measured: dict[str, Any]) -> Iterator[str]:
    """Yield the lines on the GPU's idle time."""
    for name in (UNFUSED, STEP):
        step_s = measured[name]["step s"]
        total_ms, events = measured[name]["ms of kernels"]["all"]
        yield (f"  {name:20} step {step_s:.3f} s, kernels {total_ms / 1e3:.3f} s, idle "
               f"{1 - total_ms / 1e3 / step_s:.0%}, {events:,} events of kernels and driver calls")
    yield format_paragraph(
        "These figures do not show how the host spent its time; `gpu/host_time.py` now counts driver calls, "
        "waits, Python functions and device allocations separately.  `plan` takes the longer of host and GPU "
        "per micro-batch, with a host fitted to published runs.  If it took 1.9 times its time, as here, the "
        "median error over 148 published rows with experts would grow from 5.7 to 9.3 %.")


def main() -> None:
    """Print the comparison."""
    measured = json.loads(FIGURES.read_text())
    print(format_paragraph(
        f"One rank of {RECIPE}, {NUM_RANKS} ranks, ep 64, ZeRO-1, micro-batch 1 x 4,096 tokens, bf16, full "
        "recomputation: plan against one NVIDIA H200 (16 CPU cores), 2026-11-27; torch 2.11.0+cu130, "
        "Transformer Engine 2.20.2, megatron-core 0.19.2, attention by torch's FlashAttention 2.  One run on "
        "one machine; steps are the best of four, kernels those of one more step under torch's profiler.  "
        "The other ranks are mirror images, so messages take no time.").strip(), end="\n\n")
    print(*compare_memory(measured), "", *compare_kernels(measured[STEP]), sep="\n")
    print("\nThe host", *compare_host(measured), sep="\n")


if __name__ == "__main__":
    main()
