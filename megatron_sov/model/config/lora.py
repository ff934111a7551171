"""LoRA settings (arXiv 2106.09685; DoRA: arXiv 2402.09353)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import MinLen

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, NotNegativeInt, SettingsProblem, find_broken_rules, is_set)
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
"""Values for `lora.targets`: transformers' module names, and groups of modules."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation for a frozen model (docs/sft.md): W x becomes W x + alpha / rank B A x, and only A
    and B are trained."""

    ACTS_WHEN: ClassVar[ActsWhen] = {"alpha targets dora": is_set(".rank")}

    rank: NotNegativeInt = 0
    """Rank for A and B. 0: LoRA is off and all weights are trained."""
    alpha: AboveZero = 16.0
    """Update scale: alpha / `rank`."""
    targets: Annotated[tuple[Target, ...], MinLen(1)] = ("all-linear",)
    """Adapted modules. Attention: q_proj, k_proj, v_proj, o_proj; Kimi Delta Attention: b_proj, f_a_proj,
    f_b_proj, g_a_proj, g_b_proj; Solar Open 2's output gate: g_proj; latent attention: q_a_proj, q_b_proj,
    kv_a_proj_with_mqa, kv_b_proj; dense layers and shared experts: gate_proj, up_proj, down_proj; experts:
    all routed experts, with separate matrices per expert; lm_head; embed_tokens; all-linear: every module
    except lm_head and embed_tokens."""
    dora: bool = False
    """Also train each row's magnitude in adapted matrices (DoRA); not available for routed experts, lm_head
    and embed_tokens."""

    @property
    def on(self) -> bool:
        """Whether the model is frozen and adapters are trained."""
        return self.rank > 0

    def adapts_experts(self, model: ModelConfig) -> bool:
        """Return whether `model`'s routed experts have adapters."""
        return self.on and (EXPERTS in self.targets
                            or (ALL_LINEAR in self.targets and model.num_moe_layers() > 0))

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, optim: OptimConfig,
                 gpu: GpuConfig) -> list[SettingsProblem]:
        """Return every violated rule between LoRA settings and the rest of the run."""
        if not self.on:
            return []
        with_experts = self.adapts_experts(model)
        adapted = {*self.targets, *((EXPERTS,) if with_experts else ())}
        tied = {HEAD: "the embedding", EMBEDDING: "the output head"} if model.tied_embeddings else {}
        return find_broken_rules(
            self, "lora",
            *((target not in self.targets, "targets", f"names {target}, which is also {other} in this model "
               "(model.tied_embeddings = true); an update of only one of them cannot be merged",
               "leave it out") for target, other in tied.items()),
            *((not self.dora or target not in adapted, "dora", f"does not support {target}",
               "leave it out of lora.targets, or set lora.dora=false")
              for target in (EXPERTS, HEAD, EMBEDDING)),
            ("muon" not in (optim.name, *(group.optimizer for group in optim.groups)), "rank",
             "cannot be used with optimizer muon, which orthogonalises whole matrices, not low-rank factors",
             "set optim.name=adamw"),
            (train.fp8 == "none", "rank", f"cannot be used with train.fp8 = {train.fp8}: frozen weights in "
             "8 bits are not tested", "set train.fp8=none"),
            (not parallel.overlap_param_gather, "rank", "cannot be used with parallel.overlap_param_gather: "
             "adapters are too small for it", "set it to false"),
            (gpu.shared_expert_overlap == "off", "rank", "cannot be used with gpu.shared_expert_overlap = "
             "on, which splits the computation of shared experts", "set it to off"),
            (not gpu.cuda_graphs, "rank", "cannot be used with gpu.cuda_graphs, which return gradients of a "
             "layer's own weights but not of adapters", "leave gpu.cuda_graphs out"),
            (parallel.expert_overlap == "none" and not parallel.delay_weight_grads, "rank",
             "cannot be used with parallel.expert_overlap or delay_weight_grads, which are not tested with "
             "frozen weights", "leave them out"),
            (EMBEDDING not in adapted or parallel.pp == 1 or not model.num_mtp_layers, "targets",
             "names embed_tokens, which the first and (for the prediction layer) the last pipeline stage "
             f"hold (parallel.pp = {parallel.pp})", "set parallel.pp=1 or leave it out"),
            # Tensors below `min_offloaded_tensor_size` stay on the GPU, yet Megatron-Core frees them.
            (not (with_experts and "expert_fc1" in gpu.offload_modules), "targets",
             "adapts experts, each with a separate view of the tokens, and gpu.offload_modules = expert_fc1 "
             "frees the memory of all tokens", "leave expert_fc1 out"))
