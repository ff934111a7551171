"""Save and open codec folders: artifacts with kind and settings in the manifest and weights in safetensors.

Opening a codec runs no code from the folder, downloads nothing, and reserves no more memory than its files
fill. Codecs are deterministic per device.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from megatron_sov.base.artifacts import create_artifact, find_damaged_files, read_manifest
from megatron_sov.base.errors import UserError, format_install_command
from megatron_sov.base.hints.removed import suggest_successor
from megatron_sov.base.outputs import refuse_outside_link
from megatron_sov.base.settings import parse_settings, to_plain_values

CODEC_CLASSES = {
    "vqmodel": "megatron_sov.omni.codecs.hf_codecs:VQModelCodec",
    "mimi": "megatron_sov.omni.codecs.hf_codecs:MimiCodec",
    "dac": "megatron_sov.omni.codecs.hf_codecs:DacCodec", "ta-tok": "megatron_sov.omni.codecs.ta_tok:TATok",
    "cosyvoice2": "megatron_sov.omni.codecs.published:CosyVoice2Tokenizer"}
"""Codec kind -> module:class of an `nn.Module`, which takes an instance of its `Settings` and stores it as
`.settings`."""
ARTIFACT_KIND = "codec"
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
_FLOATS = ("F64", "F32", "BF16", "F16")
_REMEDY = "import the codec again, or restore it from a copy"


def save_codec(path: Path, kind: str, codec: nn.Module, *, overwrite: bool = False) -> None:
    """Write a codec folder.

    Args:
        path: output folder.
        kind: key of `CODEC_CLASSES`.
        codec: network with `.settings`.
        overwrite: replace an existing codec.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    with create_artifact(path, ARTIFACT_KIND, overwrite=overwrite) as writer:
        # Cloned, because safetensors refuses tensors that share memory.
        state = {name: tensor.detach().cpu().clone().contiguous()
                 for name, tensor in codec.state_dict().items()}
        save_file(state, writer.path / WEIGHTS)
        writer.content = {"codec": kind, "config": to_plain_values(codec.settings)}


def open_codec(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a codec in evaluation mode, with frozen weights.

    Args:
        folder: output of `megatron-sov codec import`.
        device: target device.

    Raises:
        UserError: the folder is not a codec, a setting is invalid, a file differs from the manifest, or the
            weights do not fit the settings.
    """
    folder = Path(folder)
    _, settings, codec_class = read_codec(folder)
    file = folder / WEIGHTS
    # A link could point to a file outside the codec.
    refuse_outside_link(folder, file)
    if problems := find_damaged_files(folder):
        raise UserError(f"{problems[0]}; {_REMEDY}")
    # The constructor draws initial weights; the caller's random state must not change.
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            expected = codec_class(settings).state_dict()
        codec = load_module_weights(file, expected, lambda: codec_class(settings))
    return codec.to(device).eval().requires_grad_(False)


def read_codec(folder: Path) -> tuple[str, Any, Any]:
    """Return a codec's kind, settings and class without reading weights; raises like `open_codec`."""
    content = read_manifest(folder, ARTIFACT_KIND).content
    where = f"{folder}: config of the manifest"
    if not isinstance(content, dict) or not isinstance(content.get("codec"), str):
        raise UserError(f"{folder}: its manifest names no kind of codec; {_REMEDY}")
    if len(json.dumps(content.get("config"))) > MAX_CONFIG_BYTES:
        raise UserError(f"{where}: is larger than {MAX_CONFIG_BYTES:,} bytes; {_REMEDY}")
    codec_class = load_codec_class(content["codec"], str(folder))
    return content["codec"], parse_settings(codec_class.Settings, content.get("config"), where), codec_class


def load_codec_class(kind: str, where: str) -> Any:
    """Import and return a codec kind's class. Raises `UserError`: the kind is unknown, or a package is not
    installed; `where` names the folder."""
    if kind not in CODEC_CLASSES:
        raise UserError(f"{where}: {kind!r} is not a kind of codec{suggest_successor(kind)}; there are "
                        f"{', '.join(CODEC_CLASSES)}")
    module, _, name = CODEC_CLASSES[kind].partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as e:
        # Defects in our own modules must not look like a missing package.
        if (e.name or "").startswith("megatron_sov"):
            raise
        raise UserError(f"{where}: a codec of kind {kind!r} needs the package {e.name}; install it by "
                        f"`{format_install_command('omni')}`") from None


def load_module_weights(file: Path, expected: Mapping[str, torch.Tensor], build: Any) -> Any:
    """Build a network and load its weights from a safetensors file.

    Names, shapes and dtypes in the file's header are checked first, so that settings from a manifest cannot
    reserve more memory than the file fills.

    Args:
        file: safetensors file.
        expected: state of the network on the meta device.
        build: function that builds the network.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    try:
        with safe_open(file, "pt") as opened:
            header = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            _check_header(file, header, expected)
            network = build()
            for name, target in network.state_dict().items():
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise UserError(f"{file}: {name} has numbers that are not finite; {_REMEDY}")
                target.copy_(tensor)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: cannot be read as a safetensors file ({e}); {_REMEDY}") from None
    return network


def _check_header(file: Path, header: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in header:
            raise UserError(f"{file}: lacks {name}, which its settings ask for; {_REMEDY}")
        shape, dtype = list(header[name].get_shape()), header[name].get_dtype()
        if shape != list(tensor.shape):
            raise UserError(f"{file}: {name} has the shape {shape}, its settings say {list(tensor.shape)}; "
                            f"{_REMEDY}")
        # Another float dtype is converted; integers in place of weights are an error.
        if (dtype in _FLOATS) != tensor.dtype.is_floating_point:
            raise UserError(f"{file}: {name} has numbers of kind {dtype}, not {tensor.dtype}; {_REMEDY}")
    if extra := [name for name in header if name not in expected]:
        raise UserError(f"{file}: has {extra[0]}, which its settings do not ask for; {_REMEDY}")
