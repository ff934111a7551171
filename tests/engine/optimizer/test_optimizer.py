"""The optimizer against torch's AdamW on the same gradients, and its state as named tensors."""

from typing import Any

import pytest

from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from tests.tiny import tiny_model


def compare_with_torch_adamw(precision: str, clip_grad: float) -> dict[str, Any]:
    """Take four updates with our optimizer, and with torch.optim.AdamW on copies of the weights.

    The copies are fp64 if `precision` is fp64, else fp32.
    """
    from unittest import mock

    import megatron.core.optimizer as megatron_optimizer
    import torch

    from megatron_sov.engine.optimizer.optimizer import Optimizer
    from megatron_sov.engine.optimizer.state_shards import MASTER

    config, model = tiny_model("tiny-k-exaone", f"train.precision={precision}", "optim.weight_decay=0.2",
                               f"optim.clip_grad={clip_grad}", layout={})
    dtype = torch.float64 if precision == "fp64" else torch.float32
    if precision == "fp64":  # Transformer Engine's Adam must not be used for float64
        with (mock.patch.object(megatron_optimizer, "Adam", None),
              mock.patch.object(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)):
            optimizer = Optimizer(model, config.optim)
    else:
        optimizer = Optimizer(model, config.optim)
    optimizer.sync_master_weights()
    names, parameters = zip(*model.named_parameters(), strict=True)
    copies = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in parameters]
    optim = config.optim
    reference = torch.optim.AdamW(
        [{"params": [c for c in copies if c.dim() > 1], "weight_decay": optim.weight_decay},
         {"params": [c for c in copies if c.dim() == 1], "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2), eps=optim.eps)
    generator = torch.Generator().manual_seed(2)
    norms = []
    for lr in (1e-2, 3e-2, 1e-3, 5e-3):
        optimizer.zero_grad()
        for parameter, copy in zip(parameters, copies, strict=True):
            copy.grad = (torch.randn(copy.shape, generator=generator) * 0.01).to(dtype)
            parameter.main_grad.copy_(copy.grad)
        expected_norm = torch.nn.utils.clip_grad_norm_(copies, clip_grad or torch.inf)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        norms.append([optimizer.step(lr), float(expected_norm)])
    state = {b.key: b.data.dtype for b in optimizer.state_shards()}
    masters = [b.data for b in optimizer.state_shards() if b.key.startswith(MASTER)]
    main_weights = masters or [p.detach() for p in parameters]
    differences = {n: float((p.detach().to(dtype) - c.detach()).abs().max())
                   for n, p, c in zip(names, parameters, copies, strict=True)}
    total = sum(float(t.double().square().sum()) for t in main_weights)
    return {"norms": norms, "num_updates": optimizer.num_updates, "masters": len(masters),
            "state_has_dtype": all(d == dtype for d in state.values()),
            "sum": total, "expected_sum": sum(float(c.detach().double().square().sum()) for c in copies),
            "differences": differences,
            "size": {n: float(c.detach().abs().max()) for n, c in zip(names, copies, strict=True)}}


@pytest.mark.distributed
def test_updates_are_torchs_adamw(ranks, job) -> None:
    clipped, unclipped, bf16, fp64 = (r[0] for r in ranks(
        job(__file__, "compare_with_torch_adamw", 1, {"precision": "fp32", "clip_grad": 0.5}),
        job(__file__, "compare_with_torch_adamw", 1, {"precision": "fp32", "clip_grad": 0.0}),
        job(__file__, "compare_with_torch_adamw", 1, {"precision": "bf16", "clip_grad": 0.5}),
        job(__file__, "compare_with_torch_adamw", 1, {"precision": "fp64", "clip_grad": 0.5})))
    for result in (clipped, unclipped, bf16, fp64):
        assert result["num_updates"] == 4 and result["state_has_dtype"]
        for norm, expected_norm in result["norms"]:
            assert norm == pytest.approx(expected_norm, rel=1e-5) and expected_norm > 0.5
        assert result["sum"] == pytest.approx(result["expected_sum"], rel=1e-6)
    for result in (clipped, unclipped):
        assert max(result["differences"].values()) < 2e-6
        assert result["masters"] == 0
    assert max(fp64["differences"].values()) < 1e-14 and fp64["masters"] == 0
    for norm, expected_norm in fp64["norms"]:
        assert norm == pytest.approx(expected_norm, rel=1e-13)
    assert bf16["masters"] > 40
    for name, difference in bf16["differences"].items():  # bf16 rounds the fp32 master weights to 8 bits
        assert difference <= bf16["size"][name] * 2 ** -8, name


@pytest.mark.each("layout", [
    "parallel.tp=2 parallel.sp=true parallel.ep=2", "parallel.ep=2 parallel.zero1=true", "parallel.etp=2"])
def test_every_parameter_counts_once_in_the_gradient_norm(layout: str) -> None:
    """In bf16, which `plan --prove` leaves out. With gradients of 1 the squared norm counts parameters."""
    from layout_proof import cpu_shims

    cpu_shims.prepare_without_gpu()
    from layout_proof.simulated_world import SimulatedRanks
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.optimizer import optimizer, state_shards
    from megatron_sov.engine.parallel.world import form_groups

    def compute_norm(config: RunConfig) -> float:
        model = build_model(config.model, config.parallel, config.train)
        run_optimizer = optimizer.Optimizer(model, config.optim, config.parallel)
        for parameter in model.parameters():
            parameter.main_grad.fill_(1)
        state_shards.assign_gradients(run_optimizer.shards)
        return run_optimizer._compute_grad_norm()

    def compute_norms(*settings: str) -> list[float]:
        """Return the norm on each of two simulated ranks, or on one without settings."""
        config = apply_settings(recipes.get("tiny-k-exaone"), ["train.precision=bf16", *settings])
        ranks = SimulatedRanks(2 if settings else 1)
        return ranks.run(form_groups(config.parallel), lambda _: compute_norm(config))

    assert {*compute_norms(*layout.split())} == {*compute_norms()}
