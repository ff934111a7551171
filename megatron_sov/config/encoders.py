"""Encoders of pictures and sounds whose features are put over placeholders' embeddings: their architecture,
and which of their weights are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

STRICT = {"extra": "forbid"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels of CLIP's pictures, by which Qwen2.5-VL's are normalised as well."""
MOST_SLOTS = 1 << 20


@dataclass(frozen=True)
class VisionEncoderConfig:
    """An encoder of square pictures of one size; the frames of a video are pictures."""

    __pydantic_config__ = STRICT
    kind: Literal["qwen2_5_vl", "siglip"] = "qwen2_5_vl"
    """Class of transformers: `Qwen2_5_VisionTransformerPretrainedModel`, which merges neighbouring patches,
    or `SiglipVisionModel` without its head, a plain ViT."""
    placeholder_ids: tuple[int, ...] = ()
    """Token ids that stand for one feature each: those of pictures, and of a video's frames."""
    image_size: int = 392
    """Side of a picture, in pixels."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    hidden_size: int = 1280
    """Width of the encoder."""
    num_layers: int = 32
    """Its layers."""
    num_heads: int = 16
    """Heads of each."""
    ffn_dim: int = 3456
    """Inner width of its feed-forward networks."""
    merge_size: int = 2
    """qwen2_5_vl: side, in patches, of what becomes one feature."""
    temporal_patch_size: int = 2
    """qwen2_5_vl: frames of a patch; a picture is repeated that often."""
    window_size: int = 112
    """qwen2_5_vl: side of the window of layers without full attention, in pixels."""
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    """qwen2_5_vl: layers (from 0) in which all patches of a picture attend to each other."""
    out_hidden_size: int = 5120
    """qwen2_5_vl: width of a merged feature, before the adapter."""
    adapter: Literal["linear", "mlp"] = "linear"
    """What brings features to the model's width: one matrix, or two with GELU between them."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """What is taken off each channel of a picture in 0 .. 1."""
    std: tuple[float, float, float] = CLIP_STD
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

    def problems(self, vocab_size: int) -> list[str]:
        """Return one sentence for each rule that the encoder breaks."""
        names = ["image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "ffn_dim"]
        if self.kind == "qwen2_5_vl":
            names += ["merge_size", "temporal_patch_size", "window_size", "out_hidden_size"]
        p = _not_positive("vision", self, names) + _placeholders("vision", self.placeholder_ids, vocab_size)
        if p:
            return p
        where, side = "model.vision.image_size", self.patch_size * self._merged
        if self.image_size % side:
            p.append(f"{where} = {self.image_size} must be a multiple of {side}, the side of one feature in "
                     "pixels")
        elif self.slots > MOST_SLOTS:
            p.append(f"{where} = {self.image_size} makes {self.slots:,} features of a picture, which must be "
                     f"at most {MOST_SLOTS:,}")
        # rotary embeddings of two axes need pairs on each
        per_head = 4 if self.kind == "qwen2_5_vl" else 1
        if self.hidden_size % (self.num_heads * per_head):
            p.append(f"model.vision.hidden_size = {self.hidden_size} must be a multiple of "
                     f"{per_head * self.num_heads}: model.vision.num_heads = {self.num_heads}"
                     f"{' heads of two axes of pairs' if per_head > 1 else ''}")
        if self.kind == "qwen2_5_vl":
            if self.window_size < side:
                p.append(f"model.vision.window_size = {self.window_size} must be at least {side}, the side "
                         "of one feature in pixels")
            if any(not 0 <= layer < self.num_layers for layer in self.full_attention_layers):
                p.append(f"model.vision.full_attention_layers = {list(self.full_attention_layers)} must lie "
                         f"between 0 and model.vision.num_layers - 1 = {self.num_layers - 1}")
        if not all(math.isfinite(x) for x in self.mean) or not all(0 < x < math.inf for x in self.std):
            p.append(f"model.vision.mean = {list(self.mean)} must be numbers, and model.vision.std = "
                     f"{list(self.std)} positive ones")
        return p


@dataclass(frozen=True)
class AudioEncoderConfig:
    """An encoder of log-mel spectrograms of pieces of one length, in the form of Whisper's."""

    __pydantic_config__ = STRICT
    kind: Literal["qwen2_audio", "whisper"] = "qwen2_audio"
    """Class of transformers: `Qwen2AudioEncoder`, which pools two of Whisper's features into one, or
    `WhisperEncoder`."""
    placeholder_ids: tuple[int, ...] = ()
    """Token ids that stand for one feature each."""
    num_mels: int = 128
    """Mel bands of a spectrogram."""
    num_frames: int = 3000
    """Frames of a piece: 100 in a second of 16 kHz with a hop of 160 samples."""
    hidden_size: int = 1280
    """Width of the encoder."""
    num_layers: int = 32
    """Its layers."""
    num_heads: int = 20
    """Heads of each."""
    ffn_dim: int = 5120
    """Inner width of its feed-forward networks."""
    adapter: Literal["linear", "mlp"] = "mlp"
    """What brings features to the model's width: one matrix, or two with GELU between them."""
    compression: int = 1
    """Features that become one, by a Mamba-2 layer that reads a learned query behind them
    (`codecs/encoders/compressor.py`): 25 makes one a second of 25; 1: none."""
    compressor_size: int = 3072
    """Width of that layer."""
    compressor_head_dim: int = 64
    """Width of one of its heads; its inner width is twice its width."""
    compressor_state_size: int = 128
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
        """Heads of the compressor's layer."""
        return 2 * self.compressor_size // self.compressor_head_dim

    @property
    def _stride(self) -> int:
        """Frames of a feature: Whisper's second convolution takes every other one, Qwen2-Audio pools two."""
        return 4 if self.kind == "qwen2_audio" else 2

    def problems(self, vocab_size: int) -> list[str]:
        """Return one sentence for each rule that the encoder breaks."""
        names = ["num_mels", "num_frames", "hidden_size", "num_layers", "num_heads", "ffn_dim", "compression",
                 "compressor_size", "compressor_head_dim", "compressor_state_size"]
        p = _not_positive("audio", self, names) + _placeholders("audio", self.placeholder_ids, vocab_size)
        if p:
            return p
        whole = self._stride * self.compression
        if self.num_frames % whole:
            p.append(f"model.audio.num_frames = {self.num_frames} must be a multiple of {whole}, the frames "
                     "of one feature")
        elif self.slots > MOST_SLOTS:
            p.append(f"model.audio.num_frames = {self.num_frames} makes {self.slots:,} features of a piece, "
                     f"which must be at most {MOST_SLOTS:,}")
        if self.hidden_size % self.num_heads:
            p.append(f"model.audio.hidden_size = {self.hidden_size} must be a multiple of "
                     f"model.audio.num_heads = {self.num_heads}")
        if self.hidden_size % 2:
            p.append(f"model.audio.hidden_size = {self.hidden_size} must be even: places are sines and "
                     "cosines")
        if self.compression > 1 and 2 * self.compressor_size % self.compressor_head_dim:
            p.append(f"model.audio.compressor_size = {self.compressor_size}: twice that must be a multiple "
                     f"of model.audio.compressor_head_dim = {self.compressor_head_dim}")
        return p


@dataclass(frozen=True)
class MediaConfig:
    """Which weights of encoders are trained, and where they start."""

    __pydantic_config__ = STRICT
    train_encoders: bool = False
    """Whether encoders learn; else they are frozen, have no gradients and no optimizer state."""
    train_adapters: bool = True
    """Whether what stands between encoders and model learns: adapters and the compressor."""
    vision_from: str = ""
    """Hugging Face folder whose picture encoder's weights a new run starts from; "": those of the checkpoint
    that it starts from, or of the seed."""
    audio_from: str = ""
    """The same for the sound encoder."""


def both_problems(vision: VisionEncoderConfig | None, audio: AudioEncoderConfig | None,
                  vocab_size: int) -> list[str]:
    """Return one sentence for each rule that a model's encoders break, each and together."""
    p = vision.problems(vocab_size) if vision is not None else []
    p += audio.problems(vocab_size) if audio is not None else []
    if vision is not None and audio is not None and (
            twice := sorted(set(vision.placeholder_ids) & set(audio.placeholder_ids))):
        p.append(f"model.vision.placeholder_ids and model.audio.placeholder_ids both have {twice}; an id "
                 "stands for a picture's feature or a sound's")
    return p


def _not_positive(encoder: str, config: object, names: list[str]) -> list[str]:
    return [f"model.{encoder}.{name} = {value} must lie between 1 and 10,000,000" for name in names
            if not 1 <= (value := getattr(config, name)) <= 10_000_000]


def _placeholders(encoder: str, ids: tuple[int, ...], vocab_size: int) -> list[str]:
    if ids and all(0 <= i < vocab_size for i in ids):
        return []
    return [f"model.{encoder}.placeholder_ids = {list(ids)} must name at least one id, all below "
            f"model.vocab_size = {vocab_size}"]
