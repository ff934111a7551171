"""Low-rank adaptation: small trained matrices beside frozen ones (LoRA, arXiv 2106.09685; DoRA,
arXiv 2402.09353)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sov.config.gpu import GpuConfig
from megatron_sov.config.layout import ParallelConfig
from megatron_sov.config.model import STRICT, ModelConfig
from megatron_sov.config.optim import OptimConfig
from megatron_sov.config.train import TrainConfig

ALL_LINEAR, EXPERTS, HEAD, EMBEDDING = "all-linear", "experts", "lm_head", "embed_tokens"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
TARGETS = (ALL_LINEAR, *ATTENTION, *FEED_FORWARD, EXPERTS, HEAD, EMBEDDING)
"""What `lora.targets` may name: modules as transformers calls them, and groups of them."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of a frozen model (docs/lora.md): W x becomes W x + alpha / rank B A x, and A and
    B alone are trained."""

    __pydantic_config__ = STRICT
    rank: int = 0
    """Rows of A and columns of B; 0: off, all weights are trained."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """What is adapted: q_proj, k_proj, v_proj, o_proj; gate_proj, up_proj, down_proj (of dense layers and
    shared experts); experts (all routed ones, each with matrices of its own); lm_head; embed_tokens;
    all-linear: all of these that the model has, but lm_head and embed_tokens."""
    dora: bool = False
    """Also train the length of each row of the adapted matrices (DoRA), of routed experts, lm_head and
    embed_tokens excepted."""

    @property
    def on(self) -> bool:
        """Whether the model is frozen and adapters are trained."""
        return self.rank > 0

    def adapted(self, model: ModelConfig) -> frozenset[str]:
        """Return what is adapted in a model, with `all-linear` spelled out."""
        if not self.on:
            return frozenset()
        every = {*ATTENTION, *(FEED_FORWARD if _has_feed_forward(model) else ()),
                 *((EXPERTS,) if model.num_moe_layers() else ())}
        return frozenset(self.targets) - {ALL_LINEAR} | (every if ALL_LINEAR in self.targets else set())

    def identity(self, model: ModelConfig) -> dict[str, Any]:
        """Return what makes an adapter of a model another one than that of other settings, by the setting's
        name: what is adapted in the place of how that is spelled; without adapters `rank` alone."""
        if not self.on:
            return {"rank": 0}
        return asdict(self) | {"targets": sorted(self.adapted(model))}

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, optim: OptimConfig,
                 gpu: GpuConfig) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        if self.rank < 0:
            return [f"lora.rank = {self.rank} must be 0 (off) or positive"]
        if not self.on:
            return []
        p = self._own_problems(model)
        if optim.name == "muon" or any(group.optimizer == "muon" for group in optim.groups):
            p.append("lora.rank > 0 cannot be with optimizer muon, which orthogonalises whole matrices and "
                     "has no meaning for their factors; set optim.name=adamw")
        if train.fp8 != "none":
            p.append(f"lora.rank > 0 cannot be with train.fp8 = {train.fp8}, whose frozen products nobody "
                     "has checked; set train.fp8=none")
        if parallel.overlap_param_gather:
            p.append("lora.rank > 0 has next to nothing to gather, and cannot be with "
                     "parallel.overlap_param_gather; set it to false")
        if gpu.shared_expert_overlap == "on":
            p.append("lora.rank > 0 cannot be with gpu.shared_expert_overlap = on, which computes shared "
                     "experts in pieces; set it to off")
        if EMBEDDING in self.adapted(model) and parallel.pp > 1 and model.num_mtp_layers:
            p.append("lora.targets names embed_tokens, with which the first pipeline stage embeds and, for "
                     f"the prediction layer, the last (parallel.pp = {parallel.pp}); set parallel.pp=1 or "
                     "leave it out")
        if EXPERTS in self.adapted(model) and model.linear_bias:
            p.append("lora.targets adapts experts, which is not built for experts with biases "
                     "(model.linear_bias): Hugging Face folders hold their gate and up projections in turns; "
                     f"name some of {', '.join((*ATTENTION, HEAD, EMBEDDING))}")
        if EXPERTS in self.adapted(model) and "expert_fc1" in gpu.offload_modules:
            # parts below the library's `min_offloaded_tensor_size` stay, and the whole's memory is freed
            p.append("lora.targets adapts experts, each of which keeps its own part of the tokens, and "
                     "gpu.offload_modules = expert_fc1 frees the memory of all; leave expert_fc1 out")
        return p

    def _own_problems(self, model: ModelConfig) -> list[str]:
        p = []
        if not 0 < self.alpha < math.inf:
            p.append(f"lora.alpha = {self.alpha} must be a positive number")
        if not self.targets:
            p.append(f"lora.targets names nothing to adapt; name some of {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                p.append(f"lora.targets names {target!r}, which is none of {', '.join(TARGETS)}")
        adapted = [name for name in ATTENTION if name in self.adapted(model)]
        if model.latent_attention is not None and adapted:
            p.append(f"lora.targets adapts {', '.join(adapted)}, and adapters of latent attention are not "
                     f"built; name others of {', '.join((*FEED_FORWARD, EXPERTS, HEAD, EMBEDDING))}")
        missing = {*(() if _has_feed_forward(model) else FEED_FORWARD),
                   *(() if model.num_moe_layers() else (EXPERTS,))}
        p += [f"lora.targets names {target}, which this model lacks; leave it out"
              for target in self.targets if target in missing]
        if model.tied_embeddings:
            p += [f"lora.targets names {target}, which is {other} in this model (model.tied_embeddings), so "
                  "that no weight could hold what is adapted on one side alone; leave it out"
                  for target, other in ((HEAD, "the embedding"), (EMBEDDING, "the head"))
                  if target in self.targets]
        for target in (EXPERTS, HEAD, EMBEDDING):
            if self.dora and target in self.adapted(model):
                p.append(f"lora.dora = True is not built for {target}; name lora.targets without it, or set "
                         "lora.dora=false")
        return p


def _has_feed_forward(model: ModelConfig) -> bool:
    """Return whether a trunk layer has a dense feed-forward block, or shared experts."""
    return model.num_moe_layers() < model.num_layers or model.num_shared_experts > 0
