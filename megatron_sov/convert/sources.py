"""Weights under their Hugging Face names, whether they stand in a Hugging Face folder or in a checkpoint.

Names and shapes are checked when a folder is opened, from headers alone; tensors are read one at a
time, by any thread.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megatron_sov.base.artifacts import MANIFEST, damaged_files, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.checkpoint.writer import TensorFile
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TEXT_INSIDE, text_config
from megatron_sov.model.families.hf_layers import MAX_LAYERS, PREDICTION_NAMES
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import (
    CONFIG, DAMAGED_HF, is_hf_folder as is_hf_folder, listed, read_json, tensor_files)
from megatron_sov.runs.checkpoints import CHECKPOINTS_OF_A_RUN, find_checkpoint, settings_of

# Reads weights that stand in a folder as MXFP4: blocks of 32 numbers of 4 bits that share a scale (OCP
# Microscaling Formats v1.0, sections 5.2 and 5.3).
#
# A weight NAME [experts, inputs, outputs] is stored as NAME_blocks [experts, outputs, inputs / 32, 16] uint8,
# two numbers (E2M1) in a byte, the lower half first, and NAME_scales [experts, outputs, inputs / 32] uint8,
# powers of two with an offset of 127 (E8M0). Numbers come out in bfloat16, which has all of them but those
# below its range; transformers makes the same.

BLOCKS, SCALES = "_blocks", "_scales"
PER_BLOCK = 32
"""Numbers that share a scale."""
OFFSET, NOT_A_NUMBER = 127, 255
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Number of each 4 bits."""
BLOCKS_AT_A_TIME = 1 << 13
"""Blocks that are unpacked at a time: what fits a core's cache."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored as blocks and scales."""

    name: str
    blocks: TensorFile
    """The file that holds its blocks."""
    scales: TensorFile
    """The file that holds its scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return [experts, inputs, outputs]."""
        experts, outputs, groups, _ = self.blocks.entries[self.name + BLOCKS].shape
        return experts, groups * PER_BLOCK, outputs

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        return {self.blocks.path.name, self.scales.path.name}

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name + BLOCKS, self.name + SCALES

    def read(self) -> torch.Tensor:
        """Return the weight, bfloat16.

        Raises:
            UserError: a file is damaged, or a scale is no number.
        """
        blocks, scales = self.blocks.read(self.name + BLOCKS), self.scales.read(self.name + SCALES)
        if bool((scales == NOT_A_NUMBER).any()):
            raise UserError(f"{self.scales.path}: {self.name}{SCALES} holds {NOT_A_NUMBER}, which is no "
                            "number in E8M0; take weights from before the model broke")
        return unpacked(blocks, scales).transpose(1, 2)


def packed_weights(shards: dict[str, TensorFile]) -> dict[str, PackedWeight]:
    """Return the weights of a folder that are stored as blocks and scales, by name.

    Args:
        shards: tensor -> the file that holds it.

    Raises:
        UserError: blocks stand without scales or beside the weight itself, or have another shape or dtype.
    """
    found = {}
    for name in [n.removesuffix(BLOCKS) for n in shards if n.endswith(BLOCKS)]:
        if name + SCALES not in shards:
            raise UserError(f"{shards[name + BLOCKS].path}: {name}{BLOCKS} stands without {name}{SCALES}; "
                            "copy or download the folder again")
        if name in shards:
            raise UserError(f"{shards[name].path}: holds {name}, which {name}{BLOCKS} holds as well; remove "
                            "one of them")
        found[name] = PackedWeight(name, shards[name + BLOCKS], shards[name + SCALES])
        _check_packed(found[name])
    return found


def _check_packed(weight: PackedWeight) -> None:
    entries = (weight.blocks.entries[weight.name + BLOCKS], weight.scales.entries[weight.name + SCALES])
    blocks, scales = (list(entry.shape) for entry in entries)
    if (len(blocks) != 4 or blocks[-1] != PER_BLOCK // 2 or scales != blocks[:-1]
            or {entry.dtype for entry in entries} != {"U8"}):
        raise UserError(f"{weight.blocks.path}: {weight.name}{BLOCKS} is {entries[0].dtype} {blocks} and "
                        f"{weight.name}{SCALES} {entries[1].dtype} {scales}, and MXFP4 is U8 [experts, "
                        f"outputs, inputs / {PER_BLOCK}, {PER_BLOCK // 2}] and U8 [experts, outputs, "
                        f"inputs / {PER_BLOCK}]; copy or download the folder again")


@cache
def _pairs() -> torch.Tensor:
    """Return for each byte its two numbers in bfloat16, side by side as one integer: [256] int32."""
    numbers, byte = torch.tensor(E2M1, dtype=torch.bfloat16), torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1).view(torch.int32).flatten()


@cache
def _factors() -> torch.Tensor:
    """Return the factor of each scale, [255] bfloat16, which has all of them."""
    return torch.ldexp(torch.ones(NOT_A_NUMBER), torch.arange(NOT_A_NUMBER) - OFFSET).bfloat16()


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers of blocks: [..., groups, bytes] and [..., groups] uint8 -> [..., groups x bytes x 2]
    bfloat16."""
    rows, exponents = blocks.flatten(0, -2), scales.flatten()
    out = torch.empty(len(rows), 2 * rows.shape[1], dtype=torch.bfloat16)
    for start in range(0, len(rows), BLOCKS_AT_A_TIME):
        part = slice(start, start + BLOCKS_AT_A_TIME)
        numbers = _pairs().index_select(0, rows[part].flatten().int()).view(torch.bfloat16)
        torch.mul(numbers.view(out[part].shape), _factors()[exponents[part].int(), None], out=out[part])
    return out.reshape(*blocks.shape[:-2], -1)


FIELD = "quantization_config"
BLOCK = 128
"""Rows and columns of a weight with one scale."""
SUFFIX = "_scale_inv"
EIGHT_BITS = "F8_E4M3"
"""The dtype's name in safetensors' headers."""
KNOWN: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],), "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}
"""Field -> values that make no other weights of the same bytes."""
NAMES = ("modules_to_not_convert", "ignored_layers")
"""Fields that name modules: the tensors' dtypes say the same."""
HASHED_AT_A_TIME = 4
PART = "model"
"""The part of a checkpoint that holds the weights."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have."""


# Weights of a Hugging Face folder in 8 bits, with a scale for each block of 128 x 128: as DeepSeek-V3 is
# released. Such a weight stands there as float8_e4m3fn, and beside it, as `<name>_scale_inv`, the number
# that each of its blocks is multiplied with (DeepSeek-V3's `inference/fp8_cast_bf16.py`). The product is
# rounded to bfloat16, as it is there.


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in 8 bits with a scale for each of its blocks."""

    name: str
    weight: TensorFile
    """The file that holds it."""
    scales: TensorFile
    """The file that holds its scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        """Return that of its product with its scales."""
        return torch.bfloat16

    @property
    def files(self) -> set[str]:
        return {self.weight.path.name, self.scales.path.name}

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name, self.name + SUFFIX

    def read(self) -> torch.Tensor:
        """Return the product, in bfloat16; `UserError` where a file is damaged."""
        stored = self.weight.read(self.name, dtype=torch.float8_e4m3fn)
        scales = self.scales.read(self.name + SUFFIX)
        found = torch.empty(stored.shape, dtype=self.dtype)
        for row, of_row in enumerate(scales):
            rows = slice(row * BLOCK, (row + 1) * BLOCK)
            found[rows] = stored[rows].float() * of_row.repeat_interleave(BLOCK)[:stored.shape[1]]
        return found


def scaled_weights(config: Mapping[str, Any], shards: Mapping[str, TensorFile]) -> dict[str, ScaledWeight]:
    """Return the weights of a folder that stand in 8 bits beside their scales, by name.

    They are found and checked from headers alone.

    Args:
        config: the parsed config.json.
        shards: tensor -> its file.

    Raises:
        UserError: the folder is quantised in another way, or a scale is missing, of another shape, or
            of no tensor.
    """
    quantised = config.get(FIELD)
    if quantised is None:
        return {}
    _check_kind(quantised)
    found = [name for name, file in shards.items() if file.entries[name].dtype == EIGHT_BITS]
    scales = {name + SUFFIX for name in found}
    if orphans := [name for name in shards if name.endswith(SUFFIX) and name not in scales]:
        raise UserError(f"{orphans[0]} is the scale of no tensor in {EIGHT_BITS}; download the folder again")
    for name in found:
        _check(shards, name)
    return {name: ScaledWeight(name, shards[name], shards[name + SUFFIX]) for name in found}


def _check(shards: Mapping[str, TensorFile], name: str) -> None:
    """Raise `UserError` where a weight is no matrix of bytes, or its scales are not those of its blocks."""
    entry, scale = shards[name].entries[name], name + SUFFIX
    if len(entry.shape) != 2 or math.prod(entry.shape) != entry.size_bytes:
        raise UserError(f"{name} has {entry.size_bytes} bytes and the shape {list(entry.shape)}; in "
                        f"{EIGHT_BITS} it must be a matrix with a byte for each number")
    if scale not in shards:
        raise UserError(f"{name} has no scale ({scale}); download the folder again")
    found, wanted = shards[scale].entries[scale], [-(-n // BLOCK) for n in entry.shape]
    if list(found.shape) != wanted or found.dtype != "F32":
        raise UserError(f"{scale} is {found.dtype} {list(found.shape)} and must be F32 {wanted}: a number "
                        f"for each block of {BLOCK} x {BLOCK} of {name}")


def _check_kind(quantised: Any) -> None:
    """Raise `UserError` where weights are quantised otherwise."""
    if not isinstance(quantised, dict):
        raise UserError(f"{FIELD} = {quantised!r} must be an object; download config.json again")
    # absent is what `None` is, but for the two that say what there is
    said = {name: quantised.get(name) for name in {*KNOWN, *quantised} if name not in NAMES}
    for name, value in sorted(said.items()):
        if value not in KNOWN.get(name, (None,)):
            raise UserError(f"{FIELD} has {name} = {value!r}, but only weights in float8 (e4m3) "
                            f"with a scale for each block of {BLOCK} x {BLOCK} are read; save the model "
                            "without quantisation")


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
    def files(self) -> set[str]:
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
            self._stored = _stored_tensors(self._shards, {} if reads_field else config)
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
        """Tensors of the folder that are others once more -> the equal ones (`hf_import.check_copies`)."""
        copied = {name: self._shapes[other] for name, other in self.copies.items()}
        check_exact(path, shapes, self._shapes | copied, f"compare {CONFIG} with the files, or {DAMAGED_HF}")

    def names(self) -> list[str]:
        return list(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is read: of its file, or of what is made of what stands
        there."""
        return self._stored[name].dtype

    def held_in(self, file: str) -> list[str]:
        return [name for name, shard in self._shards.items() if shard.path == self.path / file]

    def files_of(self, name: str) -> set[str]:
        return self._stored[name].files

    def read(self, name: str) -> torch.Tensor:
        return self._stored[name].read()


def _stored_tensors(shards: dict[str, TensorFile], config: dict[str, Any]) -> dict[str, StoredTensor]:
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
