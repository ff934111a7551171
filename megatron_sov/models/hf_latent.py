"""Config items of multi-head latent attention: its sizes, and YaRN as DeepSeek states it (see
`hf_config.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_sov.config import LatentAttentionConfig, ModelConfig
from megatron_sov.errors import UserError
from megatron_sov.models.hf_config import Rope
from megatron_sov.models.weights import latent_of

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentHeads:
    """Heads of latent attention.  Sizes are required: transformers has defaults for them, other programs do
    not."""

    names: tuple[str, ...] = (*_SIZES, "q_lora_rank", "num_key_value_heads", "head_dim", "qk_head_dim")
    null_tells: tuple[str, ...] = ("q_lora_rank",)
    """Null: there is none; where it is absent transformers takes 1536."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the sizes, and as many key/value heads as heads; `UserError` where there are none."""
        latent = latent_of(model)
        return {**{name: getattr(latent, name) for name in _SIZES}, "q_lora_rank": latent.q_lora_rank,
                "num_key_value_heads": model.num_kv_heads}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the sizes; `UserError` where one is missing, or a width is not what follows from them."""
        missing = [name for name in (*_SIZES, "q_lora_rank") if name not in config]
        if missing:
            raise UserError(f"config.json: lacks {', '.join(missing)}; add them (null for a q_lora_rank that "
                            "there is not)")
        sizes = {name: int(config[name]) for name in _SIZES}
        rank = config["q_lora_rank"]
        latent = LatentAttentionConfig(q_lora_rank=None if rank is None else int(rank), **sizes)
        heads = int(config.get("num_attention_heads", 0))
        # transformers calls what rotates a head's width
        for name, follows in (("num_key_value_heads", heads), ("head_dim", latent.qk_rope_head_dim),
                              ("qk_head_dim", latent.query_dim)):
            if config.get(name, follows) != follows:
                raise UserError(f"config.json: {name} = {config[name]}, but only {follows} is supported: it "
                                "follows from num_attention_heads, qk_nope_head_dim and qk_rope_head_dim")
        return {"latent_attention": latent, "num_kv_heads": heads, "head_dim": latent.query_dim}


@dataclass(frozen=True)
class LatentRope(Rope):
    """Rotary frequencies whose YaRN has its factor as `mscale` and `mscale_all_dim`: with both equal, cosine
    and sine have none, and the scale of the softmax has all of it."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return `rope_parameters` with both."""
        written = super().write(model)
        if model.yarn is not None:
            written["rope_parameters"] |= {"mscale": model.yarn.mscale, "mscale_all_dim": model.yarn.mscale}
        return written

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return theta and YaRN; `UserError` where the two factors differ, or stand beside other scalings,
        which transformers multiplies by them, too."""
        config, yarns = dict(config), 0
        factors: set[Any] = set()
        for name in ("rope_parameters", "rope_scaling"):
            if config.get(name):
                rope = config[name] = dict(config[name])
                if rope.get("rope_type", rope.get("type")) != "yarn":
                    continue
                yarns += 1
                factors |= {rope.pop(factor, None) for factor in ("mscale", "mscale_all_dim")}
                if rope.pop("attention_factor", None) not in (None, 1.0):
                    raise UserError("config.json: attention_factor: beside mscale and mscale_all_dim only "
                                    "1.0 is supported; leave it out")
        found = super().read(config)
        if not yarns:
            return found
        if len(factors) != 1 or not (mscale := factors.pop()):
            raise UserError("config.json: rope_type 'yarn' needs mscale and mscale_all_dim that are equal "
                            "and not 0: with others cosine and sine had a factor, which is not built for "
                            "latent attention")
        return found | {"yarn": replace(found["yarn"], mscale=float(mscale))}
