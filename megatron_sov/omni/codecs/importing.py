"""Published tokenizers as codecs: their tensors are read without unpickling, and written under our names."""

from __future__ import annotations

import gzip
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors import safe_open
from torch import nn

from megatron_sov.base.artifacts import refuse_existing
from megatron_sov.base.chat.limits import TemplateTooLong, bounded
from megatron_sov.base.documents.bounded_yaml import BoundedLoader
from megatron_sov.base.errors import UserError, list_problems, told_in_a_line
from megatron_sov.base.settings import SettingsError, problems_of
from megatron_sov.omni.codecs.folder import KIND, codec_class, save_codec
from megatron_sov.omni.codecs.images import ta_tok
from megatron_sov.omni.codecs.sounds import cosyvoice2, nemo_audio

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
    "ta-tok": ta_tok.converted, "cosyvoice2": cosyvoice2.converted}


def import_codec(kind: str, source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write a codec of what others published.

    Args:
        kind: "ta-tok", "cosyvoice2" or "nemo-audio".
        source: a file (.safetensors, .pth, .pt, .onnx, .nemo), or a folder of safetensors files.
        output: the codec's folder.
        overwrite: replace a codec that is already there.

    Raises:
        UserError: the source cannot be read without running it, or is another network.
    """
    refuse_existing(output, KIND, overwrite)
    if kind == "nemo-audio":
        settings, state = _nemo(source)
    else:
        settings, state = _CONVERTERS[kind](_tensors(source, INSIDE[kind]), str(source))
    if found := problems_of(settings):
        raise SettingsError(f"{source}: its sizes", found)
    cls = codec_class(kind, str(source))
    with torch.device("meta"):  # sizes that small tensors tell apart may ask for much together
        expected = cls(settings).state_dict()
    _compare(expected, state, source)
    codec: nn.Module = cls(settings)
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
    """Return the tensors of a source under the names that their authors gave them."""
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
            raw = torch.load(file, map_location="cpu", weights_only=True)
    except (TemplateTooLong, MemoryError):
        raise UserError(f"{file}: takes more memory or time to read than weights of its size can need; pass "
                        "them as safetensors") from None
    except Exception as e:  # what is no pickle of tensors raises as it likes
        raise UserError(f"{file}: cannot be read without running what it holds ({told_in_a_line(e)[:200]}); "
                        "pass its weights as safetensors, e.g. those of a model with it inside") from None
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


def _nemo(source: Path) -> tuple[nemo_audio.NemoAudioSettings, Tensors]:
    """Return settings and state of a `.nemo` archive; its members are read one by one, and never unpacked."""
    try:
        with _opened(source) as file, \
                tarfile.TarFile(source, fileobj=cast(Any, _InPieces(file))) as archive, \
                tempfile.TemporaryDirectory() as folder:
            members = {Path(m.name).name: m for m, _ in zip(archive, range(_MAX_MEMBERS), strict=False)
                       if m.isreg() and not m.issparse()}
            config = yaml.load(_member(archive, members, "model_config.yaml", _MAX_CONFIG_BYTES).read(),
                               Loader=BoundedLoader)
            weights = Path(folder) / "weights.pt"
            with open(weights, "wb") as out:
                read = _member(archive, members, "model_weights.ckpt",
                               min(_MAX_WEIGHTS_BYTES, _MAX_GROWTH * source.stat().st_size))
                while block := read.read(1 << 24):
                    out.write(block)
            state = _read(weights)
    except (OSError, tarfile.TarError, yaml.YAMLError, EOFError, RecursionError, ValueError,
            OverflowError, zlib.error) as e:
        raise UserError(f"{source}: cannot be read as a .nemo file ({told_in_a_line(e)[:200]}); download it "
                        "again") from None
    if not isinstance(config, dict):
        raise UserError(f"{source}: its model_config.yaml is no object of settings; download it again")
    config = {key: value for key, value in config.items() if key not in nemo_audio.UNUSED}
    config |= nemo_audio.NEUTRAL
    if found := list(nemo_audio.config_problems(config)):
        raise UserError(list_problems(f"{source}: model_config.yaml", found[:20]))
    model = nemo_audio.nemo_model(config)
    ids = torch.zeros(1, 1, 1, dtype=torch.int64)
    width = model.dequantize(tokens=ids, tokens_len=torch.tensor([1])).shape[1]
    settings = nemo_audio.NemoAudioSettings(
        config=config, sample_rate_hz=int(model.sample_rate), samples_per_frame=int(model.samples_per_frame),
        codebook_size=int(model.vector_quantizer.codebook_size), code_width=int(width))
    return settings, {f"network.{name}": tensor for name, tensor in state.items()
                      if not name.startswith(nemo_audio.UNHEARD)}


def _opened(source: Path) -> Any:
    """Return an archive's bytes; older ones are compressed."""
    with open(source, "rb") as file:
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
        raise UserError(f"{os.fsdecode(archive.name or b'')}: {what} {name}; "
                        "pass a .nemo file of a codec")
    found = archive.extractfile(members[name])
    assert found is not None  # it is a regular file
    return found
