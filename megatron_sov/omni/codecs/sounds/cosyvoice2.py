"""CosyVoice 2's tokenizer of speech (https://arxiv.org/abs/2412.10117), 25 tokens a second out of 6,561, by
the package s3tokenizer (xingchensong/S3Tokenizer on GitHub), whose networks and log-mel frames these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import ProblemCode, SettingsProblem

LEVELS, NUM_LEVELS = 3, 8
_HOP_SAMPLES, _FRAMES_PER_TOKEN = 160, 4
_MAX_PIECE_S = 30
_NAME = "speech_tokenizer_v2_25hz"
"""As s3tokenizer calls the published one."""


@dataclass(frozen=True)
class CosyVoice2Settings:
    """Sizes: the published ones."""

    num_mels: Annotated[int, Ge(80), Le(128)] = 128
    """Bands of a frame."""
    width: Annotated[int, Ge(64), Le(16384)] = 1280
    """Of the transformer; its heads are 64 wide."""
    num_heads: Annotated[int, Ge(1), Le(256)] = 20
    """Of attention."""
    num_layers: Annotated[int, Ge(1), Le(100)] = 6
    """Of the transformer."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together."""
        return [] if self.width == 64 * self.num_heads else [
            SettingsProblem(ProblemCode.RULE, "width", f"must be 64 times num_heads = {self.num_heads}",
                            self.width)]


class CosyVoice2Tokenizer(nn.Module):
    """Speech as ids; an `interface.AudioTokenizer`."""

    Settings = CosyVoice2Settings
    sample_rate_hz = 16_000
    samples_per_token = _HOP_SAMPLES * _FRAMES_PER_TOKEN
    codebook_size = LEVELS**NUM_LEVELS
    max_piece_s = float(_MAX_PIECE_S)
    width = NUM_LEVELS

    def __init__(self, settings: CosyVoice2Settings) -> None:
        super().__init__()
        try:
            from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2
        except ImportError as e:
            raise UserError(f"codec of kind 'cosyvoice2': needs the package s3tokenizer ({e}); install it by "
                            "`pip install s3tokenizer`") from None
        self.settings = settings
        self.network = S3TokenizerV2(_NAME, ModelConfig(
            n_mels=settings.num_mels, n_audio_state=settings.width, n_audio_head=settings.num_heads,
            n_audio_layer=settings.num_layers))

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [t] int64 ids of [s] samples; the last token's silence is filled up, and a sound longer than
        30 s is cut into pieces."""
        piece = _MAX_PIECE_S * self.sample_rate_hz
        with torch.no_grad():
            ids = [self._piece(part) for part in sound.split(piece)] if len(sound) else []
        return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)

    def _piece(self, sound: torch.Tensor) -> torch.Tensor:
        from s3tokenizer.utils import log_mel_spectrogram

        filled = F.pad(sound, (0, -len(sound) % self.samples_per_token))
        frames = log_mel_spectrogram(filled, n_mels=self.settings.num_mels)[None]
        ids, lengths = self.network.quantize(frames, torch.tensor([frames.shape[-1]], device=frames.device))
        found: torch.Tensor = ids[0, :int(lengths[0])].long().clone()
        return found

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [t, 8] float32 embeddings of ids: their levels, -1, 0 or 1; the published tokenizer has no
        layer behind them."""
        powers = LEVELS ** torch.arange(NUM_LEVELS, device=ids.device)
        return (ids[..., None] // powers % LEVELS - 1).float()


def converted(found: Mapping[str, torch.Tensor],
              where: str) -> tuple[CosyVoice2Settings, dict[str, torch.Tensor]]:
    """Return settings and state of `CosyVoice2Tokenizer` from the tensors of s3tokenizer's network.

    Args:
        found: its names -> tensors.
        where: the file, for sentences.

    Raises:
        UserError: it is no such tokenizer.
    """
    first, codes = "encoder.conv1.weight", "quantizer._codebook.project_down.weight"
    if missing := [name for name in (first, codes) if name not in found]:
        raise UserError(f"{where}: lacks {missing[0]}, so it is no tokenizer of CosyVoice 2; pass "
                        "speech_tokenizer_v2.onnx, or its weights as s3tokenizer names them")
    if found[first].ndim != 3:
        raise UserError(f"{where}: {first} has the shape {list(found[first].shape)}; it is no tokenizer of "
                        "CosyVoice 2")
    width, num_mels, _ = found[first].shape
    layers = 1 + max((int(name.split(".")[2]) for name in found
                      if name.startswith("encoder.blocks.") and name.split(".")[2].isdigit()), default=0)
    settings = CosyVoice2Settings(num_mels=num_mels, width=width, num_heads=max(1, width // 64),
                                  num_layers=layers)
    return settings, {f"network.{name}": tensor for name, tensor in found.items()}
