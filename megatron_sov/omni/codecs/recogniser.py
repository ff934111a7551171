"""Speech as text: NeMo's recognisers with a CTC head as codecs.

Of a `.nemo` file only the three networks are taken that hear (spectrogram, encoder, head).  Whatever else its
configuration names (data, tokenizers, language models for beams, other checkpoints) is left behind unread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import nn

from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.omni.codecs.published import BoundedUnpickler, Tensors, config_problems, read_nemo

_NETWORKS = ("preprocessor", "encoder", "decoder")
_MODULES = "nemo.collections.asr.modules."
_CLASSES = frozenset(_MODULES + name for name in (
    "AudioToMelSpectrogramPreprocessor", "ConformerEncoder", "ConvASREncoder", "ConvASRDecoder"))
"""What `_target_` may name."""
_MAX_SIZES = {"features": 1024, "n_fft": 1 << 16, "n_window_size": 1 << 16, "sample_rate": 1 << 18}
"""Of the spectrogram, whose table of filters is made outside of torch, where nothing bounds it."""
_MAX_WORD_PIECES, _MAX_PIECE_CHARS = 1 << 17, 100
_MAX_ELEMENTS = 1 << 31
"""Of all tensors together; published ones have up to 1.1 billion."""
_LEAST_PIECE_S = 0.05
"""Of a piece that is heard.  Of one frame NeMo's spectrogram has no spread, and it refuses that on GPUs."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Begins a word in pieces of SentencePiece."""


@dataclass(frozen=True)
class NemoRecogniserSettings:
    """What of an archive's configuration hears."""

    config: dict[str, Any]
    """`preprocessor`, `encoder` and `decoder` of `model_config.yaml`."""
    sample_rate_hz: Annotated[int, Ge(1), Le(1 << 18)]
    """Of what it hears."""
    max_piece_s: Annotated[float, Ge(0.5), Le(600)] = 30.0
    """A longer sound is cut into pieces of this length."""

    def problems(self) -> list[str]:
        if found := list(recogniser_problems(self.config)):
            return found
        own = self.config["preprocessor"].get("sample_rate")
        return [] if own == self.sample_rate_hz else [
            f"sample_rate_hz = {self.sample_rate_hz}: its spectrogram has {str(own)[:40]}, and would hear "
            "sounds faster or slower than they are"]


class NemoRecogniser(nn.Module):
    """A `folder.Recogniser`: the most probable piece of each frame, equal neighbours once, without blanks."""

    Settings = NemoRecogniserSettings

    def __init__(self, settings: NemoRecogniserSettings) -> None:
        super().__init__()
        self.settings, self.sample_rate_hz = settings, settings.sample_rate_hz
        self.vocabulary: list[str] = settings.config["decoder"]["vocabulary"]
        with torch.device("cpu"):
            self.network = _network(settings.config)

    @staticmethod
    def of_archive(source: Path) -> tuple[NemoRecogniserSettings, Tensors]:
        """Return settings and state of a recogniser's `.nemo` archive.

        Raises:
            UserError: it is none, cannot be read without running it, or is of another kind.
        """
        whole, state = read_nemo(source)
        config = {name: whole[name] for name in _NETWORKS if name in whole}
        if found := list(recogniser_problems(config)):
            raise UserError(list_problems(f"{source}: model_config.yaml", found[:20]))
        rate_hz = config["preprocessor"].get("sample_rate", whole.get("sample_rate", 16_000))
        if type(rate_hz) is not int:  # a bool is none
            raise UserError(f"{source}: model_config.yaml: sample_rate is {str(rate_hz)[:40]!r}, no whole "
                            "number; download it again")
        config["preprocessor"] = config["preprocessor"] | {"sample_rate": rate_hz}
        return NemoRecogniserSettings(config, rate_hz), {
            f"network.{name}": tensor for name, tensor in state.items()
            if name.partition(".")[0] in _NETWORKS}

    def hear(self, sound: torch.Tensor) -> str:
        """Return the words of [s] samples; NeMo fills up the last frame's silence."""
        piece = max(1, int(self.settings.max_piece_s * self.sample_rate_hz))
        with torch.no_grad():
            texts = [self._piece(part) for part in sound.split(piece)] if len(sound) else []
        return " ".join(" ".join(texts).split())

    def _piece(self, sound: torch.Tensor) -> str:
        if len(sound) < _LEAST_PIECE_S * self.sample_rate_hz:
            return ""
        length = torch.tensor([len(sound)], device=sound.device)
        scores, frames, _ = self.network(input_signal=sound[None], input_signal_length=length)
        ids = scores[0, :int(frames[0])].argmax(-1).unique_consecutive().tolist()
        return "".join(self.vocabulary[i] for i in ids if i < len(self.vocabulary)).replace(_SPACE, " ")


def recogniser_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for each part of a configuration that would have NeMo call, read or make other
    things."""
    for name in config.keys() ^ set(_NETWORKS):
        yield f"config.{name}: {'is missing' if name in _NETWORKS else 'is none of the networks that hear'}"
    yield from config_problems(dict(config), _CLASSES)
    parts: dict[str, Any] = {name: config.get(name) for name in _NETWORKS}
    for name, part in parts.items():
        if not isinstance(part, dict) or "_target_" not in part:
            yield f"config.{name}: is no network"
            return
    for name, most in _MAX_SIZES.items():
        size = parts["preprocessor"].get(name)
        if size is not None and not (isinstance(size, int) and 0 < size <= most):
            yield f"config.preprocessor.{name} = {str(size)[:40]}: must be a whole number up to {most:,}"
    window_s = parts["preprocessor"].get("window_size")
    if window_s is not None and not (isinstance(window_s, (int, float)) and 0 < window_s <= 1):
        yield f"config.preprocessor.window_size = {str(window_s)[:40]}: must be a number of seconds up to 1"
    words = parts["decoder"].get("vocabulary")
    if not (isinstance(words, list) and 0 < len(words) <= _MAX_WORD_PIECES
            and all(isinstance(word, str) and len(word) <= _MAX_PIECE_CHARS for word in words)):
        yield (f"config.decoder.vocabulary: must be a list of up to {_MAX_WORD_PIECES:,} texts; use a "
               "recogniser with a CTC head")


def _network(config: Mapping[str, Any]) -> Any:
    """Return NeMo's recogniser of a configuration that was checked, its weights not read.

    Raises:
        UserError: nemo-toolkit is not installed, refuses the configuration, or it asks for more numbers than
            a recogniser has, or for a head of other pieces.
    """
    try:
        from nemo.collections.asr.models import EncDecCTCModel
        from omegaconf import OmegaConf
    except ImportError as e:
        raise UserError(f"codec of kind 'nemo-asr': needs NeMo ({e}), which disagrees with our "
                        "lock; install the extras omni and speech into a Python of its own (docs/install.md)"
                        ) from None
    limits = BoundedUnpickler(_MAX_ELEMENTS)
    try:
        with limits:
            model = EncDecCTCModel(cfg=OmegaConf.create(dict(config)))
    except Exception as e:
        if limits.problem:
            raise UserError(f"codec of kind 'nemo-asr': its configuration {limits.problem}; import a "
                            "recogniser of usual size") from None
        raise UserError("codec of kind 'nemo-asr': NeMo makes no recogniser of its configuration "
                        f"({type(e).__name__}: {str(e)[:200]}); import the .nemo file again") from e
    pieces, wanted = int(model.decoder.num_classes_with_blank), len(config["decoder"]["vocabulary"]) + 1
    if pieces != wanted:
        raise UserError(f"codec of kind 'nemo-asr': its head knows {pieces:,} pieces and its vocabulary, "
                        f"with the blank, {wanted:,}; import the .nemo file again")
    return model
