"""Encoder, adapter and compressor of one kind of media, as one module from raw records to features.

Networks are transformers' own classes, built from the sizes in our config.  Records never see each other: the
features of a record are the same whatever stands beside it.
"""

from __future__ import annotations

from typing import Any, Self

import torch

from megatron_sov.codecs.encoders.compressor import Compressor
from megatron_sov.config import AudioEncoderConfig, VisionEncoderConfig


class Adapter(torch.nn.Module):
    """Brings features to a model's width: one matrix, or two with GELU between them."""

    def __init__(self, kind: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(in_features, in_features) if kind == "mlp" else None
        self.fc2 = torch.nn.Linear(in_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return features of the model's width."""
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
