"""Image and audio encoder architecture, and the choice between frozen and trained encoder weights."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, Finite, NotNegativeInt, SettingsProblem, find_broken_rules, is_set)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation per RGB channel, from CLIP; Qwen2.5-VL uses the same values."""
MAX_FEATURES = 1 << 20
"""Limit for features per image or audio clip."""
Size = Annotated[int, Ge(1), Le(10_000_000)]


@dataclass(frozen=True)
class VisionEncoderConfig:
    """Encoder for square images with a fixed size. Video frames are encoded as images."""

    kind: Literal["qwen2_5_vl", "siglip"] = "qwen2_5_vl"
    """Transformers class: `Qwen2_5_VisionTransformerPretrainedModel`, which merges neighbouring patches, or
    `SiglipVisionModel` without its head (a plain ViT)."""
    placeholder_ids: tuple[NotNegativeInt, ...] = ()
    """Token ids replaced by one feature each, for images and for video frames."""
    image_size: Size = 392
    """Image side in pixels."""
    patch_size: Size = 14
    """Patch side in pixels."""
    hidden_size: Size = 1280
    """Encoder width."""
    num_layers: Size = 32
    """Encoder layers."""
    num_heads: Size = 16
    """Attention heads per layer."""
    ffn_dim: Size = 3456
    """Inner feed-forward width."""
    merge_size: Size = 2
    """qwen2_5_vl: patches per side in the square merged into one feature."""
    temporal_patch_size: Size = 2
    """qwen2_5_vl: frames per patch; a still image is repeated this many times."""
    window_size: Size = 112
    """qwen2_5_vl: attention window in pixels, for layers without full attention."""
    full_attention_layers: tuple[NotNegativeInt, ...] = (7, 15, 23, 31)
    """qwen2_5_vl: layers (from 0) with attention over the whole image."""
    out_hidden_size: Size = 5120
    """qwen2_5_vl: merged feature width before the adapter."""
    adapter: Literal["linear", "mlp"] = "linear"
    """Projection from features to `model.hidden_size`. linear: one matrix; mlp: two matrices with GELU in
    between."""
    mean: tuple[Finite, Finite, Finite] = CLIP_MEAN
    """Mean subtracted from each RGB channel, for pixel values between 0 and 1."""
    std: tuple[AboveZero, AboveZero, AboveZero] = CLIP_STD
    """Standard deviation that divides each RGB channel after `mean` is subtracted."""

    @property
    def slots(self) -> int:
        """Features per image."""
        return (self.image_size // (self.patch_size * self._merged_patches)) ** 2

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Image shape in a media bank, uint8 [channels, height, width]."""
        return (3, self.image_size, self.image_size)

    @property
    def feature_size(self) -> int:
        """Feature width before the adapter."""
        return self.out_hidden_size if self.kind == "qwen2_5_vl" else self.hidden_size

    @property
    def _merged_patches(self) -> int:
        return self.merge_size if self.kind == "qwen2_5_vl" else 1

    def problems(self, vocab_size: int) -> list[SettingsProblem]:
        """Return every rule that the image encoder violates."""
        merges = self.kind == "qwen2_5_vl"
        side = self.patch_size * self._merged_patches  # of one feature
        per_heads = self.num_heads * (4 if merges else 1)  # a head rotates channel pairs along two image axes
        return find_broken_rules(
            self, "model.vision", _build_placeholder_rule(self.placeholder_ids, vocab_size),
            (self.image_size % side == 0, "image_size",
             f"must be a multiple of {side}, the side of one feature in pixels"),
            (self.image_size % side > 0 or self.slots <= MAX_FEATURES, "image_size",
             f"gives {self.slots:,} features per image, and the limit is {MAX_FEATURES:,}"),
            (self.hidden_size % per_heads == 0, "hidden_size",
             f"must be a multiple of {per_heads}: model.vision.num_heads = {self.num_heads}"
             f"{' heads x 4 (channel pairs along two axes)' if merges else ''}"),
            (not merges or self.window_size >= side, "window_size",
             f"must be at least {side}, the side of one feature in pixels"),
            (not merges or max(self.full_attention_layers, default=0) < self.num_layers,
             "full_attention_layers", f"must be below model.vision.num_layers = {self.num_layers}"))


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Encoder for log-mel spectrograms with fixed length, with Whisper's architecture."""

    kind: Literal["qwen2_audio", "whisper"] = "qwen2_audio"
    """Transformers class: `Qwen2AudioEncoder`, which averages Whisper features in pairs, or
    `WhisperEncoder`."""
    placeholder_ids: tuple[NotNegativeInt, ...] = ()
    """Token ids replaced by one feature each."""
    num_mels: Size = 128
    """Mel bands in the spectrogram."""
    num_frames: Size = 3000
    """Spectrogram frames per clip; 100 frames per second for 16 kHz audio with a 160-sample hop."""
    hidden_size: Size = 1280
    """Encoder width."""
    num_layers: Size = 32
    """Encoder layers."""
    num_heads: Size = 20
    """Attention heads per layer."""
    ffn_dim: Size = 5120
    """Inner feed-forward width."""
    adapter: Literal["linear", "mlp"] = "mlp"
    """Projection from features to `model.hidden_size`. linear: one matrix; mlp: two matrices with GELU in
    between."""
    compression: Size = 1
    """Features compressed into one by a Mamba-2 layer with learned queries (`omni/codecs/encoders.py`). 25
    turns 25 features per second into 1. 1: no compression."""
    compressor_size: Size = 3072
    """Compression layer width."""
    compressor_head_dim: Size = 64
    """Channels per head in the compression layer, whose inner width is 2 * `compressor_size`."""
    compressor_state_size: Size = 128
    """State size per channel in the compression layer."""

    @property
    def features(self) -> int:
        """Features per clip before compression."""
        return self.num_frames // self._frames_per_feature

    @property
    def slots(self) -> int:
        """Features per clip."""
        return self.features // self.compression

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Clip shape in a media bank, float16 [mel bands, frames]."""
        return (self.num_mels, self.num_frames)

    @property
    def feature_size(self) -> int:
        """Feature width before the adapter."""
        return self.hidden_size

    @property
    def compressor_heads(self) -> int:
        return 2 * self.compressor_size // self.compressor_head_dim

    @property
    def _frames_per_feature(self) -> int:
        """Frames per feature: Whisper's second convolution has stride 2, and Qwen2-Audio averages pairs."""
        return 4 if self.kind == "qwen2_audio" else 2

    def problems(self, vocab_size: int) -> list[SettingsProblem]:
        """Return every rule that the audio encoder violates."""
        frames_per_feature = self._frames_per_feature * self.compression
        is_multiple = self.num_frames % frames_per_feature == 0
        return find_broken_rules(
            self, "model.audio", _build_placeholder_rule(self.placeholder_ids, vocab_size),
            (is_multiple, "num_frames",
             f"must be a multiple of {frames_per_feature}, the frames of one feature"),
            (not is_multiple or self.slots <= MAX_FEATURES, "num_frames",
             f"gives {self.slots:,} features per clip, and the limit is {MAX_FEATURES:,}"),
            (self.hidden_size % self.num_heads == 0, "hidden_size",
             f"must be a multiple of model.audio.num_heads = {self.num_heads}"),
            (self.hidden_size % 2 == 0, "hidden_size", "must be even: positions are sine-cosine pairs"),
            (self.compression == 1 or 2 * self.compressor_size % self.compressor_head_dim == 0,
             "compressor_size", "x 2 must be a multiple of model.audio.compressor_head_dim = "
             f"{self.compressor_head_dim}"))


@dataclass(frozen=True)
class MediaConfig:
    """Which encoder weights are trained, and the folders that provide their initial values."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "train_encoders train_adapters": AnyOf(is_set("model.vision"), is_set("model.audio")),
        "vision_from": is_set("model.vision"),
        "audio_from": is_set("model.audio")}

    train_encoders: bool = False
    """Train image and audio encoders. False: encoders are frozen, without gradients and optimizer state."""
    train_adapters: bool = True
    """Train the adapters between encoders and model, and the audio compressor."""
    vision_from: str = ""
    """Hugging Face folder with initial weights for the image encoder. Empty: weights from the run's starting
    checkpoint, or random weights."""
    audio_from: str = ""
    """Hugging Face folder with initial weights for the audio encoder. Empty: as for `vision_from`."""


def _build_placeholder_rule(ids: tuple[int, ...], vocab_size: int) -> tuple[bool, str, str]:
    return (bool(ids) and max(ids) < vocab_size, "placeholder_ids",
            f"must name at least one id, all below model.vocab_size = {vocab_size}")
