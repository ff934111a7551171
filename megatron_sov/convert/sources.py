"""Weights under their Hugging Face names, whether they stand in a Hugging Face folder or in a checkpoint.

Names and shapes are checked when a folder is opened, from headers alone; tensors are read one at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_sov import models
from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.config import ModelConfig, from_dict
from megatron_sov.errors import UserError
from megatron_sov.mcore.run_checkpoints import CHECKPOINTS_OF_A_RUN, find_checkpoint
from megatron_sov.mcore.tensors import TensorReader
from megatron_sov.models.weights import Link

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NAMES_SHOWN = 5
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Weights(Protocol):
    """A model's tensors under their Hugging Face names."""

    path: Path
    model: ModelConfig
    links: list[Link]

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, in the order of the weight map."""
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""


def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    Raises:
        UserError: it is none of them, or its tensors are not exactly those of its model.
    """
    path = newest_of_run(Path(path))
    if (path / CONFIG).is_file():
        return HfWeights(path)
    if (path / MANIFEST).is_file():
        return CheckpointWeights(path)
    raise UserError(f"{path}: has neither {CONFIG} (Hugging Face folder) nor {MANIFEST} (checkpoint); pass one of the two")


def newest_of_run(path: Path) -> Path:
    """Return the newest checkpoint of a run's folder, and any other path as it is."""
    return find_checkpoint(path) if (path / CHECKPOINTS_OF_A_RUN).is_dir() else path


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder holds a Hugging Face model (a run folder has a config.json as well, but no weights beside it)."""
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def listed(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def check_exact(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], remedy: str) -> None:
    """Raise `UserError` naming every tensor that is missing, unexpected or of another shape."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [f"{name} {list(found[name])} instead of {list(shape)}"
              for name, shape in expected.items() if name in found and found[name] != shape]
    problems = [f"{len(names)} {what} ({listed(names)})"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]
    if problems:
        raise UserError(f"{path}: its tensors are not those of the model: {'; '.join(problems)}; {remedy}")


class HfWeights:
    """The tensors of a Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / CONFIG)
        self._shards = _open_shards(path)
        shapes = {name: tuple(shard.get_slice(name).get_shape()) for name, shard in self._shards.items()}
        family = models.get(str(self.config.get("model_type")))
        try:
            self.model = family.from_hf_config(self.config, shapes)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        self.links = family.links(self.model)
        self._shapes = {name: shape for link in self.links for name, shape in link.hf_shapes().items()}
        check_exact(path, shapes, self._shapes, "compare config.json with the files, or save the model again")

    def names(self) -> list[str]:
        """Return the names in the order of the weight map."""
        return list(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor stands in its file."""
        found = self._shards[name].get_slice(name).get_dtype()
        if found not in _DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {found}, but only {', '.join(_DTYPES)} can be converted; "
                            "save the model without quantisation")
        return _DTYPES[found]

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor; `UserError` where its file is damaged."""
        try:
            tensor: torch.Tensor = self._shards[name].get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{self.path}: {name} cannot be read ({e}); copy or download the folder again") from None
        return tensor


class CheckpointWeights:
    """The tensors of a checkpoint, split as Hugging Face has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_manifest(path, "checkpoint")
        self.model = from_dict(manifest.settings).model
        self.links = models.get(self.model.family).links(self.model)
        self._reader = TensorReader(path, "model")
        self._link_of = {name: link for link in self.links for name in link.hf_names}
        found = {key: self._reader.shape(key) for key in self._reader.keys()}  # noqa: SIM118  (a method of the reader, not a dict)
        check_exact(path, found, {link.key: link.shape for link in self.links}, "the checkpoint is damaged or of another version")
        self._last: tuple[Link, torch.Tensor] | None = None

    def names(self) -> list[str]:
        """Return the names in the order of the weight map."""
        return list(self._link_of)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor stands in its file."""
        return self._reader.dtype(self._link_of[name].key)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor; `UserError` where its file is damaged."""
        link = self._link_of[name]
        # query, key and value (gate and up) follow one another and come from one block, which is therefore kept
        if self._last is None or self._last[0] is not link:
            self._last = None
            self._last = (link, self._reader.read(link.key, link.offset, link.extent).reshape(link.block_shape))
        return link.split(self._last[1])[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}); restore it from its source") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where an object is needed; restore it from its source")
    return value


def _open_shards(path: Path) -> dict[str, Any]:
    """Return for each tensor the opened file that holds it; index and files must agree in both directions."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE_FILE).is_file():
            raise UserError(f"{path}: has neither {SINGLE_FILE} nor {INDEX}; save the model with safetensors "
                            "(pickled weights are not read)")
        shard = _open(path / SINGLE_FILE)
        return dict.fromkeys(shard.keys(), shard)
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and Path(f).name == f for f in weight_map.values()):
        raise UserError(f"{path / INDEX}: weight_map must map tensor names to files in the same folder; "
                        "restore it from its source")
    shards: dict[str, Any] = {}
    file_of: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        shard = _open(path / file)
        for name in shard.keys():  # noqa: SIM118  (safe_open has no iterator)
            if name in file_of:
                raise UserError(f"{path / file}: holds {name}, which {file_of[name]} holds as well; remove one of them")
            shards[name], file_of[name] = shard, file
    differing = sorted(name for name in {*file_of, *weight_map} if weight_map.get(name) != file_of.get(name))
    if differing:
        raise UserError(f"{path / INDEX}: disagrees with the files about {listed(differing)}; restore it from its source")
    return shards


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: is not a readable safetensors file ({e}); copy or download it again") from None
