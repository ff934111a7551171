"""Codecs from transformers and diffusers with `encode` and `decode`, in `save_pretrained` folders.

Audio codecs with several codebooks interleave the codes of a frame; each codebook has its own range of ids.
"""

import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from megatron_sov.base.errors import UserError, first_error_line, format_problems
from megatron_sov.model.pretrained import CONFIG, load_pretrained, read_json

MAX_PIECE_S = 30.0
MAX_PARAMETERS = 5000
"""Largest network, in parameter tensors: ten times the published codecs."""
_IGNORED_FIELDS = ("architectures", "transformers_version", "dtype")
_REFUSED_FIELDS = ("auto_map", "attn_implementation", "quantization_config")
"""Config fields that make transformers load code or other weights."""
_MAX_DEPTH = 20
_MAX_NUMBER = 1_000_000
"""Largest number in a config: it also limits filter tables that are built without torch, and therefore not on
the meta device."""
Config = dict[str, Any]


def limit_parameters() -> RemovableHandle:
    """Return a context that raises `MemoryError` if a network gets more than `MAX_PARAMETERS` parameters.
    Their sizes need no limit: `open_codec` compares them with the weights before it reserves memory."""
    numbers = itertools.count(1)

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if next(numbers) > MAX_PARAMETERS:
            raise MemoryError(f"asks for more than {MAX_PARAMETERS:,} tensors")

    return register_module_parameter_registration_hook(count_parameter)


def find_config_problems(config: object, is_imported: bool = False, where: str = "config", depth: int = 0
                         ) -> Iterator[str]:
    """Yield a message for each config entry that is nested too deep or too large, and with `is_imported` for
    each field that an import drops."""
    if depth > _MAX_DEPTH:
        yield f"{where}: is nested deeper than {_MAX_DEPTH}"
    elif isinstance(config, dict):
        for name in map(str, config):
            if is_imported and (name in _REFUSED_FIELDS or name.startswith("_")):
                yield f"{where}.{name[:80]}: is not a size of a codec; leave it out"
        for key, value in config.items():
            yield from find_config_problems(value, is_imported, f"{where}.{str(key)[:100]}", depth + 1)
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from find_config_problems(value, is_imported, f"{where}.{i}", depth + 1)
    elif isinstance(config, (int, float)) and not abs(config) <= _MAX_NUMBER:
        yield f"{where} = {str(config)[:40]}: is too large for a codec; at most {_MAX_NUMBER:,}"


@dataclass(frozen=True)
class HfImageSettings:
    config: Config
    """Sizes from `config.json`."""
    side_pixels: Annotated[int, Ge(1), Le(4096)]
    """Picture height and width."""

    def problems(self) -> list[str]:
        return list(find_config_problems(self.config, is_imported=True))


@dataclass(frozen=True)
class HfAudioSettings:
    config: Config
    """Sizes from `config.json`."""
    num_codebooks: Annotated[int, Ge(1), Le(128)] = 1
    """Number of codebooks to use, starting with the first."""

    def problems(self) -> list[str]:
        return list(find_config_problems(self.config, is_imported=True))


class HfCodec(nn.Module):
    """Codec with a network of transformers or diffusers, built from the network's config."""

    MODEL: ClassVar[str]
    """The network's module:class."""
    network: Any

    @classmethod
    def load_model_class(cls) -> Any:
        module, _, name = cls.MODEL.partition(":")
        return getattr(importlib.import_module(module), name)

    @classmethod
    def _load_network(cls, folder: Path) -> tuple[Any, Config]:
        """Load a network in float32 and return it with the sizes in its config. Raises `UserError`: files are
        missing, damaged, pickled, or belong to another model."""
        if problems := list(find_config_problems(read_json(folder / CONFIG))):
            raise UserError(format_problems(f"{folder / CONFIG}", problems[:20]))
        model = load_pretrained(cls.load_model_class(), folder)
        config = model.config
        text = (config.to_json_string(use_diff=False) if hasattr(config, "to_json_string")
                else json.dumps(dict(config)))
        sizes: Config = _extract_sizes(json.loads(text))
        return model.float().eval(), sizes

    def _build_network(self, config: Config) -> None:
        model_class = self.load_model_class()
        try:
            with limit_parameters():
                if hasattr(model_class, "config_class"):
                    self.network = model_class(model_class.config_class.from_dict(dict(config)))
                else:
                    self.network = model_class(**config)
        except Exception as e:
            raise UserError(f"the codec's configuration cannot build {model_class.__name__} "
                            f"({type(e).__name__}: {first_error_line(e)[:200]}); import the codec again"
                            ) from None


def _extract_sizes(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _extract_sizes(value) for name, value in config.items()
                if not name.startswith("_") and name not in (*_IGNORED_FIELDS, *_REFUSED_FIELDS)}
    return [_extract_sizes(value) for value in config] if isinstance(config, list) else config


class VQModelCodec(HfCodec):
    """`VQModel` from diffusers: encodes pictures as ids and decodes ids."""

    MODEL = "diffusers:VQModel"
    Settings = HfImageSettings

    def __init__(self, settings: HfImageSettings) -> None:
        super().__init__()
        self.settings, self.side_pixels = settings, settings.side_pixels
        self._build_network(settings.config)
        patch_pixels = 2 ** (len(self.network.config.block_out_channels) - 1)
        self.grid, remainder = divmod(settings.side_pixels, patch_pixels)
        if remainder:
            raise UserError(f"side_pixels = {settings.side_pixels}: must be a multiple of the codec's "
                            f"{patch_pixels} pixels for a token; import the codec with --side-pixels")
        self.codebook_size = int(self.network.config.num_vq_embeddings)

    @classmethod
    def from_folder(cls, folder: Path, side_pixels: int | None = None) -> Self:
        """Load a codec from a `save_pretrained` folder.

        Args:
            folder: config and weights.
            side_pixels: height and width of pictures; None: from the config.
        """
        network, config = cls._load_network(folder)
        codec = cls(HfImageSettings(config, side_pixels or int(config["sample_size"])))
        codec.network = network
        return codec

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return int64 ids [n, grid * grid] for float32 pictures [n, 3, side, side] in 0..1."""
        with torch.no_grad():
            latents = self.network.encode(pictures * 2 - 1).latents
            ids: torch.Tensor = self.network.quantize(latents)[2][2]
        return ids.view(len(pictures), -1).long()

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 pictures [n, 3, side, side] in 0..1 for ids [n, grid * grid]."""
        network = self.network
        shape = (len(ids), self.grid, self.grid, network.quantize.vq_embed_dim)
        latents = ids.flatten()
        with torch.no_grad():
            if not network.config.lookup_from_codebook:
                latents = network.quantize.get_codebook_entry(latents, shape)
            pixels: torch.Tensor = network.decode(latents, force_not_quantize=True, shape=shape).sample
        return (pixels / 2 + 0.5).clamp(0, 1)


class HfAudioCodec(HfCodec):
    """Encodes sounds as ids and decodes ids."""

    Settings = HfAudioSettings
    CODEBOOKS_ARGUMENT: ClassVar[str]
    """Argument for the codebook count in the network's `encode`."""
    CODEBOOKS_FIELD: ClassVar[str]
    """Config field with the network's codebook count."""
    max_piece_s = MAX_PIECE_S

    def __init__(self, settings: HfAudioSettings) -> None:
        super().__init__()
        self.settings, self.num_codebooks = settings, settings.num_codebooks
        self._build_network(settings.config)
        config = self.network.config
        try:
            self._frame_samples = round(config.sampling_rate / config.frame_rate)
        except (ArithmeticError, TypeError):
            self._frame_samples = 0
        if self._frame_samples < 1:
            raise UserError(f"the codec's configuration has sampling_rate = {config.sampling_rate}, and no "
                            "valid frame rate; import the codec again")
        self._size = int(config.codebook_size)
        max_codebooks = int(getattr(config, self.CODEBOOKS_FIELD))
        if self.num_codebooks > max_codebooks:
            raise UserError(f"num_codebooks = {self.num_codebooks}: the codec has {max_codebooks}; import it "
                            "with fewer --codebooks")
        self.sample_rate_hz, self.codebook_size = int(config.sampling_rate), self._size * self.num_codebooks
        self.samples_per_token = self._frame_samples / self.num_codebooks

    @classmethod
    def from_folder(cls, folder: Path, num_codebooks: int = 1) -> Self:
        """Load a codec from a `save_pretrained` folder, to be used with its first `num_codebooks`."""
        network, config = cls._load_network(folder)
        codec = cls(HfAudioSettings(config, num_codebooks))
        codec.network = network
        return codec

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return int64 ids [frames * num_codebooks] for samples [s]; silence pads the last frame."""
        num_frames = int(self.max_piece_s * self.sample_rate_hz / self._frame_samples)
        if not len(sound):
            return torch.zeros(0, dtype=torch.int64)
        with torch.no_grad():
            pieces = sound.split(num_frames * self._frame_samples)
            return torch.cat([self._encode_piece(piece) for piece in pieces])

    def _encode_piece(self, sound: torch.Tensor) -> torch.Tensor:
        padded = F.pad(sound, (0, -len(sound) % self._frame_samples))[None, None]
        encoded = self.network.encode(padded, **{self.CODEBOOKS_ARGUMENT: self.num_codebooks})
        codes = encoded.audio_codes[0].long()  # [codebooks, frames]
        # Offset the codebooks to disjoint id ranges.
        ids = codes + self._size * torch.arange(self.num_codebooks, device=codes.device)[:, None]
        return ids.T.flatten()

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 samples [s] in -1..1 for ids [tokens]; an incomplete last frame is dropped."""
        num_complete = len(ids) - len(ids) % self.num_codebooks
        frames = ids[:num_complete].view(-1, self.num_codebooks) % self._size
        if not len(frames):
            return torch.zeros(0)
        with torch.no_grad():
            sound: torch.Tensor = self.network.decode(audio_codes=frames.T[None]).audio_values
        return sound.flatten().clamp(-1, 1)


class MimiCodec(HfAudioCodec):
    """`MimiModel` from transformers; its first codebook encodes the words."""

    MODEL = "transformers:MimiModel"
    CODEBOOKS_ARGUMENT = CODEBOOKS_FIELD = "num_quantizers"


class DacCodec(HfAudioCodec):
    """`DacModel` from transformers."""

    MODEL, CODEBOOKS_ARGUMENT, CODEBOOKS_FIELD = "transformers:DacModel", "n_quantizers", "n_codebooks"
