"""Low-rank adaptation: small trained matrices beside frozen ones (LoRA, arXiv 2106.09685; DoRA,
arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import MinLen

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, NotNegativeInt, SettingsProblem, find_broken, is_set)
from megatron_sov.model.config.gpu import GpuConfig
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.model import ModelConfig
from megatron_sov.model.config.train import OptimConfig, TrainConfig

ALL_LINEAR, EXPERTS, HEAD, EMBEDDING = "all-linear", "experts", "lm_head", "embed_tokens"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
Target = Literal["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "b_proj", "f_a_proj", "f_b_proj",
                 "g_a_proj", "g_b_proj", "g_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
                 "gate_proj", "up_proj", "down_proj", "experts", "lm_head", "embed_tokens"]
TARGETS: tuple[str, ...] = get_args(Target)
"""What `lora.targets` may name: modules as transformers calls them, and groups of them."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of a frozen model (docs/lora.md): W x becomes W x + alpha / rank B A x, and A and
    B alone are trained."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "alpha targets dora": is_set(".rank")}

    rank: NotNegativeInt = 0
    """Rows of A and columns of B; 0: off, all weights are trained."""
    alpha: AboveZero = 16.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[tuple[Target, ...], MinLen(1)] = ("all-linear",)
    """What is adapted: q_proj, k_proj, v_proj, o_proj; b_proj, f_a_proj, f_b_proj, g_a_proj, g_b_proj (of
    Kimi Delta Attention); g_proj (gates of Solar Open 2's attention); q_a_proj, q_b_proj,
    kv_a_proj_with_mqa, kv_b_proj (of latent attention); gate_proj, up_proj, down_proj (of dense layers and
    shared experts); experts (all routed ones, each with matrices of its own); lm_head; embed_tokens;
    all-linear: all of these that the model has, but lm_head and embed_tokens."""
    dora: bool = False
    """Also train the length of each row of the adapted matrices (DoRA), of routed experts, lm_head and
    embed_tokens excepted."""

    @property
    def on(self) -> bool:
        """Whether the model is frozen and adapters are trained."""
        return self.rank > 0

    def adapts_experts(self, model: ModelConfig) -> bool:
        """Return whether a model's routed experts have adapters."""
        return self.on and (EXPERTS in self.targets
                            or (ALL_LINEAR in self.targets and model.num_moe_layers() > 0))

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, optim: OptimConfig,
                 gpu: GpuConfig) -> list[SettingsProblem]:
        """Return every rule that these settings break."""
        if not self.on:
            return []
        with_experts = self.adapts_experts(model)
        adapted = {*self.targets, *((EXPERTS,) if with_experts else ())}
        one_sided = {HEAD: "the embedding", EMBEDDING: "the head"} if model.tied_embeddings else {}
        return find_broken(
            self, "lora",
            *((target not in self.targets, "targets", f"names {target}, which is {other} in this model "
               "(model.tied_embeddings), so that no weight could hold what is adapted on one side alone",
               "leave it out") for target, other in one_sided.items()),
            *((not self.dora or target not in adapted, "dora", f"is not built for {target}",
               "name lora.targets without it, or set lora.dora=false")
              for target in (EXPERTS, HEAD, EMBEDDING)),
            ("muon" not in (optim.name, *(group.optimizer for group in optim.groups)), "rank",
             "cannot be with optimizer muon, which orthogonalises whole matrices and has no meaning for "
             "their factors", "set optim.name=adamw"),
            (train.fp8 == "none", "rank", f"cannot be with train.fp8 = {train.fp8}, whose frozen products "
             "nobody has checked", "set train.fp8=none"),
            (not parallel.overlap_param_gather, "rank", "has next to nothing to gather, and cannot be with "
             "parallel.overlap_param_gather", "set it to false"),
            (gpu.shared_expert_overlap == "off", "rank", "cannot be with gpu.shared_expert_overlap = on, "
             "which computes shared experts in pieces", "set it to off"),
            (not gpu.cuda_graphs, "rank", "cannot be with gpu.cuda_graphs, which hand on gradients of a "
             "layer's own weights alone, and adapters are none of them", "leave gpu.cuda_graphs out"),
            (parallel.expert_overlap == "none" and not parallel.delay_weight_grads, "rank",
             "cannot be with parallel.expert_overlap, whose pieces of layers nobody has checked with frozen "
             "weights", "leave it out"),
            (EMBEDDING not in adapted or parallel.pp == 1 or not model.num_mtp_layers, "targets",
             "names embed_tokens, with which the first pipeline stage embeds and, for the prediction layer, "
             f"the last (parallel.pp = {parallel.pp})", "set parallel.pp=1 or leave it out"),
            # parts below the library's `min_offloaded_tensor_size` stay, and the whole's memory is freed
            (not (with_experts and "expert_fc1" in gpu.offload_modules), "targets",
             "adapts experts, each of which keeps its own part of the tokens, and gpu.offload_modules = "
             "expert_fc1 frees the memory of all", "leave expert_fc1 out"))
