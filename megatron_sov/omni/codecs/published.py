"""Import published tokenizers as codecs: TA-Tok, CosyVoice 2, transformers and diffusers.

Reading a published file executes no code from the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import UserError, format_error
from megatron_sov.base.settings import ProblemCode, SettingsError, SettingsProblem, find_all_problems
from megatron_sov.omni.codecs.folder import ARTIFACT_KIND, load_codec_class, save_codec
from megatron_sov.omni.codecs.ta_tok import convert_ta_tok_state

LEVELS, NUM_LEVELS = 3, 8
_HOP_SAMPLES, _FRAMES_PER_TOKEN = 160, 4
_MAX_PIECE_S = 30
_S3_NAME = "speech_tokenizer_v2_25hz"
"""The published model's name in the package s3tokenizer."""
RELEASED_PREFIXES = {"ta-tok": "model.discrete_vision_model.", "cosyvoice2": "model.discrete_audio_model."}
"""Codec kind -> prefix for the tokenizer's tensors inside HyperCLOVA X 8B Omni."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CosyVoice2Settings:
    """CosyVoice 2's tokenizer sizes. Defaults: the published model."""

    num_mels: Annotated[int, Ge(80), Le(128)] = 128
    """Mel bands."""
    width: Annotated[int, Ge(64), Le(16384)] = 1280
    """Hidden size; attention heads have size 64."""
    num_heads: Annotated[int, Ge(1), Le(256)] = 20
    """Attention heads."""
    num_layers: Annotated[int, Ge(1), Le(100)] = 6
    """Transformer layers."""

    def problems(self) -> list[SettingsProblem]:
        if self.width == 64 * self.num_heads:
            return []
        return [SettingsProblem(ProblemCode.RULE, "width", f"must be 64 times num_heads = {self.num_heads}",
                                self.width)]


class CosyVoice2Tokenizer(nn.Module):
    """CosyVoice 2's speech tokenizer (https://arxiv.org/abs/2412.10117): 25 ids per second, vocabulary 6,561.

    Networks and log-mel frames come from the package s3tokenizer (GitHub: xingchensong/S3Tokenizer).
    """

    Settings = CosyVoice2Settings
    sample_rate_hz = 16_000
    samples_per_token = _HOP_SAMPLES * _FRAMES_PER_TOKEN
    codebook_size = LEVELS**NUM_LEVELS
    max_piece_s = float(_MAX_PIECE_S)

    def __init__(self, settings: CosyVoice2Settings) -> None:
        super().__init__()
        try:
            from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2  # optional package
            from s3tokenizer.utils import log_mel_spectrogram
        except ImportError as e:
            raise UserError(f"codec of kind 'cosyvoice2': needs the package s3tokenizer ({e}); install it by "
                            "`pip install s3tokenizer`") from None
        self.settings = settings
        self._compute_frames = log_mel_spectrogram
        self.network = S3TokenizerV2(_S3_NAME, ModelConfig(
            n_mels=settings.num_mels, n_audio_state=settings.width, n_audio_head=settings.num_heads,
            n_audio_layer=settings.num_layers))

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return int64 ids [tokens] for samples [s].

        Sounds longer than 30 s are cut into pieces; the last token of a piece is padded with silence.
        """
        if not len(sound):
            return torch.zeros(0, dtype=torch.int64)
        with torch.no_grad():
            pieces = sound.split(_MAX_PIECE_S * self.sample_rate_hz)
            return torch.cat([self._encode_piece(piece) for piece in pieces])

    def _encode_piece(self, sound: torch.Tensor) -> torch.Tensor:
        padded = F.pad(sound, (0, -len(sound) % self.samples_per_token))
        frames = self._compute_frames(padded, n_mels=self.settings.num_mels)[None]
        ids, lengths = self.network.quantize(frames, torch.tensor([frames.shape[-1]], device=frames.device))
        encoded: torch.Tensor = ids[0, :int(lengths[0])].long().clone()
        return encoded


def convert_cosyvoice2_state(tensors: Mapping[str, torch.Tensor],
                             where: str) -> tuple[CosyVoice2Settings, Tensors]:
    """Convert s3tokenizer's tensors to the settings and state of `CosyVoice2Tokenizer`.

    Args:
        tensors: s3tokenizer's name -> tensor.
        where: file name for error messages.

    Raises:
        UserError: a tensor is missing or has another number of axes.
    """
    conv, codes = "encoder.conv1.weight", "quantizer._codebook.project_down.weight"
    if missing := [name for name in (conv, codes) if name not in tensors]:
        raise UserError(f"{where}: lacks {missing[0]}, so it is not CosyVoice 2's tokenizer; pass "
                        "speech_tokenizer_v2.onnx, or its weights as s3tokenizer names them")
    if tensors[conv].ndim != 3:
        raise UserError(f"{where}: {conv} has the shape {list(tensors[conv].shape)}; it is not CosyVoice 2's "
                        "tokenizer")
    width, num_mels, _ = tensors[conv].shape
    layers = [int(name.split(".")[2]) for name in tensors
              if name.startswith("encoder.blocks.") and name.split(".")[2].isdecimal()]
    settings = CosyVoice2Settings(num_mels=num_mels, width=width, num_heads=max(1, width // 64),
                                  num_layers=1 + max(layers, default=0))
    return settings, {f"network.{name}": tensor for name, tensor in tensors.items()}


_CONVERTERS: dict[str, Callable[[Mapping[str, torch.Tensor], str], tuple[Any, Tensors]]] = {
    "ta-tok": convert_ta_tok_state, "cosyvoice2": convert_cosyvoice2_state}


def import_codec(kind: str, source: Path, output: Path, *, overwrite: bool = False, **options: Any) -> None:
    """Write a codec folder from a published tokenizer.

    Args:
        kind: key of `folder.CODEC_CLASSES`.
        source: a file (.safetensors, .onnx), a folder of safetensors files, or a `save_pretrained` folder.
        output: codec folder.
        overwrite: replace an existing codec.
        options: further arguments of `from_folder` in `hf_codecs`.

    Raises:
        UserError: the source cannot be read, or is another network.
    """
    check_output_folder(output, ARTIFACT_KIND, overwrite)
    codec_class = load_codec_class(kind, str(source))
    if hasattr(codec_class, "from_folder"):
        save_codec(output, kind, codec_class.from_folder(source, **options), overwrite=overwrite)
        return
    settings, state = _CONVERTERS[kind](_read_tensors(source, RELEASED_PREFIXES[kind]), str(source))
    if problems := find_all_problems(settings):
        raise SettingsError(f"{source}: its sizes", problems)
    with torch.device("meta"):  # small tensors may imply a huge network
        expected = codec_class(settings).state_dict()
    _check_state(expected, state, source)
    codec: nn.Module = codec_class(settings)
    codec.load_state_dict(state)
    save_codec(output, kind, codec, overwrite=overwrite)


def _check_state(expected: Mapping[str, torch.Tensor], state: Tensors, source: Path) -> None:
    """Raise `UserError` if a tensor is missing, unknown, misshapen or not finite."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            problem = "lacks" if name not in state else "has an unknown tensor,"
            raise UserError(f"{source}: {problem} {name} in our naming; it is another version of the "
                            "tokenizer")
        if expected[name].shape != state[name].shape:
            raise UserError(f"{source}: {name} in our naming has the shape {list(state[name].shape)}, not "
                            f"{list(expected[name].shape)}; it is another version of the tokenizer")
        if not bool(state[name].isfinite().all()):
            raise UserError(f"{source}: {name} in our naming has numbers that are not finite; download it "
                            "again")


def _read_tensors(source: Path, prefix: str) -> Tensors:
    """Read tensors from a file or folder, floats as float32; see `_read_file` for `prefix`."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        problem = "has no safetensors files" if source.is_dir() else "does not exist"
        raise UserError(f"{source}: {problem}; pass the file or folder that you downloaded")
    tensors: Tensors = {}
    for file in files:
        tensors |= _read_file(file, prefix)
    return {name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}


def _read_file(file: Path, prefix: str) -> Tensors:
    """Read tensors from a file; if names start with `prefix`, only these, without the prefix."""
    if file.suffix == ".onnx":
        return _read_onnx(file)
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            names = [name for name in names if name.startswith(prefix)] or names
            return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read ({format_error(e)[:200]}); pass the weights as safetensors, "
                        "such as the folder of a model that contains the tokenizer") from None


def _read_onnx(file: Path) -> Tensors:
    """Read CosyVoice 2's published ONNX file; return tensors by s3tokenizer's names."""
    try:
        from s3tokenizer.utils import onnx2torch  # optional package
    except ImportError as e:
        raise UserError(f"{file}: needs the package s3tokenizer ({e}); install it by "
                        "`pip install s3tokenizer`") from None
    try:
        tensors: Tensors = onnx2torch(str(file), None, False)
    except Exception as e:
        raise UserError(f"{file}: is not CosyVoice's tokenizer ({format_error(e)[:200]}); pass "
                        "speech_tokenizer_v2.onnx") from None
    return tensors
