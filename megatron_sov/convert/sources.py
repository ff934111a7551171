"""Weights under their Hugging Face names, whether they stand in a Hugging Face folder or in a checkpoint.

Names and shapes are checked when a folder is opened, from headers alone; tensors are read one at a
time, by any thread.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megatron_sov.base.artifacts import MANIFEST, damaged_files, read_manifest
from megatron_sov.base.errors import UserError, find_misspelt
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.checkpoint.writer import TensorFile
from megatron_sov.convert.low_bit import FIELD, low_bit_weights
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TEXT_INSIDE, text_config
from megatron_sov.model.families.hf_layers import MAX_LAYERS, PREDICTION_NAMES
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import (
    CONFIG, DAMAGED_HF, EMBEDDING, HEAD, RECOMPUTED, is_hf_folder as is_hf_folder, listed, read_json,
    tensor_files)
from megatron_sov.runs.checkpoints import CHECKPOINTS_OF_A_RUN, find_checkpoint, settings_of

HASHED_AT_A_TIME = 4
PART = "model"
"""The part of a checkpoint that holds the weights."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have."""


# One tensor of a Hugging Face folder, however its files store it.


class StoredTensor(Protocol):
    """What conversion asks of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of what is read."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of what is read."""

    @property
    def files(self) -> Set[str]:
        """Return the names of the files that hold a part of it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of what is stored of it."""

    def read(self) -> torch.Tensor:
        """Return the tensor; `UserError` where a file is damaged."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor that a file holds as it is."""

    file: TensorFile
    """The file."""
    name: str
    """Its name there."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.name)

    @property
    def files(self) -> set[str]:
        return {self.file.path.name}

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self) -> torch.Tensor:
        return self.file.read(self.name)


@dataclass(frozen=True)
class ExpertPart(FileTensor):
    """One expert's matrix in a file's tensor of all experts of a layer, [experts, outputs, inputs]."""

    expert: int
    rows: slice
    """Its outputs: half of those of gate and up projection, which stand one behind the other."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, self.file.entries[self.name].shape[2])

    def read(self) -> torch.Tensor:
        inputs = slice(0, self.shape[1])
        return self.file.read(self.name, [slice(self.expert, self.expert + 1), self.rows, inputs])[0]


class Weights(Protocol):
    """A model's tensors under their Hugging Face names."""

    path: Path
    model: ModelConfig
    links: list[Link]

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors, in the order of the weight map."""
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is read."""
    def held_in(self, file: str) -> list[str]:
        """Return the tensors of which a file of the folder holds a part."""
    def files_of(self, name: str) -> set[str]:
        """Return the files of the folder that hold a part of a tensor."""
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""


def newest_of_run(path: Path) -> Path:
    """Return the newest checkpoint of a run's folder, and any other path as it is."""
    return find_checkpoint(path) if (path / CHECKPOINTS_OF_A_RUN).is_dir() else path


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
        """Tensors of what sees pictures."""
        self.notes: list[str] = []
        """Sentences about fields and tensors that are passed over or not read as config.json says."""
        inside = TEXT_INSIDE.get(str(config.get("model_type")))
        try:
            self.config = text_config(config)
            family = models.get(str(self.config.get("model_type")))
            self._stored = _stored_tensors(self._shards, config)
            """Name of each tensor -> how it stands in the folder."""
            if inside is not None:
                names, self.left_out = inside.names(self._stored)
                if self.left_out:
                    self.notes.append(f"the {len(self.left_out)} tensors of what sees pictures ("
                                      f"{self.left_out[0]}, ...) are left out: the checkpoint has none of it")
                self._stored = {name: self._stored[other] for name, other in names.items()}
            read = {name: value for name, value in self.config.items() if name != FIELD}
            if passed_over := family.find_passed_over(read):
                known = [name for item in family.config for name in item.names]
                # a hint that a field is misspelt begins with "; "
                hints = {name: find_misspelt(name, known)[2:] for name in passed_over}
                told = ", ".join(f"{name} ({hint})" if hint else name for name, hint in hints.items())
                self.notes.append(f"{CONFIG}: fields without effect on the computation, which to-hf writes "
                                  f"again: {told}")
            self.carried = family.find_carried(read)
            """Fields of config.json that an export has again."""
            self.model = family.from_hf_config(read, self._stored)
            if self.model.tied_embeddings and not self._tie_head():
                self.model = family.from_hf_config(read | {"tie_word_embeddings": False}, self._stored)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        self.links = family.links(self.model)
        self._shapes = {name: shape for link in self.links for name, shape in link.hf_shapes().items()}
        self._stored = _without_stacks(self._respelt(family.respelt), self._shapes)
        self._leave_out([name for name in self._stored if name not in self._shapes
                         and RECOMPUTED.fullmatch(name)], f"programs compute them from {CONFIG}")
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.copies = {name: other for name, other in family.copies_in(self.model).items() if name in shapes}
        """Tensors of the folder that are others once more -> the equal ones (`hf_import.check_copies`)."""
        copied = {name: self._shapes[other] for name, other in self.copies.items()}
        expected = self._shapes | copied
        remedy = f"correct the sizes in {CONFIG}"
        if shapes.keys() - expected:
            remedy = f"correct {CONFIG}, which has no place for them, or remove them if no program reads them"
        if expected.keys() - shapes:
            remedy = f"correct {CONFIG} if the model has none of them, else {DAMAGED_HF}"
        check_exact(path, shapes, expected, remedy)

    def _leave_out(self, names: Iterable[str], reason: str) -> None:
        """Take tensors out of those of the folder, and note it."""
        found = [name for name in names if self._stored.pop(name, None)]
        if found:
            self.notes.append(f"tensors that are left out: {listed(found)} ({reason})")

    def _tie_head(self) -> bool:
        """Take the stored head out where config.json ties it to the embedding; return whether the two are one
        matrix.  As in transformers 5, a head of other values is a head of its own, and one alone is the
        embedding too."""
        head, embedding = self._stored.get(HEAD), self._stored.get(EMBEDDING)
        if head is None:
            return True
        if embedding is not None and not has_same_bits(head.read(), embedding.read()):
            self.notes.append(f"{HEAD} and {EMBEDDING} differ, and {CONFIG} says that they are tied; both "
                              "are read (set tie_word_embeddings to false there)")
            return False
        self._stored.setdefault(EMBEDDING, head)
        self._leave_out([HEAD], f"{CONFIG} ties it to {EMBEDDING}, which it equals")
        return True

    def _respelt(self, parts: Sequence[tuple[str, str]]) -> dict[str, StoredTensor]:
        """Return the tensors under the map's names, where the folder spells some otherwise."""
        found = {}
        for name, tensor in self._stored.items():
            spellings = (name, *(name.replace(theirs, ours) for theirs, ours in parts))
            found[next((own for own in spellings if own in self._shapes), name)] = tensor
        return found

    def names(self) -> list[str]:
        return list(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is read: of its file, or of what is made of what stands
        there."""
        return self._stored[name].dtype

    def held_in(self, file: str) -> list[str]:
        return [name for name, shard in self._shards.items() if shard.path == self.path / file]

    def files_of(self, name: str) -> set[str]:
        return {*self._stored[name].files}

    def read(self, name: str) -> torch.Tensor:
        return self._stored[name].read()


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bit patterns: NaN equals itself, and 0.0 is not -0.0."""
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8),
                                                    other.contiguous().view(torch.uint8))


def _stored_tensors(shards: dict[str, TensorFile], config: dict[str, Any]) -> dict[str, StoredTensor]:
    """Return how each tensor of a folder's files stands there; `UserError` where one cannot be read."""
    made: dict[str, StoredTensor] = {**low_bit_weights(config, shards)}
    parts = {part for tensor in made.values() for part in tensor.parts}
    return {name: FileTensor(file, name) for name, file in shards.items() if name not in parts} | made


STACK = re.compile(r"(.+\.experts)\.(gate_up|down)_proj")
"""Name of a tensor of all experts of a layer, as transformers has them in memory."""


def _without_stacks(stored: dict[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
                    ) -> dict[str, StoredTensor]:
    """Return the tensors with those of all experts cut into those of each, where the model has these.

    Args:
        stored: of the folder.
        shapes: of the model's tensors.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = STACK.fullmatch(name)
        if not match or not isinstance(tensor, FileTensor) or len(tensor.shape) != 3 or name in shapes:
            found[name] = tensor
            continue
        parts, (experts, outputs, _) = match[2].split("_"), tensor.shape
        rows = outputs // len(parts)
        found |= {f"{match[1]}.{e}.{part}_proj.weight": ExpertPart(
            tensor.file, tensor.name, e, slice(i * rows, (i + 1) * rows))
            for e in range(experts) for i, part in enumerate(parts)}
    return found


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
        return list(self._link_of)

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._link_of[name].key)

    def held_in(self, file: str) -> list[str]:
        """Return the keys of the tensors of which a file holds a block."""
        return self._reader.held_in(file)

    def files_of(self, name: str) -> set[str]:
        """Return the files that hold a block of the tensor that this one is a part of."""
        return self._reader.files_of(self._link_of[name].key)

    def read(self, name: str) -> torch.Tensor:
        link = self._link_of[name]
        # query, key and value (gate and up) follow one another and come from one block, which is therefore
        # kept
        last: tuple[Link, torch.Tensor] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] is not link:
            self._of_thread.last = None
            last = self._of_thread.last = (
                link, self._reader.read(link.key, link.offset, link.extent).reshape(link.block_shape))
        return link.split(last[1])[name]

    def read_stored(self, key: str, offset: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
        """Return any part of a tensor as the checkpoint holds it."""
        return self._reader.read(key, offset, extent)


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
    """Return for each tensor the file that holds it; `UserError` as `tensor_files`."""
    opened: dict[str, TensorFile] = {}

    def names_in(file: Path, remedy: str) -> Iterable[str]:
        opened[file.name] = TensorFile(file, remedy)
        return opened[file.name].entries

    return {name: opened[file] for name, file in tensor_files(path, names_in).items()}


def tensors_left_out(folder: Path) -> tuple[str, ...]:
    """Return the beginnings of the names of tensors that transformers' class for a language model in a folder
    has no place for, and that need no place: prediction layers behind the trunk, and what sees pictures where
    the text model alone is read.

    transformers itself knows of such layers at the published sizes alone.
    """
    config = read_json(folder / CONFIG)
    name = str(config.get("model_type"))
    found = TEXT_INSIDE[name].others if name in TEXT_INSIDE else ()
    layers, behind = config.get("num_hidden_layers"), config.get(PREDICTION_NAMES[0])
    try:
        behind = behind if isinstance(behind, int) else int(models.get(name).predicts_behind())
    except UserError:  # transformers has more families
        behind = 0
    if not isinstance(layers, int) or not 0 <= behind <= MAX_LAYERS:
        return found
    return (*found, *(f"model.layers.{layers + i}." for i in range(behind)))


def refuse_damaged_export(folder: Path) -> None:
    """Raise `UserError` where the weights of a folder that this software wrote are not what its manifest
    says; what people edit (templates, defaults of generation) is not looked at."""
    if not (folder / MANIFEST).is_file() or "format_version" not in read_json(folder / MANIFEST):
        return
    weights = [name for name in read_manifest(folder).files if name.endswith(".safetensors")]
    if problems := damaged_files(folder, weights, HASHED_AT_A_TIME):
        raise UserError(f"{problems[0]}; {DAMAGED_HF}")


# A stream of tensors that must be a whole model: each once, of its shape, none missing.

WHERE = "the weights to take in"


class Shaped(Protocol):
    """A tensor, or what is sent of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...


_Tensor = TypeVar("_Tensor", bound=Shaped)


def check_whole_model(weights: Iterable[tuple[str, _Tensor]], shapes: Mapping[str, tuple[int, ...]],
            ignored: Sequence[str] = ()) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors that a model has, in the order in which they come.

    Args:
        weights: names and tensors, or what is sent of them.
        shapes: the model's.
        ignored: regular expressions for names that it may be given and does without.

    Raises:
        UserError: at a tensor that is unknown, of another shape or comes twice; after the last one where
            some are missing.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in weights:
        if name not in shapes and any(re.search(pattern, name) for pattern in ignored):
            continue
        if name in found:
            raise UserError(f"{WHERE}: {name} comes twice; give each tensor once")
        found[name] = tuple(tensor.shape)
        if shapes.get(name) != found[name]:
            check_exact(WHERE, {name: found[name]}, {n: s for n, s in shapes.items() if n == name},
                        "take a model of the same family and sizes")
        yield name, tensor
    check_exact(WHERE, found, dict(shapes), "give every tensor of the model")
