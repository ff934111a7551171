"""Published tokenizers as codecs: CosyVoice 2's and NeMo's networks, and how files of others are read.

Tensors are read without unpickling, and written under our names.  A `.nemo` file is an archive of a
configuration, whose `_target_` fields name what NeMo then calls, and of pickled weights: neither is trusted,
only classes of NeMo's own speech codecs may be named, and nothing is looked up in the environment."""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import yaml
from annotated_types import Ge, Le
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sov.base.artifacts import refuse_existing
from megatron_sov.base.documents.bounded_yaml import BoundedLoader
from megatron_sov.base.errors import UserError, list_problems, told_in_a_line
from megatron_sov.base.settings import ProblemCode, SettingsError, SettingsProblem, problems_of
from megatron_sov.chat.limits import TemplateTooLong, bounded
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


# What a network that another's settings describe may reserve while it is made.

MAX_ELEMENTS = 1 << 29
"""Of all tensors together: 2 GiB in float32, several times what published codecs have."""
MAX_TENSORS = 100_000


class BoundedUnpickler(TorchDispatchMode):
    """While it is entered, tensors beyond the bounds raise `MemoryError` before they are made."""

    def __init__(self, max_elements: int = MAX_ELEMENTS, max_tensors: int = MAX_TENSORS) -> None:
        super().__init__()
        self._max_elements, self._max_tensors = max_elements, max_tensors
        self.problem = ""
        """What was asked for, where it was too much: what made the network may have told it otherwise."""
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
NEUTRAL = {"discriminator": None, "use_scl_loss": False, "use_slm_loss": False}
"""Others that belong to it, which NeMo reads always: losses of speakers and of language models download
pickled networks."""
UNHEARD = ("discriminator.", "speaker_encoder.", "slm_encoder.", "slm_predictor.")
"""Weights of them."""
_OTHERS = ("semantic_codec", "semantic_codec_path")
"""A second codec, which NeMo 3 opens and unpickles wherever the path leads."""
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
        return list(config_problems(self.config))


class NemoAudioTokenizer(nn.Module):
    """Speech as ids; an `folder.AudioTokenizer`."""

    Settings = NemoAudioSettings

    def __init__(self, settings: NemoAudioSettings) -> None:
        super().__init__()
        self.settings = settings
        self.sample_rate_hz, self.samples_per_token = settings.sample_rate_hz, settings.samples_per_frame
        self.codebook_size, self.max_piece_s = settings.codebook_size, settings.max_piece_s
        with torch.device("cpu"):
            self.network = nemo_model(settings.config)

    @staticmethod
    def of_archive(source: Path) -> tuple[NemoAudioSettings, Tensors]:
        """Return settings and state of a codec's archive; `UserError` where it is none that is read."""
        return _nemo(source)

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


def config_problems(config: object, classes: frozenset[str] = _CLASSES) -> Iterator[str]:
    """Yield one sentence for each part of a configuration that would have NeMo call or read other things.

    Args:
        config: what is to be looked at.
        classes: what `_target_` may name.
    """
    if isinstance(config, dict):
        for name in NEUTRAL:
            if config.get(name):
                yield f"config.{name}: belongs to training, which may download other networks; leave it out"
        yield from (f"config.{name}: names a second codec, which NeMo would open; use a codec that needs none"
                    for name in _OTHERS if config.get(name))
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
            target = node.get("_target_")
            if target is not None and not (isinstance(target, str) and target in classes):
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
        elif node is not None and not isinstance(node, (str, int, float)):
            yield f"{where}: is a {type(node).__name__}, which no settings are made of"
        # omegaconf's resolvers, as ${oc.env:KEY}, read the environment; ${a.b} names a place in the file
        elif isinstance(node, str) and ":" in node.partition("${")[2]:
            yield f"{where} = {node[:100]!r}: would be looked up outside of the file"


INSIDE = {"ta-tok": "model.discrete_vision_model.", "cosyvoice2": "model.discrete_audio_model."}
"""Kind -> how its tensors' names begin inside a released any-to-any model (HyperCLOVA X 8B Omni)."""
_MAX_CONFIG_BYTES, _MAX_MEMBERS = 1_000_000, 1000
_MAX_WEIGHTS_BYTES, _MAX_READ_BYTES = 16 << 30, 1 << 25
_MAX_GROWTH = 10
"""Times of an archive's size that weights in it may have: numbers hardly shrink when they are compressed."""
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
        source: a file (.safetensors, .pth, .pt, .onnx, .nemo), or a folder of safetensors files.
        output: the codec's folder.
        overwrite: replace a codec that is already there.
        given: what `of_folder` of a codec of transformers or diffusers takes.

    Raises:
        UserError: the source cannot be read without running it, or is another network.
    """
    refuse_existing(output, KIND, overwrite)
    cls = codec_class(kind, str(source))
    if hasattr(cls, "of_folder"):
        save_codec(output, kind, cls.of_folder(source, **given), overwrite=overwrite)
        return
    if kind in INSIDE:
        settings, state = _CONVERTERS[kind](_tensors(source, INSIDE[kind]), str(source))
    else:
        settings, state = cls.of_archive(source)
    if found := problems_of(settings):
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


def _read(file: Path, inside: str = "") -> Tensors:
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
        with bounded(_LOADING_S, _LOADING_BYTES + _LOADING_COPIES * file.stat().st_size):
            # torch's restricted unpickler runs no code of the file; time and memory are bounded around it
            raw = torch.load(file, map_location="cpu", weights_only=True)
    except (TemplateTooLong, MemoryError):
        raise UserError(f"{file}: takes more memory or time to read than weights of its size can need; pass "
                        "them as safetensors") from None
    except Exception as e:  # what is no pickle of tensors raises as it likes
        raise UserError(f"{file}: cannot be read without running what it holds ({told_in_a_line(e)[:200]}); "
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
        raise UserError(f"{file}: is not CosyVoice's tokenizer ({told_in_a_line(e)[:200]}); pass "
                        "speech_tokenizer_v2.onnx") from None
    return found


def _nemo(source: Path) -> tuple[NemoAudioSettings, Tensors]:
    config, state = read_nemo(source)
    config = {key: value for key, value in config.items() if key not in UNUSED}
    # set, not removed: NeMo reads them always
    config |= NEUTRAL
    if found := list(config_problems(config)):
        raise UserError(list_problems(f"{source}: model_config.yaml", found[:20]))
    model = nemo_model(config)
    ids = torch.zeros(1, 1, 1, dtype=torch.int64)
    width = model.dequantize(tokens=ids, tokens_len=torch.tensor([1])).shape[1]
    settings = NemoAudioSettings(
        config=config, sample_rate_hz=int(model.sample_rate), samples_per_frame=int(model.samples_per_frame),
        codebook_size=int(model.vector_quantizer.codebook_size), code_width=int(width))
    return settings, {f"network.{name}": tensor for name, tensor in state.items()
                      if not name.startswith(UNHEARD)}


def read_nemo(source: Path) -> tuple[dict[str, Any], Tensors]:
    """Return configuration and weights of a `.nemo` archive, neither of them checked: its members are read
    one by one and never unpacked, its weights never unpickled.

    Raises:
        UserError: it is none, or cannot be read without running it.
    """
    try:
        with _opened(source) as file, \
                tarfile.TarFile(source, fileobj=cast(Any, _InPieces(file))) as archive, \
                tempfile.TemporaryDirectory() as folder:
            members = {Path(m.name).name: m for m, _ in zip(archive, range(_MAX_MEMBERS), strict=False)
                       if m.isreg() and not m.issparse()}
            config = yaml.load(_member(archive, members, "model_config.yaml", _MAX_CONFIG_BYTES).read(),
                               Loader=BoundedLoader)
            weights = Path(folder) / "weights.pt"
            # block by block into a file of ours: the archive's names are never used as paths
            with open(weights, "wb") as out:
                read = _member(archive, members, "model_weights.ckpt",
                               min(_MAX_WEIGHTS_BYTES, _MAX_GROWTH * source.stat().st_size))
                while block := read.read(1 << 24):
                    out.write(block)
            try:
                state = _read(weights)
            except UserError as e:  # it names our copy, which is gone by then
                raise UserError(str(e).replace(str(weights), f"{source}: model_weights.ckpt")) from None
    except (OSError, tarfile.TarError, yaml.YAMLError, EOFError, RecursionError, ValueError,
            OverflowError, zlib.error) as e:
        raise UserError(f"{source}: cannot be read as a .nemo file ({told_in_a_line(e)[:200]}); download it "
                        "again") from None
    if not isinstance(config, dict):
        raise UserError(f"{source}: its model_config.yaml is no object of settings; download it again")
    return config, state


def _opened(source: Path) -> Any:
    """Return an archive's bytes; older ones are compressed."""
    with open(source, "rb") as file:
        # gzip's two magic bytes: the ending says nothing
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(source) if zipped else open(source, "rb")


class _InPieces:
    """A file of which nothing is read at once that is larger than a part of an archive has to be: names and
    headers have the size that the archive says, and would be held as a whole."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read; `tarfile.ReadError` for too much."""
        if not 0 <= size <= _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        found: bytes = self._file.read(size)
        return found


def _member(archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], name: str,
            max_bytes: int) -> Any:
    """Return a member of an archive, to be read; `UserError` where there is none, or it is too large."""
    if name not in members or members[name].size > max_bytes:
        what = "has no" if name not in members else "has too large a"
        raise UserError(f"{os.fsdecode(archive.name or b'')}: {what} {name}; pass a .nemo file of a codec")
    found = archive.extractfile(members[name])
    assert found is not None  # it is a regular file
    return found
