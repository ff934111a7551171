"""Published tokenizers as codecs: CosyVoice 2's network, and how files of others are read.

Tensors are read without unpickling, and written under our names."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from safetensors import safe_open
from torch import nn

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import UserError, format_error
from megatron_sov.base.settings import ProblemCode, SettingsError, SettingsProblem, find_all_problems
from megatron_sov.chat.limits import TemplateTimeout, limit_resources
from megatron_sov.omni.codecs.folder import KIND, codec_class, save_codec
from megatron_sov.omni.codecs.ta_tok import ta_tok_state

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
        return [] if self.width == 64 * self.num_heads else [
            SettingsProblem(ProblemCode.RULE, "width", f"must be 64 times num_heads = {self.num_heads}",
                            self.width)]


class CosyVoice2Tokenizer(nn.Module):
    """Speech as ids, 25 a second out of 6,561 (https://arxiv.org/abs/2412.10117); networks and log-mel frames
    are those of the package s3tokenizer (xingchensong/S3Tokenizer on GitHub)."""

    Settings = CosyVoice2Settings
    sample_rate_hz = 16_000
    samples_per_token = _HOP_SAMPLES * _FRAMES_PER_TOKEN
    codebook_size = LEVELS**NUM_LEVELS
    max_piece_s = float(_MAX_PIECE_S)

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


def cosyvoice2_state(found: Mapping[str, torch.Tensor],
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


INSIDE = {"ta-tok": "model.discrete_vision_model.", "cosyvoice2": "model.discrete_audio_model."}
"""Kind -> how its tensors' names begin inside a released any-to-any model (HyperCLOVA X 8B Omni)."""
_LOADING_S, _LOADING_BYTES, _LOADING_COPIES = 300.0, 1 << 29, 4
"""What reading a pickle of tensors may take: processor time; memory, and times the file's size beside it.
One of a hundred bytes may ask for all there is."""
Tensors = dict[str, torch.Tensor]
_CONVERTERS: dict[str, Callable[[Mapping[str, torch.Tensor], str], tuple[Any, Tensors]]] = {
    "ta-tok": ta_tok_state, "cosyvoice2": cosyvoice2_state}


def import_codec(kind: str, source: Path, output: Path, *, overwrite: bool = False, **given: Any) -> None:
    """Write a codec of what others published.

    Args:
        kind: one of `folder.KNOWN`.
        source: a file (.safetensors, .pth, .pt, .onnx), or a folder of safetensors files.
        output: the codec's folder.
        overwrite: replace a codec that is already there.
        given: what `of_folder` of a codec of transformers or diffusers takes.

    Raises:
        UserError: the source cannot be read without running it, or is another network.
    """
    check_output_folder(output, KIND, overwrite)
    cls = codec_class(kind, str(source))
    if hasattr(cls, "of_folder"):
        save_codec(output, kind, cls.of_folder(source, **given), overwrite=overwrite)
        return
    settings, state = _CONVERTERS[kind](_tensors(source, INSIDE[kind]), str(source))
    if found := find_all_problems(settings):
        raise SettingsError(f"{source}: its sizes", found)
    with torch.device("meta"):  # sizes that small tensors tell apart may ask for much together
        expected = cls(settings).state_dict()
    _compare(expected, state, source)
    codec: nn.Module = cls(settings)
    # names and shapes have been compared: what is left is a copy
    codec.load_state_dict(state)
    save_codec(output, kind, codec, overwrite=overwrite)


def _compare(own: Mapping[str, torch.Tensor], state: Tensors, source: Path) -> None:
    """Raise `UserError` where a weight is missing, unknown, of another shape or not finite."""
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            said = "lacks" if name not in state else "has more than the codec needs:"
            raise UserError(f"{source}: {said} what is {name} here; it is of another version of it")
        if own[name].shape != state[name].shape:
            raise UserError(f"{source}: what is {name} here has the shape {list(state[name].shape)}, not "
                            f"{list(own[name].shape)}; it is of another version of it")
        if not bool(state[name].isfinite().all()):
            raise UserError(f"{source}: what is {name} here has numbers that are not finite; download it "
                            "again")


def _tensors(source: Path, inside: str) -> Tensors:
    # of a folder safetensors alone: other files in it may be pickles
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{source}: {'has no safetensors files' if source.is_dir() else 'does not exist'}; "
                        "pass the file or folder that you downloaded")
    found: Tensors = {}
    for file in files:
        found |= _read(file, inside)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _read(file: Path, inside: str) -> Tensors:
    """Return the tensors of one file; where some begin with `inside`, these alone, without it."""
    if file.suffix == ".onnx":
        return _onnx(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
                own = [name for name in names if name.startswith(inside)] or names
                return {name.removeprefix(inside): opened.get_tensor(name) for name in own}
        _refuse_inflated(file)
        with limit_resources(_LOADING_S, _LOADING_BYTES + _LOADING_COPIES * file.stat().st_size):
            # torch's restricted unpickler runs no code of the file; time and memory are bounded around it
            raw = torch.load(file, map_location="cpu", weights_only=True)
    except (TemplateTimeout, MemoryError):
        raise UserError(f"{file}: takes more memory or time to read than weights of its size can need; pass "
                        "them as safetensors") from None
    except Exception as e:  # what is no pickle of tensors raises as it likes
        raise UserError(f"{file}: cannot be read without running what it holds ({format_error(e)[:200]}); "
                        "pass its weights as safetensors, e.g. those of a model with it inside") from None
    # published files wrap their weights, some of them twice
    for key in ("model", "sd", "state_dict"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
    if not isinstance(raw, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in raw.values()):
        raise UserError(f"{file}: holds no names with tensors; pass the file with a tokenizer's weights")
    if not _are_held(raw.values(), file.stat().st_size):
        raise UserError(f"{file}: its tensors are not numbers that it holds; pass the file with a "
                        "tokenizer's weights")
    return {str(name): tensor for name, tensor in raw.items()}


def _refuse_inflated(file: Path) -> None:
    """Raise ValueError where an archive of torch.save would be larger in memory than it is on the disk."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) \
                or sum(m.file_size for m in members) > file.stat().st_size:
            raise ValueError("it is compressed, which torch.save never does")


def _are_held(tensors: Iterable[torch.Tensor], size_bytes: int) -> bool:
    """Return whether tensors are plain numbers, none of them spread out of fewer ones; two may be one."""
    kept = list(tensors)
    # expanded views (stride 0) claim more numbers than the file has; twice, as two names may share one
    # tensor
    return all(t.layout == torch.strided and t.device.type == "cpu" and not t.is_quantized
               and not t.is_complex() for t in kept) \
        and sum(t.numel() * t.element_size() for t in kept) <= 2 * size_bytes


def _onnx(file: Path) -> Tensors:
    """Return the tensors of CosyVoice 2's published file, under s3tokenizer's names."""
    try:
        from s3tokenizer.utils import onnx2torch
    except ImportError as e:
        raise UserError(f"{file}: needs the package s3tokenizer ({e}); install it by "
                        "`pip install s3tokenizer`") from None
    try:
        found: Tensors = onnx2torch(str(file), None, False)
    except Exception as e:
        raise UserError(f"{file}: is not CosyVoice's tokenizer ({format_error(e)[:200]}); pass "
                        "speech_tokenizer_v2.onnx") from None
    return found
