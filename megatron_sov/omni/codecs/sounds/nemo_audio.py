"""A codec of NeMo (`AudioCodecModel` of nemo-toolkit) with one codebook as a tokenizer of speech.

A `.nemo` file is an archive of a configuration, whose `_target_` fields name what NeMo then calls, and of
pickled weights.  Neither is trusted: `codec import` reads the weights without unpickling, only classes of
NeMo's own speech codecs may be named, and nothing is looked up in the environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sov.base.errors import UserError

# What a network that another's settings describe may reserve while it is made.

MAX_ELEMENTS = 1 << 29
"""Of all tensors together: 2 GiB in float32, several times what published codecs have."""
MAX_TENSORS = 100_000


class BoundedUnpickler(TorchDispatchMode):
    """While it is entered, tensors beyond the bounds raise `MemoryError` before they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        """What was asked for, where it was too much: what made the network may have told it otherwise."""
        self._num_elements = self._num_tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Count what an operation makes that begins with sizes (`empty`, `zeros`, ...) or a range."""
        asked = args[0] if args else None
        if isinstance(asked, (list, tuple)) and asked and all(isinstance(n, int) for n in asked):
            self._num_elements += math.prod(asked)
            self._num_tensors += 1
        elif isinstance(asked, (int, float)):
            self._num_elements += int(max(abs(n) for n in args if isinstance(n, (int, float))))
        if self._num_elements > MAX_ELEMENTS or self._num_tensors > MAX_TENSORS:
            self.problem = (f"asks for {self._num_elements:,} numbers in {self._num_tensors:,} tensors, and "
                            f"at most {MAX_ELEMENTS:,} in {MAX_TENSORS:,} are reserved")
            raise MemoryError(self.problem)
        return func(*args, **kwargs or {})


_NAMED = {
    "modules.audio_codec_modules": (
        "CausalHiFiGANDecoder", "CausalHiFiGANEncoder", "FiniteScalarQuantizer", "FullBandMelEncoder",
        "GroupFiniteScalarQuantizer", "HiFiGANDecoder", "HiFiGANEncoder", "MelSpectrogramProcessor",
        "MultiBandMelEncoder", "ResNetEncoder"),
    "modules.encodec_modules": ("SEANetDecoder", "SEANetEncoder"),  # its quantisers do not tell their sizes
    "losses.audio_codec_loss": (
        "DiscriminatorHingedLoss", "DiscriminatorSquaredLoss", "GeneratorHingedLoss", "GeneratorSquaredLoss")}
_CLASSES = frozenset(f"nemo.collections.tts.{module}.{name}" for module, names in _NAMED.items()
                     for name in names)
"""What `_target_` may name.  A module of NeMo is no bound: Hydra walks from it to all that it imports
(`...audio_codec_modules.torch.ctypes.util.subprocess.Popen`), and `SLMDiscriminator` downloads a model."""
_OLD_KEYS = ("cls", "params")
"""Hydra 0's: NeMo makes `_target_` of the first and lays the second over its parent, after our check."""
UNUSED = ("train_ds", "validation_ds", "test_ds", "optim", "log_config", "exp_manager", "trainer")
"""Fields of a configuration that belong to its training; a model that is made with them opens files."""
NEUTRAL = {"discriminator": None, "use_scl_loss": False}
"""Others that belong to it, which NeMo reads always: a loss of speakers downloads a pickled network."""
UNHEARD = ("discriminator.", "speaker_encoder.")
"""Weights of them."""
_MAX_DEPTH, _MAX_ITEMS, _MAX_SHOWN_CHARS = 20, 100_000, 200
_MAX_NUMBER = 1_000_000
"""Sizes and rates: tables of filters are made outside of torch, and a layer of each count."""


@dataclass(frozen=True)
class NemoAudioSettings:
    """The configuration that the archive came with."""

    config: dict[str, Any]
    """`model_config.yaml`, without what belongs to training."""
    sample_rate_hz: int
    """Of what it hears."""
    samples_per_frame: int
    """Of one token."""
    codebook_size: int
    """Tokens there are."""
    code_width: int
    """Of a token's embedding."""
    max_piece_s: float = 30.0
    """A longer sound is cut into pieces of this length."""

    def problems(self) -> list[str]:
        """Return one sentence for each setting that is not well."""
        return list(config_problems(self.config))


class NemoAudioTokenizer(nn.Module):
    """Speech as ids; an `interface.AudioTokenizer`."""

    Settings = NemoAudioSettings

    def __init__(self, settings: NemoAudioSettings) -> None:
        super().__init__()
        self.settings = settings
        self.sample_rate_hz, self.samples_per_token = settings.sample_rate_hz, settings.samples_per_frame
        self.codebook_size, self.max_piece_s = settings.codebook_size, settings.max_piece_s
        self.width = settings.code_width
        with torch.device("cpu"):
            self.network = nemo_model(settings.config)

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [t] int64 ids of [s] samples; NeMo fills up the last token's silence."""
        tokens = int(self.max_piece_s * self.sample_rate_hz / self.samples_per_token)
        ids = []
        with torch.no_grad():
            for part in sound.split(max(1, tokens) * self.samples_per_token) if len(sound) else []:
                length = torch.tensor([len(part)], device=sound.device)
                found, _ = self.network.encode(audio=part[None], audio_len=length)
                ids.append(found[0, 0].long())
        return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [t, width] float32 embeddings of ids."""
        with torch.no_grad():
            length = torch.tensor([len(ids)], device=ids.device)
            found: torch.Tensor = self.network.dequantize(tokens=ids[None, None], tokens_len=length)
            return found[0].T.float()


def nemo_model(config: Mapping[str, Any]) -> Any:
    """Return NeMo's codec of a configuration that was checked, its weights not read.

    Raises:
        UserError: nemo-toolkit is not installed, refuses the configuration, or it has several codebooks or
            asks for more numbers than a codec has.
    """
    try:
        from nemo.collections.tts.models import AudioCodecModel
        from omegaconf import OmegaConf
    except ImportError as e:
        raise UserError(f"codec of kind 'nemo-audio': needs NeMo ({e}); install it by "
                        "`pip install nemo-toolkit[tts]`") from None
    bounded = BoundedUnpickler()
    try:
        with bounded:
            model = AudioCodecModel(cfg=OmegaConf.create(dict(config)))
    except Exception as e:
        if bounded.problem:
            raise UserError(f"codec of kind 'nemo-audio': its configuration {bounded.problem}; import a "
                            "codec of usual size") from None
        raise UserError("codec of kind 'nemo-audio': NeMo makes no codec of its configuration "
                        f"({type(e).__name__}: {str(e)[:200]}); import the .nemo file again") from e
    quantiser = model.vector_quantizer
    # a group of scalar quantisers has a codebook of each; one by itself does not count in NeMo 2.5
    count = 0 if quantiser is None else getattr(quantiser, "num_codebooks",
                                                getattr(quantiser, "num_groups", 1))
    if count != 1:
        raise UserError(f"codec of kind 'nemo-audio': has {count or 'no'} codebooks, where a token is one "
                        "number; use a codec with one codebook")
    return model


def config_problems(config: object) -> Iterator[str]:
    """Yield one sentence for each part of a configuration that would have NeMo call or read other things."""
    if isinstance(config, dict):
        for name in NEUTRAL:
            if config.get(name):
                yield f"config.{name}: belongs to training, which may download other networks; leave it out"
    stack: list[tuple[str, object, int]] = [("config", config, 0)]
    num_items = 0
    while stack:
        where, node, depth = stack.pop()
        num_items += 1
        if depth > _MAX_DEPTH or num_items > _MAX_ITEMS:
            yield f"{where}: is nested deeper than {_MAX_DEPTH}, or has too many items ({_MAX_ITEMS:,})"
            return
        if isinstance(node, dict):
            target = node.get("_target_")
            if target is not None and not (isinstance(target, str) and target in _CLASSES):
                # what is no text may hold itself again and again, and is not written out
                told = repr(target[:100]) if isinstance(target, str) else f"a {type(target).__name__}"
                yield f"{where}._target_ = {told}: names no network of NeMo's for speech"
            yield from (f"{where}.{key}: is of an old form, which NeMo would turn into calls that nobody "
                        "checked" for key in _OLD_KEYS if key in node)
            stack += [(f"{where}.{str(key)[:100]}"[:_MAX_SHOWN_CHARS], value, depth + 1)
                      for key, value in node.items()]
        elif isinstance(node, list):
            stack += [(f"{where}.{i}"[:_MAX_SHOWN_CHARS], value, depth + 1) for i, value in enumerate(node)]
        elif isinstance(node, (int, float)) and not abs(node) <= _MAX_NUMBER:
            yield f"{where} = {str(node)[:40]}: is no number of a codec; each is at most {_MAX_NUMBER:,}"
        elif isinstance(node, str) and ":" in node.partition("${")[2]:
            yield f"{where} = {node[:100]!r}: would be looked up outside of the file"
