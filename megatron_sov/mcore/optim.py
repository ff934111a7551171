"""Gradients and optimizer: the library's data-parallel wrapper and AdamW, and their state as named global tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_sov.config import OptimConfig
from megatron_sov.mcore import cpu
from megatron_sov.mcore.blocks import Block, ParameterLookup, like, of
from megatron_sov.mcore.model import LanguageModel

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


class Optimizer:
    """Data-parallel gradients plus AdamW over one model; gradients are plain sums of what the losses give."""

    def __init__(self, model: LanguageModel, config: OptimConfig) -> None:
        self.model = model
        # bf16 gradients are accumulated and reduced in fp32, fp64 ones as they are
        reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=model.config.params_dtype != torch.float64)
        self.wrapped = [DistributedDataParallel(model.config, reduction, chunk) for chunk in model.chunks]
        self.library = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=config.lr, weight_decay=config.weight_decay, adam_beta1=config.beta1,
                adam_beta2=config.beta2, adam_eps=config.eps, bf16=model.config.bf16,
                params_dtype=model.config.params_dtype),
            self.wrapped)
        for group in self.library.param_groups:  # the library marks norms, and leaves it to a scheduler to heed the mark
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        self._clip_grad = config.clip_grad
        self.num_updates = 0
        """Updates so far; AdamW's bias correction counts them."""

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.library.zero_grad()

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, and return the global gradient norm before clipping."""
        for group in self.library.param_groups:
            group["lr"] = lr
        self.library.prepare_grads()
        grad_norm = self._grad_norm()
        self._clip(grad_norm)
        self.library.step_with_ready_grads()
        self.num_updates += 1
        return grad_norm

    @torch.no_grad()
    def _grad_norm(self) -> float:
        """Return the norm of all gradients of all processes, each parameter counted once, summed in float64.

        The library sums squares in float32, where the norm of many parameters depends on how they are split.
        """
        total = torch.zeros((), dtype=torch.float64, device=cpu.device())
        for optimizer in self._chain():
            norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in optimizer.get_main_grads_for_grad_norm()]
            squares = torch.stack(norms).square().sum() if norms else torch.zeros_like(total)
            torch.distributed.all_reduce(squares, group=optimizer.get_grad_stats_parallel_group())
            total += squares
        return math.sqrt(total.item())

    @torch.no_grad()
    def _clip(self, grad_norm: float) -> None:
        """Scale all gradients so that their norm is at most `clip_grad` (the divisor's 1e-6 as torch's clip_grad_norm_)."""
        if 0 < self._clip_grad < grad_norm + 1e-6:
            for optimizer in self._chain():
                gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, self._clip_grad / (grad_norm + 1e-6))

    def adopt_model(self) -> None:
        """Renew the fp32 master weights after weights were loaded into the model."""
        self.library.reload_model_params()

    def state_blocks(self) -> Iterator[Block]:
        """Yield the moments (and, under bf16, master weights) of this process, named `exp_avg/KEY` and so on."""
        states = {id(model_param): (main, inner) for main, model_param, inner in self._parameters()}
        lookup = ParameterLookup([p for p in self.model.parameters() if id(p) in states])
        for block in of(self.model):
            parameter = lookup.find(block)
            if parameter is None:
                continue
            main, inner = states[id(parameter)]
            state = self._moments(main, inner)
            named = {name: state[name] for name in MOMENTS}
            if main is not parameter:
                named[MASTER] = main
            for name, tensor in named.items():
                view = like(block, parameter, tensor.detach())
                yield Block(f"{name}/{block.key}", view, block.global_shape, block.offset, block.owned)

    def restore_updates(self, num_updates: int) -> None:
        """Set the number of updates that the restored moments have seen."""
        self.num_updates = num_updates
        for main, _, inner in self._parameters():
            state = self._moments(main, inner)
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(float(num_updates))
        for optimizer in self._chain():
            for group in optimizer.optimizer.param_groups:
                if "step" in group:  # fused Adam keeps one count per group
                    group["step"] = num_updates

    def _chain(self) -> list[Any]:
        return list(getattr(self.library, "chained_optimizers", [self.library]))

    def _parameters(self) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter, Any]]:
        """Yield (parameter that is updated, the model's parameter, torch optimizer); the first two differ under bf16."""
        for optimizer in self._chain():
            inner = optimizer.optimizer
            if inner is None:
                continue
            model_param_of = {}
            low_groups, high_groups = getattr(optimizer, "float16_groups", []), getattr(optimizer, "fp32_from_float16_groups", [])
            for low, high in zip(low_groups, high_groups, strict=True):
                model_param_of.update({id(main): model for model, main in zip(low, high, strict=True)})
            for group in inner.param_groups:
                for main in group["params"]:
                    yield main, model_param_of.get(id(main), main), inner

    @staticmethod
    def _moments(main: torch.Tensor, inner: Any) -> dict[str, torch.Tensor]:
        """Return the state of one parameter, created empty before the first update."""
        state = inner.state[main]
        if not state:
            if "step" not in inner.param_groups[0]:
                state["step"] = torch.tensor(0.0)
            for name in MOMENTS:
                state[name] = torch.zeros_like(main, memory_format=torch.preserve_format)
        return state
