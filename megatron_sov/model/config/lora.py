"""Low-rank adaptation: small trained matrices beside frozen ones (LoRA, arXiv 2106.09685; DoRA,
arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from annotated_types import MinLen

from megatron_sov.base.settings import AboveZero, NotNegativeInt, SettingsProblem, find_broken
from megatron_sov.model.config.gpu import GpuConfig
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.model import ModelConfig
from megatron_sov.model.config.train import OptimConfig, TrainConfig

ALL_LINEAR, EXPERTS, HEAD, EMBEDDING = "all-linear", "experts", "lm_head", "embed_tokens"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DELTA_NET = ("in_proj_qkvz", "in_proj_ba", "out_proj")
SPLIT_DELTA_NET = ("in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
"""Of a family whose folders have four matrices in the place of two (Qwen3.5).  The fourth, `in_proj_qkv`, has
three runs of all heads, which a tensor-parallel process could not cut: it stays frozen."""
KIMI_DELTA = (*ATTENTION, "b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj")
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
QUERIES_OF_A_LATENT = ("q_a_proj", "q_b_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
Target = Literal["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba",
                 "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "b_proj", "f_a_proj", "f_b_proj",
                 "g_a_proj", "g_b_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
                 "gate_proj", "up_proj", "down_proj", "experts", "lm_head", "embed_tokens"]
TARGETS: tuple[str, ...] = get_args(Target)
"""What `lora.targets` may name: modules as transformers calls them, and groups of them."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of a frozen model (docs/lora.md): W x becomes W x + alpha / rank B A x, and A and
    B alone are trained."""

    rank: NotNegativeInt = 0
    """Rows of A and columns of B; 0: off, all weights are trained."""
    alpha: AboveZero = 16.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[tuple[Target, ...], MinLen(1)] = ("all-linear",)
    """What is adapted: q_proj, k_proj, v_proj, o_proj; in_proj_qkvz, in_proj_ba, out_proj (of a gated delta
    net); in_proj_z, in_proj_b, in_proj_a, out_proj (of Qwen3.5's); b_proj, f_a_proj, f_b_proj, g_a_proj,
    g_b_proj (of Kimi Delta Attention); q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj (of latent
    attention); gate_proj, up_proj, down_proj (of dense layers and shared experts); experts (all routed ones,
    each with matrices of its own); lm_head; embed_tokens; all-linear: all of these that the model has, but
    lm_head and embed_tokens."""
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
        # Heads and embeddings are never among `all-linear`, as in PEFT.
        every = {*_of_attention(model), *(FEED_FORWARD if _has_feed_forward(model) else ()),
                 *((EXPERTS,) if model.num_moe_layers() else ())}
        return frozenset(self.targets) - {ALL_LINEAR} | (every if ALL_LINEAR in self.targets else set())

    def identity(self, model: ModelConfig) -> dict[str, Any]:
        """Return what makes an adapter of a model another one than that of other settings, by the setting's
        name: what is adapted in the place of how that is spelled; without adapters `rank` alone."""
        if not self.on:
            return {"rank": 0}
        return asdict(self) | {"targets": sorted(self.adapted(model))}

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, optim: OptimConfig,
                 gpu: GpuConfig) -> list[SettingsProblem]:
        """Return every rule that these settings break."""
        if not self.on:
            return []
        adapted, with_experts = self.adapted(model), EXPERTS in self.adapted(model)
        missing = {*(() if _has_feed_forward(model) else FEED_FORWARD),
                   *(_OF_ATTENTION - _of_attention(model)),
                   *(() if model.num_moe_layers() else (EXPERTS,))} & {*self.targets}
        one_sided = {HEAD: "the embedding", EMBEDDING: "the head"} if model.tied_embeddings else {}
        return find_broken(
            self, "lora",
            *((False, "targets", f"names {target}, which this model lacks", "leave it out")
              for target in sorted(missing)),
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
            (not (with_experts and model.linear_bias), "targets",
             "adapts experts, which is not built for experts with biases (model.linear_bias): Hugging Face "
             "folders hold their gate and up projections in turns",
             f"name some of {', '.join((*ATTENTION, HEAD, EMBEDDING))}"),
            # parts below the library's `min_offloaded_tensor_size` stay, and the whole's memory is freed
            (not (with_experts and "expert_fc1" in gpu.offload_modules), "targets",
             "adapts experts, each of which keeps its own part of the tokens, and gpu.offload_modules = "
             "expert_fc1 frees the memory of all", "leave expert_fc1 out"))


_OF_ATTENTION = frozenset((*DELTA_NET, *SPLIT_DELTA_NET, *KIMI_DELTA, *LATENT, *QUERIES_OF_A_LATENT))


def _of_attention(model: ModelConfig) -> frozenset[str]:
    """Return the linear layers of a model's attention, of every kind that it has."""
    linear, found = model.linear_attention, {*ATTENTION}
    if model.latent_attention is not None:
        found = {*LATENT, *(QUERIES_OF_A_LATENT if model.has_query_latent else ("q_proj",))}
    if linear is not None:
        delta_net = SPLIT_DELTA_NET if model.family == "qwen3_5_moe_text" else DELTA_NET
        found |= {*(delta_net if linear.gate_rank is None else KIMI_DELTA)}
    return frozenset(found)


def _has_feed_forward(model: ModelConfig) -> bool:
    """Return whether a trunk layer has a dense feed-forward block, or shared experts."""
    return model.num_moe_layers() < model.num_layers or model.num_shared_experts > 0
