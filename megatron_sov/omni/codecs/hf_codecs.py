"""Codecs of transformers and diffusers, which encode and decode, read from folders of `save_pretrained`.

A sound's token is one number: of a codec with several codebooks, a frame's codes follow one another, each
moved behind the codebooks before it.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sov.base.errors import UserError, first_error_line, format_problems
from megatron_sov.model.pretrained import CONFIG, load_pretrained, read_json

MAX_PIECE_S = 30.0
MAX_TENSORS = 5000
"""Of a network: ten times what published codecs have."""
_PASSED_OVER = ("architectures", "transformers_version", "dtype")
_REFUSED = ("auto_map", "attn_implementation", "quantization_config")
"""Fields by which transformers loads code or other weights."""
MAX_ELEMENTS = 1 << 29
"""Of all tensors together: 2 GiB in float32, several times what published codecs have."""
_MAX_DEPTH, _MAX_ITEMS, _MAX_SHOWN_CHARS = 20, 100_000, 200
_MAX_NUMBER = 1_000_000
"""Sizes and rates: tables of filters are made outside of torch, and a layer of each count."""
Config = dict[str, Any]


class BoundedTensors(TorchDispatchMode):
    """While it is entered, tensors beyond the bounds raise `MemoryError` before they are made."""

    def __init__(self, max_elements: int = MAX_ELEMENTS, max_tensors: int = MAX_TENSORS) -> None:
        super().__init__()
        self._max_elements, self._max_tensors = max_elements, max_tensors
        self.problem = ""
        """Numbers and tensors that were asked for, if they were too many."""
        self._num_elements = self._num_tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Count what an operation makes that begins with sizes (`empty`, `zeros`, ...) or a range."""
        # operations that make a tensor have its size first; the dispatcher sees them before memory is
        # reserved
        asked = args[0] if args else None
        if isinstance(asked, (list, tuple)) and asked and all(isinstance(n, int) for n in asked):
            self._num_elements += math.prod(asked)
            self._num_tensors += 1
        elif isinstance(asked, (int, float)):
            self._num_elements += int(max(abs(n) for n in args if isinstance(n, (int, float))))
        if self._num_elements > self._max_elements or self._num_tensors > self._max_tensors:
            self.problem = (f"asks for {self._num_elements:,} numbers in {self._num_tensors:,} tensors, and "
                            f"at most {self._max_elements:,} in {self._max_tensors:,} are reserved")
            raise MemoryError(self.problem)
        return func(*args, **kwargs or {})


def config_problems(config: object) -> Iterator[str]:
    """Yield one sentence for each part of a configuration that is nested too deep or no size of a codec."""
    # without recursion: the file decides how deep it is nested
    stack: list[tuple[str, object, int]] = [("config", config, 0)]
    num_items = 0
    while stack:
        where, node, depth = stack.pop()
        num_items += 1
        if depth > _MAX_DEPTH or num_items > _MAX_ITEMS:
            yield f"{where}: is nested deeper than {_MAX_DEPTH}, or has too many items ({_MAX_ITEMS:,})"
            return
        if isinstance(node, dict):
            stack += [(f"{where}.{str(key)[:100]}"[:_MAX_SHOWN_CHARS], value, depth + 1)
                      for key, value in node.items()]
        elif isinstance(node, list):
            stack += [(f"{where}.{i}"[:_MAX_SHOWN_CHARS], value, depth + 1) for i, value in enumerate(node)]
        elif isinstance(node, (int, float)) and not abs(node) <= _MAX_NUMBER:
            yield f"{where} = {str(node)[:40]}: is no number of a codec; each is at most {_MAX_NUMBER:,}"


def _refused_fields(config: object, where: str = "config") -> Iterator[str]:
    if isinstance(config, dict):
        for name, value in config.items():
            if name in _REFUSED or str(name).startswith("_"):
                yield f"{where}.{str(name)[:80]}: is no size of a codec; leave it out"
            yield from _refused_fields(value, f"{where}.{str(name)[:80]}")
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from _refused_fields(value, f"{where}.{i}")


def _problems(config: Config) -> list[str]:
    # the first reads without recursion, and bounds the depth for the second
    return list(config_problems(config)) or list(_refused_fields(config))


@dataclass(frozen=True)
class HfImageSettings:
    """A codec of pictures."""

    config: Config
    """`config.json` of its folder, sizes alone."""
    side_pixels: Annotated[int, Ge(1), Le(4096)]
    """Height and width of a picture."""

    def problems(self) -> list[str]:
        return _problems(self.config)


@dataclass(frozen=True)
class HfAudioSettings:
    """A codec of sounds."""

    config: Config
    """`config.json` of its folder, sizes alone."""
    num_codebooks: Annotated[int, Ge(1), Le(128)] = 1
    """Codes of a frame, the first ones of those that the codec has."""

    def problems(self) -> list[str]:
        return _problems(self.config)


class HfCodec(nn.Module):
    """A network of a library, made of its own configuration."""

    MODEL: ClassVar[str]
    """Module and class."""
    network: Any

    @classmethod
    def model_class(cls) -> Any:
        module, _, name = cls.MODEL.partition(":")
        return getattr(importlib.import_module(module), name)

    @classmethod
    def _load(cls, folder: Path) -> tuple[Any, Config]:
        """Return the library's model of a folder, and the sizes in its configuration.

        Raises:
            UserError: its files are missing, damaged, pickled or of another model.
        """
        if found := _raw_problems(folder):
            raise UserError(format_problems(f"{folder / CONFIG}", found[:20]))
        model = load_pretrained(cls.model_class(), folder)
        config = model.config
        text = (config.to_json_string(use_diff=False) if hasattr(config, "to_json_string")
                else json.dumps(dict(config)))
        sizes: Config = _sizes(json.loads(text))
        return model.float().eval(), sizes

    def _build(self, config: Config) -> None:
        """Make the network, its weights not read, within the bounds of a codec."""
        model, bounded = self.model_class(), BoundedTensors()
        try:
            with bounded:
                self.network = (model(model.config_class.from_dict(dict(config)))
                                if hasattr(model, "config_class") else model(**config))
        except Exception as e:
            said = bounded.problem or (f"makes no {model.__name__} ({type(e).__name__}: "
                                       f"{first_error_line(e)[:200]})")
            raise UserError(f"the codec's configuration {said}; import the codec again") from None


def _raw_problems(folder: Path) -> list[str]:
    return list(config_problems(read_json(folder / CONFIG)))


def _sizes(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _sizes(value) for name, value in config.items()
                if not name.startswith("_") and name not in (*_PASSED_OVER, *_REFUSED)}
    return [_sizes(value) for value in config] if isinstance(config, list) else config


class HfImageCodec(HfCodec):
    """Pictures as ids and back."""

    Settings = HfImageSettings

    def __init__(self, settings: HfImageSettings) -> None:
        super().__init__()
        self.settings, self.side_pixels = settings, settings.side_pixels
        self._build(settings.config)
        self.grid, rest = divmod(settings.side_pixels, self._patch_pixels())
        if rest:
            raise UserError(f"side_pixels = {settings.side_pixels}: must be a multiple of the codec's "
                            f"{self._patch_pixels()} pixels for a token; import the codec with --side-pixels")
        self.codebook_size = self._codebook_size()

    @classmethod
    def of_folder(cls, folder: Path, side_pixels: int | None = None) -> Self:
        """Return the codec of a folder; `side_pixels`: of its pictures, unless the configuration says."""
        network, config = cls._load(folder)
        codec = cls(HfImageSettings(config, side_pixels or cls._own_side(config)))
        codec.network = network
        return codec

    @classmethod
    def _own_side(cls, config: Config) -> int:
        raise NotImplementedError

    def _patch_pixels(self) -> int:
        raise NotImplementedError

    def _codebook_size(self) -> int:
        raise NotImplementedError

    def _ids(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return ids, row by row, of pixels [n, 3, side, side] in -1..1."""
        raise NotImplementedError

    def _pixels(self, ids: torch.Tensor) -> torch.Tensor:
        """Return pixels in -1..1 of ids [n, grid * grid]."""
        raise NotImplementedError

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            return self._ids(pictures * 2 - 1).view(len(pictures), -1).long()

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, 3, side, side] float32 pictures in 0..1 of [n, grid * grid] ids."""
        with torch.no_grad():
            return (self._pixels(ids) / 2 + 0.5).clamp(0, 1)


class VQModelCodec(HfImageCodec):
    """diffusers' VQModel."""

    MODEL = "diffusers:VQModel"

    @classmethod
    def _own_side(cls, config: Config) -> int:
        return int(config["sample_size"])

    def _patch_pixels(self) -> int:
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    def _codebook_size(self) -> int:
        return int(self.network.config.num_vq_embeddings)

    def _ids(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network.quantize(self.network.encode(pixels).latents)[2][2]
        return found

    def _pixels(self, ids: torch.Tensor) -> torch.Tensor:
        network = self.network
        shape = (len(ids), self.grid, self.grid, network.quantize.vq_embed_dim)
        entries = ids.flatten()
        if not network.config.lookup_from_codebook:
            entries = network.quantize.get_codebook_entry(entries, shape)
        found: torch.Tensor = network.decode(entries, force_not_quantize=True, shape=shape).sample
        return found


class JanusCodec(HfImageCodec):
    """transformers' JanusVQVAE."""

    MODEL = "transformers:JanusVQVAE"

    def __init__(self, settings: HfImageSettings) -> None:
        super().__init__(settings)
        num_patches = self.network.config.num_patches
        if self.grid != num_patches:  # it decodes pictures of one size alone
            raise UserError(f"side_pixels = {settings.side_pixels}: must be "
                            f"{num_patches * self._patch_pixels()} for this codec; import the codec again")

    @classmethod
    def _own_side(cls, config: Config) -> int:
        return int(config["num_patches"] * 2 ** (len(config["channel_multiplier"]) - 1))

    def _patch_pixels(self) -> int:
        return int(2 ** (len(self.network.config.channel_multiplier) - 1))

    def _codebook_size(self) -> int:
        return int(self.network.config.num_embeddings)

    def _ids(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network.encode(pixels).image_tokens
        return found

    def _pixels(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network.decode(ids)
        return found


class HfAudioCodec(HfCodec):
    """Sounds as ids and back."""

    Settings = HfAudioSettings
    COUNT: ClassVar[str]
    """Argument of the network's `encode` for the number of codebooks."""
    max_piece_s = MAX_PIECE_S

    def __init__(self, settings: HfAudioSettings) -> None:
        super().__init__()
        self.settings, self.num_codebooks = settings, settings.num_codebooks
        self._build(settings.config)
        config = self.network.config
        try:
            self._frame_samples = round(config.sampling_rate / config.frame_rate)
        except (ArithmeticError, TypeError):
            self._frame_samples = 0
        if self._frame_samples < 1:
            raise UserError(f"the codec's configuration has sampling_rate = {config.sampling_rate}, and no "
                            "rate of frames; import the codec again")
        self._size = int(config.codebook_size)
        if self.num_codebooks > self._most():
            raise UserError(f"num_codebooks = {self.num_codebooks}: the codec has {self._most()}; import it "
                            "with fewer --codebooks")
        self.sample_rate_hz, self.codebook_size = int(config.sampling_rate), self._size * self.num_codebooks
        self.samples_per_token = self._frame_samples / self.num_codebooks

    @classmethod
    def of_folder(cls, folder: Path, num_codebooks: int = 1) -> Self:
        """Return the codec of a folder, of which the first codebooks are used."""
        network, config = cls._load(folder)
        codec = cls(HfAudioSettings(config, num_codebooks))
        codec.network = network
        return codec

    def _most(self) -> int:
        raise NotImplementedError

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [frames * num_codebooks] int64 ids of [s] samples; the last frame's silence is filled up."""
        piece = int(self.max_piece_s * self.sample_rate_hz / self._frame_samples) * self._frame_samples
        with torch.no_grad():
            found = [self._codes(part) for part in sound.split(piece)] if len(sound) else []
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def _codes(self, sound: torch.Tensor) -> torch.Tensor:
        filled = F.pad(sound, (0, -len(sound) % self._frame_samples))[None, None]
        codes = self.network.encode(filled, **{self.COUNT: self.num_codebooks}).audio_codes[0].long()
        # [codebooks, frames]: each codebook has ids of its own
        moved = codes + self._size * torch.arange(self.num_codebooks, device=codes.device)[:, None]
        return moved.T.flatten()

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [samples] float32 in -1..1 of ids; codes of a last frame that is not whole are left out."""
        frames = ids[:len(ids) - len(ids) % self.num_codebooks].view(-1, self.num_codebooks) % self._size
        if not len(frames):
            return torch.zeros(0)
        with torch.no_grad():
            sound: torch.Tensor = self.network.decode(audio_codes=frames.T[None]).audio_values
        return sound.flatten().clamp(-1, 1)


class MimiCodec(HfAudioCodec):
    """transformers' Mimi, whose first codebook is what is said."""

    MODEL, COUNT = "transformers:MimiModel", "num_quantizers"

    def _most(self) -> int:
        return int(self.network.config.num_quantizers)


class DacCodec(HfAudioCodec):
    """transformers' DAC."""

    MODEL, COUNT = "transformers:DacModel", "n_quantizers"

    def _most(self) -> int:
        return int(self.network.config.n_codebooks)
