"""Dtypes under `train.precision`, and repeated bits under `train.deterministic`."""

import hashlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sov.engine.model import logprobs
from megatron_sov.engine.parallel import gpu_setup
from megatron_sov.engine.router import BalancedRouter
from megatron_sov.train.loop import train_step
from megatron_sov.train.trainer import Trainer
from tests.layouts.layout_run import build_small_config, build_trainer

LAYOUT = ["parallel.tp=2", "parallel.sp=true", "parallel.ep=2"]



class Operations(TorchDispatchMode):
    """Collects the largest number of elements per reduction over processes, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "allreduce" in str(func) or "reduce_scatter" in str(func):
            for tensor in tree_leaves(args):
                if torch.is_tensor(tensor) and tensor.is_floating_point():
                    name = str(tensor.dtype)
                    self.reduced[name] = max(self.reduced.get(name, 0), tensor.numel())
        return out


def collect_dtypes(recipe: str, settings: list[str], data: str) -> dict[str, Any]:
    """Return the dtypes that a step stores and computes with."""
    built = build_trainer(build_small_config(recipe, settings, [data], "lm"))
    dtypes_by_name: dict[str, set[str]] = {}

    def record_dtype(name: str, tensor: torch.Tensor) -> None:
        dtypes_by_name.setdefault(name, set()).add(str(tensor.dtype))

    for router in (m for m in built.model.modules() if isinstance(m, BalancedRouter)):
        router.register_forward_hook(lambda module, inputs, out: record_dtype("router weights", out[0]))
        record_dtype("router bias", router.expert_bias)
    with (Operations() as seen,
          patch_and_record(BalancedRouter, "gating", lambda out: record_dtype("router logits", out)),
          patch_and_record(logprobs.Head, "cross_entropy", lambda out: record_dtype("losses", out[1]))):
        result = train_step(built)
    assert result is not None
    for parameter in built.model.parameters():
        record_dtype("weights", parameter)
        record_dtype("gradients", parameter.main_grad)
    for block in built.optimizer.state_shards():
        record_dtype(block.key.split("/")[0], block.data)
    gradients = sum(p.numel() for p in built.model.parameters())
    return {"dtypes": {name: sorted(kinds) for name, kinds in dtypes_by_name.items()},
            "reduced": seen.reduced, "gradients": gradients, "loss": result.loss}


def patch_and_record(cls: type, method: str, record: Any) -> Any:
    """Patch a method so that `record` receives its results."""
    original = getattr(cls, method)

    def call_and_record(self: Any, *args: Any) -> Any:
        out = original(self, *args)
        record(out)
        return out

    return mock.patch.object(cls, method, call_and_record)


def hash_state(built: Trainer) -> str:
    """Hash all weights, buffers and optimizer states of this process."""
    digest = hashlib.sha256()
    named = [*built.model.state_dict().items(), *((b.key, b.data) for b in built.optimizer.state_shards())]
    for name, tensor in named:
        if torch.is_tensor(tensor):
            digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_deterministically(settings: list[str], data: str, threads: int) -> dict[str, Any]:
    """Return losses and a state hash of two deterministic steps whose sizes keep several threads busy."""
    gpu_setup.enable_determinism()
    torch.set_num_threads(threads)
    sizes = ["model.hidden_size=128", "model.head_dim=32", "model.expert_ffn_dim=128", "model.num_layers=1",
             'data.phases=[{"name": "main", "seq_len": 256}]', "train.micro_batch_size=2",
             "train.global_batch_size=4", "train.head_chunk_tokens=2048", "train.deterministic=true"]
    built = build_trainer(build_small_config("tiny-solar-open", [*sizes, *settings], [data], "lm"))
    losses = [train_step(built).loss for _ in range(2)]  # type: ignore[union-attr]
    return {"losses": losses, "state": hash_state(built), "threads": torch.get_num_threads(),
            "torch": torch.are_deterministic_algorithms_enabled(),
            "library": built.model.config.deterministic_mode}


@pytest.mark.distributed
@pytest.mark.essential
def test_bf16_keeps_master_weights_gradients_routing_and_loss_in_float32(ranks: Any, job: Any,
                                                                         packed_data: Any) -> None:
    arguments = {"recipe": "tiny-k-exaone", "data": str(packed_data.text)}
    jobs = [job(__file__, "collect_dtypes", 2 if p == "bf16" else 1,
                {**arguments,
                 "settings": [f"train.precision={p}", "model.num_experts=8", "model.num_layers=3"]})
            for p in ("bf16", "fp32", "fp64")]
    (bf16, _), (fp32,), (fp64,) = ranks(*jobs)
    single = ["torch.float32"]
    assert bf16["dtypes"] == {
        "weights": ["torch.bfloat16"], "gradients": single, "master": single, "exp_avg": single,
        "exp_avg_sq": single, "router logits": single, "router weights": single, "router bias": single,
        "losses": single}
    # data-parallel reduction: dense and expert gradients have one buffer each
    assert bf16["reduced"]["torch.float32"] > 0.4 * bf16["gradients"]
    assert "torch.bfloat16" not in bf16["reduced"]
    assert {k: v for k, v in fp64["dtypes"].items() if v != ["torch.float64"]} == {"router bias": single}
    assert abs(fp32["loss"] / fp64["loss"] - 1) < 1e-6
    # bf16 has 8 bits: errors of 2^-9 in many roundings mostly average out
    assert 1e-6 < abs(bf16["loss"] / fp64["loss"] - 1) < 2**-9


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize(("nproc", "threads", "settings"), [
    (1, 2, []), (2, 1, [*LAYOUT, "train.precision=bf16"])], ids=["threads", "layouts"])
def test_deterministic_runs_repeat_their_bits(ranks: Any, job: Any, packed_data: Any, nproc: int,
                                              threads: int, settings: list[str]) -> None:
    once, repeated = ranks(*2 * [job(__file__, "train_deterministically", nproc, {
        "settings": settings, "data": str(packed_data.text), "threads": threads})])
    assert once == repeated
    assert once[0]["threads"] == threads and once[0]["torch"] and once[0]["library"]
