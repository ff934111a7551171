"""Weights under their Hugging Face names, whether they stand in a Hugging Face folder or in a checkpoint.

Names and shapes are checked when a folder is opened, from headers alone; tensors are read one at a
time, by any thread.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sov import models
from megatron_sov.config import ModelConfig
from megatron_sov.convert.block_scales import FIELD, scaled_weights
from megatron_sov.convert.mxfp4 import packed_weights
from megatron_sov.convert.stored_tensor import FileTensor, StoredTensor
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.safetensors_file import TensorFile
from megatron_sov.mcore.checkpoint.sharded_tensors import TensorReader
from megatron_sov.models.text_inside import TEXT_INSIDE, text_config
from megatron_sov.models.weights import Link
from megatron_sov.runs.checkpoints import (
    CHECKPOINTS_OF_A_RUN,
    find_checkpoint,
    settings_of,
)

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PART = "model"
"""The part of a checkpoint that holds the weights."""
NAMES_SHOWN = 5
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have."""
DAMAGED_HF = "copy or download it again"


class Weights(Protocol):
    """A model's tensors under their Hugging Face names."""

    path: Path
    model: ModelConfig
    links: list[Link]

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, in the order of the weight map."""
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
    def held_in(self, file: str) -> list[str]:
        """Return the tensors of which a file of the folder holds a part."""
    def files_of(self, name: str) -> set[str]:
        """Return the files of the folder that hold a part of a tensor."""
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""


def newest_of_run(path: Path) -> Path:
    """Return the newest checkpoint of a run's folder, and any other path as it is."""
    return find_checkpoint(path) if (path / CHECKPOINTS_OF_A_RUN).is_dir() else path


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder holds a Hugging Face model (a run folder has a config.json as well, but no
    weights beside it)."""
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def listed(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def check_exact(where: object, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]],
                remedy: str) -> None:
    """Raise `UserError` naming every tensor that is missing, unexpected or of another shape."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [f"{name} {list(found[name])} instead of {list(shape)}"
              for name, shape in expected.items() if name in found and found[name] != shape]
    problems = [f"{len(names)} {what} ({listed(names)})" for what, names in (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]
    if problems:
        raise UserError(f"{where}: its tensors are not those of the model: {'; '.join(problems)}; {remedy}")


class HfWeights:
    """The tensors of a Hugging Face folder; of one of a model that sees, those of its text model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_json(path / CONFIG)
        self._shards = open_shards(path)
        self.left_out: list[str] = []
        """Tensors that are not read."""
        inside = TEXT_INSIDE.get(str(config.get("model_type")))
        try:
            self.config = text_config(config)
            family = models.get(str(self.config.get("model_type")))
            reads_field = any(FIELD in item.names for item in family.config)
            self._stored = _stored(self._shards, {} if reads_field else config)
            """Name of each tensor -> how it stands in the folder."""
            if inside is not None:
                names, self.left_out = inside.names(self._stored)
                self._stored = {name: self._stored[other] for name, other in names.items()}
            shapes = {name: stored.shape for name, stored in self._stored.items()}
            self.model = family.from_hf_config(
                {name: value for name, value in self.config.items() if reads_field or name != FIELD}, shapes)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        self.links = family.links(self.model)
        self._shapes = {name: shape for link in self.links for name, shape in link.hf_shapes().items()}
        self.copies = {name: other for name, other in family.copies_in(self.model).items() if name in shapes}
        """Tensors of the folder that are others once more -> those that they equal (`convert.copies`)."""
        copied = {name: self._shapes[other] for name, other in self.copies.items()}
        check_exact(path, shapes, self._shapes | copied, f"compare {CONFIG} with the files, or {DAMAGED_HF}")

    def names(self) -> list[str]:
        """Return the names in the order of the weight map."""
        return list(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is read: of its file, or of what is made of what stands
        there."""
        return self._stored[name].dtype

    def held_in(self, file: str) -> list[str]:
        """Return the tensors that a file holds."""
        return [name for name, shard in self._shards.items() if shard.path == self.path / file]

    def files_of(self, name: str) -> set[str]:
        """Return the files that hold the tensor."""
        return self._stored[name].files

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor; `UserError` where its file is damaged."""
        return self._stored[name].read()


def _stored(shards: dict[str, TensorFile], config: dict[str, Any]) -> dict[str, StoredTensor]:
    """Return how each tensor of a folder's files stands there; `UserError` where one cannot be read."""
    made: dict[str, StoredTensor] = {**packed_weights(shards), **scaled_weights(config, shards)}
    parts = {part for tensor in made.values() for part in tensor.parts}
    return {name: FileTensor(file, name) for name, file in shards.items() if name not in parts} | made


class CheckpointWeights:
    """The tensors of a checkpoint of all weights, split as Hugging Face has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = settings_of(path)
        self.model = settings.model
        self.links = models.get(self.model.family, settings.code).links(self.model)
        self._reader = TensorReader(path, PART)
        self._link_of = {name: link for link in self.links for name in link.hf_names}
        found = {key: self._reader.shape(key)
                 for key in self._reader.keys()}  # noqa: SIM118  (a method of the reader, not a dict)
        check_exact(path, found, {link.key: link.shape for link in self.links},
                    "the checkpoint is damaged or of another version")
        self._reader.check_complete()
        self._of_thread = threading.local()

    def names(self) -> list[str]:
        """Return the names in the order of the weight map."""
        return list(self._link_of)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor stands in its file."""
        return self._reader.dtype(self._link_of[name].key)

    def held_in(self, file: str) -> list[str]:
        """Return the keys of the tensors of which a file holds a block."""
        return self._reader.held_in(file)

    def files_of(self, name: str) -> set[str]:
        """Return the files that hold a block of the tensor that this one is a part of."""
        return self._reader.files_of(self._link_of[name].key)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor; `UserError` where its file is damaged."""
        link = self._link_of[name]
        # query, key and value (gate and up) follow one another and come from one block,
        # which is therefore kept
        last: tuple[Link, torch.Tensor] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] is not link:
            self._of_thread.last = None
            last = self._of_thread.last = (
                link, self._reader.read(link.key, link.offset, link.extent).reshape(link.block_shape))
        return link.split(last[1])[name]

    def read_stored(self, key: str, offset: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
        """Return any part of a tensor as the checkpoint holds it."""
        return self._reader.read(key, offset, extent)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; `UserError` where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}); restore it from its source") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where an object is needed; "
                        "restore it from its source")
    return value


def check_dtypes(weights: Weights) -> None:
    """Check, before anything is converted, that every tensor has a dtype that can be kept.

    Raises:
        UserError: weights that are no floating-point numbers, router biases that were rounded (they move in
            steps that vanish in 16 bits), or tensors of different dtypes where they become one (query and
            key, all experts of a layer).
    """
    first: dict[str, str] = {}
    for link in weights.links:
        for name in link.hf_names:
            found, other = weights.dtype(name), first.setdefault(link.key, name)
            if found not in FLOATS:
                raise UserError(f"{weights.path}: {name} has dtype {found}; "
                                "weights must be floating-point numbers")
            if link.fp32 and found.itemsize < torch.float32.itemsize:
                raise UserError(f"{weights.path}: {name} has dtype {found}, but it must be torch.float32: "
                                "it was rounded when it was saved; save this tensor in float32")
            if found != weights.dtype(other):
                raise UserError(f"{weights.path}: {name} has dtype {found} and {other} "
                                f"{weights.dtype(other)}, but they become one tensor; "
                                "save the model in one dtype")


def open_shards(path: Path) -> dict[str, TensorFile]:
    """Return for each tensor the file that holds it; index and files must agree in both directions."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE_FILE).is_file():
            raise UserError(f"{path}: has neither {SINGLE_FILE} nor {INDEX}; save the model with safetensors "
                            "(pickled weights are not read)")
        shard = TensorFile(path / SINGLE_FILE, DAMAGED_HF)
        return dict.fromkeys(shard.entries, shard)
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path / INDEX}: lacks a weight_map from tensor names to files; "
                        "restore it from its source")
    outside = [f"{name} to {file}"
               for name, file in weight_map.items() if not isinstance(file, str) or Path(file).name != file]
    if outside:
        raise UserError(f"{path / INDEX}: weight_map must name files in the same folder, "
                        f"but it sends {listed(outside)}; restore it from its source")
    shards: dict[str, TensorFile] = {}
    file_of: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        held = listed([name for name, place in weight_map.items() if place == file])
        shard = TensorFile(path / file, f"it should hold {held}; {DAMAGED_HF}")
        for name in shard.entries:
            if name in file_of:
                raise UserError(f"{path / file}: holds {name}, which {file_of[name]} holds as well; "
                                "remove one of them")
            shards[name], file_of[name] = shard, file
    differing = sorted(name for name in {*file_of, *weight_map} if weight_map.get(name) != file_of.get(name))
    if differing:
        raise UserError(f"{path / INDEX}: disagrees with the files about {listed(differing)}; "
                        "restore it from its source")
    return shards
