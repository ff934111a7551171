"""Run Triton kernels of Transformer Engine and megatron-core in Triton's CPU interpreter, and compare the
results with the Transformer Engine double of the tests and with torch formulas.

Usage: python benchmarks/gpu/triton_interpreter.py [--quick]      --quick: smaller, and one dtype

Prints a line of JSON for each case: name, largest error relative to the largest value, and limit. Wheels that
are not installed are downloaded into build/.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import types
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from setting import ROOT

sys.path.append(str(ROOT))
from tests import releases
from tests.te_double.contract import TE_VERSION

TRITON = "3.9.0"
MEGATRON = ("megatron.core.fusions.fused_indices_converter", "megatron.core.fusions.fused_pad_routing_map",
            "megatron.core.fusions.fused_mla_yarn_rope_apply")
"""Modules with Triton kernels that models of this project may call."""
LIMITS = {"float32": 1e-6, "bfloat16": 8e-3}
"""dtype -> largest error relative to the largest value; rounding to bf16 changes a number by up to 4e-3."""
Case = tuple[str, float, float]
"""Name, error, limit."""


def find_triton_folder() -> Path | None:
    """Return a folder with Triton from its wheel, or None if Triton is installed.

    Raises:
        OSError: pip cannot download the wheel.
    """
    if find_spec("triton"):
        return None
    folder = releases.fetch_wheel("triton", TRITON, platform.python_version().rpartition(".")[0],
                                  _is_of_triton)
    for program in folder.glob("triton/backends/nvidia/bin/ptxas*"):
        program.chmod(0o755)  # zipfile does not restore it
    return folder


def _is_of_triton(member: str) -> bool:
    # Triton finds its backend by entry_points.txt
    return "/ptxas" in member or member.endswith(
        (".py", ".so", ".bc", "METADATA", "entry_points.txt", ".h", ".c"))


def stub(name: str, folder: Path, **values: Any) -> None:
    """Register a package without running its __init__.py, which needs a GPU or imports the whole library."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    vars(module).update(values)
    sys.modules[name] = module


def prepare() -> None:
    """Select Triton's interpreter, and create all tensors on the CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    if folder := find_triton_folder():
        sys.path.insert(0, str(folder))
    from triton.runtime import autotuner

    create_tensors_on("cpu")
    # the first configuration is chosen without timing
    autotuner.Autotuner._bench = lambda self, *args, **kwargs: [0.0]


def create_tensors_on(kind: str) -> None:
    """Let `torch.empty` and `torch.zeros` ignore the device that their callers ask for."""
    import torch

    for make in (torch.empty, torch.zeros):
        setattr(torch, make.__name__, lambda *args, make=make, device=None, **kwargs: make(
            *args, device=kind, **kwargs))


def stub_transformer_engine() -> None:
    """Make the modules of Transformer Engine that contain only Triton kernels importable from its wheel."""
    home = releases.fetch_wheel("transformer-engine", TE_VERSION) / "transformer_engine"
    for name in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        stub(f"transformer_engine{name}", home / name.replace(".", "/").lstrip("/"))


def stub_megatron() -> None:
    """Make `megatron.core.fusions` importable without the rest of megatron-core."""
    spec = find_spec("megatron")
    assert spec and spec.submodule_search_locations
    home = Path(next(iter(spec.submodule_search_locations))).parent
    for name in [n for n in sys.modules if n.partition(".")[0] == "megatron"]:
        del sys.modules[name]
    for name in ("megatron", "megatron.core", "megatron.core.fusions"):
        stub(name, home / name.replace(".", "/"))
    stub("megatron.core.utils", home, null_decorator=lambda f=None, **_: f or (lambda g: g))
    stub("megatron.core.jit", home, jit_fuser=lambda f: f)


def compute_error(found: Any, expected: Any) -> float:
    """Return the largest absolute difference, relative to the largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def compare_permutations(quick: bool) -> Iterator[Case]:
    """Compare token permutation, its inverse and the sorting of chunks with the double."""
    import torch

    stub_transformer_engine()
    kernels = import_module("transformer_engine.pytorch.triton.permutation")
    double_home = ROOT / "tests/te_double/transformer_engine/pytorch"
    for name in ("te_double", "te_double.pytorch"):
        stub(name, double_home)
    double = import_module("te_double.pytorch.permutation")
    tokens, experts, top, hidden = (24, 4, 2, 64) if quick else (48, 8, 3, 96)
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        name, limit = str(dtype).removeprefix("torch."), LIMITS[str(dtype).removeprefix("torch.")]
        x = torch.randn(tokens, hidden, dtype=dtype)
        chosen = torch.rand(tokens, experts).topk(top).indices
        routing = torch.zeros(tokens, experts, dtype=torch.int32).scatter(1, chosen, 1)
        probs = torch.rand(tokens, experts) * routing
        rows = kernels.make_row_id_map(routing, tokens, experts)
        permuted, _, weights = kernels.permute_with_mask_map(
            x, rows, probs, None, None, tokens, experts, tokens * top, hidden, 0)
        theirs, their_weights, their_rows = double.moe_permute_with_probs(x, probs, routing, tokens * top)
        yield f"permute, {name}", compute_error(permuted, theirs), 0.0
        yield f"permute, weights, {name}", compute_error(weights, their_weights), 0.0
        for merging in (None, probs):
            back, _ = kernels.unpermute_with_mask_map(permuted, rows, merging, None, None, tokens, experts,
                                                      hidden)
            expected = double.moe_unpermute(theirs, their_rows, merging, x.shape)
            weighted = ", weighted" if merging is not None else ""
            yield f"unpermute{weighted}, {name}", compute_error(back, expected), limit
        leaf, merging = theirs.float().requires_grad_(), probs.clone().requires_grad_()
        gradient = torch.randn(tokens, hidden).to(dtype)
        double.moe_unpermute(leaf, their_rows, merging, x.shape).backward(gradient.float())
        found = kernels.unpermute_with_mask_map_bwd_with_merging_probs(
            gradient, rows, permuted, probs, None, tokens, experts, tokens * top, hidden)
        yield f"unpermute, weighted, gradient of rows, {name}", compute_error(found[0], leaf.grad), limit
        # the kernel leaves entries of unchosen experts unwritten or zero
        yield (f"unpermute, weighted, gradient of weights, {name}",
               compute_error(found[1] * routing, merging.grad * routing), limit)  # type: ignore[operator]
        sizes = torch.tensor([5, 0, 9, tokens - 14])
        order = torch.tensor([2, 0, 3, 1])
        chunk_map = kernels.make_chunk_sort_map(sizes, order, tokens, 4)
        found, weights = kernels.sort_chunks_by_map(x, chunk_map, probs[:, 0].contiguous(), tokens, hidden,
                                                    True)
        expected = double.moe_sort_chunks_by_index_with_probs(x, probs[:, 0], sizes, order)
        yield f"sort chunks, {name}", compute_error(found, expected[0]), 0.0
        yield f"sort chunks, weights, {name}", compute_error(weights, expected[1]), 0.0
        found, _ = kernels.sort_chunks_by_map(found, chunk_map, None, tokens, hidden, False)
        yield f"sort chunks and back, {name}", compute_error(found, x), 0.0


def compare_losses(quick: bool) -> Iterator[Case]:
    """Compare cross entropy and its gradient, padded scales and grouped bias gradients with torch."""
    import torch
    from torch.nn import functional

    stub_transformer_engine()
    entropy = import_module("transformer_engine.pytorch.triton.cross_entropy")
    rows, vocab = (6, 300) if quick else (6, 40000)
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        torch.manual_seed(0)
        logits, target = torch.randn(2, rows, vocab).to(dtype) * 3, torch.randint(vocab, (2, rows))
        target[0, 1] = -100
        leaf = logits.float().requires_grad_()
        expected = functional.cross_entropy(leaf.flatten(0, 1), target.flatten(), reduction="none")
        seed = torch.rand(2, rows)
        expected.backward(seed.flatten())
        loss, saved, stats, kept, count, rank, size = entropy.cross_entropy_forward(
            logits.clone(), target, 0.0, False, None, -100, False)
        yield f"cross entropy, {name}", compute_error(loss.flatten(), expected), 1e-6
        found = entropy.cross_entropy_backward(saved, stats, kept, count, seed, 0.0, False, rank, size, -100)
        yield f"cross entropy, gradient, {name}", compute_error(found, leaf.grad), LIMITS[name]
    pad = import_module("transformer_engine.pytorch.triton.pad")
    scales = torch.randint(255, (200, 7), dtype=torch.uint8)
    padded = functional.pad(scales, (0, 1, 0, 56))
    yield "padded scales", compute_error(pad.pad_columnwise_scale_inv(scales), padded), 0.0
    grouped = import_module("transformer_engine.pytorch.triton.grouped_dbias_dscales")
    tokens, hidden, groups = (50, 130, 3) if quick else (300, 300, 8)
    dy, given = torch.randn(tokens, hidden), torch.rand(tokens)
    bias = torch.randn(groups, hidden)
    ends = torch.randint(tokens, (groups - 1,)).sort().values
    offsets = torch.cat([torch.tensor([0]), ends, torch.tensor([tokens])])
    group = torch.bucketize(torch.arange(tokens), offsets[1:-1], right=True)
    sums = torch.zeros(groups, hidden)
    found = grouped.compute_grouped_dbias(dy, offsets, groups)
    yield "grouped sums of biases", compute_error(found, sums.index_add(0, group, dy)), 1e-5
    found, weights = grouped.compute_grouped_dbias_dscales(dy, given, bias, offsets)
    yield "grouped sums, scaled", compute_error(found, sums.index_add(0, group, dy * given[:, None])), 1e-5
    yield "grouped sums, gradient of scales", compute_error(weights, (dy * bias[group]).sum(1)), 1e-5


def compare_routing_maps(quick: bool) -> Iterator[Case]:
    """Compare conversion of expert indices to a multi-hot map, its gradient, and map padding with torch."""
    import torch

    converter, padding, _ = map(import_module, MEGATRON)
    tokens, experts, top = (12, 6, 3) if quick else (40, 24, 8)
    indices = torch.rand(tokens, experts + 4).topk(top).indices  # the last four are experts of another rank
    indices = torch.where(indices < experts, indices, -1)
    probs = torch.rand(tokens, top).requires_grad_()
    is_local = indices >= 0
    token = torch.arange(tokens)[:, None].expand_as(indices)
    expected = torch.zeros(tokens, experts).index_put((token[is_local], indices[is_local]), probs[is_local])
    seed = torch.rand(tokens, experts)
    theirs, = torch.autograd.grad((expected * seed).sum(), probs)
    chosen, weights = converter.fused_indices_to_multihot(indices, probs, experts)
    found, = torch.autograd.grad((weights * seed).sum(), probs)
    yield "choices to a map", compute_error(chosen, expected.detach() > 0), 0.0
    yield "choices to a map, weights", compute_error(weights, expected), 0.0
    yield "choices to a map, gradient", compute_error(found, theirs), 0.0
    routing = torch.rand(tokens, experts) < 0.3
    zeros = (~routing).cumsum(0)  # padding adds the first tokens that are not routed to an expert
    expected = routing | (zeros <= (-routing.sum(0)) % 8) & ~routing
    yield "padded map", compute_error(padding.fused_pad_routing_map(routing, 8), expected), 0.0


def rotate_pairs(x: Any, cos: Any, sin: Any) -> Any:
    """Return `x` rotated by angles with these cosines and sines: interleaved pairs become two halves."""
    import torch

    half = x.shape[-1] // 2
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos[..., :half] - second * sin[..., :half],
                      second * cos[..., half:] + first * sin[..., half:]], -1)


def compare_rotations(quick: bool) -> Iterator[Case]:
    """Compare megatron-core's rotary embedding of latent attention, and its gradients, with a torch
    formula."""
    import torch

    rope = import_module(MEGATRON[-1])
    heads, plain, turned, value = 2, 16, 8, 16  # head widths without rotation, with rotation, of values
    bounds = [0, 5, 6, 16] if quick else [0, 15, 16, 40]
    total = bounds[-1]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    angles = torch.arange(total)[:, None] * torch.rand(turned // 2) * 0.3
    cos, sin = (turn(torch.cat([angles, angles], -1))[:, None, None].contiguous()
                for turn in (torch.cos, torch.sin))
    packed = torch.tensor(bounds, dtype=torch.int32)
    query = torch.randn(total, heads, plain + turned)
    seed = torch.randn_like(query)

    def formula(q: Any) -> Any:
        turned_part = rotate_pairs(q[..., plain:], cos[positions, 0], sin[positions, 0])
        return torch.cat([q[..., :plain], turned_part], -1)

    leaf = query.clone().requires_grad_()
    formula(leaf).backward(seed)
    given = query.clone().requires_grad_()
    result = rope.fused_apply_mla_rope_for_q(given * 1.0, cos, sin, plain, turned, packed)
    result.backward(seed.clone())
    yield "rotated queries", compute_error(result, formula(query)), 1e-6
    yield "rotated queries, gradient", compute_error(given.grad, leaf.grad), 1e-6
    both, shared = torch.randn(total, heads, plain + value), torch.randn(total, 1, turned)
    leaves = [t.clone().requires_grad_() for t in (both, shared)]
    keys = torch.cat([leaves[0][..., :plain], rotate_pairs(
        leaves[1], cos[positions, 0], sin[positions, 0]).expand(-1, heads, -1)], -1)
    seeds = torch.randn_like(keys), torch.randn(total, heads, value)
    torch.autograd.backward([keys, leaves[0][..., plain:]], seeds)
    ours = [t.clone().requires_grad_() for t in (both, shared)]
    result = rope.fused_apply_mla_rope_for_kv(*ours, cos, sin, turned, plain, value, packed)
    torch.autograd.backward(list(result), [s.clone() for s in seeds])
    yield "rotated keys", compute_error(result[0], keys), 1e-6
    yield "values", compute_error(result[1], both[..., plain:]), 0.0
    yield "rotated keys, gradient", compute_error(ours[0].grad, leaves[0].grad), 1e-6
    yield "rotated keys, gradient of the shared part", compute_error(ours[1].grad, leaves[1].grad), 1e-5


def iter_cases(quick: bool) -> Iterator[Case]:
    """Yield all cases; names begin with library and version."""
    for measured in (compare_permutations, compare_losses):
        for name, apart, limit in measured(quick):
            yield f"Transformer Engine {TE_VERSION}: {name}", apart, limit
    version = metadata.version("megatron-core")
    stub_megatron()
    for measured in (compare_routing_maps, compare_rotations):
        for name, apart, limit in measured(quick):
            yield f"megatron-core {version}: {name}", apart, limit


def main() -> int:
    """Print every case; return 1 if an error is above its limit."""
    start_s, failed = time.monotonic(), 0
    prepare()
    for name, apart, limit in iter_cases("--quick" in sys.argv):
        failed += not apart <= limit
        print(json.dumps({"case": name, "error": apart, "limit": limit}), flush=True)
    print(f"{time.monotonic() - start_s:.0f} s, {platform.machine()}, triton {TRITON}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
