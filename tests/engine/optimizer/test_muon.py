"""Muon at any layout: each gathered matrix follows torch.optim.Muon step by step."""

import dataclasses
import hashlib
import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from megatron_sov.checkpoint.gather import TensorGatherer
from megatron_sov.engine.model.local_shards import ParameterLookup, list_local_shards
from megatron_sov.engine.optimizer.muon import compute_update_scale, orthogonalize
from megatron_sov.engine.optimizer.optimizer import Optimizer
from tests.tiny import tiny_model

STEPS, LR = 3, 0.02
FP64 = "train.precision=fp64"
SETTINGS = ("model.num_heads=8", "model.num_kv_heads=2", "model.num_experts=4", "model.dense_ffn_dim=40",
            "model.expert_ffn_dim=24", "optim.name=muon", "optim.weight_decay=0.2", "optim.clip_grad=0.0")
TP2 = ("parallel.tp=2", "parallel.sp=true")
OVERLAP = ("parallel.zero1=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
           "parallel.bucket_params=9000")


def draw_gradient(key: str, shape: tuple[int, ...], seed: int) -> Any:
    """Draw the gradient of a global tensor; the same key and seed give the same gradient on every rank."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(digest[:12], 16))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def write_gradients(optimizer: Any, model: Any, seed: int) -> None:
    """Write this process's shards of all gradients, as if reduced over data-parallel processes."""
    lookup = ParameterLookup(model)
    for block in list_local_shards(model):
        parameter = lookup.find_parameter(block)
        if parameter is None:
            continue
        gradient = draw_gradient(block.key, block.global_shape, seed)
        slices = tuple(slice(start, start + size)
                       for start, size in zip(block.offset, block.shape, strict=True))
        local_gradient = gradient[slices].reshape(block.data.shape)
        # The block may be a view of a part of the parameter, such as one expert or the gate of a fused
        # weight.
        start = block.data.storage_offset() - parameter.storage_offset()
        with torch.no_grad():
            part = parameter.main_grad.view(-1)[start:start + local_gradient.numel()]
            part.view(local_gradient.shape).copy_(local_gradient)


def gather_weights(model: Any, optimizer: Any) -> dict[str, Any]:
    """Gather the updated weights (under bf16 the masters) on every process."""
    blocks = list_local_shards(model)
    if model.config.params_dtype == torch.bfloat16:
        blocks = [dataclasses.replace(b, key=b.key.removeprefix("master/")) for b in optimizer.state_shards()
                  if b.key.startswith("master/")]
    gatherer = TensorGatherer(blocks, everywhere=True)
    return {key: gatherer.gather(key) for key in sorted(gatherer.get_shapes())}


def split_into_matrices(key: str, tensor: Any) -> list[Any]:
    """Return copies of the matrices inside a global tensor, by Megatron's documented layout."""
    if "experts.experts" in key:
        return [part for expert in tensor
                for part in split_into_matrices(key.replace("experts.experts", "expert"), expert)]
    if key.endswith("linear_qkv.weight"):  # per key head (2): its 4 queries, the key, the value, 8 rows each
        groups = tensor.view(2, 6, 8, -1)
        return [groups[:, a:b].reshape(-1, tensor.shape[1]) for a, b in ((0, 4), (4, 5), (5, 6))]
    if key.endswith("linear_fc1.weight"):  # gate and up
        return [matrix.clone() for matrix in tensor.chunk(2)]
    return [tensor.clone()]


def is_matrix(key: str, tensor: Any, optim: Any) -> bool:
    """Return whether Muon updates the tensor."""
    return optim.name == "muon" and tensor.dim() > 1 and not re.search("word_embeddings|output_layer", key)


class Reference:
    """torch.optim.Muon and torch.optim.AdamW over the whole matrices of a model."""

    def __init__(self, weights: dict[str, Any], optim: Any, dtype: Any) -> None:
        self.dtype, self.shapes = dtype, {key: tuple(w.shape) for key, w in weights.items()}
        self.matrices = {key: [torch.nn.Parameter(m.to(dtype)) for m in split_into_matrices(key, w)]
                         for key, w in weights.items() if is_matrix(key, w, optim)}
        self.rest = {key: torch.nn.Parameter(w.to(dtype, copy=True)) for key, w in weights.items()
                     if key not in self.matrices and not key.endswith("expert_bias")}
        scale = None if optim.muon_scale == "original" else optim.muon_scale
        matrices = [m for ms in self.matrices.values() for m in ms]
        matrices = matrices or [torch.nn.Parameter(torch.ones(1, 1))]  # torch refuses an empty list
        self.muon = torch.optim.Muon(matrices, lr=LR, weight_decay=optim.weight_decay,
                                     momentum=optim.muon_momentum, nesterov=optim.muon_nesterov,
                                     adjust_lr_fn=scale)
        decays = [p for p in self.rest.values() if p.dim() > 1]
        self.adamw = torch.optim.AdamW([{"params": decays, "weight_decay": optim.weight_decay}, {
            "params": [p for p in self.rest.values() if p.dim() == 1], "weight_decay": 0.0}],
                                       lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps)

    def step(self, seed: int, *, low_precision: bool) -> None:
        """Take one step. Newton-Schulz runs in bf16 with `low_precision`, else in the weights' dtype."""
        for key, parameters in self.matrices.items():
            whole = draw_gradient(key, self.shapes[key], seed).to(self.dtype)
            for parameter, grad in zip(parameters, split_into_matrices(key, whole), strict=True):
                assert grad.shape[1] == parameters[0].shape[1]
                parameter.grad = grad
        for key, parameter in self.rest.items():
            parameter.grad = draw_gradient(key, tuple(parameter.shape), seed).to(self.dtype)
        if low_precision:
            self.muon.step()
        else:
            with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
                self.muon.step()
        self.adamw.step()


def compare_updates(settings: list[str], seed: int) -> dict[str, Any]:
    """Take `STEPS` steps with our optimizer and with torch's optimizers.

    Returns:
        Per matrix or other tensor: "differences", the largest difference from torch's weights after any step,
        and "changes", the largest change since the start. "kinds": kinds of optimizer state.
    """
    config, model = tiny_model("tiny-k-exaone", *SETTINGS, *settings, seed=seed)
    optimizer = Optimizer(model, config.optim, config.parallel)
    optimizer.sync_master_weights()
    start = gather_weights(model, optimizer)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    reference = Reference(start, config.optim, dtype)
    differences: dict[str, float] = {}
    changes: dict[str, float] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        write_gradients(optimizer, model, 100 * seed + step)
        optimizer.step(LR)
        reference.step(100 * seed + step, low_precision=config.train.precision == "bf16")
        weights = gather_weights(model, optimizer)
        compared = {key: (weights[key], expected, start[key]) for key, expected in reference.rest.items()}
        for key, parameters in reference.matrices.items():
            matrices, start_matrices = (split_into_matrices(key, tensors[key])
                                        for tensors in (weights, start))
            for i, triple in enumerate(zip(matrices, parameters, start_matrices, strict=True)):
                compared[f"{key} {i}"] = triple
        for name, (updated, expected, initial) in compared.items():
            difference = float((updated.to(dtype) - expected.detach()).abs().max())
            differences[name] = max(differences.get(name, 0.0), difference)
            changes[name] = float((updated.to(dtype) - initial.to(dtype)).abs().max())
    kinds = sorted({block.key.split("/")[0] for block in optimizer.state_shards()})
    return {"differences": differences, "changes": changes, "kinds": kinds}


LAYOUTS = {
    "one rank": (1, ()),
    "TP2+SP": (2, TP2),
    "EP2, original scale, no Nesterov": (2, ("parallel.ep=2", "optim.muon_scale=original",
                                             "optim.muon_nesterov=false")),
    "PP2": (2, ("parallel.pp=2",)),
    "ZeRO-1": (2, ("parallel.zero1=true",)),
    "TP2+SP ETP2 x ZeRO-1": (4, (*TP2, "parallel.etp=2", "parallel.zero1=true")),
    "TP2+SP x EP2 x ZeRO-1 overlapped": (4, (*TP2, "parallel.ep=2", *OVERLAP)),
    "PP2 VPP2 x CP2 ZeRO-1 overlapped": (4, ("parallel.pp=2", "parallel.vpp=2", "parallel.cp=2", *OVERLAP)),
}
TIER1_LAYOUTS = {"TP2+SP x EP2 x ZeRO-1 overlapped"}
"""Layouts that `make test` runs; the others are `deep`."""


def find_largest_difference(result: dict[str, Any]) -> tuple[float, str]:
    """Return the largest difference from torch's weights, and its tensor."""
    return max((difference, name) for name, difference in result["differences"].items())


@pytest.mark.essential
@pytest.mark.distributed
@pytest.mark.parametrize("names", [
    TIER1_LAYOUTS, pytest.param(LAYOUTS.keys() - TIER1_LAYOUTS, marks=pytest.mark.deep)],
    ids=["tier 1", "other layouts"])
def test_matrices_follow_torch_muon_and_other_parameters_torch_adamw(names: set[str], ranks: Any,
                                                                     job: Any) -> None:
    cases = [(name, num_ranks, settings, seed)
             for seed, (name, (num_ranks, settings)) in enumerate(LAYOUTS.items(), 1) if name in names]
    jobs = [job(__file__, "compare_updates", num_ranks, {"settings": [FP64, *settings], "seed": seed})
            for _, num_ranks, settings, seed in cases]
    results = ranks(*jobs, timeout_s=600)
    for case, per_rank in zip(cases, results, strict=True):
        for result in per_rank:
            assert len(result["differences"]) > 90, "gate, up and down of each expert are separate matrices"
            assert min(result["changes"].values()) > 0.01, case
            assert find_largest_difference(result)[0] < 1e-13, (case, find_largest_difference(result))
            assert result["kinds"] == ["exp_avg", "exp_avg_sq", "momentum"]


# Rows of each matrix, and the orthogonal update against torch's Newton-Schulz and a singular value
# decomposition.

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration, as in torch.optim.Muon."""


@pytest.mark.each("shape", [(12, 40), (40, 12), (16, 16)])
def test_the_update_is_torchs_bit_for_bit(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    update_bf16 = update.bfloat16()
    assert orthogonalize(update_bf16, 5, COEFFICIENTS).equal(
        _zeropower_via_newtonschulz(update, COEFFICIENTS, 5, 1e-7))
    # torch's algorithm without its rounding to bfloat16
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        assert orthogonalize(update, 5, COEFFICIENTS).equal(
            _zeropower_via_newtonschulz(update, COEFFICIENTS, 5, 1e-7))


def test_scales_are_those_of_the_papers() -> None:
    orthogonal = torch.linalg.qr(torch.randn(200, 50, dtype=torch.float64)).Q
    update = compute_update_scale("match_rms_adamw", 200, 50) * orthogonal
    assert update.square().mean().sqrt() == pytest.approx(0.2)
    # The root of rows / columns; "original" does not scale a wide matrix.
    assert compute_update_scale("original", 200, 50) == compute_update_scale("spectral", 200, 50) == 2.0
    assert compute_update_scale("original", 50, 200) == 1.0
    assert compute_update_scale("spectral", 50, 200) == math.sqrt(0.25)
