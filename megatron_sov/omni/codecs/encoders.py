"""Media encoders: from raw records to features with the model's hidden size.

A `MediaEncoder` is a transformers network, built from the sizes in our config, an adapter and, for long
recordings, a compressor. Records are independent: the features of a record do not depend on its batch.

The compressor is MambaMia2 with the authors' parameter names (OmniServe, mambamia_videoaudio_compressor.py).
It appends a learned query to each chunk of features, runs a Mamba-2 block over the chunks, and keeps the
states at the queries. The authors' dropout is omitted, because its random numbers would depend on the layout.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.nn.functional import gelu, pad, rms_norm, silu, softplus
from transformers import Qwen2AudioEncoderConfig, SiglipVisionConfig, SiglipVisionModel, WhisperConfig
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig

EPS = 1e-5
INPUT_EPS = 1e-6
CONV_KERNEL = 4
"""Width of the mixer's causal convolution, in tokens."""
SCAN_TOKENS = 64
"""Tokens per chunk of the scan: chunks compute all pairs of tokens, and pass a state to the next chunk."""
GATE_MARGIN = 0.01
"""Smallest weight of the query, and of the pooled chunk, in the mixer's input at the query."""

Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Function with the arguments and result of `scan`."""


class MediaEncoder(torch.nn.Module):
    """Turns pictures or spectrograms into features of the model's hidden size, with an encoder, an adapter,
    and for sounds an optional compressor."""

    def __init__(self, config: VisionEncoderConfig | AudioEncoderConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.slots = config.slots
        """Features per record."""
        self.encoder: Any = (_build_vision_encoder(config) if isinstance(config, VisionEncoderConfig)
                             else _build_audio_encoder(config))
        self.adapter = Adapter(config.adapter, config.feature_size, hidden_size)
        self.compressor = (Compressor(config, hidden_size)
                           if isinstance(config, AudioEncoderConfig) and config.compression > 1 else None)

    @property
    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return _is_trained(self)

    def forward(self, records: torch.Tensor | None) -> torch.Tensor:
        """Return features [records, slots, hidden] for raw records of any dtype.

        Args:
            records: [records, *record_shape]; None: encode a dummy record, so that ranks without media take
                part in the gradient reductions of all trained parameters.
        """
        config, weight, trains_encoder = self.config, self.adapter.fc2.weight, _is_trained(self.encoder)
        if records is None and not trains_encoder:
            num_features = config.features if isinstance(config, AudioEncoderConfig) else config.slots
            features = weight.new_zeros(1, num_features, config.feature_size)
        else:
            with torch.set_grad_enabled(trains_encoder and torch.is_grad_enabled()):
                if records is None:
                    records = weight.new_zeros(1, *config.record_shape)
                features = self._encode(records)
        features = self.adapter(features)
        if self.compressor is not None:
            features = self.compressor(features)
        return features

    def _encode(self, records: torch.Tensor) -> torch.Tensor:
        """Return encoder features [records, features, feature size]."""
        c = self.config
        dtype = self.adapter.fc2.weight.dtype
        if isinstance(c, AudioEncoderConfig):
            states: torch.Tensor = self.encoder(records.to(dtype)).last_hidden_state
            return states
        wide_dtype = torch.promote_types(dtype, torch.float32)
        mean, std = (torch.tensor(values, dtype=wide_dtype, device=records.device)[:, None, None]
                     for values in (c.mean, c.std))
        pixels = ((records.to(wide_dtype) / 255 - mean) / std).to(dtype)
        if c.kind == "siglip":
            states = self.encoder(pixel_values=pixels).last_hidden_state
            return states
        side = c.image_size // c.patch_size
        grid = torch.tensor([[1, side, side]] * len(records), device=records.device)
        states = self.encoder(cut_patches(pixels, c), grid_thw=grid).pooler_output
        return states.unflatten(0, (len(records), -1))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; parts without trained parameters stay in evaluation mode."""
        super().train(mode)
        for part in (self.encoder, self.adapter, self.compressor):
            if part is not None and not _is_trained(part):
                part.eval()
        return self


def _is_trained(module: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def cut_patches(pixels: torch.Tensor, config: VisionEncoderConfig) -> torch.Tensor:
    """Cut pictures into patches, ordered like in Qwen2.5-VL.

    Args:
        pixels: [n, 3, side, side].
        config: sizes of patches.

    Returns:
        [n * patches, 3 * frames * patch * patch]. The patches that the encoder merges are adjacent. Each
        picture is repeated as the frames of a temporal patch.
    """
    patch, merge, frames = config.patch_size, config.merge_size, config.temporal_patch_size
    side = config.image_size // patch // merge
    grid = pixels.reshape(len(pixels), 3, side, merge, patch, side, merge, patch)
    # picture, merged row, merged column, row and column inside, channel, frame, pixel row, pixel column
    ordered = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return ordered.expand(*ordered.shape[:6], frames, patch, patch).reshape(-1, 3 * frames * patch * patch)


def _build_network(network_class: Any, config: Any) -> Any:
    """Build a transformers network without initializing weights, which are loaded by name later."""
    with no_init_weights():
        return network_class(config)


def _build_vision_encoder(c: VisionEncoderConfig) -> Any:
    if c.kind == "siglip":
        return _build_network(SiglipVisionModel, SiglipVisionConfig(
            hidden_size=c.hidden_size, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, image_size=c.image_size, patch_size=c.patch_size,
            vision_use_head=False))
    return _build_network(Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig(
        depth=c.num_layers, hidden_size=c.hidden_size, intermediate_size=c.ffn_dim, num_heads=c.num_heads,
        patch_size=c.patch_size, spatial_merge_size=c.merge_size, temporal_patch_size=c.temporal_patch_size,
        window_size=c.window_size, out_hidden_size=c.out_hidden_size,
        fullatt_block_indexes=list(c.full_attention_layers)))


def _build_audio_encoder(c: AudioEncoderConfig) -> Any:
    network_class, config_class = ((WhisperEncoder, WhisperConfig) if c.kind == "whisper"
                                   else (Qwen2AudioEncoder, Qwen2AudioEncoderConfig))
    return _build_network(network_class, config_class(
        num_mel_bins=c.num_mels, d_model=c.hidden_size, encoder_layers=c.num_layers,
        encoder_attention_heads=c.num_heads, encoder_ffn_dim=c.ffn_dim,
        max_source_positions=c.num_frames // 2))


class Adapter(torch.nn.Module):
    """Projects encoder features to the model's hidden size: a linear layer, or an MLP with GELU."""

    def __init__(self, kind: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(in_features, in_features) if kind == "mlp" else None
        self.fc2 = torch.nn.Linear(in_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.fc1 is not None:
            features = gelu(self.fc1(features))
        projected: torch.Tensor = self.fc2(features)
        return projected


class Compressor(torch.nn.Module):
    """Compresses each chunk in a record's features to a single feature."""

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
        """Return [records, features / chunk, hidden] for features [records, features, hidden]."""
        chunks = self.input_proj(features).unflatten(1, (-1, self._chunk))
        query = self.query_token.expand(*chunks.shape[:2], 1, -1)
        states = self.model(self.input_norm(torch.cat([chunks, query], 2)))
        # The state at the query depends on the query's chunk and earlier chunks.
        compressed: torch.Tensor = self.output_proj(states[:, :, -1])
        return compressed


class Backbone(torch.nn.Module):
    """Encoder block and final norm."""

    def __init__(self, block: EncoderBlock, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([block])
        self.norm_f = Norm(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states [n, chunks, chunk + 1, width] to the same shape."""
        normed: torch.Tensor = self.norm_f(self.layers[0](states))
        return normed


class EncoderBlock(torch.nn.Module):
    """Mamba-2 block over chunks: each chunk is pooled into its query before the mixer."""

    def __init__(self, width: int, chunk: int, head_dim: int, state_size: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.mixer = Mixer(width, head_dim, state_size)
        self.weight_fc = torch.nn.Linear(width, chunk)
        self.gate_fc = torch.nn.Linear(width, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states [n, chunks, chunk + 1, width] to the same shape; the query is last in a chunk."""
        normed = self.norm(states)
        features, query = normed[:, :, :-1], normed[:, :, -1]
        pooled = (features * self.weight_fc(query).softmax(-1)[..., None]).sum(2)
        # In [margin, 1 - margin]: query and chunk always contribute.
        gate = self.gate_fc(query).sigmoid() * (1 - 2 * GATE_MARGIN) + GATE_MARGIN
        inputs = torch.cat([features, (pooled * gate + query * (1 - gate)).unsqueeze(2)], 2)
        mixed: torch.Tensor = self.mixer(inputs.flatten(1, 2)).unflatten(1, states.shape[1:3])
        return mixed + states


class Norm(torch.nn.Module):
    """RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return rms_norm(states, self.weight.shape, self.weight, EPS)


class Mixer(torch.nn.Module):
    """Mamba-2 mixer with a single group; the norm precedes the gate."""

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
        """Mix states [n, tokens, width] along tokens, causally; keeps the shape."""
        projected = self.in_proj(states)
        gate, mixed, dt = projected.split([self.inner, self.inner + 2 * self.state_size, self.heads], -1)
        # Conv1d pads both ends; cutting the end off makes the convolution causal.
        mixed = silu(self.conv1d(mixed.transpose(1, 2))[..., :states.shape[1]].transpose(1, 2))
        x, b, c = mixed.split([self.inner, self.state_size, self.state_size], -1)
        # At least float32: in bfloat16, long sums lose small terms.
        dtype = torch.promote_types(states.dtype, torch.float32)
        x, b, c = x.unflatten(-1, (self.heads, self.head_dim)).to(dtype), b.to(dtype), c.to(dtype)
        dt, a = softplus(dt.to(dtype) + self.dt_bias.to(dtype)), -self.A_log.to(dtype).exp()
        y = select_scan(x.device)(x, dt, a, b, c) + x * self.D.to(dtype)[:, None]
        out: torch.Tensor = self.out_proj(self.norm(y.flatten(2).to(states.dtype)) * silu(gate))
        return out


def select_scan(device: torch.device) -> Scan:
    """Return the kernel from `mamba_ssm` on a GPU if installed, else `scan`."""
    if device.type != "cuda" or importlib.util.find_spec("mamba_ssm") is None:
        return scan
    kernel: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    # The kernel expects a group axis in b and c.
    return lambda x, dt, a, b, c: kernel(x, dt, a, b.unsqueeze(2), c.unsqueeze(2), SCAN_TOKENS)


def scan(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
         c: torch.Tensor) -> torch.Tensor:
    """Compute the Mamba-2 recurrence in chunks (arXiv 2405.21060, listing 1).

    state[t] = exp(dt[t] a) state[t - 1] + dt[t] x[t] b[t]^T and y[t] = state[t] c[t].

    Args:
        x: [n, tokens, heads, head dim].
        dt: [n, tokens, heads], positive.
        a: [heads], negative.
        b: [n, tokens, state size], shared by all heads.
        c: [n, tokens, state size].

    Returns:
        y, with the shape of `x`.
    """
    tokens = x.shape[1]
    gap = -tokens % SCAN_TOKENS
    # Padding at the end has dt = 0 and keeps the state.
    x, dt, b, c = (pad(t, (0, 0) * (t.dim() - 2) + (0, gap)).unflatten(1, (-1, SCAN_TOKENS))
                   for t in (x, dt, b, c))
    log_decay = (dt * a).cumsum(2)
    scaled_x = x * dt[..., None]
    # Inside a chunk: contributions of each token s to tokens t >= s.
    log_decay_between = log_decay[:, :, :, None] - log_decay[:, :, None]
    causal = torch.ones(SCAN_TOKENS, SCAN_TOKENS, dtype=torch.bool, device=x.device).tril()
    decay_between = log_decay_between.masked_fill(~causal[:, :, None], -torch.inf).exp()
    inside = torch.einsum("ngtk,ngsk,ngtsh,ngshd->ngthd", c, b, decay_between, scaled_x)
    # Between chunks: the state at the end of each chunk.
    last = log_decay[:, :, -1:]
    chunk_states = torch.einsum("ngsk,ngsh,ngshd->nghdk", b, (last - log_decay).exp(), scaled_x)
    states, state = [], torch.zeros_like(chunk_states[:, 0])
    for chunk in range(chunk_states.shape[1]):
        states.append(state)
        state = state * last[:, chunk, 0].exp()[..., None, None] + chunk_states[:, chunk]
    carried = torch.einsum("ngtk,ngth,nghdk->ngthd", c, log_decay.exp(), torch.stack(states, 1))
    return (inside + carried).flatten(1, 2)[:, :tokens]
