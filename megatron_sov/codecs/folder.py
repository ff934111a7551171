"""A codec on disk: an artifact of kind "codec" whose manifest has its kind and settings, and whose weights
lie in `model.safetensors`.  Opening one runs nothing that the folder brings, and reserves no memory that its
files do not fill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from megatron_sov.artifacts import damaged_files, new_artifact, read_manifest
from megatron_sov.codecs.known import codec_class
from megatron_sov.errors import UserError
from megatron_sov.outputs import refuse_link_outside
from megatron_sov.settings import plain, read

KIND = "codec"
"""Of the artifact."""
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
_FLOATS = ("F64", "F32", "BF16", "F16")
_REMEDY = "make the codec again, or restore it from a copy"


def save_codec(path: Path, kind: str, codec: nn.Module, *, facts: Mapping[str, Any] | None = None,
               training: Mapping[str, Any] | None = None, files: Mapping[str, Path] | None = None,
               overwrite: bool = False) -> None:
    """Write a codec's folder.

    Args:
        path: the folder.
        kind: one of `known.KNOWN`.
        codec: has `.settings`; its state is written as it is.
        facts: goes into the manifest's content beside kind and config, e.g. figures of held-out media.
        training: the settings that it was trained with.
        files: name in the folder -> a file that is copied into it.
        overwrite: replace a codec that is already there.

    Raises:
        UserError: the folder is taken, or the disk refuses.
    """
    with new_artifact(path, KIND, overwrite=overwrite) as writer:
        state = {name: tensor.detach().cpu().clone().contiguous()
                 for name, tensor in codec.state_dict().items()}
        save_file(state, writer.path / WEIGHTS)
        for name, file in (files or {}).items():
            (writer.path / name).write_bytes(file.read_bytes())
        writer.content = {"codec": kind, "config": plain(codec.settings), **(facts or {})}
        writer.settings = dict(training or {})


def open_codec(folder: str | Path, device: str | torch.device = "cpu", kind: str | None = None) -> Any:
    """Return the codec of a folder, ready for use: on `device`, without dropout, its weights frozen.

    Args:
        folder: what `megatron-sov codec train` or `codec import` wrote.
        device: where it computes.
        kind: the only one that will do; None: any.

    Raises:
        UserError: there is no codec, its settings break a rule, a file is not what the manifest says, its
            weights are not the ones that these settings ask for, or it is of another kind.
    """
    folder = Path(folder)
    found, settings, cls = read_codec(folder)
    if kind is not None and found != kind:
        raise UserError(f"{folder}: is a codec of kind {found!r} where {kind!r} is needed; pass another one")
    file = folder / WEIGHTS
    refuse_link_outside(folder, file)
    if problems := damaged_files(folder):
        raise UserError(f"{problems[0]}; {_REMEDY}")
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        with torch.device("meta"):
            expected = cls(settings).state_dict()
        codec = load_weights(file, expected, lambda: cls(settings))
    return codec.to(device).eval().requires_grad_(False)


def read_codec(folder: Path) -> tuple[str, Any, Any]:
    """Return kind, settings and class of a codec's folder; reads no weights.

    Raises:
        UserError: as `open_codec`.
    """
    content = read_manifest(folder, KIND).content
    where = f"{folder}: config of the manifest"
    if not isinstance(content, dict) or not isinstance(content.get("codec"), str):
        raise UserError(f"{folder}: its manifest names no kind of codec; {_REMEDY}")
    if len(json.dumps(content.get("config"))) > MAX_CONFIG_BYTES:
        raise UserError(f"{where}: is larger than {MAX_CONFIG_BYTES:,} bytes; {_REMEDY}")
    cls = codec_class(content["codec"], str(folder))
    return content["codec"], read(cls.Settings, content.get("config"), where), cls


def load_weights(file: Path, expected: Mapping[str, torch.Tensor], build: Any) -> Any:
    """Return what `build` makes, with the weights of a safetensors file.

    Names, shapes and kinds of number are compared with `expected` (on no device) by the file's header before
    anything is made, so that settings cannot reserve more memory than the file has bytes.

    Raises:
        UserError: naming the first tensor that is missing, unknown, of another shape, or not finite.
    """
    try:
        with safe_open(file, "pt") as opened:
            _compare(file, {name: opened.get_slice(name) for name in opened.keys()}, expected)  # noqa: SIM118
            network = build()
            own = network.state_dict()
            for name, tensor in own.items():
                read = opened.get_tensor(name)
                if read.is_floating_point() and not bool(read.isfinite().all()):
                    raise UserError(f"{file}: {name} has numbers that are not finite; {_REMEDY}")
                tensor.copy_(read)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read as a safetensors file ({e}); {_REMEDY}") from None
    return network


def _compare(file: Path, found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `UserError` where a file's tensors are not the expected ones."""
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{file}: lacks {name}, which its settings ask for; {_REMEDY}")
        shape, dtype = list(found[name].get_shape()), found[name].get_dtype()
        if shape != list(tensor.shape):
            raise UserError(f"{file}: {name} has the shape {shape}, its settings say {list(tensor.shape)}; "
                            f"{_REMEDY}")
        if (dtype in _FLOATS) != tensor.dtype.is_floating_point:
            raise UserError(f"{file}: {name} has numbers of kind {dtype}, not {tensor.dtype}; {_REMEDY}")
    if extra := [name for name in found if name not in expected]:
        raise UserError(f"{file}: has {extra[0]}, which its settings do not ask for; {_REMEDY}")
