"""Encoders of pictures and sounds whose features are put over placeholders' embeddings: their architecture,
and which of their weights are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, Finite, NotNegativeInt, SettingsProblem, find_broken, is_set)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels of CLIP's pictures, by which Qwen2.5-VL's are normalised as well."""
MOST_SLOTS = 1 << 20
Size = Annotated[int, Ge(1), Le(10_000_000)]


@dataclass(frozen=True)
class VisionEncoderConfig:
    """An encoder of square pictures of one size; the frames of a video are pictures."""

    kind: Literal["qwen2_5_vl", "siglip"] = "qwen2_5_vl"
    """Class of transformers: `Qwen2_5_VisionTransformerPretrainedModel`, which merges neighbouring patches,
    or `SiglipVisionModel` without its head, a plain ViT."""
    placeholder_ids: tuple[NotNegativeInt, ...] = ()
    """Token ids that stand for one feature each: those of pictures, and of a video's frames."""
    image_size: Size = 392
    """Side of a picture, in pixels."""
    patch_size: Size = 14
    """Side of a patch, in pixels."""
    hidden_size: Size = 1280
    """Width of the encoder."""
    num_layers: Size = 32
    """Its layers."""
    num_heads: Size = 16
    """Heads of each."""
    ffn_dim: Size = 3456
    """Inner width of its feed-forward networks."""
    merge_size: Size = 2
    """qwen2_5_vl: side, in patches, of what becomes one feature."""
    temporal_patch_size: Size = 2
    """qwen2_5_vl: frames of a patch; a picture is repeated that often."""
    window_size: Size = 112
    """qwen2_5_vl: side of the window of layers without full attention, in pixels."""
    full_attention_layers: tuple[NotNegativeInt, ...] = (7, 15, 23, 31)
    """qwen2_5_vl: layers (from 0) in which all patches of a picture attend to each other."""
    out_hidden_size: Size = 5120
    """qwen2_5_vl: width of a merged feature, before the adapter."""
    adapter: Literal["linear", "mlp"] = "linear"
    """What brings features to the model's width: one matrix, or two with GELU between them."""
    mean: tuple[Finite, Finite, Finite] = CLIP_MEAN
    """What is taken off each channel of a picture in 0 .. 1."""
    std: tuple[AboveZero, AboveZero, AboveZero] = CLIP_STD
    """What each channel is divided by then."""

    @property
    def slots(self) -> int:
        """Features of a picture."""
        return (self.image_size // (self.patch_size * self._merged)) ** 2

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of a picture in a bank, uint8."""
        return (3, self.image_size, self.image_size)

    @property
    def feature_size(self) -> int:
        """Width of a feature before the adapter."""
        return self.out_hidden_size if self.kind == "qwen2_5_vl" else self.hidden_size

    @property
    def _merged(self) -> int:
        return self.merge_size if self.kind == "qwen2_5_vl" else 1

    def problems(self, vocab_size: int) -> list[SettingsProblem]:
        """Return every rule that the encoder breaks."""
        side, merges = self.patch_size * self._merged, self.kind == "qwen2_5_vl"
        # rotary embeddings of two axes need pairs on each
        per_heads = self.num_heads * (4 if merges else 1)
        return find_broken(
            self, "model.vision", _placeholders(self.placeholder_ids, vocab_size),
            (self.image_size % side == 0, "image_size",
             f"must be a multiple of {side}, the side of one feature in pixels"),
            (self.image_size % side > 0 or self.slots <= MOST_SLOTS, "image_size",
             f"makes {self.slots:,} features of a picture, which must be at most {MOST_SLOTS:,}"),
            (self.hidden_size % per_heads == 0, "hidden_size",
             f"must be a multiple of {per_heads}: model.vision.num_heads = {self.num_heads}"
             f"{' heads of two axes of pairs' if merges else ''}"),
            (not merges or self.window_size >= side, "window_size",
             f"must be at least {side}, the side of one feature in pixels"),
            (not merges or max(self.full_attention_layers, default=0) < self.num_layers,
             "full_attention_layers", f"must be below model.vision.num_layers = {self.num_layers}"))


@dataclass(frozen=True)
class AudioEncoderConfig:
    """An encoder of log-mel spectrograms of pieces of one length, in the form of Whisper's."""

    kind: Literal["qwen2_audio", "whisper"] = "qwen2_audio"
    """Class of transformers: `Qwen2AudioEncoder`, which pools two of Whisper's features into one, or
    `WhisperEncoder`."""
    placeholder_ids: tuple[NotNegativeInt, ...] = ()
    """Token ids that stand for one feature each."""
    num_mels: Size = 128
    """Mel bands of a spectrogram."""
    num_frames: Size = 3000
    """Frames of a piece: 100 in a second of 16 kHz with a hop of 160 samples."""
    hidden_size: Size = 1280
    """Width of the encoder."""
    num_layers: Size = 32
    """Its layers."""
    num_heads: Size = 20
    """Heads of each."""
    ffn_dim: Size = 5120
    """Inner width of its feed-forward networks."""
    adapter: Literal["linear", "mlp"] = "mlp"
    """What brings features to the model's width: one matrix, or two with GELU between them."""
    compression: Size = 1
    """Features that become one, by a Mamba-2 layer that reads a learned query behind them
    (`omni/codecs/encoders.py`): 25 makes one a second of 25; 1: none."""
    compressor_size: Size = 3072
    """Width of that layer."""
    compressor_head_dim: Size = 64
    """Width of one of its heads; its inner width is twice its width."""
    compressor_state_size: Size = 128
    """Numbers that it remembers for each channel."""

    @property
    def features(self) -> int:
        """Features of a piece before the compressor."""
        return self.num_frames // self._stride

    @property
    def slots(self) -> int:
        """Features of a piece."""
        return self.features // self.compression

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of a piece in a bank, float16."""
        return (self.num_mels, self.num_frames)

    @property
    def feature_size(self) -> int:
        """Width of a feature before the adapter."""
        return self.hidden_size

    @property
    def compressor_heads(self) -> int:
        return 2 * self.compressor_size // self.compressor_head_dim

    @property
    def _stride(self) -> int:
        """Frames of a feature: Whisper's second convolution takes every other one, Qwen2-Audio pools two."""
        return 4 if self.kind == "qwen2_audio" else 2

    def problems(self, vocab_size: int) -> list[SettingsProblem]:
        """Return every rule that the encoder breaks."""
        whole = self._stride * self.compression
        return find_broken(
            self, "model.audio", _placeholders(self.placeholder_ids, vocab_size),
            (self.num_frames % whole == 0, "num_frames",
             f"must be a multiple of {whole}, the frames of one feature"),
            (self.num_frames % whole > 0 or self.slots <= MOST_SLOTS, "num_frames",
             f"makes {self.slots:,} features of a piece, which must be at most {MOST_SLOTS:,}"),
            (self.hidden_size % self.num_heads == 0, "hidden_size",
             f"must be a multiple of model.audio.num_heads = {self.num_heads}"),
            (self.hidden_size % 2 == 0, "hidden_size", "must be even: places are sines and cosines"),
            (self.compression == 1 or 2 * self.compressor_size % self.compressor_head_dim == 0,
             "compressor_size", "x 2 must be a multiple of model.audio.compressor_head_dim = "
             f"{self.compressor_head_dim}"))


@dataclass(frozen=True)
class MediaConfig:
    """Which weights of encoders are trained, and where they start."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "train_encoders train_adapters": AnyOf(is_set("model.vision"), is_set("model.audio")),
        "vision_from": is_set("model.vision"),
        "audio_from": is_set("model.audio")}

    train_encoders: bool = False
    """Whether encoders learn; else they are frozen, have no gradients and no optimizer state."""
    train_adapters: bool = True
    """Whether what stands between encoders and model learns: adapters and the compressor."""
    vision_from: str = ""
    """Hugging Face folder whose picture encoder's weights a new run starts from; "": those of the checkpoint
    that it starts from, or of the seed."""
    audio_from: str = ""
    """The same for the sound encoder."""


def _placeholders(ids: tuple[int, ...], vocab_size: int) -> tuple[bool, str, str]:
    return (bool(ids) and max(ids) < vocab_size, "placeholder_ids",
            f"must name at least one id, all below model.vocab_size = {vocab_size}")
