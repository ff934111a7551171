# What: Mistral 7B, Nemo and other models of type `mistral`: Llama's decoder, possibly with sliding windows.
# Run:  megatron-sov convert from-hf mistral-7b mistral-ckpt --plugin examples/families/mistral.py:MISTRAL
# See:  a checkpoint for `sft --from mistral-ckpt`; `convert to-hf` takes the same --plugin.

from dataclasses import dataclass

from megatron_sov import Family
from megatron_sov.base.errors import UserError
from megatron_sov.model.families.family import DECODER_CONFIG, KV_HEADS
from megatron_sov.model.families.hf_config import Renamed, Rope, hidden_over_heads
from megatron_sov.model.families.weights import ATTENTION, DENSE_FFN, EMBEDDINGS_AND_HEAD, trunk_section


@dataclass(frozen=True)
class OneWindow:
    """Sliding window of all layers, or no window: `sliding_window`."""

    default: int = 0
    """Window in tokens if config.json lacks `sliding_window`, as in transformers; null means no window."""
    names: tuple[str, ...] = ("sliding_window",)
    """Fields of config.json that this item reads and writes."""
    null_tells: tuple[str, ...] = ("sliding_window",)
    """Fields in which null has a meaning of its own; elsewhere null is a missing field."""

    def write(self, model):
        """Return the window, or null; raise `UserError` if layers differ."""
        if len(set(model.layer_types())) > 1:
            raise UserError(f"model.attention_pattern = {model.attention_pattern!r}: in family "
                            f"'{model.family}' either every layer slides or none does; use 'L' or 'G'")
        return {"sliding_window": model.sliding_window_tokens or None}

    def read(self, config):
        window = config.get("sliding_window", self.default) or 0
        return {"attention_pattern": "L" if window else "G", "sliding_window_tokens": window}


MISTRAL = Family(
    name="mistral",
    hf_classes=("MistralForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION, DENSE_FFN)),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads), Rope(default_theta=10_000.0),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        OneWindow(default=4096)),
    structure={"rope_on_global": True, "num_mtp_layers": 0, "num_experts": 0, "num_dense_layers": 0,
               "qkv_bias": False, "qk_norm": False},
)
