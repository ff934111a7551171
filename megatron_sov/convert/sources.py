"""Open weights in a Hugging Face folder or checkpoint under Hugging Face names.

Names and shapes are checked from headers when a folder is opened. Tensors are read one at a time, by any
thread.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_sov.base.artifacts import MANIFEST, find_damaged_files, read_manifest
from megatron_sov.base.errors import UserError, suggest_spelling
from megatron_sov.checkpoint.safetensors_files import TensorFile
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.checkpoint.stored_tensors import StoredTensors
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import NESTED_TEXT_MODELS, extract_text_config
from megatron_sov.model.families.hf_layers import MAX_LAYERS, PREDICTION_NAMES
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import (
    CONFIG, DAMAGED_HF, EMBEDDING, HEAD, RECOMPUTED, find_tensor_files, format_names,
    is_hf_folder as is_hf_folder, read_json)
from megatron_sov.runs.checkpoints import (
    CHECKPOINTS_FOLDER, OPTIMIZER, find_checkpoint, read_checkpoint_settings)

HASHED_AT_A_TIME = 4
MAX_FIELD_DEPTH = 100
PART = "model"
"""Checkpoint part with the weights."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Accepted weight dtypes."""


def find_low_bit_weights(config: Mapping[str, Any], shards: Mapping[str, TensorFile]
                         ) -> dict[str, LowBitWeight]:
    """Return name -> weight for a folder's FP8 weights; {} without `quantization_config`. Raises `UserError`:
    the format is not supported, or a stored tensor is missing or has a wrong shape or dtype."""
    quantised = config.get(FIELD)
    if quantised is None:
        return {}
    if not isinstance(quantised, dict):
        raise UserError(f"{FIELD} = {quantised!r} must be an object; download config.json again")
    suffix = BLOCK_SCALES
    if quantised.get("quant_method") == "compressed-tensors":
        _check_compressed(quantised)
        suffix = SINGLE_SCALE
    else:
        _check_blocks(quantised)
    names = {name.removesuffix(suffix) for name, file in shards.items()
             if file.entries[name].dtype == EIGHT_BITS or name.endswith(f".weight{suffix}")}
    return {name: _open_weight(name, suffix, shards) for name in names}


def _open_weight(name: str, suffix: str, shards: Mapping[str, TensorFile]) -> LowBitWeight:
    """Check a weight's header and that of its scales."""
    scales = name + suffix
    if name not in shards:
        raise UserError(f"{name} is missing, although {scales} exists; download the folder again")
    if scales not in shards:
        raise UserError(f"{name} has no scale ({scales}); download the folder again")
    shape = shards[name].entries[name].shape
    if len(shape) != 2:
        raise UserError(f"{name} has shape {list(shape)}, but an FP8 weight is a matrix; download the folder "
                        "again")
    num_scales = (1,) if suffix == SINGLE_SCALE else tuple(-(-n // BLOCK) for n in shape)
    for part, kind, expected, itemsize in ((name, EIGHT_BITS, shape, 1), (scales, "F32", num_scales, 4)):
        stored, size_bytes = shards[part].entries[part], math.prod(expected) * itemsize
        if (stored.dtype, stored.shape, stored.size_bytes) != (kind, expected, size_bytes):
            raise UserError(f"{part} is {stored.dtype} {list(stored.shape)} and must be {kind} "
                            f"{list(expected)}, see {FIELD}")
    return LowBitWeight((name, scales), shards)


def _check_blocks(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the format is FP8 with block scales."""
    # Absent fields count as None, except for `quant_method` and `weight_block_size`, which must be present.
    values = {name: quantised.get(name) for name in {*SUPPORTED_VALUES, *quantised}
              if name not in MODULE_FIELDS}
    for name, value in sorted(values.items()):
        if value not in SUPPORTED_VALUES.get(name, (None,)):
            raise UserError(f"{FIELD} has {name} = {value!r}, but only weights in float8 (e4m3) with a scale "
                            f"per block of {BLOCK} x {BLOCK} and those of compressed-tensors are supported; "
                            "save the model without quantization")


def _has_single_scales(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and all(
        weights.get(name) == value for name, value in TENSOR_WISE.items())


def _check_compressed(quantised: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a compressed-tensors folder has a single scale per weight."""
    groups = quantised.get("config_groups")
    group_list = list(groups.values()) if isinstance(groups, dict) else []
    is_supported = (group_list and quantised.get("format") == "float-quantized"
                    and not any(quantised.get(name) for name in ("transform_config", "sparsity_config"))
                    and all(map(_has_single_scales, group_list)))
    if not is_supported:
        raise UserError(f"{FIELD} has format = {quantised.get('format')!r} with config_groups = {groups!r}, "
                        "but the only supported compressed-tensors format is float-quantized with one scale "
                        "per tensor; save the model without quantization")


STACK = re.compile(r"(.+\.experts)\.(gate_up|down)_proj")
"""A layer's stacked experts, as in transformers' memory layout."""
IMPORTED_WEIGHTS = "the weights to take in"


@dataclass(frozen=True)
class FileTensor:
    """A plain tensor in a safetensors file."""

    file: TensorFile
    name: str
    """Name in `file`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.file.get_dtype(self.name)

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self) -> torch.Tensor:
        return self.file.read(self.name)


@dataclass(frozen=True)
class ExpertPart(FileTensor):
    """An expert's matrix inside a stacked tensor [experts, outputs, inputs]."""

    expert: int
    rows: slice
    """The matrix's outputs; `gate_up_proj` stores the gate rows before the up rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, self.file.entries[self.name].shape[2])

    def read(self) -> torch.Tensor:
        inputs = slice(0, self.shape[1])
        return self.file.read(self.name, [slice(self.expert, self.expert + 1), self.rows, inputs])[0]


# FP8 weights have a scale per block of 128 x 128 (DeepSeek-V3), or one scale (format `float-quantized` of
# compressed-tensors). They are value times scale, rounded as in DeepSeek-V3's `inference/fp8_cast_bf16.py`.

FIELD = "quantization_config"
EIGHT_BITS = "F8_E4M3"
"""Name for `torch.float8_e4m3fn` in safetensors headers."""
BLOCK = 128
"""Rows and columns per block."""
BLOCK_SCALES, SINGLE_SCALE = "_scale_inv", "_scale"
"""Suffixes of the names of scales."""
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",), "weight_block_size": ([BLOCK, BLOCK],), "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}
"""Field -> values that do not change how stored bytes are interpreted."""
MODULE_FIELDS = ("modules_to_not_convert", "ignored_layers")
"""Fields that list unquantized modules; the dtypes in the files contain the same information."""
TENSOR_WISE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None,
               "block_structure": None, "actorder": None}
"""Field in a compressed-tensors group that determines how bytes are interpreted -> supported values."""


@dataclass(frozen=True)
class LowBitWeight:
    """A weight stored in FP8."""

    parts: tuple[str, str]
    """Names of the stored weight and its scales."""
    shards: Mapping[str, TensorFile]
    """Tensor name -> file."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shards[self.parts[0]].entries[self.parts[0]].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def read(self) -> torch.Tensor:
        """Read the weight in bfloat16. Raises `UserError`: a damaged file."""
        numbers, scales = (self.shards[part].read(part, dtype=dtype) for part, dtype in zip(
            self.parts, (torch.float8_e4m3fn, torch.float32), strict=True))
        if scales.dim() == 1:
            return (numbers.float() * scales).bfloat16()
        weight = torch.empty(numbers.shape, dtype=torch.bfloat16)
        for row, row_scales in enumerate(scales):
            strip = slice(row * BLOCK, (row + 1) * BLOCK)
            weight[strip] = numbers[strip].float() * row_scales.repeat_interleave(BLOCK)[:numbers.shape[1]]
        return weight


StoredTensor = FileTensor | LowBitWeight
"""A tensor in a Hugging Face folder, stored plain or in FP8."""


def resolve_run(path: Path) -> Path:
    """Return the newest checkpoint if `path` is a run folder, otherwise `path`."""
    return find_checkpoint(path) if (path / CHECKPOINTS_FOLDER).is_dir() else path


def check_shapes(where: object, actual: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]],
                 remedy: str) -> None:
    """Raise `UserError` that lists missing and unexpected tensors and wrong shapes."""
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    shapes = [f"{name} {list(actual[name])} instead of {list(shape)}"
              for name, shape in expected.items() if name in actual and actual[name] != shape]
    problems = [f"{len(names)} {problem} ({format_names(names)})" for problem, names in (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]
    if problems:
        raise UserError(f"{where}: its tensors do not match the model: {'; '.join(problems)}; {remedy}")


_T = TypeVar("_T", bound=Any)
BlockPlace = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key of a stored tensor, and offset and extent of a block."""


class Weights:
    """A model's tensors under Hugging Face names, split from the blocks of stored tensors."""

    tensors: StoredTensors

    def __init__(self, path: Path, model: ModelConfig, links: list[Link]) -> None:
        self.path, self.model, self.links = path, model, links
        self._links_by_name = {name: link for link in links for name in link.hf_names}
        self._thread_state = threading.local()

    def locate(self, link: Link, state: str = "") -> list[BlockPlace]:
        """Return the stored blocks of a link's block of a weight, or of its optimizer tensor `state`."""
        return [(link.key, link.offset, link.extent)]

    def list_names(self) -> list[str]:
        """Return the tensor names, in the order of `links`."""
        return list(self._links_by_name)

    def get_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `read` returns."""
        return self.tensors.get_dtype(self.locate(self._links_by_name[name])[0][0])

    def list_keys_in(self, file: str) -> list[str]:
        """Return the stored tensors with a block in `file`."""
        return self.tensors.list_keys_in(file)

    def list_files(self, name: str) -> set[str]:
        """Return the files that store tensor `name`."""
        return {file for place in self.locate(self._links_by_name[name])
                for file in self.tensors.list_files(*place)}

    def read(self, name: str) -> torch.Tensor:
        link = self._links_by_name[name]
        # consecutive names (query, key, value; gate, up) come from one block
        return link.split(self.cache_last(link, lambda: self.read_block(link)))[name]

    def cache_last(self, source: object, read: Callable[[], _T]) -> _T:
        """Return `read()`, which this thread repeats only for another source than in the last call."""
        last = getattr(self._thread_state, "last", None)
        if last is None or last[0] is not source:
            self._thread_state.last = None
            last = self._thread_state.last = (source, read())
        return last[1]

    def check_tensors(self, keys: Iterable[str], expected: dict[str, tuple[int, ...]]) -> None:
        """Raise `UserError` if the tensors `keys` are not `expected` (key -> shape), or have holes."""
        check_shapes(self.path, {key: self.tensors.get_shape(key) for key in keys}, expected,
                     "the checkpoint is damaged or of another version")
        self.tensors.check_complete()

    def read_block(self, link: Link, state: str = "") -> torch.Tensor:
        """Read a link's block of a weight, or of its optimizer tensor `state`."""
        rows = [self.tensors.read(*place).reshape(-1, *link.block_shape[1:])
                for place in self.locate(link, state)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).reshape(link.block_shape)


class HfWeights(Weights):
    """Tensors in a Hugging Face folder; for multimodal models, only the text model's tensors."""

    def __init__(self, path: Path) -> None:
        config = read_json(path / CONFIG)
        self._shards = open_shards(path)
        self.encoder_tensors: list[str] = []
        """Image and audio encoder tensors."""
        self.notes: list[str] = []
        """Warnings about ignored fields and tensors."""
        text_model = NESTED_TEXT_MODELS.get(str(config.get("model_type")))
        try:
            self.config = extract_text_config(config)
            family = models.get_family(str(self.config.get("model_type")))
            low_bit = find_low_bit_weights(config, self._shards)
            parts = {part for tensor in low_bit.values() for part in tensor.parts}
            self._stored: dict[str, StoredTensor] = {
                name: FileTensor(file, name) for name, file in self._shards.items() if name not in parts}
            self._stored |= low_bit
            """Hugging Face name -> stored tensor."""
            if text_model is not None:
                text_names, self.encoder_tensors = text_model.map_tensor_names(self._stored)
                if self.encoder_tensors:
                    self.notes.append(f"the {len(self.encoder_tensors)} tensors of the image encoder ("
                                      f"{self.encoder_tensors[0]}, ...) are not converted")
                self._stored = {name: self._stored[stored_name] for name, stored_name in text_names.items()}
            known_config = {name: value for name, value in self.config.items() if name != FIELD}
            _check_fields(known_config)
            if ignored_fields := family.find_ignored_fields(known_config):
                field_names = [name for item in family.config for name in item.names]
                # `suggest_spelling` returns "" or "; HINT".
                hints = {name: suggest_spelling(name, field_names)[2:] for name in ignored_fields}
                fields = ", ".join(f"{name} ({hint})" if hint else name for name, hint in hints.items())
                self.notes.append(f"{CONFIG}: fields without effect on the computation, which to-hf writes "
                                  f"unchanged: {fields}")
            self.carried = family.find_carried_fields(known_config)
            """config.json fields that exports copy."""
            self.model = family.from_hf_config(known_config, self._stored)
            if self.model.tied_embeddings and not self._tie_head():
                untied_config = known_config | {"tie_word_embeddings": False}
                self.model = family.from_hf_config(untied_config, self._stored)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        super().__init__(path, self.model, family.links(self.model))
        self._shapes = {name: shape for link in self.links for name, shape in link.hf_shapes().items()}
        self._stored = _split_stacks(self._rename_tensors(family.respelt), self._shapes)
        self._exclude_tensors(
            [name for name in self._stored if name not in self._shapes and RECOMPUTED.fullmatch(name)],
            f"programs compute them from {CONFIG}")
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.copies = {name: other for name, other in family.find_copies(self.model).items()
                       if name in shapes}
        """Duplicated tensors in the folder -> originals (see `hf_import.check_copies`)."""
        copy_shapes = {name: self._shapes[other] for name, other in self.copies.items()}
        expected = self._shapes | copy_shapes
        remedy = f"correct the sizes in {CONFIG}"
        if shapes.keys() - expected:
            remedy = f"correct {CONFIG}, or remove the unexpected tensors if no program reads them"
        if expected.keys() - shapes:
            remedy = f"correct {CONFIG} if the model has no such tensors, otherwise {DAMAGED_HF}"
        check_shapes(path, shapes, expected, remedy)

    def _exclude_tensors(self, names: Iterable[str], reason: str) -> None:
        """Remove tensors that need no conversion, and add a note."""
        removed = [name for name in names if self._stored.pop(name, None)]
        if removed:
            self.notes.append(f"tensors that are not converted: {format_names(removed)} ({reason})")

    def _tie_head(self) -> bool:
        """Remove the head if it equals the embedding; return False if `tie_word_embeddings` must be ignored.

        As in transformers 5: a head that differs is loaded, and a lone head is the embedding too.
        """
        head, embedding = self._stored.get(HEAD), self._stored.get(EMBEDDING)
        if head is None:
            return True
        if embedding is not None and not has_same_bits(head.read(), embedding.read()):
            self.notes.append(f"{HEAD} and {EMBEDDING} differ, and {CONFIG} says that they are tied; both "
                              "are read (set tie_word_embeddings to false there)")
            return False
        self._stored.setdefault(EMBEDDING, head)
        self._exclude_tensors([HEAD], f"{CONFIG} ties it to {EMBEDDING}, which it equals")
        return True

    def _rename_tensors(self, replacements: Sequence[tuple[str, str]]) -> dict[str, StoredTensor]:
        """Return tensors under the weight map's names. `replacements`: (another spelling, its spelling)."""
        tensors = {}
        for name, tensor in self._stored.items():
            spellings = (name, *(name.replace(other, known) for other, known in replacements))
            known_name = next((spelling for spelling in spellings if spelling in self._shapes), name)
            tensors[known_name] = tensor
        return tensors

    def get_dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def list_keys_in(self, file: str) -> list[str]:
        return [name for name, shard in self._shards.items() if shard.path == self.path / file]

    def list_files(self, name: str) -> set[str]:
        return {self._shards[part].path.name for part in self._stored[name].parts}

    def read(self, name: str) -> torch.Tensor:
        return self._stored[name].read()


def _check_fields(config: Mapping[str, Any]) -> None:
    """Refuse field names of config.json that cannot be printed, and fields nested too deeply to be copied."""
    for name, value in config.items():
        if not name.isprintable():
            raise UserError(f"{CONFIG}: field {name!r} has characters that cannot be printed; rename it")
        items, depth = [value], 0
        while items:
            depth += 1
            items = [inner for item in items if isinstance(item, (dict, list))
                     for inner in (item.values() if isinstance(item, dict) else item)]
        if depth > MAX_FIELD_DEPTH:
            raise UserError(f"{CONFIG}: field {name} is nested {depth} levels deep, and the limit is "
                            f"{MAX_FIELD_DEPTH}; remove it")


def has_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare bit patterns: NaN equals NaN, and 0.0 differs from -0.0."""
    return first.dtype == second.dtype and torch.equal(first.contiguous().view(torch.uint8),
                                                       second.contiguous().view(torch.uint8))


def _split_stacks(stored: dict[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
                  ) -> dict[str, StoredTensor]:
    """Replace stacked expert tensors by a tensor per expert, if `shapes` list experts separately."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = STACK.fullmatch(name)
        if not match or not isinstance(tensor, FileTensor) or len(tensor.shape) != 3 or name in shapes:
            tensors[name] = tensor
            continue
        projections, (experts, outputs, _) = match[2].split("_"), tensor.shape
        rows = outputs // len(projections)
        for expert in range(experts):
            for i, projection in enumerate(projections):
                tensors[f"{match[1]}.{expert}.{projection}_proj.weight"] = ExpertPart(
                    tensor.file, tensor.name, expert, slice(i * rows, (i + 1) * rows))
    return tensors


class CheckpointWeights(Weights):
    """Checkpoint tensors, split into Hugging Face tensors."""

    def __init__(self, path: Path, state: str = "") -> None:
        """`state`: read this optimizer tensor, such as exp_avg, of the weights that have it; "": weights."""
        settings = read_checkpoint_settings(path)
        model = settings.model
        links = models.get_family(model.family, settings.code).links(model)
        self.tensors = TensorReader(path, OPTIMIZER if state else PART)
        keys = self.tensors.keys()
        if state:
            keys = [key for key in keys if key.startswith(f"{state}/")]
            trained = set(keys)
            links = [replace(link, key=f"{state}/{link.key}") for link in links
                     if f"{state}/{link.key}" in trained]
        super().__init__(path, model, links)
        self.check_tensors(keys, {link.key: link.shape for link in self.links})


def check_dtypes(weights: Weights) -> None:
    """Check tensor dtypes before the conversion. Raises `UserError`: a weight is not floating-point, a router
    bias was rounded to 16 bits (its updates would vanish), or tensors that become one tensor (query and key,
    experts of a layer) differ in dtype."""
    first_names: dict[str, str] = {}
    for link in weights.links:
        for name in link.hf_names:
            dtype, first_name = weights.get_dtype(name), first_names.setdefault(link.key, name)
            if dtype not in FLOATS:
                raise UserError(f"{weights.path}: {name} has dtype {dtype}; "
                                "weights must be floating-point numbers")
            if link.fp32 and dtype.itemsize < torch.float32.itemsize:
                raise UserError(f"{weights.path}: {name} has dtype {dtype}, but it must be torch.float32: "
                                "rounding loses its small updates; save this tensor in float32")
            if dtype != weights.get_dtype(first_name):
                raise UserError(f"{weights.path}: {name} has dtype {dtype} and {first_name} "
                                f"{weights.get_dtype(first_name)}, but they are parts of one tensor; "
                                "save the model in one dtype")


def open_shards(path: Path) -> dict[str, TensorFile]:
    """Return tensor name -> open file; raises `UserError` (see `find_tensor_files`)."""
    files: dict[str, TensorFile] = {}

    def read_names(file: Path, remedy: str) -> Iterable[str]:
        files[file.name] = TensorFile(file, remedy)
        return files[file.name].entries

    return {name: files[file] for name, file in find_tensor_files(path, read_names).items()}


def list_ignored_prefixes(folder: Path) -> tuple[str, ...]:
    """Return name prefixes for tensors in `folder` that transformers' language model class ignores.

    These are prediction layers after the last layer (transformers knows them for published sizes only) and,
    for a text model inside a multimodal folder, the encoders.
    """
    config = read_json(folder / CONFIG)
    model_type = str(config.get("model_type"))
    prefixes = NESTED_TEXT_MODELS[model_type].others if model_type in NESTED_TEXT_MODELS else ()
    num_layers, num_predictions = config.get("num_hidden_layers"), config.get(PREDICTION_NAMES[0])
    try:
        if not isinstance(num_predictions, int):
            num_predictions = int(models.get_family(model_type).has_mtp_after_trunk())
    except UserError:  # a transformers family without support here
        num_predictions = 0
    if not isinstance(num_layers, int) or not 0 <= num_predictions <= MAX_LAYERS:
        return prefixes
    return (*prefixes, *(f"model.layers.{num_layers + i}." for i in range(num_predictions)))


def check_export(folder: Path) -> None:
    """Raise `UserError` if weight files in an `hf_model` artifact differ from the manifest.

    Files that users edit, such as templates and generation defaults, are not checked.
    """
    if not (folder / MANIFEST).is_file() or "format_version" not in read_json(folder / MANIFEST):
        return
    weights = [name for name in read_manifest(folder).files if name.endswith(".safetensors")]
    if problems := find_damaged_files(folder, weights, HASHED_AT_A_TIME):
        raise UserError(f"{problems[0]}; {DAMAGED_HF}")


def check_whole_model(weights: Iterable[tuple[str, _T]], shapes: Mapping[str, tuple[int, ...]],
                      ignored: Sequence[str] = ()) -> Iterator[tuple[str, _T]]:
    """Yield tensors in arrival order, and check that the tensors form a whole model with `shapes`; names that
    match the regular expressions `ignored` are skipped. Raises `UserError`: a tensor is unknown, repeated or
    has a wrong shape; after the last tensor, if tensors are missing."""
    received_shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in weights:
        if name not in shapes and any(re.search(pattern, name) for pattern in ignored):
            continue
        if name in received_shapes:
            raise UserError(f"{IMPORTED_WEIGHTS}: {name} is given twice; give each tensor once")
        received_shapes[name] = tuple(tensor.shape)
        if shapes.get(name) != received_shapes[name]:
            expected = {name: shapes[name]} if name in shapes else {}
            check_shapes(IMPORTED_WEIGHTS, {name: received_shapes[name]}, expected,
                         "take a model of the same family and sizes")
        yield name, tensor
    check_shapes(IMPORTED_WEIGHTS, received_shapes, dict(shapes), "give every tensor of the model")
