"""How a GPU's kernels, memory and messages are used: what changes no result beyond rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.bounds import MAX_STEPS, above
from megatron_sov.config.layout import ParallelConfig
from megatron_sov.config.model import STRICT, ModelConfig
from megatron_sov.config.optim import OptimConfig
from megatron_sov.config.train import TrainConfig

Switch = Literal["auto", "on", "off"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
OffloadModule = Literal["qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
OF_EXPERTS = ("layernorm", "moe", "moe_act", "shared_experts", "mlp_norm", "expert_fc1")
"""Modules that only layers with experts have.  Norms are among them: all others are a part of Transformer
Engine's linear layer behind them."""


@dataclass(frozen=True)
class GpuConfig:
    """How GPUs are used (docs/gpu.md): `auto` is on where the machine, the model and the layout can;
    `on` where they cannot is refused."""

    __pydantic_config__ = STRICT
    attention: Literal["auto", "fused", "flash", "unfused", "local"] = "auto"
    """Attention kernel: Transformer Engine's choice (auto), its cuDNN (fused), FlashAttention or plain torch
    (unfused) one, or this framework's own (local), which serves anyway under context parallelism,
    without Transformer Engine, and where products are capped (`model.attention_softcap`)."""
    rope_fusion: Switch = "auto"
    """Rotate queries and keys in one kernel."""
    router_fusion: Literal["on", "off"] = "off"
    """Choose experts in Transformer Engine's kernels, which compute in float32 and take a chosen score from
    its biased one, so that weights differ in their last bits."""
    permute_fusion: Switch = "auto"
    """Sort tokens by expert, and back, in one kernel."""
    swiglu_fusion: Switch = "auto"
    """Compute SwiGLU in one kernel."""
    grad_accumulation_fusion: Switch = "auto"
    """Add weight gradients to the accumulated ones inside the matrix product, not behind it."""
    recompute_modules: tuple[RecomputeModule, ...] = ()
    """What `train.recompute=selective` computes again in the backward pass: core_attn, layernorm (before
    experts), mlp (dense layers), moe (all of a layer with experts), moe_act (their activation),
    shared_experts."""
    offload_modules: tuple[OffloadModule, ...] = ()
    """Modules whose inputs wait in host memory between forward and backward pass."""
    shared_expert_overlap: Literal["on", "off"] = "off"
    """Compute shared experts while tokens travel to the routed ones."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which a bf16 model's gradients are accumulated and summed over processes; bf16 halves memory
    and messages, and rounds at each addition."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which a bf16 model's AdamW keeps its two moments between updates, under ZeRO-1; bf16 saves 4
    bytes of each weight that a process updates, and rounds at each update."""
    optimizer_offload: float = 0.0
    """Share of a bf16 model's AdamW that lies in host memory and is computed there, under ZeRO-1: master
    weights, moments and update; 0: none, 1: all of it.  Each weight of it frees 12 bytes of the GPU."""
    pad_buckets: Literal["on", "off"] = "off"
    """Make each bucket of ZeRO-1 a multiple of 65,536 elements over all processes together, a size that
    NCCL's rings are fast at."""
    nccl_user_buffers: Literal["on", "off"] = "off"
    """Keep gradients and parameters in memory that NCCL has registered, so that sums need fewer of the
    GPU's multiprocessors."""
    gc_every_steps: int = 0
    """Collect Python's garbage after every so many steps, on all processes at once, and never between;
    0: whenever Python wants to, which makes processes wait for one another."""
    profile_first_step: int = 0
    """First step of which process 0 writes a trace into RUN/profile; 0: none."""
    profile_last_step: int = 0
    """Last step of the trace."""
    peak_tflops: float = 0.0
    """Peak of one GPU in dense TFLOP/s that MFU is counted against; 0: the known one of the GPU in bf16,
    also where products are in 8 or 4 bits."""

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
                 optim: OptimConfig) -> list[str]:
        """Return one sentence for every rule of the library that these settings break, on any machine."""
        return [*self._recompute_problems(model, train), *self._offload_problems(model, train),
                *self._optimizer_problems(parallel, train, optim),
                *self._kernel_problems(model, parallel, train), *self._watching_problems()]

    def _recompute_problems(self, model: ModelConfig, train: TrainConfig) -> list[str]:
        """Tell which modules cannot be recomputed, and which are already."""
        chosen, p = self.recompute_modules, []
        if (train.recompute == "selective") != bool(chosen):
            p.append(f"gpu.recompute_modules = {list(chosen)} must name modules exactly when "
                     f"train.recompute = selective, and it is {train.recompute}; set both, e.g. "
                     'train.recompute=selective and gpu.recompute_modules=["layernorm"]')
        p += _missing_modules("recompute_modules", chosen, model)
        for part in ("moe_act", "shared_experts"):
            if "moe" in chosen and part in chosen:
                p.append(f"gpu.recompute_modules names moe and {part}, which is a part of moe; leave one out")
        if "shared_experts" in chosen and self.shared_expert_overlap == "on":
            p.append("gpu.recompute_modules names shared_experts, which gpu.shared_expert_overlap = on "
                     "cannot recompute; leave one of them out")
        if "mlp" in chosen and not model.has_dense_layers():
            p.append("gpu.recompute_modules names mlp, and the model has no dense layer; "
                     "leave it out, or name moe")
        return p

    def _offload_problems(self, model: ModelConfig, train: TrainConfig) -> list[str]:
        """Tell which activations cannot wait in host memory."""
        chosen = self.offload_modules
        p = _missing_modules("offload_modules", chosen, model)
        if chosen and train.recompute is True:
            p.append("gpu.offload_modules needs stored activations, and train.recompute = True stores none; "
                     "set train.recompute to selective or false, or leave gpu.offload_modules out")
        if "attn_proj" in chosen and "core_attn" not in chosen:
            p.append("gpu.offload_modules names attn_proj without core_attn, whose output is attn_proj's "
                     "input and stays for its own backward pass; name both")
        return p

    def _optimizer_problems(self, parallel: ParallelConfig, train: TrainConfig,
                            optim: OptimConfig) -> list[str]:
        """Tell which optimizers cannot keep their state elsewhere, or in other numbers."""
        p, share = [], self.optimizer_offload
        sharded = train.precision == "bf16" and parallel.zero1
        given = f"which are {train.precision} and {parallel.zero1}; set both, or leave it out"
        if self.moment_dtype == "bf16" and not sharded:
            p.append("gpu.moment_dtype = bf16 needs train.precision = bf16 and parallel.zero1 = True, "
                     f"{given}")
        if not 0 <= share <= 1:
            return [*p, f"gpu.optimizer_offload = {share} must be a share from 0 to 1"]
        if share and not sharded:
            p.append(f"gpu.optimizer_offload = {share} needs train.precision = bf16 and parallel.zero1 = "
                     f"True, {given}")
        if share and self.moment_dtype == "bf16":
            p.append(f"gpu.optimizer_offload = {share} keeps moments in float32, and gpu.moment_dtype = "
                     "bf16; leave one of them out")
        if share and "muon" in (optim.name, *(group.optimizer for group in optim.groups)):
            p.append(f"gpu.optimizer_offload = {share} is for AdamW, and the settings under optim name muon, "
                     "whose matrix products the host is too slow for; leave it out, or set adamw")
        return p

    def _kernel_problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> list[str]:
        """Tell which kernels and messages the model, the layout or the precision rule out."""
        experts, dispatcher = model.num_moe_layers() > 0, parallel.expert_dispatcher
        p = []
        if self.grad_dtype == "bf16" and train.precision != "bf16":
            p.append(f"gpu.grad_dtype = bf16 needs train.precision = bf16, which is {train.precision}; "
                     "leave it out")
        if self.permute_fusion == "on" and not experts:
            p.append("gpu.permute_fusion = on sorts tokens by expert, and model.num_experts = "
                     f"{model.num_experts}; leave it out")
        if self.rope_fusion == "on" and parallel.cp > 1:
            p.append(f"gpu.rope_fusion = on knows no rows that are cut as by parallel.cp = {parallel.cp}; "
                     "set gpu.rope_fusion to auto, or parallel.cp to 1")
        if parallel.cp > 1 and self.attention not in ("auto", "local"):
            p.append(f"gpu.attention = {self.attention}: under parallel.cp = {parallel.cp} this framework's "
                     "own attention serves; set gpu.attention to auto or local, or parallel.cp to 1")
        if self.shared_expert_overlap == "on":
            if not (experts and model.num_shared_experts):
                p.append("gpu.shared_expert_overlap = on needs a shared expert, and the model has none; "
                         "leave it out")
            if dispatcher != "alltoall":
                p.append("gpu.shared_expert_overlap = on needs parallel.expert_dispatcher = alltoall, "
                         f"which is {dispatcher}; set one of them otherwise")
        if dispatcher in ("deepep", "hybridep"):
            p += _flex_problems(dispatcher, parallel, train)
        if self.pad_buckets == "on" and not parallel.zero1:
            p.append("gpu.pad_buckets = on needs parallel.zero1 = True, whose buckets it pads; "
                     "set it, or leave gpu.pad_buckets out")
        return p

    def _watching_problems(self) -> list[str]:
        """Tell what is wrong with garbage collection, profiling and the peak."""
        first, last = self.profile_first_step, self.profile_last_step
        rules = [
            (self.gc_every_steps >= 0, f"gpu.gc_every_steps = {self.gc_every_steps} must not be negative"),
            (first == last == 0 or 0 < first <= last,
             f"gpu.profile_first_step = {first} and gpu.profile_last_step = {last} must be steps in order, "
             "both from 1 on, or both 0"),
            (0 <= self.peak_tflops < math.inf,
             f"gpu.peak_tflops = {self.peak_tflops} must be a number that is not negative"),
        ]
        return [sentence for holds, sentence in rules if not holds] + above(
            "gpu", self, gc_every_steps=MAX_STEPS, profile_first_step=MAX_STEPS, profile_last_step=MAX_STEPS)


AUTO = GpuConfig()
"""Everything as the machine can."""


def _missing_modules(setting: str, chosen: tuple[str, ...], model: ModelConfig) -> list[str]:
    """Tell which chosen modules the model has none of."""
    p = []
    if not model.num_moe_layers():
        p += [f"gpu.{setting} names {name}, and the model has no experts (model.num_experts = "
              f"{model.num_experts}); leave it out" for name in chosen if name in OF_EXPERTS]
    elif "shared_experts" in chosen and not model.num_shared_experts:
        p.append(f"gpu.{setting} names shared_experts, and model.num_shared_experts = 0; leave it out")
    return p


def _flex_problems(dispatcher: str, parallel: ParallelConfig, train: TrainConfig) -> list[str]:
    """Tell what DeepEP and HybridEP cannot carry."""
    p = []
    if parallel.ep * parallel.etp == 1:
        p.append(f"parallel.expert_dispatcher = {dispatcher} needs parallel.ep x parallel.etp > 1, and "
                 "nothing travels at 1; use alltoall")
    if train.precision != "bf16":
        p.append(f"parallel.expert_dispatcher = {dispatcher} carries bf16 alone, and train.precision = "
                 f"{train.precision}; use alltoall")
    return p
