"""Compile the Triton kernels of Transformer Engine and megatron-core for Hopper and Blackwell without a GPU,
and print their registers, spilled bytes and shared memory.

Usage: python benchmarks/gpu/compile_kernels.py > benchmarks/results/ptx.txt

The wrappers of the libraries are called with meta tensors at the sizes of the recommended layouts. Each
kernel launch is replaced by compilation. For an autotuned kernel all configurations are compiled, and
the one with the most spilled bytes (then registers) is printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton_interpreter as kernels

TARGETS = {90: "Hopper", 100: "Blackwell"}
TOKENS, EXPERTS, TOP, LOCAL, HIDDEN, VOCAB = 8192, 128, 8, 16, 4096, 196608
"""Sizes of a micro-batch of solar-open-102b; TOP experts per token, LOCAL experts per rank."""
LATENT = (128, 128, 64, 128)
"""Latent attention of DeepSeek-V3: heads, key width without rotation, key width with rotation, value
width."""


@dataclass
class Compiled:
    """Compilation results of one kernel."""

    configs: int = 0
    """Compiled configurations."""
    worst: tuple[int, int] = (-1, -1)
    """(spilled bytes, registers) of the configuration with the most; -1: none compiled."""
    shared_bytes: int = 0
    warps: int = 0
    problems: set[str] = field(default_factory=set)


class Driver:
    """Replaces Triton's CUDA driver: the methods that Triton calls before a launch."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def assemble_ptx(ptx: str, capability: int) -> tuple[int, int]:
    """Assemble PTX text with ptxas for `sm_<capability>a`; return (spilled bytes, registers)."""
    folder = kernels.find_triton_folder()
    home = folder / "triton" if folder else Path(import_module("triton").__file__ or "").parent
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ptxas = home / "backends/nvidia/bin/ptxas-blackwell"
        completed = subprocess.run([ptxas, "-v", f"-arch=sm_{capability}a", file.name, "-o", "/dev/null"],
                                   capture_output=True, text=True, check=True)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", completed.stderr)))
    return spills, int(re.findall(r"Used (\d+) registers", completed.stderr)[0])


def compile_in_place_of_launches(capability: int) -> dict[str, Compiled]:
    """Replace Triton's launches by compilation; return kernel name -> results, which later launches fill."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    results: dict[str, Compiled] = {}
    driver.set_active(Driver(capability))
    run = JITFunction.__dict__["run"]

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        entry = results.setdefault(self.__name__, Compiled())
        entry.configs += 1
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            spills_and_registers = assemble_ptx(kernel.asm["ptx"], capability)
        except Exception as e:  # the benchmark reports which kernels compile
            entry.problems.add(f"{type(e).__name__}: {str(e).strip().splitlines()[-1][:150]}")
            return
        if spills_and_registers >= entry.worst:
            entry.worst, entry.warps = spills_and_registers, kernel.metadata.num_warps
            entry.shared_bytes = kernel.metadata.shared

    def compile_configs(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_launch, compile_configs
    return results


def launch_transformer_engine() -> None:
    """Call the wrappers of Transformer Engine's Triton kernels with meta tensors."""
    import torch

    kernels.stub_transformer_engine()
    home = "transformer_engine.pytorch.triton"
    permutation, entropy, pad, grouped = (import_module(f"{home}.{name}") for name in (
        "permutation", "cross_entropy", "pad", "grouped_dbias_dscales"))
    x = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)
    routing = torch.empty(TOKENS, EXPERTS, dtype=torch.int32)
    probs = torch.empty(TOKENS, EXPERTS)
    rows = permutation.make_row_id_map(routing, TOKENS, EXPERTS)
    out = TOKENS * TOP
    permuted, _, weights = permutation.permute_with_mask_map(
        x, rows, probs, None, None, TOKENS, EXPERTS, out, HIDDEN, 0)
    permutation.unpermute_with_mask_map(permuted, rows, None, weights, None, TOKENS, EXPERTS, HIDDEN)
    permutation.unpermute_with_mask_map_bwd_with_merging_probs(
        x, rows, permuted, probs, None, TOKENS, EXPERTS, out, HIDDEN)
    chunks = torch.empty(EXPERTS, dtype=torch.int64)
    order = permutation.make_chunk_sort_map(chunks, chunks, out, EXPERTS)
    permutation.sort_chunks_by_map(permuted, order, weights, out, HIDDEN, True)
    logits = torch.empty(1, 2048, VOCAB, dtype=torch.bfloat16)
    target = torch.empty(1, 2048, dtype=torch.int64)
    loss, saved, stats, kept, count, rank, size = entropy.cross_entropy_forward(
        logits, target, 0.0, False, None, -100, False)
    entropy.cross_entropy_backward(saved, stats, kept, count, loss, 0.0, False, rank, size, -100)
    pad.pad_columnwise_scale_inv(torch.empty(HIDDEN // 32 + 1, HIDDEN + 1, dtype=torch.uint8))
    grouped.compute_grouped_dbias_dscales(permuted, weights, torch.empty(LOCAL, HIDDEN, dtype=torch.bfloat16),
                                          torch.empty(LOCAL + 1, dtype=torch.int64))


def launch_megatron() -> None:
    """Call the fusions of megatron-core with meta tensors, forward and backward."""
    import torch

    kernels.stub_megatron()
    converter, padding, rope = map(import_module, kernels.MEGATRON)
    probs = torch.empty(TOKENS, TOP, requires_grad=True)
    chosen = torch.empty(TOKENS, TOP, dtype=torch.int64)
    _, weights = converter.fused_indices_to_multihot(chosen, probs, LOCAL)
    weights.sum().backward()
    padding.fused_pad_routing_map(torch.empty(TOKENS, EXPERTS, dtype=torch.bool), 32)
    heads, plain, turned, value = LATENT
    cos = torch.empty(TOKENS, 1, 1, turned)
    bounds = torch.empty(9, dtype=torch.int32)
    query = torch.empty(TOKENS, heads, plain + turned, dtype=torch.bfloat16, requires_grad=True)
    result = rope.fused_apply_mla_rope_for_q(query * 1, cos, cos, plain, turned, bounds)
    result.backward(torch.empty_like(result))
    both = torch.empty(TOKENS, heads, plain + value, dtype=torch.bfloat16, requires_grad=True)
    shared = torch.empty(TOKENS, 1, turned, dtype=torch.bfloat16, requires_grad=True)
    keys, values = rope.fused_apply_mla_rope_for_kv(both, shared, cos, cos, turned, plain, value, bounds)
    torch.autograd.backward([keys, values], [torch.empty_like(keys), torch.empty_like(values)])


def format_table(capability: int) -> Iterator[str]:
    """Compile all kernels for a compute capability, and yield the lines of the printed table."""
    import torch

    libraries: dict[str, Callable[[], None]] = {
        f"Transformer Engine {kernels.TE_VERSION}": launch_transformer_engine,
        f"megatron-core {version('megatron-core')}": launch_megatron}
    result = compile_in_place_of_launches(capability)
    for library, launch in libraries.items():
        result.clear()
        with torch.device("meta"):
            launch()
        yield f"{library}, sm_{capability} ({TARGETS[capability]})"
        for name, entry in sorted(result.items()):
            spills, registers = entry.worst
            figures = "does not compile"
            if registers >= 0:
                figures = (f"configs {entry.configs:>2}  warps {entry.warps:>2}  registers {registers:>3}  "
                           f"spill bytes {spills:>4}  shared bytes {entry.shared_bytes:>6}")
            problems = "".join(f"  {problem}" for problem in sorted(entry.problems))
            yield f"  {name.lstrip('_'):<45} {figures}{problems}"


def main() -> None:
    """Print the table of the capability in `sys.argv`; without one, start a process for each of `TARGETS`."""
    if len(sys.argv) == 1:
        print("python benchmarks/gpu/compile_kernels.py, on a CPU: PTX by Triton, SASS by its wheel's ptxas; "
              f"triton {kernels.TRITON}\n{TOKENS} tokens, {EXPERTS} experts of which {TOP} are chosen, "
              f"hidden size {HIDDEN}, vocabulary {VOCAB}; nothing was launched\n", flush=True)
        for capability in TARGETS:
            subprocess.run([sys.executable, "-W", "ignore", __file__, str(capability)], check=True)
        return
    if folder := kernels.find_triton_folder():
        sys.path.insert(0, str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(kernels.ROOT / "build/triton-cache"))
    kernels.create_tensors_on("meta")
    for line in format_table(int(sys.argv[1])):
        print(line, flush=True)


if __name__ == "__main__":
    main()
