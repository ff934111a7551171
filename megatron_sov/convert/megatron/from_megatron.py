"""Import `torch_dist` and `fsdp_dtensor` checkpoints from Megatron-LM, Megatron-Bridge and NeMo."""

import functools
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.kinds import TRACKER
from megatron_sov.base.outputs import refuse_outside_link
from megatron_sov.checkpoint.safetensors_files import read_block
from megatron_sov.checkpoint.stored_tensors import StoredBlock, StoredTensors
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, choose_dtype
from megatron_sov.convert.hf_import import (
    ImportSource, StateBlock, TrainingState, list_states, write_imported)
from megatron_sov.convert.megatron.inert_pickle import (
    COMMON_STATE, MAX_SIZE, STATE_KEY, TORCH_STATE_KEY, TorchArchive, parse_file, read_index, read_settings,
    read_value)
from megatron_sov.convert.sources import BlockPlace, Weights, check_dtypes, check_shapes
from megatron_sov.engine.model.language_model import VOCABULARY_WEIGHTS
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.counterparts.architecture import (
    infer_architecture, normalize_arguments, read_sections)
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import format_names, read_json
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
RUN_CONFIG = "run_config.yaml"
BACKEND, VERSIONS = "torch_dist", (1,)
MAX_TRACKER_BYTES = 64


def find_iteration(folder: Path) -> Path:
    """Return the folder with the index: `folder` itself, or the newest iteration. Raises `UserError`: there
    is no checkpoint, or its format or version is not supported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; pass a checkpoint of Megatron-LM or Megatron-Bridge")
    iteration_folder = folder
    if not _is_checkpoint(folder):
        iteration_folder = _find_newest(folder)
    if (iteration_folder / "weights").is_dir() and not _is_checkpoint(iteration_folder):  # NeMo 2
        iteration_folder /= "weights"
    _check_format(iteration_folder)
    return iteration_folder


def _is_checkpoint(folder: Path) -> bool:
    return (folder / METADATA).exists() or (folder / FORMAT).exists() or any(folder.glob("mp_rank_*"))


def _find_newest(folder: Path) -> Path:
    tracker = folder / TRACKER
    if not tracker.is_file():
        names = sorted(p.name for p in folder.glob("iter_*") if p.is_dir())
        if len(names) == 1:
            return folder / names[0]
        if not names:
            return folder
        raise UserError(f"{folder}: has no {TRACKER} with the newest iteration; pass one of its checkpoints "
                        f"({format_names(names)})")
    with open(tracker, encoding="utf-8", errors="replace") as f:
        iteration = f.read(MAX_TRACKER_BYTES).strip()
    if not re.fullmatch(r"\d{1,12}|release", iteration):
        raise UserError(f"{tracker}: contains {iteration!r}, which is not an iteration; pass the checkpoint "
                        "folder")
    newest = folder / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
    if not newest.is_dir():
        raise UserError(f"{tracker}: names {newest.name}, which does not exist; pass the checkpoint folder")
    return newest


def _check_format(folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise UserError(f"{folder}: has files of single ranks (--ckpt-format torch), which are not "
                        "supported; let Megatron-LM convert it to --ckpt-format torch_dist "
                        "(--ckpt-convert-format)")
    if not (folder / METADATA).is_file() and not (folder / FORMAT).is_file():
        raise UserError(f"{folder}: has neither {METADATA} nor {FORMAT}, so it is not a torch_dist "
                        f"checkpoint; pass the folder of an iteration, or the folder with {TRACKER}; pass "
                        "folders with step-N to `megatron-sov convert from-dcp`")
    if not (folder / FORMAT).is_file():
        keys = parse_file(read_index, folder / METADATA)["tensors"]
        if not any(key.startswith("model.") and key.endswith(VOCABULARY_WEIGHTS) for key in keys):
            raise UserError(f"{folder}: has neither {FORMAT} (torch_dist) nor model.{VOCABULARY_WEIGHTS[0]} "
                            "(fsdp_dtensor); pass checkpoints of torchtitan or torch loops to "
                            "`megatron-sov convert from-dcp`")
        return
    metadata = read_json(folder / FORMAT)
    backend, version = metadata.get("sharded_backend"), metadata.get("sharded_backend_version")
    if backend != BACKEND or version not in VERSIONS:
        raise UserError(f"{folder / FORMAT}: sharded_backend = {backend!r} version {version!r} is not "
                        f"supported, only {BACKEND!r} version {VERSIONS[0]}; let Megatron convert it to "
                        "--ckpt-format torch_dist")
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: has no {METADATA}, so it was never complete; use an earlier checkpoint")


MAX_READ_BYTES = 1 << 20
"""Maximum bytes per read from an archive's member list or header."""


def find_tensor(path: Path, start: int, length_bytes: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Return dtype, shape and first byte of a `torch.save` archive's tensor; raises OSError or ValueError."""
    if not path.is_file():
        raise ValueError("the file is missing")
    with open(path, "rb") as file:
        if start + length_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("the file ends before it does")
        archive = TorchArchive(_TensorWindow(file, start, length_bytes))
        dtype, shape, first = archive.locate_tensor(archive.header)
    return getattr(torch, dtype), shape, start + first


class _TensorWindow(io.RawIOBase):
    """A byte range as a read-only file object."""

    def __init__(self, file: Any, start: int, length_bytes: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read bytes; raises ValueError above `MAX_READ_BYTES`, more than a single-tensor archive needs."""
        if min(size if size >= 0 else self._length, self._length - self._at) > MAX_READ_BYTES:
            raise ValueError(f"its archive has a member list of more than {MAX_READ_BYTES:,} bytes")
        return super().read(min(size, MAX_READ_BYTES)) or b""

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        raw = self._file.read(count)
        buffer[:len(raw)] = raw
        self._at += len(raw)
        return len(raw)


_LAYER = re.compile(r"(decoder\.layers)\.(\d+)\.(.+)")
_ALIASES = ((".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
            (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
            (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
            (".transformer_layer.", ".mtp_model_layer."))
"""(our key part, Megatron's key part): norms without Transformer Engine, and the layer inside a prediction
layer in later versions."""
EXPERTS = ".experts.experts."
DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "inverse_sqrt": "inverse-square-root",
                "constant": "constant"}
"""Our name of a learning rate schedule -> Megatron's."""
STATES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "master": "fp32_param"}
"""Our name of an optimizer tensor -> Megatron's."""
PREFIXES = ("", "module.")
"""Key prefixes; NeMo's wrapper adds `module.`."""
HALVES = ("_w", "_v")
"""Key suffixes for the halves of a gated matrix: gate and up."""
REMEDY = "restore the checkpoint from its source"
_CACHED_HEADERS = 4096
"""Cache size for parsed archive headers."""


# Our keys are Megatron's global names, so most keys agree. Differences: layers of one kind may be stacked
# along a leading axis (`decoder.layers.mlp...` [layers, ...], the default up to megatron-core 0.15), experts
# and halves of a gated matrix may be separate tensors, and some norms are named after the module that they
# are fused into.


@dataclass(frozen=True)
class DistSource:
    """Source for a block in a Megatron checkpoint."""

    key: str
    """Megatron's key."""
    leading_indices: tuple[int, ...]
    """Indices along the leading axes that only Megatron's tensor has."""
    has_one_expert: bool = False
    """Whether Megatron's tensor holds a single expert without expert axis."""


def find_block_sources(key: str, expert: int | None, stored_keys: Collection[str]) -> list[DistSource] | None:
    """Return a tensor's or expert's sources: a single source, or two halves of a gated matrix; None if
    missing.

    Args:
        key: our key.
        expert: expert index, for tensors with an expert axis.
        stored_keys: Megatron's keys.
    """
    for name, lead, drops_expert in _iter_candidates(key, expert):
        if name in stored_keys:
            return [DistSource(name, lead, drops_expert)]
        if all(name + half in stored_keys for half in HALVES):
            return [DistSource(name + half, lead, drops_expert) for half in HALVES]
    return None


def _iter_candidates(key: str, expert: int | None) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield the fields of a `DistSource` for each key that Megatron may use for our `key`."""
    names = [key]
    for name_part, alias in _ALIASES:
        names += [name.replace(name_part, alias, 1) for name in names if name_part in name]
    for name in names:
        layer = _LAYER.fullmatch(name)
        forms = [(name, ())] + ([(f"{layer[1]}.{layer[3]}", (int(layer[2]),))] if layer else [])
        for form, lead in forms:
            yield form, lead, False
            if expert is not None and EXPERTS in form:
                yield form.replace(EXPERTS, f"{EXPERTS}{expert}.", 1), lead, True


class DistTensors(StoredTensors):
    """Tensors in a torch.distributed checkpoint."""

    def __init__(self, folder: Path, entries: Mapping[str, Sequence[Any]]) -> None:
        """`entries`: key -> [dtype, shape, pieces], see `inert_pickle.Index`. Raises `UserError`: a file is
        missing, or a link out of the folder."""
        self.folder = folder
        blocks = {}
        for key, (_, _, pieces) in entries.items():
            blocks[key] = [StoredBlock(file, f"{start}:{length}", tuple(offset), tuple(extent))
                           for file, start, length, offset, extent in pieces]
        shapes = {key: tuple(shape) for key, (_, shape, _) in entries.items()}
        dtypes = {key: getattr(torch, dtype) for key, (dtype, _, _) in entries.items()}
        super().__init__(folder, shapes, dtypes, blocks, REMEDY)
        for file in {piece[0] for _, _, pieces in entries.values() for piece in pieces}:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file}: is missing; according to the index it contains "
                                f"{format_names(self.list_keys_in(file))}; {REMEDY}")
            refuse_outside_link(folder, folder / file)
        self._find = functools.lru_cache(_CACHED_HEADERS)(find_tensor)

    def read_slice(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        try:
            dtype, shape, first = self._find(self.folder / piece.file, *map(int, piece.name.split(":")))
            missing_axes = len(piece.shape) - len(shape)
            if ((1,) * missing_axes + shape) != piece.shape or dtype != self.get_dtype(key):
                raise ValueError(f"it is {dtype} {list(shape)} there")
            read = read_block(self.folder / piece.file, first, shape, block[missing_axes:], dtype)
            return read.reshape(tuple(s.stop - s.start for s in block))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder / piece.file}: the block of {key} {list(piece.shape)} at "
                            f"{list(piece.offset)} cannot be read ({e}); {REMEDY}") from None


_WRAPPERS = re.compile(r"(model\.)?(module\.)*")
_FSDP_EXPERT = re.compile(
    r"\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12]\.weight)|(linear_fc[12]\.weight)(\d+))(_[wv])?")


def _rename_fsdp_tensors(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of an `fsdp_dtensor` checkpoint under the keys of `torch_dist`."""
    renamed: dict[str, Any] = {}
    for key, entry in tensors.items():
        state = TORCH_STATE_KEY.fullmatch(key)
        name = _WRAPPERS.sub("", state[1] if state else key, count=1)
        name = _FSDP_EXPERT.sub(lambda m: f"{EXPERTS}{m[1] or m[4]}.{m[2] or m[3]}{m[5] or ''}", name)
        if state is None:
            add_entry(folder, renamed, name, entry)
        elif state[2] != "step":  # AdamW's count, which is the iteration
            add_entry(folder, renamed, f"optimizer.state.{state[2]}.{name}", entry)
    return renamed


def add_entry(folder: Path, entries: dict[str, Any], key: str, entry: Any) -> None:
    """Add a tensor's entry. Raises `UserError`: the checkpoint has another tensor for the same `key`."""
    if entries.setdefault(key, entry) is not entry:
        raise UserError(f"{folder}: has two tensors for {key}; save one model with one optimizer")


def _select_entries(folder: Path, index: dict[str, Any], *, with_optimizer: bool
                    ) -> tuple[dict[str, Any], int]:
    """Return the tensors of an index under Megatron's keys, with AdamW's state under keys such as
    `exp_avg/KEY`, and the number of optimizer tensors that are left out."""
    tensors: dict[str, Any] = index["tensors"]
    prefix = next((p for p in PREFIXES if f"{p}{VOCABULARY_WEIGHTS[0]}" in tensors), "")
    entries: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for key, entry in tensors.items():
        if match := STATE_KEY.fullmatch(key):
            add_entry(folder, states, f"{match[1]}/{match[2].removeprefix(prefix)}", entry)
        else:
            add_entry(folder, entries, key.removeprefix(prefix), entry)
    # formats that depend on the layout have other shapes
    if with_optimizer and all(entries.get(key.partition("/")[2], ("", ()))[1] == shape
                              for key, (_, shape, _) in states.items()):
        entries, states = entries | states, {}
    return entries, index["num_skipped"] + len(states)


class TorchDistWeights(Weights):
    """Tensors in a `torch_dist` or `fsdp_dtensor` checkpoint, split into Hugging Face tensors.

    Args:
        path: folder with the index.
        model: architecture.
        with_optimizer: also read AdamW's state.

    Raises:
        UserError: tensors do not match the model; the message names them.
    """

    def __init__(self, path: Path, model: ModelConfig, *, with_optimizer: bool = False) -> None:
        super().__init__(path, model, models.get_family(model.family).links(model))
        index = parse_file(read_index, path / METADATA)
        if not (path / FORMAT).is_file():
            index["tensors"] = _rename_fsdp_tensors(path, index["tensors"])
        entries, self.num_skipped = _select_entries(path, index, with_optimizer=with_optimizer)
        self.tensors = DistTensors(path, entries)
        self._stored_keys = self.tensors.keys()
        self._sources = self._match_tensors()
        self.tensors.check_complete()

    def locate(self, link: Link, state: str = "") -> list[BlockPlace]:
        prefix = f"{state}/" if state else ""
        return [(prefix + source.key, *self._locate_block(link, source))
                for source in self._sources[link.key, link.offset]]

    def list_states(self, dtype: torch.dtype) -> list[StateBlock]:
        """Return AdamW's moments, and masters if they are stored, or are float32 weights that are written in
        `dtype`; [] without state. Raises `UserError`: a weight has none, although others do."""
        stored_states = {key.partition("/")[0] for key in self._stored_keys if "/" in key}
        names = {state: state for state in ("exp_avg", "exp_avg_sq")} if stored_states else {}
        if masters := [name for name in (STATES["master"], "param") if name in stored_states]:
            names["master"] = masters[0]
        elif stored_states and dtype.itemsize < torch.float32.itemsize:
            names["master"] = ""
        return list_states(self, lambda link: names)

    def _locate_block(self, link: Link, source: DistSource) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offset and shape of a block's part in Megatron's tensor."""
        offset, extent = link.offset, link.extent
        if source.has_one_expert:
            offset, extent = offset[1:], extent[1:]
        if len(self._sources[link.key, link.offset]) > 1:  # gate or up rows
            axis = len(extent) - len(link.block_shape)
            extent = (*extent[:axis], extent[axis] // 2, *extent[axis + 1:])
        return (*source.leading_indices, *offset), (*(1,) * len(source.leading_indices), *extent)

    def _match_tensors(self) -> dict[tuple[str, tuple[int, ...]], list[DistSource]]:
        """Find each block's sources; keys and shapes must match the model exactly."""
        stored_keys, matched = {key for key in self._stored_keys if "/" not in key}, {}
        missing: dict[str, tuple[int, ...]] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for link in self.links:
            expert = link.offset[0] if EXPERTS in link.key else None
            block_sources = find_block_sources(link.key, expert, stored_keys)
            if block_sources is None:
                missing[link.key] = link.shape
                continue
            matched[link.key, link.offset] = block_sources
            for source in block_sources:
                expected[source.key] = self._get_stored_shape(link, source, len(block_sources))
        shapes = {key: self.tensors.get_shape(key) for key in stored_keys}
        for key in VOCABULARY_WEIGHTS:  # Megatron pads rows to a multiple that depends on the layout
            if key in expected and key in shapes and shapes[key][0] >= expected[key][0]:
                expected[key] = (shapes[key][0], *expected[key][1:])
        check_shapes(self.path, shapes, expected | missing,
                     "compare the settings with those of the training, and correct them with --set")
        return matched

    def _get_stored_shape(self, link: Link, source: DistSource, parts: int) -> tuple[int, ...]:
        shape = link.shape[1:] if source.has_one_expert else link.shape
        if parts > 1:
            axis = len(shape) - len(link.block_shape)
            shape = (*shape[:axis], shape[axis] // 2, *shape[axis + 1:])
        return (*(self.model.num_layers,) * len(source.leading_indices), *shape)


FROM_MEGATRON = "from_megatron"
"""Manifest key for the checkpoint's origin."""
SETTINGS = {"optim.lr": "max_lr", "optim.min_lr": "min_lr", "optim.weight_decay": "end_wd"}
"""Our setting -> field of Megatron's scheduler."""
_SCHEDULER_KEY = re.compile(r"opt_param_scheduler\.(\w+)")
_GROUP_KEY = re.compile(rf".+\.param_to_group_meta\..+\.{re.escape(VOCABULARY_WEIGHTS[0])}\.(\w+)")
"""Keys of scheduler and optimizer settings in an `fsdp_dtensor` checkpoint."""
SAMPLE_COUNTS = {"step": "num_steps", "train.steps": "lr_decay_steps",
                 "optim.warmup_steps": "lr_warmup_steps"}
"""Step, and our settings in steps -> field of Megatron's scheduler in samples."""


@dataclass(frozen=True)
class ImportReport:
    """Facts about an import, for the command's output."""

    iteration: int | None
    """Training iteration, if known."""
    num_padded_rows: int
    """Dropped vocabulary rows, which have no token id."""
    num_optimizer_tensors: int
    """Dropped optimizer tensors."""
    model: ModelConfig
    """The imported model's architecture."""
    training: TrainingState | None
    """None: weights only."""


def from_megatron(folder: str | Path, out: str | Path, dtype: str = KEEP, *, family: str = "",
                  overrides: Mapping[str, Any] | None = None, tokenizer: Path | None = None,
                  weights_only: bool = False, workers: int = DEFAULT_WORKERS, overwrite: bool = False,
                  redo: bool = False) -> ImportReport:
    """Convert a Megatron-LM, Megatron-Bridge or NeMo 2 checkpoint to this project's format, with AdamW's
    state.

    `folder` is an iteration or holds several; `family` "" finds the only family that can express the model;
    `overrides` replace `ModelConfig` fields of the checkpoint; `weights_only` leaves out the optimizer (step
    0). For the other arguments see `from_hf`. Raises `UserError`: the format is not supported, the index
    contains forbidden names, no family can express the model, or a tensor is missing or damaged.
    """
    out = Path(out)
    check_dtype_name(dtype)
    check_output_folder(out, CHECKPOINT_KIND, overwrite)
    iteration_folder = find_iteration(Path(folder))
    stored, iteration = _read_settings(iteration_folder)
    try:
        model = infer_architecture(stored["model"], family, overrides)
    except UserError as e:
        raise UserError(f"{iteration_folder}: {e}") from None
    weights = TorchDistWeights(iteration_folder, model, with_optimizer=not weights_only)
    check_dtypes(weights)
    stored_dtype = weights.tensors.get_dtype(VOCABULARY_WEIGHTS[0])
    states = weights.list_states(choose_dtype(dtype, fp32=False, stored_dtype=stored_dtype))
    training = _describe_training(iteration_folder, stored, iteration or 0) if states else None
    index_sha256 = hashlib.sha256((iteration_folder / METADATA).read_bytes()).hexdigest()
    origin = {"path": str(iteration_folder), "iteration": iteration, "index_sha256": index_sha256}
    source = ImportSource(weights, "from-megatron", tokenizer=tokenizer, tokens=TokenIds(),
                          content={FROM_MEGATRON: origin}, states=states, training=training)
    write_imported(out, source, dtype, workers=workers, overwrite=overwrite, redo=redo)
    tensors = weights.tensors
    num_padded_rows = max(tensors.get_shape(key)[0] - model.vocab_size
                          for key in VOCABULARY_WEIGHTS if key in tensors.keys())  # noqa: SIM118
    return ImportReport(iteration, num_padded_rows, weights.num_skipped, model, training)


def _describe_training(folder: Path, stored: Mapping[str, Any], iteration: int) -> TrainingState:
    """Return where and how to continue; raises `UserError` for numbers that no training has."""
    scheduler, group, args = (block if isinstance(block := stored.get(name), dict) else {}
                              for name in ("scheduler", "group", "args"))
    step, settings = iteration, read_numbers(folder, scheduler, SETTINGS)
    num_samples = read_numbers(folder, scheduler, SAMPLE_COUNTS)
    batch_size = read_numbers(folder, args, {"samples": "global_batch_size"}).get("samples", 0)
    if batch_size and "step" in num_samples:
        counts = {name: int(value // batch_size) for name, value in num_samples.items()}
        # our first step has the rate after one step of warm-up, the library's has the rate before it
        step = max(0, counts.pop("step") - 1)
        settings |= {"train.global_batch_size": batch_size, **counts}
    for ours, theirs in DECAY_STYLES.items():
        if scheduler.get("lr_decay_style") == theirs:
            settings["optim.schedule"] = ours
    settings |= read_adamw(folder, group)
    # in some versions a tensor, whose value is not in the header
    counted = {} if isinstance(group.get("step"), dict) else read_numbers(folder, group, {"step": "step"})
    return TrainingState(step, int(counted.get("step", iteration)),
                         tuple(f"{name}={value}" for name, value in settings.items()))


def read_adamw(folder: Path, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings for a parameter group of torch's AdamW."""
    betas = group.get("betas")
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        return {}
    values = {"beta1": betas[0], "beta2": betas[1], "eps": group.get("eps")}
    return read_numbers(folder, values, {f"optim.{name}": name for name in values})


def read_numbers(folder: Path, block: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return our name -> number for the fields in `names` that a checkpoint has. Raises `UserError`: a value
    is not a finite number from 0 to `MAX_SIZE`."""
    numbers = {ours: block[theirs] for ours, theirs in names.items() if block.get(theirs) is not None}
    for ours, value in numbers.items():
        if type(value) not in (int, float) or not 0 <= value <= MAX_SIZE:  # NaN compares as false
            raise UserError(f"{folder}: its {names[ours]} = {str(value)[:80]!r} must be a number from 0 to "
                            f"{MAX_SIZE:,}; {REMEDY}, or pass --weights-only")
    return numbers


def read_objects(folder: Path, objects: Mapping[str, Sequence[Any]], keys: re.Pattern[str]) -> dict[str, Any]:
    """Return name (first group of `keys`) -> JSON value of the stored objects whose key matches; None for
    values that need further classes, or are too large."""
    values: dict[str, Any] = {}
    for key, (file, start, length_bytes) in objects.items():
        if match := keys.fullmatch(key):
            refuse_outside_link(folder, folder / file)
            values[match[1]] = None
            with suppress(UserError):
                values[match[1]] = parse_file(read_value, folder / file, start,
                                              min(length_bytes, MAX_READ_BYTES))["value"]
    return values


def _read_settings(folder: Path) -> tuple[dict[str, Any], int | None]:
    """Return a checkpoint's settings (`model`, and `read_settings`) and iteration."""
    number = re.fullmatch(r"iter_(\d{7,12})", folder.name)
    iteration = int(number[1]) if number else None
    settings: dict[str, Any] = {"args": {}, "iteration": None}
    if (folder / COMMON).is_file():
        settings = parse_file(read_settings, folder / COMMON)
    else:
        objects = parse_file(read_index, folder / METADATA)["objects"]
        if place := objects.get(COMMON_STATE) or objects.get("args"):
            file, start, length_bytes = place
            settings = parse_file(read_settings, folder / file, start, length_bytes)
        if COMMON_STATE not in objects:  # fsdp_dtensor
            settings |= read_objects(folder, objects, re.compile("(iteration)"))
            settings["scheduler"] = read_objects(folder, objects, _SCHEDULER_KEY)
            settings["group"] = read_objects(folder, objects, _GROUP_KEY)
    settings["model"] = normalize_arguments(settings["args"])
    if (folder / RUN_CONFIG).is_file():
        settings["model"] = read_sections(folder / RUN_CONFIG).get("model")
        if settings["model"] is None:
            raise UserError(f"{folder / RUN_CONFIG}: has no `model` section with the architecture; "
                            "restore it from its source")
    stored_iteration = read_numbers(folder, settings, {"iteration": "iteration"}).get("iteration")
    return settings, iteration if stored_iteration is None else int(stored_iteration)
