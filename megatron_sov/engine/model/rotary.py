"""Rotary positions: frequencies in float64 (the library's are float32, whatever the dtype of the model),
YaRN's factor, and rotations that ask the device nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_sov.engine.parallel.device import CPU
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.config.model import Llama3RopeConfig


def frequencies(model: ModelConfig) -> torch.Tensor:
    """Return the angle per position of each rotated pair of channels, [pairs] float64.

    RoPE (Su et al., arXiv 2104.09864, sec. 3.2.2) and, where the model has it, YaRN's "NTK-by-parts" (Peng et
    al., arXiv 2309.00071, eq. 17-22), its ramp's ends rounded outwards to whole channels as
    transformers does, Llama 3.1's scaling (`apply_scaling` of Meta's llama-models), or positions divided by
    a factor (arXiv 2306.15595).
    """
    dim = model.rotated_channels()
    base = model.rope_theta
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if model.llama3_rope is not None:
        return _llama3(plain, model.llama3_rope)
    if model.linear_rope_factor is not None:
        return plain / model.linear_rope_factor
    if model.yarn is None:
        return plain
    yarn = model.yarn

    def channel(rotations: float) -> float:
        """Channel pair that turns `rotations` times over the original context."""
        return (dim * math.log(yarn.original_max_position_tokens / (rotations * 2 * math.pi))
                / (2 * math.log(base)))

    low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    # 1: wavelengths beyond the original context, which are divided by the factor; 0: short ones, which stay
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * (1 - interpolated) + plain / yarn.factor * interpolated


def _llama3(plain: torch.Tensor, scaling: Llama3RopeConfig) -> torch.Tensor:
    """Return the frequencies with long wavelengths divided, short ones kept, and a line between the two."""
    rotations = plain * scaling.original_max_position_tokens / (2 * math.pi)  # over the original context
    # 1 keeps a frequency (it turns often inside the original context), 0 divides it
    kept = ((rotations - scaling.low_freq_factor)
            / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def rotate_by(embedding: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Have the library's rotary embedding turn by `frequencies`: in float64 for models in float64, whose
    angles it would round, and in its own float32 for scalings that it does not have with these numbers.

    Where no layer rotates its table has a line for each place of a row, but no channels: of 1M places it
    would have half a GiB."""
    if not model.rotates():
        embedding.dim = 0  # of YaRN's
        for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
            if hasattr(embedding, name):
                setattr(embedding, name, getattr(embedding, name)[:0])
        embedding.forward.cache_clear()
        return
    if dtype != torch.float64 and model.llama3_rope is None and model.linear_rope_factor is None:
        return
    with CPU:  # a model may be built on meta tensors, and these are numbers
        exact = frequencies(model).to(torch.promote_types(dtype, torch.float32))
    exact = exact.to(embedding.inv_freq.device)
    embedding.inv_freq = exact
    if model.yarn is not None or model.latent_attention is not None:
        # it mixes these two by float32 shares that add up to exactly 1, so both being the mixture gives the
        # mixture
        embedding.inv_freq_extra = embedding.inv_freq_inter = exact
    embedding.forward.cache_clear()


def local_turns(model: ModelConfig) -> list[float] | None:
    """Return how often each rotated channel of sliding layers turns while it turns once in global ones; None:
    as often."""
    if model.local_rope_theta is None:
        return None
    with CPU:  # a model may be built on meta tensors, and these are numbers
        local = frequencies(replace(model, rope_theta=model.local_rope_theta, local_rope_theta=None,
                                    linear_rope_factor=None))
        turns: list[float] = (local / frequencies(model)).tolist()
    return turns * 2  # a channel and its pair in the other half


def softmax_scale(model: ModelConfig, kind: str) -> float:
    """Return the factor on the products of queries and keys in layers of a kind (`ModelConfig.layer_types`).

    YaRN multiplies cosine and sine by ``m = 0.1 ln(factor) + 1`` (arXiv 2309.00071, eq. 22).  Rotations are
    linear, so queries and keys come out m times as long and their products m^2 times as large: the same as
    ``m^2 / sqrt(head_dim)`` behind plain rotations, which fused kernels know.  Layers that do not
    rotate have no such factor.  DeepSeek's latent attention, of whose heads a part rotates, has it there for
    the whole heads, with ``m = 0.1 mscale ln(factor) + 1``.
    """
    plain: float = model.head_dim ** -0.5 if model.attention_multiplier is None else (
        model.attention_multiplier)
    rotates = model.rope_on_global or kind == "sliding_attention"
    if model.yarn is None or not rotates:
        return plain
    return plain * max(1.0, 0.1 * model.yarn.mscale * math.log(model.yarn.factor) + 1.0) ** 2


def rotate_by_token() -> None:
    """Have the library's unfused rotation of packed rows take the angles of each local token.

    Its own asks the device for the lengths of the documents, for queries and for keys in every layer,
    and the host waits there for all that was launched before.
    """
    rope_utils._apply_rotary_pos_emb_thd = _rotate


def _rotate(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False,
            mscale: float = 1.0, cp_group: Any = None, **paired: bool) -> torch.Tensor:
    """[tokens, heads, head_dim] by angles [tokens, 1, 1, channels] -> [tokens, heads, head_dim]."""
    if not freqs.shape[-1]:
        return t
    if not rotary_interleaved and not paired.get("mla_rotary_interleaved"):
        rotated: torch.Tensor = _Rotation.apply(t, *_cosine_sine(freqs, t.dtype, mscale))
        return rotated
    rows: torch.Tensor = rope_utils._apply_rotary_pos_emb_bshd(
        t[:, None], freqs, rotary_interleaved=rotary_interleaved, mscale=mscale, **paired)
    return rows[:, 0]


def _cosine_sine(angles: Any, dtype: torch.dtype, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both of angles [tokens, 1, 1, channels], as [tokens, 1, channels].

    They stay with the angles: queries and keys of all layers rotate by the same ones.
    """
    # on the tensor itself: it lives as long as the row's angles, and a new row has new ones
    made = getattr(angles, "cosine_sine", {})
    if (dtype, factor) not in made:
        made[dtype, factor] = tuple((of(angles[:, 0]) * factor).to(dtype) for of in (torch.cos, torch.sin))
        angles.cosine_sine = made
    found: tuple[torch.Tensor, torch.Tensor] = made[dtype, factor]
    return found


class _Rotation(torch.autograd.Function):
    """The library's rotation of a channel and its partner in the other half, to the bit, in fewer passes: it
    concatenates halves, and autograd once more."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, head_dim], [tokens, 1, channels] twice; channels behind these pass."""
        ctx.save_for_backward(cosine, sine)
        channels = sine.shape[-1]
        if channels == values.shape[-1]:
            rotated = values * cosine
        else:
            rotated = torch.cat([values[..., :channels] * cosine, values[..., channels:]], dim=-1)
        first, second = values[..., :channels].chunk(2, dim=-1)
        into_first, into_second = rotated[..., :channels].chunk(2, dim=-1)
        of_first, of_second = sine.chunk(2, dim=-1)
        into_first -= second * of_first
        into_second += first * of_second
        return rotated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        of_first, of_second = sine.chunk(2, dim=-1)
        return _Rotation.apply(gradient, cosine, torch.cat([-of_second, -of_first], dim=-1)), None, None
