"""A process's optimizer: data-parallel wrapper, gradient clipping, AdamW and Muon, and state as shards."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import megatron.core.optimizer as library_optimizer
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_sov.engine.model import quantized_weights
from megatron_sov.engine.model.gpu_settings import moment_settings
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard
from megatron_sov.engine.optimizer import parameter_groups, state_shards
from megatron_sov.engine.optimizer.adamw import CpuAdamW
from megatron_sov.engine.parallel.device import get_local_device, on_gpu
from megatron_sov.model.config import GpuConfig, OptimConfig, ParallelConfig
from megatron_sov.model.config.gpu import DEFAULT_GPU

NOT_SHARDED = ParallelConfig()
"""Layout without ZeRO-1: every process updates all of its parameters."""
NORM_ELEMENTS = 1 << 16
"""Elements of a CPU gradient per norm computation: the float64 copy of a part that fits in the cache takes a
third of the time."""


class Optimizer:
    """Sums of gradients over data-parallel processes, and AdamW or Muon, for one model."""

    def __init__(self, model: LanguageModel, config: OptimConfig,
                 parallel: ParallelConfig = NOT_SHARDED, gpu: GpuConfig = DEFAULT_GPU) -> None:
        self.model = model
        rules = parameter_groups.build_rules(model, config)
        parameter_groups.freeze_parameters(model, rules)
        # freeze first: the wrapper creates gradient buffers for trainable parameters only
        self.wrapped = parameter_groups.wrap_chunks(model, parallel, gpu)
        self._shares_gradients = quantized_weights.shares_gradient_memory(model.config)
        self._gather = model.pending_gather = self._deferred_gather()
        settings = OptimizerConfig(
            optimizer="adam", lr=config.lr, weight_decay=config.weight_decay, adam_beta1=config.beta1,
            adam_beta2=config.beta2, adam_eps=config.eps, bf16=model.config.bf16,
            params_dtype=model.config.params_dtype, use_distributed_optimizer=parallel.zero1,
            overlap_param_gather=parallel.overlap_param_gather,
            **{**moment_settings(gpu), **quantized_weights.optimizer_settings(model.config)})
        with (state_shards.allow_float64(), _select_adamw(model.config.params_dtype),
              warnings.catch_warnings()):
            # warning from an unused model class that Megatron-Core imports
            warnings.filterwarnings("ignore", "MimoModelConfig is experimental")
            # gloo groups are needed only for Megatron-Core's own checkpoints
            self.megatron_optimizer = get_megatron_optimizer(settings, self.wrapped,
                                                             use_gloo_process_groups=False)
        self.shards = parameter_groups.assign_shards(self.megatron_optimizer, model, rules, config,
                                                     zero1=parallel.zero1,
                                                     on_host=gpu.optimizer_offload)
        """Shards that this process updates."""
        self._shard_by_parameter = {id(shard.parameter): shard for shard in self.shards}
        if model.fp8_placeholders:
            model.iter_masters, model.quantize_masters = self._iter_masters, self._quantize_masters
            model.requantize_weights()
        self._clip_grad = config.clip_grad
        self.num_updates = 0
        """Number of updates so far, for AdamW's bias correction."""

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.megatron_optimizer.zero_grad()
        # with shared buffers, the next forward pass gathers from gradient memory, once per update
        if self._shares_gradients and self._gather is not None and not parameter_groups.has_gathered(
                self.wrapped):
            quantized_weights.fill_gather_buffers(self.megatron_optimizer.chained_optimizers)

    def step(self, lr: float, accept: Callable[[float], bool] = lambda grad_norm: True) -> float:
        """Clip gradients, update with learning rate `lr`, and return the global gradient norm before
        clipping.

        Args:
            accept: called with the norm; must return the same on every process. False: no update.
        """
        for group in self.megatron_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        state_shards.assign_gradients(self.shards)
        grad_norm = self._compute_grad_norm()
        if not accept(grad_norm):
            return grad_norm
        # clip after `accept`: a rejected step keeps gradients and weights for diagnosis
        self._clip_gradients(grad_norm)
        self._update_weights()
        # with a deferred gather, readers of the model fetch the other processes' updates first
        self.model.pending_gather = self._gather
        self.num_updates += 1
        return grad_norm

    def _update_weights(self) -> None:
        """Update the masters, then gather the weights unless `_deferred_gather` postpones the gather.

        If gradients share memory with the gather, the gather of the first optimizer would overwrite the
        gradients of the second (experts), so all updates come first."""
        if not self._shares_gradients:
            self.megatron_optimizer.step_with_ready_grads()
            return
        for optimizer in self.megatron_optimizer.chained_optimizers:
            if optimizer.optimizer is not None:
                optimizer.optimizer.step()
        if self._gather is None:
            self._gather_masters()

    def _deferred_gather(self) -> Callable[[], None] | None:
        """Return the function that gathers updated weights, or None if every step gathers."""
        if not self.wrapped[0].ddp_config.overlap_param_gather:
            return None
        if self._shares_gradients:
            return self._gather_masters
        return partial(parameter_groups.gather_parameters, self.wrapped)

    def _gather_masters(self) -> None:
        quantized_weights.fill_gather_buffers(self.megatron_optimizer.chained_optimizers)
        parameter_groups.gather_parameters(self.wrapped)

    def _iter_masters(self, block: LocalShard, parameter: torch.nn.Parameter | None) -> Iterator[LocalShard]:
        """Yield the local master blocks of a block of an FP8 weight."""
        shard = self._shard_by_parameter.get(id(parameter))
        if shard is not None:
            yield from state_shards.iter_pieces(block, shard, shard.main.detach().view(-1))

    @torch.no_grad()
    def _quantize_masters(self) -> None:
        """Quantize FP8 weights from the masters on every process (`quantized_weights`). Collective."""
        quantized_weights.quantize_local_ranges(self.megatron_optimizer.chained_optimizers)
        parameter_groups.gather_parameters(self.wrapped)

    @torch.no_grad()
    def _compute_grad_norm(self) -> float:
        """Return the global gradient norm, each parameter counted once, summed in float64. Collective.

        Megatron-Core sums squares in float32, where the result depends on the layout for many parameters."""
        total = torch.zeros((), dtype=torch.float64, device=get_local_device())
        for optimizer in self.megatron_optimizer.chained_optimizers:
            parts: list[torch.Tensor] = []
            for gradient in optimizer.get_grads_for_grad_norm():
                parts += gradient.view(-1).split(NORM_ELEMENTS) if gradient.is_cpu else [gradient]
            norms = torch._foreach_norm(parts, dtype=torch.float64) if parts else [torch.zeros_like(total)]
            norms = [norm.to(total.device) for norm in norms]  # some gradients are in host memory
            squares = torch.stack(norms).square().sum()
            torch.distributed.all_reduce(squares, group=optimizer.get_grad_stats_parallel_group())
            total += squares
        return math.sqrt(total.item())

    @torch.no_grad()
    def _clip_gradients(self, grad_norm: float) -> None:
        """Scale all gradients to a norm of at most `clip_grad` (1e-6 as in torch's clip_grad_norm_)."""
        if 0 < self._clip_grad < grad_norm + 1e-6:
            for optimizer in self.megatron_optimizer.chained_optimizers:
                gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
                if gradients:  # empty if all parameters of a stage are frozen
                    torch._foreach_mul_(gradients, self._clip_grad / (grad_norm + 1e-6))

    def sync_master_weights(self) -> None:
        """Update the float32 masters from loaded weights; masters of FP8 weights were loaded directly."""
        if not self.model.fp8_placeholders:
            self.megatron_optimizer.reload_model_params()
            return
        with torch.no_grad():
            for shard in self.shards:
                if id(shard.parameter) not in self.model.fp8_placeholders:
                    weights = shard.parameter.detach().view(-1)[shard.start:shard.stop]
                    shard.main.copy_(weights.view(shard.main.shape))

    def state_shards(self) -> Iterator[LocalShard]:
        """Yield moments, momentum and (under bf16) master weights, named `exp_avg/KEY` and so on.

        Names and shapes are equal at every layout, with and without ZeRO-1."""
        return state_shards.iter_state_shards(self.model, self.shards)

    def restore_updates(self, num_updates: int) -> None:
        """Set the number of updates that the restored moments include."""
        self.num_updates = num_updates
        state_shards.set_update_count(self.shards, num_updates)


@contextlib.contextmanager
def _select_adamw(dtype: torch.dtype) -> Iterator[None]:
    """Make Megatron-Core create `CpuAdamW` on CPUs and torch's AdamW on GPUs, unless Transformer Engine's
    optimizer is available and supports `dtype` (not float64)."""
    previous = library_optimizer.Adam, library_optimizer.USING_PYTORCH_OPTIMIZER
    if not library_optimizer.USING_PYTORCH_OPTIMIZER and dtype != torch.float64:
        yield
        return
    optimizer_class = torch.optim.AdamW if on_gpu() else CpuAdamW
    # with the flag at True Megatron-Core would ignore this attribute
    library_optimizer.Adam = lambda adam_w_mode, **settings: optimizer_class(**settings)
    library_optimizer.USING_PYTORCH_OPTIMIZER = False
    try:
        yield
    finally:
        library_optimizer.Adam, library_optimizer.USING_PYTORCH_OPTIMIZER = previous
