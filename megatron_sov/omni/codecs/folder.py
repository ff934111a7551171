"""A codec on disk: an artifact of kind "codec" whose manifest has its kind and settings, and whose weights
lie in `model.safetensors`.  Opening one runs nothing that the folder brings, and reserves no memory that its
files do not fill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from megatron_sov.base.artifacts import create_artifact, find_damaged_files, read_manifest
from megatron_sov.base.errors import UserError, format_install_command
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.outputs import refuse_outside_link
from megatron_sov.base.settings import parse_settings, to_plain_values

# What all codecs do, whoever made them.
#
# Each is opened from a local folder; nothing is downloaded.  All are deterministic on one device, given a
# generator where they draw.

class ImageTokenizer(Protocol):
    """Pictures as a fixed number of ids."""

    side_pixels: int
    """Height and width of what it reads."""
    grid: int
    """Tokens of a row and of a column: a picture has grid * grid of them, row by row."""
    codebook_size: int
    """Ids are below it."""
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        ...


class AudioTokenizer(Protocol):
    """Speech as ids at a fixed rate."""

    sample_rate_hz: int
    """Of what it hears: one channel, float32 in -1..1."""
    samples_per_token: float
    """Of what it hears; the silence behind a sound is filled up to a whole frame of tokens."""
    codebook_size: int
    """Ids are below it."""
    max_piece_s: float
    """A longer sound is cut into pieces of this length."""

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [t] int64 ids of [s] samples; the last token's silence is filled up."""
        ...


# The kinds of codec there are; none is imported before it is asked for.

KNOWN = {
    "vqmodel": "megatron_sov.omni.codecs.hf_codecs:VQModelCodec",
    "janus-vq": "megatron_sov.omni.codecs.hf_codecs:JanusCodec",
    "mimi": "megatron_sov.omni.codecs.hf_codecs:MimiCodec",
    "dac": "megatron_sov.omni.codecs.hf_codecs:DacCodec",
    "ta-tok": "megatron_sov.omni.codecs.ta_tok:TATok",
    "cosyvoice2": "megatron_sov.omni.codecs.published:CosyVoice2Tokenizer",
}
"""Kind, as manifests have it -> module and class.  A class is an `nn.Module` that is made of its `Settings`
and keeps them as `.settings`."""


def codec_class(kind: str, where: str) -> Any:
    """Return the class of a kind.

    Raises:
        UserError: there is no such kind, or a package that it needs is not installed.
    """
    if kind not in KNOWN:
        raise UserError(f"{where}: {kind!r} is no kind of codec{suggest_successor(kind)}; there are "
                        f"{', '.join(KNOWN)}")
    module, _, name = KNOWN[kind].partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as e:
        # a defect of ours must not read as a missing package
        if (e.name or "").startswith("megatron_sov"):
            raise
        raise UserError(f"{where}: a codec of kind {kind!r} needs the package {e.name}; install it by "
                        f"`{format_install_command('omni')}`") from None


KIND = "codec"
"""Of the artifact."""
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
_FLOATS = ("F64", "F32", "BF16", "F16")
_REMEDY = "make the codec again, or restore it from a copy"


def save_codec(path: Path, kind: str, codec: nn.Module, *, facts: Mapping[str, Any] | None = None,
               overwrite: bool = False) -> None:
    """Write a codec's folder.

    Args:
        path: the folder.
        kind: one of `folder.KNOWN`.
        codec: has `.settings`; its state is written as it is.
        facts: goes into the manifest's content beside kind and config, e.g. figures of held-out media.
        overwrite: replace a codec that is already there.

    Raises:
        UserError: the folder is taken, or the disk refuses.
    """
    with create_artifact(path, KIND, overwrite=overwrite) as writer:
        # cloned: safetensors refuses tensors that share memory
        state = {name: tensor.detach().cpu().clone().contiguous()
                 for name, tensor in codec.state_dict().items()}
        save_file(state, writer.path / WEIGHTS)
        writer.content = {"codec": kind, "config": to_plain_values(codec.settings), **(facts or {})}


def open_codec(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """Return the codec of a folder, ready for use: on `device`, without dropout, its weights frozen.

    Args:
        folder: what `megatron-sov codec import` wrote.
        device: where it computes.

    Raises:
        UserError: there is no codec, its settings break a rule, a file is not what the manifest says, or
            its weights are not the ones that these settings ask for.
    """
    folder = Path(folder)
    _, settings, cls = read_codec(folder)
    file = folder / WEIGHTS
    # a link could name any file of this machine
    refuse_outside_link(folder, file)
    if problems := find_damaged_files(folder):
        raise UserError(f"{problems[0]}; {_REMEDY}")
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        with torch.device("meta"):
            # on no device: shapes cost nothing there, and are compared before memory is reserved
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
    return content["codec"], parse_settings(cls.Settings, content.get("config"), where), cls


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
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{file}: lacks {name}, which its settings ask for; {_REMEDY}")
        shape, dtype = list(found[name].get_shape()), found[name].get_dtype()
        if shape != list(tensor.shape):
            raise UserError(f"{file}: {name} has the shape {shape}, its settings say {list(tensor.shape)}; "
                            f"{_REMEDY}")
        # bf16 for float32 may pass, since it is converted; ids for weights may not
        if (dtype in _FLOATS) != tensor.dtype.is_floating_point:
            raise UserError(f"{file}: {name} has numbers of kind {dtype}, not {tensor.dtype}; {_REMEDY}")
    if extra := [name for name in found if name not in expected]:
        raise UserError(f"{file}: has {extra[0]}, which its settings do not ask for; {_REMEDY}")


# What a codec's folder says of itself, its weights unread.

def inspected(folder: Path) -> dict[str, Any]:
    """Return kind, settings, number of parameters, and figures on held-out media where its maker wrote some.

    Raises:
        UserError: it is no codec, or one that no network can be made of.
    """
    kind, settings, _ = read_codec(folder)
    heldout = read_manifest(folder, KIND).content.get("heldout")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder / WEIGHTS}: cannot be read as a safetensors file ({e}); make the codec "
                        "again, or restore it from a copy") from None
    return {"codec": kind, "config": to_plain_values(settings), "num_parameters": sum(sizes),
            "heldout": heldout if isinstance(heldout, dict) else {}}
