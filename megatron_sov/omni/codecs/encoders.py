"""Encoder, adapter and compressor of one kind of media, as one module from raw records to features.

Networks are transformers' own classes, built from the sizes in our config.  Records never see each other: the
features of a record are the same whatever stands beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.nn.functional import pad, rms_norm, silu, softplus

from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig

# The compressor of long recordings: of each chunk of features one stays, which a Mamba-2 layer has written
# at a learned query behind the chunk.
#
# It is MambaMia2 as the authors serve it (OmniServe, mambamia_videoaudio_compressor.py), with their names:
# a projection to the layer's width, a query behind each chunk, a norm, one block (norm, gated pooling of the
# chunk into its query, Mamba-2, residual), a norm, a projection to the model's width. Their dropout inside
# the block is left out: what is computed would depend on the layout.
#
# The scan is Mamba-2's (arXiv 2405.21060, listing 1) in plain torch, piece by piece; where `mamba_ssm` is
# installed and the layer is on a GPU, its kernel does the same.

EPS = 1e-5
INPUT_EPS = 1e-6
CONV_KERNEL = 4
"""Tokens that the layer's convolution sees."""
SCAN_TOKENS = 64
"""Tokens of a piece of the scan: inside of it all pairs are weighed, between pieces a state is passed on."""
GATE_MARGIN = 0.01
"""Least share of the query, and of its chunk, in what the layer reads at the query."""


Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x, dt, a, b, c of `scan` -> y."""


def scan(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
         c: torch.Tensor) -> torch.Tensor:
    """Return y with state[t] = exp(dt[t] a) state[t - 1] + dt[t] x[t] b[t]^T and y[t] = state[t] c[t].

    Args:
        x: [n, tokens, heads, head dim].
        dt: [n, tokens, heads], positive.
        a: [heads], negative.
        b: [n, tokens, state size], one for all heads.
        c: as `b`.
    """
    tokens = x.shape[1]
    gap = -tokens % SCAN_TOKENS
    # behind the end: steps of length 0 change nothing
    x, dt, b, c = (pad(t, (0, 0) * (t.dim() - 2) + (0, gap)).unflatten(1, (-1, SCAN_TOKENS))
                   for t in (x, dt, b, c))
    decay = (dt * a).cumsum(2)
    weighed = x * dt[..., None]
    # inside a piece: what each token adds to the ones behind it
    apart = decay[:, :, :, None] - decay[:, :, None]
    later = torch.ones(SCAN_TOKENS, SCAN_TOKENS, dtype=torch.bool, device=x.device).tril()
    kept = apart.masked_fill(~later[:, :, None], -torch.inf).exp()
    inside = torch.einsum("ngtk,ngsk,ngtsh,ngshd->ngthd", c, b, kept, weighed)
    # between pieces: the state at the end of each
    last = decay[:, :, -1:]
    added = torch.einsum("ngsk,ngsh,ngshd->nghdk", b, (last - decay).exp(), weighed)
    states, state = [], torch.zeros_like(added[:, 0])
    for piece in range(added.shape[1]):
        states.append(state)
        state = state * last[:, piece, 0].exp()[..., None, None] + added[:, piece]
    before = torch.einsum("ngtk,ngth,nghdk->ngthd", c, decay.exp(), torch.stack(states, 1))
    return (inside + before).flatten(1, 2)[:, :tokens]


def fastest(device: torch.device) -> Scan:
    """Return the kernel of `mamba_ssm` where it is installed and the numbers are on a GPU, else `scan`."""
    if device.type != "cuda" or importlib.util.find_spec("mamba_ssm") is None:
        return scan
    kernel: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    # the kernel wants an axis of groups, of which there is one
    return lambda x, dt, a, b, c: kernel(x, dt, a, b.unsqueeze(2), c.unsqueeze(2), SCAN_TOKENS)


class Mixer(torch.nn.Module):
    """A Mamba-2 mixer with one group, which normalises before its gate."""

    def __init__(self, width: int, head_dim: int, state_size: int) -> None:
        super().__init__()
        self.inner, self.state_size, self.head_dim = 2 * width, state_size, head_dim
        self.heads = self.inner // head_dim
        channels = self.inner + 2 * state_size
        self.dt_bias = torch.nn.Parameter(torch.ones(self.heads))
        self.A_log = torch.nn.Parameter(torch.ones(self.heads))
        self.D = torch.nn.Parameter(torch.ones(self.heads))
        self.conv1d = torch.nn.Conv1d(channels, channels, CONV_KERNEL, groups=channels,
                                      padding=CONV_KERNEL - 1)
        self.in_proj = torch.nn.Linear(width, self.inner + channels + self.heads, bias=False)
        self.norm = Norm(self.inner)
        self.out_proj = torch.nn.Linear(self.inner, width, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]; every token knows those before it."""
        projected = self.in_proj(states)
        gate, mixed, dt = projected.split([self.inner, self.inner + 2 * self.state_size, self.heads], -1)
        # padded on both sides and cut behind: each token sees itself and three before it
        mixed = silu(self.conv1d(mixed.transpose(1, 2))[..., :states.shape[1]].transpose(1, 2))
        x, b, c = mixed.split([self.inner, self.state_size, self.state_size], -1)
        # bf16 would lose what is added to a long sum
        wide = torch.promote_types(states.dtype, torch.float32)
        x, b, c = x.unflatten(-1, (self.heads, self.head_dim)).to(wide), b.to(wide), c.to(wide)
        dt, a = softplus(dt.to(wide) + self.dt_bias.to(wide)), -self.A_log.to(wide).exp()
        y = fastest(x.device)(x, dt, a, b, c) + x * self.D.to(wide)[:, None]
        out: torch.Tensor = self.out_proj(self.norm(y.flatten(2).to(states.dtype)) * silu(gate))
        return out


class Norm(torch.nn.Module):
    """RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return rms_norm(states, self.weight.shape, self.weight, EPS)


class EncoderBlock(torch.nn.Module):
    """A layer over chunks with a query behind each: the chunk is pooled into the query, then mixed."""

    def __init__(self, width: int, chunk: int, head_dim: int, state_size: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.mixer = Mixer(width, head_dim, state_size)
        self.weight_fc = torch.nn.Linear(width, chunk)
        self.gate_fc = torch.nn.Linear(width, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [n, chunks, chunk + 1, width]."""
        normed = self.norm(states)
        features, query = normed[:, :, :-1], normed[:, :, -1]
        pooled = (features * self.weight_fc(query).softmax(-1)[..., None]).sum(2)
        # in [margin, 1 - margin]: neither the query nor its chunk is ever shut out
        gate = self.gate_fc(query).sigmoid() * (1 - 2 * GATE_MARGIN) + GATE_MARGIN
        read = torch.cat([features, (pooled * gate + query * (1 - gate)).unsqueeze(2)], 2)
        mixed: torch.Tensor = self.mixer(read.flatten(1, 2)).unflatten(1, states.shape[1:3])
        return mixed + states


class Backbone(torch.nn.Module):
    """The one block, and the norm behind it."""

    def __init__(self, block: EncoderBlock, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([block])
        self.norm_f = Norm(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [n, chunks, chunk + 1, width]."""
        out: torch.Tensor = self.norm_f(self.layers[0](states))
        return out


class Compressor(torch.nn.Module):
    """Makes one feature of each chunk of a record's features."""

    def __init__(self, config: AudioEncoderConfig, hidden_size: int) -> None:
        super().__init__()
        width, self._chunk = config.compressor_size, config.compression
        self.query_token = torch.nn.Parameter(torch.zeros(width))
        self.input_proj = torch.nn.Linear(hidden_size, width)
        self.model = Backbone(EncoderBlock(width, self._chunk, config.compressor_head_dim,
                                           config.compressor_state_size), width)
        self.input_norm = torch.nn.LayerNorm(width, eps=INPUT_EPS)
        self.output_proj = torch.nn.Linear(width, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return [records, features / chunk, hidden] of [records, features, hidden]."""
        chunks = self.input_proj(features).unflatten(1, (-1, self._chunk))
        query = self.query_token.expand(*chunks.shape[:2], 1, -1)
        states = self.model(self.input_norm(torch.cat([chunks, query], 2)))
        # the query's place has read the whole chunk, and those before it
        out: torch.Tensor = self.output_proj(states[:, :, -1])
        return out


class Adapter(torch.nn.Module):
    """Brings features to a model's width: one matrix, or two with GELU between them."""

    def __init__(self, kind: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(in_features, in_features) if kind == "mlp" else None
        self.fc2 = torch.nn.Linear(in_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.fc1 is not None:
            features = torch.nn.functional.gelu(self.fc1(features))
        out: torch.Tensor = self.fc2(features)
        return out


class MediaEncoder(torch.nn.Module):
    """From raw records to features of the model's width."""

    config: VisionEncoderConfig | AudioEncoderConfig

    def __init__(self, config: VisionEncoderConfig | AudioEncoderConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.slots = config.slots
        """Features of a record."""
        self._encoded_features = config.features if isinstance(config, AudioEncoderConfig) else config.slots
        self.encoder: Any = _vision(config) if isinstance(config, VisionEncoderConfig) else _audio(config)
        self.adapter = Adapter(config.adapter, config.feature_size, hidden_size)
        self.compressor = (Compressor(config, hidden_size)
                           if isinstance(config, AudioEncoderConfig) and config.compression > 1 else None)

    @property
    def trains(self) -> bool:
        """Whether anything of it learns."""
        return any(p.requires_grad for p in self.parameters())

    def forward(self, records: torch.Tensor | None) -> torch.Tensor:
        """Return [records, slots, hidden] of raw records, whatever their dtype; None: features of nothing,
        through all that learns."""
        weight, learns = self.adapter.fc2.weight, any(p.requires_grad for p in self.encoder.parameters())
        # ranks without media must take part in gradients and their reductions, as far as anything learns
        if records is None and not learns:
            features = weight.new_zeros(1, self._encoded_features, self.config.feature_size)
        else:
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                features = self._encoded(weight.new_zeros(1, *self.config.record_shape)
                                         if records is None else records)
        features = self.adapter(features)
        if self.compressor is not None:
            features = self.compressor(features)
        return features

    def _encoded(self, records: torch.Tensor) -> torch.Tensor:
        """Return [records, features, feature size]."""
        c = self.config
        dtype = self.adapter.fc2.weight.dtype
        if isinstance(c, AudioEncoderConfig):
            out: torch.Tensor = self.encoder(records.to(dtype)).last_hidden_state
            return out
        wide = torch.promote_types(dtype, torch.float32)
        mean, std = (torch.tensor(x, dtype=wide, device=records.device)[:, None, None]
                     for x in (c.mean, c.std))
        pixels = ((records.to(wide) / 255 - mean) / std).to(dtype)
        if c.kind == "siglip":
            out = self.encoder(pixel_values=pixels).last_hidden_state
            return out
        side = c.image_size // c.patch_size
        grid = torch.tensor([[1, side, side]] * len(records), device=records.device)
        out = self.encoder(patches(pixels, c), grid_thw=grid).pooler_output
        return out.unflatten(0, (len(records), -1))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen is always evaluated."""
        super().train(mode)
        for part in (self.encoder, self.adapter, self.compressor):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self


def patches(pixels: torch.Tensor, config: VisionEncoderConfig) -> torch.Tensor:
    """Return the patches of pictures [n, 3, side, side] as Qwen2.5-VL orders them: [n * patches, 3 * frames *
    patch * patch], those that are merged behind one another; a picture is repeated as the frames of a
    patch."""
    patch, merge, frames = config.patch_size, config.merge_size, config.temporal_patch_size
    side = config.image_size // patch // merge
    cut = pixels.reshape(len(pixels), 3, side, merge, patch, side, merge, patch)
    # picture, row and column of what is merged, row and column of the patch in it, channel, pixel
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return ordered.expand(*ordered.shape[:6], frames, patch, patch).reshape(-1, 3 * frames * patch * patch)


def _built(cls: Any, config: Any) -> Any:
    """Build a network of transformers whose weights nobody initialises: they are set by name."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return cls(config)


def _vision(c: VisionEncoderConfig) -> Any:
    if c.kind == "siglip":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return _built(SiglipVisionModel, SiglipVisionConfig(
            hidden_size=c.hidden_size, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, image_size=c.image_size, patch_size=c.patch_size,
            vision_use_head=False))
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return _built(Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig(
        depth=c.num_layers, hidden_size=c.hidden_size, intermediate_size=c.ffn_dim, num_heads=c.num_heads,
        patch_size=c.patch_size, spatial_merge_size=c.merge_size, temporal_patch_size=c.temporal_patch_size,
        window_size=c.window_size, out_hidden_size=c.out_hidden_size,
        fullatt_block_indexes=list(c.full_attention_layers)))


def _audio(c: AudioEncoderConfig) -> Any:
    if c.kind == "whisper":
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return _built(WhisperEncoder, WhisperConfig(
            num_mel_bins=c.num_mels, d_model=c.hidden_size, encoder_layers=c.num_layers,
            encoder_attention_heads=c.num_heads, encoder_ffn_dim=c.ffn_dim,
            max_source_positions=c.num_frames // 2))
    from transformers import Qwen2AudioEncoderConfig
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    return _built(Qwen2AudioEncoder, Qwen2AudioEncoderConfig(
        num_mel_bins=c.num_mels, d_model=c.hidden_size, encoder_layers=c.num_layers,
        encoder_attention_heads=c.num_heads, encoder_ffn_dim=c.ffn_dim,
        max_source_positions=c.num_frames // 2))
