"""What matrix products in 8 or 4 bits ask of precision, model, layout and rows: the rules of Transformer
Engine 2.20 and megatron-core 0.16.1, told before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sov.config.data import PhaseConfig
from megatron_sov.config.layout import ParallelConfig
from megatron_sov.config.model import ModelConfig
from megatron_sov.config.train import TrainConfig
from megatron_sov.settings import Problem, find_broken


@dataclass(frozen=True)
class Recipe:
    """A way to scale the operands of matrix products, as `train.fp8` names it."""

    row_multiple: int
    """What the tokens of a row on each process must be a multiple of; each expert's are padded to it."""
    width_multiple: int
    """What both sizes of every quantised weight must be a multiple of, on each process."""
    auto_format: str
    """The 8-bit format where `train.fp8_format` is auto; "" where the recipe has its own."""


RECIPES = {
    # rows: `get_fp8_align_size` and `get_fp4_align_size` of megatron-core; widths: the leading dimension of
    # an FP8 product is a multiple of 16 (cublaslt_gemm.cu), whole MX blocks are 32 (quantizer.cpp), and
    # 16 bytes of FP4 are 32 values (fp4_utils.py)
    "tensorwise": Recipe(16, 16, "hybrid"),
    "blockwise": Recipe(16, 16, "e4m3"),
    "mxfp8": Recipe(32, 32, "e4m3"),
    "nvfp4": Recipe(128, 32, ""),
}
OWN_SETTINGS = ("fp8_format", "fp8_bf16_layers_at_start", "fp8_bf16_layers_at_end", "fp8_pad_routed_tokens")


def fp8_format(train: TrainConfig) -> str:
    """Return the library's name of the 8-bit format."""
    return RECIPES[train.fp8].auto_format if train.fp8_format == "auto" else train.fp8_format


def problems(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig,
             phases: Sequence[PhaseConfig]) -> list[Problem]:
    """Return every rule that `train.fp8` breaks with what it meets."""
    if train.fp8 == "none":
        defaults = TrainConfig()
        return find_broken(train, "train", *(
            (getattr(train, name) == getattr(defaults, name), name, "needs train.fp8, which is none",
             "set it or leave this out") for name in OWN_SETTINGS))
    if train.fp8 == "delayed":
        return find_broken(train, "train", (
            False, "fp8", "is not to be had: its scales follow from the largest values of earlier steps, "
            "which are in no checkpoint here, so that a resumed run would differ", "use tensorwise, which "
            "scales each tensor by its own largest value"))
    start, end = train.fp8_bf16_layers_at_start, train.fp8_bf16_layers_at_end
    pads = train.fp8_pad_routed_tokens
    p = find_broken(
        train, "train",
        (train.precision == "bf16", "fp8", f"needs train.precision = bf16, it is {train.precision}: what is "
         "not quantised stays in bf16"),
        (train.fp8 != "nvfp4" or train.fp8_format == "auto", "fp8_format", "belongs to the 8-bit recipes, "
         "and train.fp8 = nvfp4 has a format of its own (e2m1)", "leave it out"),
        (start + end < model.num_layers, "fp8_bf16_layers_at_start",
         f"and train.fp8_bf16_layers_at_end = {end} leave none of the {model.num_layers} layers to train.fp8 "
         f"= {train.fp8}", "lower one or set train.fp8=none"),
        (not pads or model.num_moe_layers() > 0, "fp8_pad_routed_tokens",
         "needs experts, and the model has none", "leave it out"),
        (not pads or parallel.expert_dispatcher != "allgather" or not model.num_moe_layers(),
         "fp8_pad_routed_tokens", "does not go with parallel.expert_dispatcher = allgather",
         "use alltoall or leave it out"))
    multiple = RECIPES[train.fp8].row_multiple
    parts = parallel.cp * (parallel.tp if parallel.sp else 1)
    shared = (f" / parallel.cp {parallel.cp}" if parallel.cp > 1 else "") + (
        f" / parallel.tp {parallel.tp} (parallel.sp)" if parallel.sp else "")
    for i, phase in enumerate(phases):
        tokens = phase.seq_len * train.micro_batch_size
        p += find_broken(phase, f"data.phases.{i}", (
            tokens % (parts * multiple) == 0, "seq_len", f"x train.micro_batch_size {train.micro_batch_size}"
            f"{shared} = {tokens / parts:g} tokens on each process, which train.fp8 = {train.fp8} wants to "
            f"be a multiple of {multiple}"))
    multiple, smaller = RECIPES[train.fp8].width_multiple, " or a smaller parallel.tp" * (parallel.tp > 1)
    return p + find_broken(train, "train", *(
        (width % multiple == 0, "fp8", f"needs a multiple of {multiple}, and {name} = {width:g}",
         f"choose another recipe{smaller}") for name, width in _widths(train, model, parallel)))


def _widths(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, float]]:
    """Return both sizes of every weight that is quantised, as each process holds it."""
    # under nvfp4 the library keeps the prediction layer in bf16
    predicts = bool(model.num_mtp_layers) and train.fp8 != "nvfp4"
    tp, cut = parallel.tp, f" / parallel.tp {parallel.tp}" if parallel.tp > 1 else ""
    shared = model.num_shared_experts * model.expert_ffn_dim if model.num_moe_layers() else 0
    widths = [("model.hidden_size", float(model.hidden_size)), *_attention_widths(model, tp, cut)]
    dense_prediction = predicts and not model.mtp_experts
    if (model.num_dense_layers > train.fp8_bf16_layers_at_start or not model.num_moe_layers()
            or dense_prediction):
        widths.append((f"model.dense_ffn_dim {model.dense_ffn_dim}{cut}", model.dense_ffn_dim / tp))
    if model.num_moe_layers():
        etp = f" / parallel.etp {parallel.etp}" if parallel.etp > 1 else ""
        widths.append((f"model.expert_ffn_dim {model.expert_ffn_dim}{etp}",
                       model.expert_ffn_dim / parallel.etp))
    if shared:
        widths.append((f"model.num_shared_experts {model.num_shared_experts} x model.expert_ffn_dim "
                       f"{model.expert_ffn_dim}{cut}", shared / tp))
    if predicts:
        widths.append((f"model.hidden_size {model.hidden_size}{cut}, of the prediction layer's projection,",
                       model.hidden_size / tp))
    return widths


def _attention_widths(model: ModelConfig, tp: int, cut: str) -> list[tuple[str, float]]:
    """Return the sizes of attention's weights, each with its name."""
    heads, kv_heads, head_dim, latent = (model.num_heads, model.num_kv_heads, model.head_dim,
                                         model.latent_attention)
    if latent is None:
        return [(f"(model.num_heads {heads} + 2 x model.num_kv_heads {kv_heads}) x model.head_dim "
                 f"{head_dim}{cut}", (heads + 2 * kv_heads) * head_dim / tp),
                (f"model.num_heads {heads} x model.head_dim {head_dim}{cut}", heads * head_dim / tp)]
    at = "model.latent_attention"
    whole = {"q_lora_rank": latent.q_lora_rank, "kv_lora_rank": latent.kv_lora_rank,
             "kv_lora_rank + qk_rope_head_dim": latent.cached_dim}
    by_head = {"head_dim": head_dim, "latent_attention.v_head_dim": latent.v_head_dim,
               "latent_attention.(qk_nope_head_dim + v_head_dim)":
                   latent.qk_nope_head_dim + latent.v_head_dim}
    return [*((f"{at}.{name}", size) for name, size in whole.items() if size),
            *((f"model.num_heads {heads} x model.{name} {size}{cut}", heads * size / tp)
              for name, size in by_head.items())]
