"""Rotary position embeddings: frequencies in float64, YaRN's softmax factor, and rotations without device
synchronization."""

import math
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_sov.engine.parallel.device import CPU
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.config.model import Llama3RopeConfig


def compute_frequencies(model: ModelConfig) -> torch.Tensor:
    """Return the angle per position for each rotated channel pair, [pairs] float64.

    RoPE (Su et al., arXiv 2104.09864, sec. 3.2.2), with one of these scalings: YaRN's "NTK-by-parts" (Peng et
    al., arXiv 2309.00071, eq. 17-22), with the ends of its ramp rounded outwards to whole channels as in
    transformers; Llama 3.1's (`apply_scaling` of Meta's llama-models); or linear position interpolation
    (arXiv 2306.15595)."""
    dim = model.rotated_channels()
    base = model.rope_theta
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if model.llama3_rope is not None:
        return _scale_llama3(plain, model.llama3_rope)
    if model.linear_rope_factor is not None:
        return plain / model.linear_rope_factor
    if model.yarn is None:
        return plain
    yarn = model.yarn

    def find_channel(rotations: float) -> float:
        """Return the channel pair that turns `rotations` times over the original context."""
        return (dim * math.log(yarn.original_max_position_tokens / (rotations * 2 * math.pi))
                / (2 * math.log(base)))

    low, high = find_channel(yarn.beta_fast), find_channel(yarn.beta_slow)
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    # 1: wavelengths beyond the original context, divided by the factor; 0: short ones, unchanged
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * (1 - interpolated) + plain / yarn.factor * interpolated


def _scale_llama3(plain: torch.Tensor, scaling: Llama3RopeConfig) -> torch.Tensor:
    """Divide low frequencies by the factor, keep high ones, and interpolate linearly between them."""
    rotations = plain * scaling.original_max_position_tokens / (2 * math.pi)  # over the original context
    # 1 keeps a frequency (several turns inside the original context), 0 divides it
    interpolation = ((rotations - scaling.low_freq_factor)
                     / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return plain * interpolation + plain / scaling.factor * (1 - interpolation)


def set_frequencies(embedding: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Set the frequencies in Megatron-Core's rotary embedding by `compute_frequencies`.

    float64 models get float64 frequencies, which Megatron-Core would round; scalings that Megatron-Core
    lacks get float32. If no layer rotates, the table has one entry per position but no channels, instead of
    half a GiB for 1M positions."""
    if not model.rotates():
        embedding.dim = 0  # read by YaRN's module
        for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
            if hasattr(embedding, name):
                setattr(embedding, name, getattr(embedding, name)[:0])
        embedding.forward.cache_clear()
        return
    if dtype != torch.float64 and model.llama3_rope is None and model.linear_rope_factor is None:
        return
    with CPU:  # the model may be built on meta tensors, but frequencies are needed
        exact = compute_frequencies(model).to(torch.promote_types(dtype, torch.float32))
    exact = exact.to(embedding.inv_freq.device)
    embedding.inv_freq = exact
    if model.yarn is not None or model.latent_attention is not None:
        # the module mixes these two with float32 weights that sum to exactly 1, so two equal tensors give the
        # tensor itself
        embedding.inv_freq_extra = embedding.inv_freq_inter = exact
    embedding.forward.cache_clear()


def compute_frequency_ratios(model: ModelConfig) -> list[float] | None:
    """Return local / global frequency per rotated channel if `local_rope_theta` is set, else None."""
    if model.local_rope_theta is None:
        return None
    with CPU:  # the model may be built on meta tensors, but frequencies are needed
        local_model = replace(model, rope_theta=model.local_rope_theta, local_rope_theta=None,
                              linear_rope_factor=None)
        local_frequencies = compute_frequencies(local_model)
        turns: list[float] = (local_frequencies / compute_frequencies(model)).tolist()
    return turns * 2  # both channels of a pair


def compute_softmax_scale(model: ModelConfig, kind: str) -> float:
    """Return the softmax scale for a layer kind (`ModelConfig.layer_types`).

    YaRN multiplies cosine and sine by ``m = 0.1 ln(factor) + 1`` (arXiv 2309.00071, eq. 22). Rotations are
    linear, so queries and keys grow by m and their products by m^2: equal to a softmax scale of
    ``m^2 / sqrt(head_dim)`` with plain rotations, which fused kernels support. Layers without rotation have
    no such factor. DeepSeek's latent attention applies ``m = 0.1 mscale ln(factor) + 1`` to whole heads,
    although only part of each head rotates."""
    plain: float = model.head_dim ** -0.5
    if model.attention_multiplier is not None:
        plain = model.attention_multiplier
    rotates = model.rope_on_global or kind == "sliding_attention"
    if model.yarn is None or not rotates:
        return plain
    return plain * max(1.0, 0.1 * model.yarn.mscale * math.log(model.yarn.factor) + 1.0) ** 2


def patch_packed_rotation() -> None:
    """Patch Megatron-Core's unfused rotation of packed rows to take per-token angles.

    Megatron-Core's version copies the document lengths from the device, for queries and keys of every layer,
    and the host waits for all previously launched kernels. Test:
    `test_rotary.py::test_a_row_is_rotated_without_reading_document_lengths`."""
    rope_utils._apply_rotary_pos_emb_thd = _rotate_rows


def _rotate_rows(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor,
                 rotary_interleaved: bool = False, mscale: float = 1.0, cp_group: Any = None,
                 **paired: bool) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] by angles [tokens, 1, 1, channels]."""
    if not freqs.shape[-1]:
        return t
    if not rotary_interleaved and not paired.get("mla_rotary_interleaved"):
        rotated: torch.Tensor = _Rotation.apply(t, *_get_cosine_sine(freqs, t.dtype, mscale))
        return rotated
    rows: torch.Tensor = rope_utils._apply_rotary_pos_emb_bshd(
        t[:, None], freqs, rotary_interleaved=rotary_interleaved, mscale=mscale, **paired)
    return rows[:, 0]


def _get_cosine_sine(angles: Any, dtype: torch.dtype, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine for angles [tokens, 1, 1, channels], each [tokens, 1, channels].

    The result is cached on the angles tensor: queries and keys of all layers share it."""
    # an attribute of the tensor lives as long as the row's angles; a new row has a new tensor
    cache = getattr(angles, "cosine_sine", {})
    if (dtype, factor) not in cache:
        cache[dtype, factor] = tuple((value * factor).to(dtype)
                                     for value in (angles[:, 0].cos(), angles[:, 0].sin()))
        angles.cosine_sine = cache
    cosine_sine: tuple[torch.Tensor, torch.Tensor] = cache[dtype, factor]
    return cosine_sine


class _Rotation(torch.autograd.Function):
    """Rotation of channel pairs with the same bits as Megatron-Core's, which concatenates halves twice.
    Test: `test_rotary.py::test_a_rotation_has_the_bits_of_megatron_core`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Rotate values [tokens, heads, head_dim] by cosine and sine [tokens, 1, channels]; further channels
        pass unchanged."""
        ctx.save_for_backward(cosine, sine)
        channels = sine.shape[-1]
        if channels == values.shape[-1]:
            rotated = values * cosine
        else:
            rotated = torch.cat([values[..., :channels] * cosine, values[..., channels:]], dim=-1)
        first, second = values[..., :channels].chunk(2, dim=-1)
        rotated_first, rotated_second = rotated[..., :channels].chunk(2, dim=-1)
        first_sine, second_sine = sine.chunk(2, dim=-1)
        rotated_first -= second * first_sine
        rotated_second += first * second_sine
        return rotated

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        first_sine, second_sine = sine.chunk(2, dim=-1)
        return _Rotation.apply(gradient, cosine, torch.cat([-second_sine, -first_sine], dim=-1)), None, None
