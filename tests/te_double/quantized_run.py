"""Training runs on several ranks with low-precision recipes: the double's matrix products quantize their
operands by the reference quantizers of benchmarks/gpu/quantizers."""

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from layout_proof import cpu_shims
from megatron_sov import recipes
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.convert import export_weights
from megatron_sov.engine.model import language_model, replica_checks
from megatron_sov.engine.model.quantized_weights import get_raw_data, is_quantized
from megatron_sov.engine.optimizer.adamw import HostAdamW
from megatron_sov.engine.parallel import device, gpu_setup, world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives import microbatch
from megatron_sov.train.trainer import Trainer
from tests.layouts import layout_run

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
from quantizers.products import ROLES, quantized

SMALL = ("model.vocab_size=368", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2",
         "model.head_dim=16", "model.expert_ffn_dim=32", "train.global_batch_size=2",
         "train.micro_batch_size=1", "train.steps=20", "optim.warmup_steps=2", "train.precision=bf16",
         'data.phases=[{"name": "main", "seq_len": 128}]')
"""Sizes that every recipe supports."""
RECIPES = {"Float8CurrentScaling": "tensorwise", "Float8BlockScaling": "blockwise",
           "MXFP8BlockScaling": "mxfp8", "NVFP4BlockScaling": "nvfp4"}
"""Name of a recipe class -> name of its reference quantizer."""
DENSE = ("model.dense_ffn_dim=96",)
FAMILIES = {"tiny-solar-open": ("model.num_layers=3",), "tiny-k-exaone": DENSE, "tiny-qwen2": DENSE,
            "tiny-qwen3": DENSE, "tiny-qwen3-moe": (),
            "tiny-solar-open2": (
                'model.linear_attention={"num_key_heads": 32, "num_value_heads": 32, "key_head_dim": 32, '
                '"value_head_dim": 32, "gate_rank": 32, "negative_eigenvalues": true}',)}
"""Recipe -> its settings in addition to `SMALL`."""


def build_config(recipe: str, settings: list[str], path: str) -> RunConfig:
    """Return a small config of a recipe with token shards in `path`; `settings` take precedence."""
    return apply_settings(recipes.get(recipe), [*SMALL, *FAMILIES[recipe], f'data.paths={{"{path}": 1}}',
                                                *settings])


def quantize_products() -> None:
    """Make the double quantize the operands of its products under a recipe, and accumulate as Hopper does."""
    from transformer_engine.pytorch import gemm as products  # the double's own
    from transformer_engine.pytorch.recording import kernel

    plain = products.gemm

    def gemm(a: torch.Tensor, b: torch.Tensor, kind: Any, recipe: Any = None,
             out_dtype: torch.dtype | None = None, b_is_quantized: bool = False) -> torch.Tensor:
        name = type(recipe).__name__
        if name not in RECIPES:
            return plain(a, b, kind, recipe, out_dtype, b_is_quantized)
        products.COUNTS[kind, name] += 1
        products.check_aligned(a, b, recipe)
        with kernel():
            left_role, right_role = ROLES[kind]
            number_format = recipe.fp8_format.name.lower()
            left, right = quantized(a, left_role, kind, RECIPES[name], number_format), b.t()
            if not b_is_quantized:
                right = quantized(right, right_role, kind, RECIPES[name], number_format)
            multiply = products.fast_product if products.accumulates_fast(kind, recipe) else torch.matmul
            return multiply(left, right.t()).to(out_dtype or a.dtype)

    for module in list(sys.modules.values()):
        if module.__name__.startswith("transformer_engine.") and getattr(module, "gemm", None) is plain:
            module.gemm = gemm
    gather_one_by_one()


def gather_one_by_one() -> None:
    """Make Megatron-Core gather weight buffers one by one: gloo's coalesced gather requires one dtype, and
    would write FP8 bytes over bf16 values."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    start = buffers._ParamAndGradBucketGroup.start_param_sync

    def gather_each(self: Any, force_sync: bool = False) -> None:
        uncoalesced = mock.patch.multiple(
            buffers, _coalescing_manager=lambda *args, **kwargs: contextlib.nullcontext(mock.Mock()),
            dist_all_gather_func=lambda whole, part, group, async_op:
                torch.distributed.all_gather_into_tensor(whole, part.clone(), group=group))
        with uncoalesced:
            start(self, force_sync)

    buffers._ParamAndGradBucketGroup.start_param_sync = gather_each


def train_cases(cases: list[tuple[str, list[str]]], path: str) -> list[dict[str, Any]]:
    """Train a step for each (recipe, settings). Return its loss, a hash of the weights, the numbers of
    products, and ("again") the number of norms and activations recomputed in the backward pass."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    quantize_products()
    num_recomputed, recompute = [0], CheckpointWithoutOutput._recompute

    def count_and_recompute(self: Any, gradient: Any) -> None:
        num_recomputed[0] += self.ctx is not None
        recompute(self, gradient)

    CheckpointWithoutOutput._recompute = count_and_recompute
    results = []
    for recipe, settings in cases:
        trainer = layout_run.build_trainer(build_config(recipe, settings, path))
        take_product_counts()
        num_recomputed[0] = 0
        loss = train_step(trainer).loss
        results.append({"loss": loss, "weights": _digest(trainer), "products": take_product_counts(),
                        "again": num_recomputed[0]})
        world.leave_world()
    return results


def _trainer(recipe: str, settings: list[str], path: str, run: str = "not-written") -> Trainer:
    """Build a trainer whose products are quantized; `run`: run folder."""
    quantize_products()
    trainer: Trainer = layout_run.build_trainer(build_config(recipe, settings, path), run)
    return trainer


def take_product_counts() -> dict[str, int]:
    """Return and reset the numbers of products, for example "fprop Float8BlockScaling" -> number."""
    from transformer_engine.pytorch.gemm import COUNTS  # the double's own

    counts = {f"{kind} {name}".strip(): count for (kind, name), count in COUNTS.items()
              if kind != "general"}  # products of the router are never quantized
    COUNTS.clear()
    return counts


def train_losses(recipe: str, settings: list[str], path: str, steps: int) -> dict[str, Any]:
    """Train for `steps` steps. Return the losses, and the first step's numbers of products by kind."""
    if "train.deterministic=true" in settings:
        gpu_setup.enable_determinism()
    trainer = _trainer(recipe, settings, path)
    take_product_counts()
    losses = [train_step(trainer).loss]
    products = take_product_counts()
    losses += [train_step(trainer).loss for _ in range(steps - 1)]
    return {"losses": losses, "products": products}


def resume_and_compare(recipe: str, settings: list[str], path: str, run: str) -> dict[str, Any]:
    """Train four steps with a checkpoint and an evaluation after the second, then resume from the checkpoint.

    Returns:
        straight, resumed: losses of both runs; "straight ends", "resumed ends": hashes of their last weights.
        saved: hash of each tensor in the checkpoint; exported: hash of the exported weights.
        differing: replicas that differ; "in 8 bits": number of elements of FP8 weights.
        heldout: held-out losses; "products of the evaluation": number of products by kind.
    """
    trainer = _trainer(recipe, settings, path, run)
    trainer.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"straight": [train_step(trainer).loss for _ in range(2)]}
    trainer.save()
    trainer.checkpointer.finish()
    results["saved"] = _hash_checkpoint(trainer.folder.checkpoint(2))
    results["exported"] = hashlib.sha256(b"".join(
        name.encode() + _bytes(tensor) for name, tensor in export_weights(trainer.model))).hexdigest()
    results["differing"] = replica_checks.find_differing_replicas(trainer.model)
    results["in 8 bits"] = sum(get_raw_data(p).numel() for p in trainer.model.parameters() if is_quantized(p))
    take_product_counts()
    results["heldout"] = {name: result.loss for name, result in trainer.evaluate().items()}
    results["products of the evaluation"] = take_product_counts()
    results["straight"] += [train_step(trainer).loss for _ in range(2)]
    results["straight ends"] = _digest(trainer)
    trainer.resume(trainer.folder.checkpoint(2))
    results["resumed"] = [train_step(trainer).loss for _ in range(2)]
    results["resumed ends"] = _digest(trainer)
    trainer.close()
    return results


def check_placement(cases: list[tuple[str, list[str]]], path: str, run: str, *,
                    sends: bool = True) -> list[Any]:
    """Train with a checkpoint, an evaluation and a resume for each (recipe, settings), where host tensors in
    GPU operations raise an error. Return for each the number of host tensors, or the error message.

    `sends=False` leaves the rows of a micro-batch in host memory, which must raise the error.
    """
    from transformer_engine.pytorch import placement  # the double's own

    quantize_products()
    device.CPU = cpu_shims.CPU = placement.GPU
    language_model.on_gpu = lambda: True
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(placement.GPU)  # type: ignore[method-assign]
    if not sends:
        microbatch.to_device = lambda values, device: values
    results: list[Any] = []
    for number, (recipe, settings) in enumerate(cases):
        with placement.HostTensors() as mode:
            trainer = layout_run.build_trainer(build_config(recipe, settings, path), f"{run}-{number}")
            trainer.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                train_step(trainer)
            except (RuntimeError, ValueError) as e:
                results.append(str(e))
                continue
            trainer.save()
            trainer.checkpointer.finish()
            trainer.evaluate()
            trainer.resume(trainer.folder.checkpoint(1))
            train_step(trainer)
            trainer.close()
            world.leave_world()
        results.append(mode.marked)
    return results


def compare_moments(recipe: str, settings: list[str], path: str, before: str) -> dict[str, Any]:
    """Train a step from another run's checkpoint `before`. Return the number of moment elements that differ
    from the formula in float32, rounded once; dtypes; loss; and the share of elements in host memory."""
    trainer = _trainer(recipe, settings, path)
    trainer.resume(Path(before))
    old = {(shard.parameter, shard.start): {name: t.clone() for name, t in shard.state().items()}
           for shard in trainer.optimizer.shards}
    gradients: dict[Any, torch.Tensor] = {}  # of each shard, at the moment of the optimizer step
    inner_step = trainer.optimizer.megatron_optimizer.step_with_ready_grads

    def step() -> Any:
        gradients.update({(s.parameter, s.start): s.main.grad.flatten().clone()
                          for s in trainer.optimizer.shards})
        return inner_step()

    trainer.optimizer.megatron_optimizer.step_with_ready_grads = step
    loss = train_step(trainer).loss
    optim, num_wrong, dtypes = trainer.config.optim, 0, set()
    for shard in trainer.optimizer.shards:
        key = (shard.parameter, shard.start)
        new, gradient = shard.state(), gradients[key]
        for name, beta, added in (("exp_avg", optim.beta1, gradient),
                                  ("exp_avg_sq", optim.beta2, gradient.square())):
            expected = beta * old[key][name].float() + (1 - beta) * added
            # another summation order may change the last bit of a bf16 value
            tolerance = 2 ** -8 * expected.abs() + 1e-30
            num_wrong += int(((new[name].float() - expected).abs() > tolerance).sum())
        dtypes |= {f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in new.items()}
    sizes = [(shard.main.numel(), isinstance(shard.inner, HostAdamW)) for shard in trainer.optimizer.shards]
    return {"wrong": num_wrong, "dtypes": sorted(dtypes), "loss": loss,
            "on the host": sum(n for n, on_host in sizes if on_host) / sum(n for n, _ in sizes)}


def record_weight_quantization(recipe: str, settings: list[str], path: str) -> list[bool]:
    """Train two steps with an evaluation between them. Return for each forward pass of training whether the
    first linear layer quantizes its weight again (`is_first_microbatch`)."""
    trainer = _trainer(recipe, settings, path)
    flags: list[bool] = []

    def note(module: Any, *inputs: Any) -> None:
        if torch.is_grad_enabled():
            flags.append(module.is_first_microbatch)

    first = next(m for m in trainer.model.modules() if hasattr(m, "is_first_microbatch"))
    first.register_forward_pre_hook(note)
    train_step(trainer)
    trainer.evaluate()
    train_step(trainer)
    return flags


def _digest(trainer: Trainer) -> str:
    """Return a hash of the raw data of this process's weights."""
    return hashlib.sha256(b"".join(_bytes(get_raw_data(p)) for p in trainer.model.parameters())).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _hash_checkpoint(path: Path) -> dict[str, str]:
    """Return the hash of every tensor in a checkpoint."""
    hashes = {}
    for part in ("model", "optimizer"):
        reader = TensorReader(path, part)
        keys = reader.keys()
        hashes |= {key: hashlib.sha256(_bytes(reader.read(key))).hexdigest() for key in keys}
    return hashes
