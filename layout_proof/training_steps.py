"""Training steps on a rank with Megatron-Core's schedules, `DistributedDataParallel` and Adam."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import (
    DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

from layout_proof.layout import Layout
from layout_proof.module_sums import ModuleSums, observe_modules
from layout_proof.simulated_world import use_single_thread
from layout_proof.small_model import SmallModel

STEPS = 2  # the second step shows that weights and optimizer state after the first step agree
MICRO_BATCH_SIZE = 2
LEARNED_SHARE = 0.7  # share of learned tokens in `loss_mask`, unequal between ranks
CLIP_GRAD = 0.1  # small enough that the gradient is clipped
SPREAD = 0.05
"""Standard deviation added to initial weights, since equal norm weights would hide exchanged shards."""
MOMENTS = ("exp_avg", "exp_avg_sq")
Key = tuple[str, str]
"""(`gradient`, `weights`, `exp_avg` or `exp_avg_sq`; parameter's name in Megatron-Core's checkpoints)."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) in a flattened block, on a rank."""
    key: Key
    global_shape: tuple[int, ...]
    block: tuple[slice, ...]  # indices in the global tensor
    start: int
    values: torch.Tensor  # [stop - start] local elements


@contextlib.contextmanager
def use_float64() -> Iterator[None]:
    """Compute in float64 where Megatron-Core names float32."""
    torch.set_default_dtype(torch.float64)
    try:
        with (use_single_thread(), mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
              mock.patch.object(torch.Tensor, "float", torch.Tensor.double)):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class RankTrainer:
    """A rank's model, optimizer and data: `num_microbatches` a step over all replicas."""

    def __init__(self, model: SmallModel, layout: Layout, num_microbatches: int, full_masks: bool) -> None:
        self.model, self.layout, self.full_masks = model, layout, full_masks
        self.num_microbatches = num_microbatches // layout.replicas
        first, last = zip(*(
            (parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
             parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage))
            for stage in range(layout.vpp)), strict=True)
        inner, loss = model.build_chunks(layout, first, last)
        self.loss: Callable[..., Any] = loss or compute_masked_loss
        self.config: Any = inner[0].config
        self.sums: ModuleSums = observe_modules(inner)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer)
        self.chunks = [DistributedDataParallel(self.config, ddp, chunk) for chunk in inner]
        self.config.finalize_model_grads_func = finalize_model_grads
        dtypes = dict.fromkeys(("params_dtype", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype",
                                "exp_avg_sq_dtype"), torch.float64)
        self.optimizer = get_megatron_optimizer(OptimizerConfig(
            optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=CLIP_GRAD, **dtypes,
            use_distributed_optimizer=layout.distributed_optimizer), self.chunks,
            use_gloo_process_groups=False)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.blocks = [block for chunk in inner for block in _iter_blocks(chunk)]
        """(name, global shape, block of the global tensor, its live memory)."""

    def run_step(self, step: int) -> tuple[dict[str, float], list[Piece]]:
        """Run a training step (0-based); return name -> number, and copies of the tensors."""
        self.sums.begin_step(step + 1)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches: Any = [self._iter_batches(step) for _ in self.chunks]
        losses = get_forward_backward_func()(
            forward_step_func=self._run_forward, data_iterator=batches if self.layout.vpp > 1 else batches[0],
            model=self.chunks if self.layout.vpp > 1 else self.chunks[0],
            num_microbatches=self.num_microbatches, seq_length=self.model.row_tokens,
            micro_batch_size=MICRO_BATCH_SIZE, forward_only=False)
        numbers = reduce_losses(losses)
        pieces = self._list_pieces(lambda parameter, *_: {"gradient": parameter.main_grad.view(-1)})
        _, norm, _ = self.optimizer.step()
        numbers["gradient norm"] = float(norm)
        pieces += self._list_pieces(lambda _, main, inner: {
            name: inner.state[main][name].view(-1) for name in MOMENTS})
        pieces += [Piece(("weights", key), shape, block, 0, data.detach().reshape(-1).clone())
                   for key, shape, block, data in self.blocks]
        return numbers, pieces

    def _iter_batches(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield the replica's micro-batches, cut for context parallelism."""
        replica = parallel_state.get_data_parallel_rank()
        for i in range(self.num_microbatches):
            batch = draw_batch(step, replica * self.num_microbatches + i, self.model, self.full_masks)
            yield get_batch_on_this_cp_rank(batch, False, parallel_state.get_context_parallel_group())

    def _run_forward(self, batches: Iterator[dict[str, Any]], chunk: Any, *_: Any) -> tuple[Any, Any]:
        batch = next(batches)
        mask = batch["loss_mask"]
        losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask)
        return losses, partial(self.loss, mask)

    def _list_pieces(self, read: Callable[[Any, Any, Any], dict[str, torch.Tensor]]) -> list[Piece]:
        """Copy elements that the rank's optimizer updates, from tensors that `read` returns."""
        pieces = []
        blocks = [(block, block[3].data_ptr()) for block in self.blocks]
        for parameter, start, main, inner in _iter_updated(self.optimizer):
            base, size = parameter.data_ptr(), parameter.element_size()
            stop = start + main.numel()
            for (name, shape, block, data), pointer in blocks:
                first = (pointer - base) // size
                low, high = max(start, first), min(stop, first + data.numel())
                if not 0 <= first < parameter.numel() or low >= high:
                    continue
                assert data.is_contiguous(), f"{name}: its block is no contiguous part of the parameter"
                for kind, flat in read(parameter, main, inner).items():
                    shift = 0 if flat.numel() == parameter.numel() else start
                    pieces.append(Piece((kind, name), shape, block, low - first,
                                        flat[low - shift:high - shift].detach().clone()))
        return pieces


def compute_masked_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
    """Return (sum of learned tokens' losses, their number, values to report), as Megatron-LM's
    `pretrain_gpt.py`."""
    mask = loss_mask.view(-1).to(losses.dtype)
    total, count = (losses.view(-1) * mask).sum(), mask.sum()
    return total, count.detach().to(torch.int), {"lm loss": torch.stack([total.detach(), count])}


def reduce_losses(losses: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return the step's losses on the last stage, over micro-batches and replicas, as Megatron-LM does."""
    numbers = {}
    for name in losses[0] if losses else ():
        total = torch.stack([values[name].detach().view(-1).double() for values in losses]).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(
            with_context_parallel=True))
        numbers[name] = float(total[0] / total[1]) if total.numel() == 2 else float(total[0])
    return numbers


def draw_batch(step: int, index: int, model: SmallModel, full_masks: bool) -> dict[str, torch.Tensor]:
    """Draw micro-batch `index` of a step, equal on every rank and at every layout."""
    random = torch.Generator().manual_seed(step * 1_000_003 + index)
    shape = MICRO_BATCH_SIZE, model.row_tokens
    tokens = torch.randint(0, model.arguments["vocab_size"], (shape[0], shape[1] + 1), generator=random)
    learned = torch.rand(shape, generator=random) < (1 if full_masks else LEARNED_SHARE)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(),
            "loss_mask": learned.to(torch.float64),
            "position_ids": torch.arange(shape[1]).expand(shape).contiguous()}


def _iter_blocks(chunk: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Yield the parts of a chunk that `sharded_state_dict` declares for checkpoints."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    declared = chunk.sharded_state_dict(metadata=metadata)
    apply_factories(declared)
    for tensor in nested_values(declared):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None and tensor.data.is_floating_point():
            shape = (1,) * (len(tensor.global_shape) - tensor.data.dim()) + tuple(tensor.data.shape)
            block = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, shape, strict=True))
            yield tensor.key, tuple(tensor.global_shape), block, tensor.data


def _iter_updated(optimizer: Any) -> Iterator[tuple[Any, int, torch.Tensor, Any]]:
    """Yield (parameter, index of the first updated element, tensor that is updated, torch optimizer)."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        if isinstance(part, DistributedOptimizer):
            for parameters, mains in zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True):
                for parameter, main in zip(parameters, mains, strict=True):
                    yield (parameter, part._get_model_param_range_map(parameter)["param"].start, main,
                           part.optimizer)
        else:
            for group in part.optimizer.param_groups:
                yield from ((parameter, 0, parameter, part.optimizer) for parameter in group["params"])
