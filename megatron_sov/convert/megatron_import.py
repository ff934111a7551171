"""A `torch_dist` checkpoint of Megatron-LM or Megatron-Bridge becomes one that any layout can load."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import refuse_existing
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_link_outside
from megatron_sov.checkpoint.assembling import Assembled, StoredBlock
from megatron_sov.checkpoint.writer import read_block
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.dtypes import KEEP, check_dtype_name
from megatron_sov.convert.hf_import import Imported, write_imported
from megatron_sov.convert.inert_pickle import TorchArchive, read_apart
from megatron_sov.convert.sources import check_dtypes, check_exact
from megatron_sov.engine.model.language_model import VOCABULARY_WEIGHTS
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.counterparts.architecture import architecture, of_arguments, read_sections
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import listed, read_json
from megatron_sov.runs.checkpoints import KIND

# The weights of a `torch_dist` checkpoint under their Hugging Face names.

# Where in a folder of Megatron-LM, Megatron-Bridge or NeMo the checkpoint lies, and whether it is read.

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
BACKEND, VERSIONS = "torch_dist", (1,)
MAX_TRACKER_BYTES = 64


def find_iteration(folder: Path) -> Path:
    """Return the folder that holds an index: the one that is named, or its newest iteration.

    Raises:
        UserError: there is none, or it is of a format or version that is not read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name a checkpoint of Megatron-LM or Megatron-Bridge")
    found = folder
    if not _is_checkpoint(folder):
        found = _newest(folder)
    if (found / "weights").is_dir() and not _is_checkpoint(found):  # NeMo 2
        found /= "weights"
    _check_format(found)
    return found


def iteration_of(folder: Path) -> int | None:
    number = re.fullmatch(r"iter_(\d{7,12})", folder.name)
    return int(number[1]) if number else None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / METADATA).exists() or (folder / FORMAT).exists() or any(folder.glob("mp_rank_*"))


def _newest(folder: Path) -> Path:
    tracker = folder / TRACKER
    if not tracker.is_file():
        names = sorted(p.name for p in folder.glob("iter_*") if p.is_dir())
        if len(names) == 1:
            return folder / names[0]
        if not names:
            return folder
        raise UserError(f"{folder}: has no {TRACKER} that says which of its checkpoints is the newest; name "
                        f"one of them ({listed(names)})")
    with open(tracker, encoding="utf-8", errors="replace") as f:
        said = f.read(MAX_TRACKER_BYTES).strip()
    if not re.fullmatch(r"\d{1,12}|release", said):
        raise UserError(f"{tracker}: says {said!r}, which is no iteration; name the checkpoint's own folder")
    found = folder / (said if said == "release" else f"iter_{int(said):07d}")
    if not found.is_dir():
        raise UserError(f"{tracker}: says {said}, and there is no {found.name}; name the checkpoint's own "
                        "folder")
    return found


def _check_format(folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise UserError(f"{folder}: has files of single ranks (--ckpt-format torch), which are not read; let "
                        "Megatron-LM write it again with --ckpt-format torch_dist (--ckpt-convert-format)")
    if not (folder / METADATA).is_file() and not (folder / FORMAT).is_file():
        raise UserError(f"{folder}: has neither {METADATA} nor {FORMAT}, so it is no torch_dist checkpoint; "
                        f"name the folder of an iteration, or the one with {TRACKER}")
    if not (folder / FORMAT).is_file():
        raise UserError(f"{folder}: has no {FORMAT}, so its format is not known (fsdp_dtensor and plain "
                        "torch.distributed checkpoints are not read); let Megatron write it with "
                        "--ckpt-format torch_dist")
    said = read_json(folder / FORMAT)
    backend, version = said.get("sharded_backend"), said.get("sharded_backend_version")
    if backend != BACKEND or version not in VERSIONS:
        raise UserError(f"{folder / FORMAT}: sharded_backend = {backend!r} version {version!r} is not read, "
                        f"only {BACKEND!r} version {VERSIONS[0]}; let Megatron write it again with "
                        "--ckpt-format torch_dist")
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: has no {METADATA}, so it was never complete; use an earlier checkpoint")


MAX_READ_BYTES = 1 << 20
"""Of an archive's list of members and its header, at a time."""


@dataclass(frozen=True)
class DistTensor:
    """Where a tensor's bytes stand."""

    path: Path
    start: int
    """First byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, block: Sequence[slice]) -> torch.Tensor:
        """Return the block that slices (start and stop, one for each axis) cut out; OSError where the file
        cannot be read."""
        return read_block(self.path, self.start, self.shape, block, self.dtype)


def find_tensor(path: Path, start: int, length_bytes: int) -> DistTensor:
    """Return where the one tensor of an archive of `torch.save` stands that is a part of a file; OSError or
    ValueError where the file cannot be read, or holds no such archive there."""
    with open(path, "rb") as file:
        if start + length_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("the file ends before it does")
        archive = TorchArchive(_TensorWindow(file, start, length_bytes))
        dtype, shape, first, _ = archive.find(archive.header)
    return DistTensor(path, start + first, shape, getattr(torch, dtype))


class _TensorWindow(io.RawIOBase):
    """A part of a file, as a file."""

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
        """Read as `RawIOBase`; ValueError for more than what an archive of one tensor has at a place."""
        if min(size if size >= 0 else self._length, self._length - self._at) > MAX_READ_BYTES:
            raise ValueError(f"its archive has a list of more than {MAX_READ_BYTES:,} bytes")
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
            (".transformer_layer.", ".mtp_model_layer."))
"""What a name may have in the place of ours: the norm before experts without Transformer Engine, and the
layer inside a prediction layer in later versions."""
_EXPERTS = ".experts.experts."
PREFIXES = ("", "module.")
"""What may stand before all names: NeMo's wrapper."""
HALVES = ("_w", "_v")
"""What a gated matrix's halves, gate and up, are called behind its name."""
REMEDY = "restore the checkpoint from its source"
_KEPT_HEADERS = 4096
"""Of stored parts, whose places are remembered."""


# Under which names, and in which pieces, Megatron-LM keeps the tensors that we keep under our own. Both go
# by the library's global names, so most are the same. What differs: layers of one kind may be stacked along
# a leading axis (`decoder.layers.mlp...` [layers, ...], the default up to megatron-core 0.15), experts and
# the halves of a gated matrix may be tensors of their own, and some norms are named after the module that
# they are fused into.


@dataclass(frozen=True)
class DistSource:
    """Where a block of one of our tensors stands."""

    key: str
    """Their tensor."""
    lead: tuple[int, ...]
    """Places along axes that theirs has before those of ours."""
    drops_expert: bool = False
    """Whether theirs holds one expert, and has no axis of experts."""


def sources(key: str, expert: int | None, found: Collection[str]) -> list[DistSource] | None:
    """Return where a tensor, or an expert of it, stands; two for the halves of a gated matrix; None: nowhere.

    Args:
        key: our name.
        expert: of a tensor with an axis of experts, the one that is wanted.
        found: their names.
    """
    for name, lead, drops in _candidates(key, expert):
        if name in found:
            return [DistSource(name, lead, drops)]
        if all(name + half in found for half in HALVES):
            return [DistSource(name + half, lead, drops) for half in HALVES]
    return None


def _candidates(key: str, expert: int | None) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    names = [key]
    for ours, theirs in _ALIASES:
        names += [name.replace(ours, theirs, 1) for name in names if ours in name]
    for name in names:
        layer = _LAYER.fullmatch(name)
        forms = [(name, ())] + ([(f"{layer[1]}.{layer[3]}", (int(layer[2]),))] if layer else [])
        for form, lead in forms:
            yield form, lead, False
            if expert is not None and _EXPERTS in form:
                yield form.replace(_EXPERTS, f"{_EXPERTS}{expert}.", 1), lead, True


class TorchDistTensors(Assembled):
    """Any block of any tensor of a `torch_dist` checkpoint, under Megatron's names."""

    def __init__(self, folder: Path) -> None:
        """Read the index; `UserError` where it is damaged or holds what it should not."""
        self.folder = folder
        index = read_apart("index", folder / METADATA)
        self.num_skipped: int = index["num_skipped"]
        """Tensors of the optimizer."""
        tensors: dict[str, Any] = index["tensors"]
        prefix = next((p for p in PREFIXES if f"{p}{VOCABULARY_WEIGHTS[0]}" in tensors), "")
        of_name = {key.removeprefix(prefix): found for key, found in tensors.items()}
        super().__init__(
            folder, {key: tuple(shape) for key, (_, shape, _) in of_name.items()},
            {key: getattr(torch, dtype) for key, (dtype, _, _) in of_name.items()},
            {key: [StoredBlock(file, f"{start}:{length}", tuple(offset), tuple(extent))
                   for file, start, length, offset, extent in pieces]
             for key, (_, _, pieces) in of_name.items()}, REMEDY)
        for file in {piece[0] for _, _, pieces in tensors.values() for piece in pieces}:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file}: is missing, and the index says that it holds "
                                f"{listed(self.held_in(file))}; {REMEDY}")
            refuse_link_outside(folder, folder / file)
        self._find = functools.lru_cache(_KEPT_HEADERS)(self._find_now)

    def slice_of(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        """Return the part of a piece that the slices cut out of it."""
        try:
            found = self._find(piece)
            missing = len(piece.shape) - len(found.shape)
            if ((1,) * missing + found.shape) != piece.shape or found.dtype != self.dtype(key):
                raise ValueError(f"it is {found.dtype} {list(found.shape)} there")
            return found.read(block[missing:]).reshape(tuple(s.stop - s.start for s in block))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder / piece.file}: the part of {key} {list(piece.shape)} at "
                            f"{list(piece.offset)} cannot be read ({e}); {REMEDY}") from None

    def _find_now(self, piece: StoredBlock) -> DistTensor:
        start, length = map(int, piece.name.split(":"))
        return find_tensor(self.folder / piece.file, start, length)


class TorchDistWeights:
    """The tensors of a `torch_dist` checkpoint, split as Hugging Face has them."""

    def __init__(self, path: Path, model: ModelConfig) -> None:
        """Open a checkpoint.

        Args:
            path: the folder with the index.
            model: its architecture.

        Raises:
            UserError: its tensors are not exactly those of the model; the message names them.
        """
        self.path, self.model = path, model
        self.links = models.get(model.family).links(model)
        self.tensors = TorchDistTensors(path)
        self._link_of = {name: link for link in self.links for name in link.hf_names}
        self._sources = self._matched()
        self.tensors.check_complete()
        self._of_thread = threading.local()

    def names(self) -> list[str]:
        return list(self._link_of)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors.dtype(self._of(self._link_of[name])[0].key)

    def held_in(self, file: str) -> list[str]:
        """Return Megatron's names of the tensors of which a file holds a part."""
        return self.tensors.held_in(file)

    def files_of(self, name: str) -> set[str]:
        """Return the files that hold a part of the tensor that this one is a part of."""
        return {file for source in self._of(self._link_of[name])
                for file in self.tensors.files_of(source.key)}

    def read(self, name: str) -> torch.Tensor:
        link = self._link_of[name]
        # parts of one block follow one another
        last: tuple[Link, torch.Tensor] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] is not link:
            self._of_thread.last = None
            last = self._of_thread.last = (link, self._block(link))
        return link.split(last[1])[name]

    def _of(self, link: Link) -> list[DistSource]:
        return self._sources[link.key, link.offset]

    def _block(self, link: Link) -> torch.Tensor:
        parts = []
        for source in self._of(link):
            offset, extent = link.offset, link.extent
            if source.drops_expert:
                offset, extent = offset[1:], extent[1:]
            if len(self._of(link)) > 1:  # a half of its rows
                axis = len(extent) - len(link.block_shape)
                extent = (*extent[:axis], extent[axis] // 2, *extent[axis + 1:])
            parts.append(self.tensors.read(source.key, (*source.lead, *offset),
                                           (*(1,) * len(source.lead), *extent)))
        rows = [part.reshape(-1, *link.block_shape[1:]) for part in parts]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return whole.reshape(link.block_shape)

    def _matched(self) -> dict[tuple[str, tuple[int, ...]], list[DistSource]]:
        """Return where each block stands; every tensor of the checkpoint must be one of the model's, of its
        shape."""
        theirs, found = set(self.tensors.keys()), {}
        missing: dict[str, tuple[int, ...]] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for link in self.links:
            expert = link.offset[0] if _EXPERTS in link.key else None
            at = sources(link.key, expert, theirs)
            if at is None:
                missing[link.key] = link.shape
                continue
            found[link.key, link.offset] = at
            for source in at:
                expected[source.key] = self._shape(link, source, len(at))
        shapes = {key: self.tensors.shape(key) for key in theirs}
        for key in VOCABULARY_WEIGHTS:  # Megatron pads them, to a size that depends on the layout
            if key in expected and key in shapes and shapes[key][0] >= expected[key][0]:
                expected[key] = (shapes[key][0], *expected[key][1:])
        check_exact(self.path, shapes, expected | missing,
                    "compare the settings with those it was trained with, and set what differs with --set")
        return found

    def _shape(self, link: Link, source: DistSource, parts: int) -> tuple[int, ...]:
        shape = link.shape[1:] if source.drops_expert else link.shape
        if parts > 1:
            axis = len(shape) - len(link.block_shape)
            shape = (*shape[:axis], shape[axis] // 2, *shape[axis + 1:])
        return (*(self.model.num_layers,) * len(source.lead), *shape)


def num_padded_rows(weights: TorchDistWeights) -> int:
    """Return the rows of the vocabulary's matrices that no token id has."""
    return max((weights.tensors.shape(key)[0] - weights.model.vocab_size
                for key in _present(weights.tensors.keys())), default=0)


def _present(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key in VOCABULARY_WEIGHTS]


FROM_MEGATRON = "from_megatron"
"""What a manifest's content says of it."""


@dataclass(frozen=True)
class ImportReport:
    """What is to be said of a conversion."""

    iteration: int | None
    """Of the checkpoint, where it says one."""
    num_padded_rows: int
    """Rows of the vocabulary's matrices that were left out, since no token id has them."""
    num_optimizer_tensors: int
    """Left out as well."""
    model: ModelConfig
    """The architecture that was read."""


def from_megatron(folder: str | Path, out: str | Path, dtype: str = KEEP, *, family: str = "",
                  overrides: Mapping[str, Any] | None = None, tokenizer: Path | None = None,
                  workers: int = DEFAULT_WORKERS, overwrite: bool = False,
                  redo: bool = False) -> ImportReport:
    """Write a checkpoint of Megatron-LM or Megatron-Bridge as one of ours (part "model", step 0).

    Args:
        folder: an iteration's, or the one that holds iterations; of NeMo 2 as well.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        dtype: as of `from_hf`.
        family: name of ours; empty: the only one that has such a model.
        overrides: fields of `ModelConfig`, in the place of what the checkpoint says.
        tokenizer: folder of the tokenizer to put beside the weights.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the checkpoint is of a format that is not read, its index holds anything but tensors'
            metadata, its settings are no model of ours, a tensor is missing or damaged; nothing is left then.
    """
    out = Path(out)
    check_dtype_name(dtype)
    refuse_existing(out, KIND, overwrite)
    found = find_iteration(Path(folder))
    stated, iteration = _read_statement(found)
    try:
        model = architecture(stated, family, overrides)
    except UserError as e:
        raise UserError(f"{found}: {e}") from None
    weights = TorchDistWeights(found, model)
    check_dtypes(weights)
    index_sha256 = hashlib.sha256((found / METADATA).read_bytes()).hexdigest()
    write_imported(out, Imported(weights, "from-megatron", tokenizer, TokenIds(), {
        FROM_MEGATRON: {"path": str(found), "iteration": iteration, "index_sha256": index_sha256}}),
        dtype, workers=workers, overwrite=overwrite, redo=redo)
    return ImportReport(iteration, num_padded_rows(weights), weights.tensors.num_skipped, model)


def _read_statement(folder: Path) -> tuple[dict[str, Any], int | None]:
    """Return what a checkpoint says of its model, and its iteration."""
    iteration = iteration_of(folder)
    if (folder / RUN_CONFIG).is_file():
        model = read_sections(folder / RUN_CONFIG).get("model")
        if model is None:
            raise UserError(f"{folder / RUN_CONFIG}: has no `model`, so it says nothing of the architecture; "
                            "restore it from its source")
        return model, iteration
    if (folder / COMMON).is_file():
        said = read_apart("settings", folder / COMMON)
    elif place := read_apart("index", folder / METADATA)["settings"]:
        file, start, length_bytes = place
        said = read_apart("settings", folder / file, start, length_bytes)
    else:
        return {}, iteration
    known = said["iteration"] if isinstance(said["iteration"], int) else None
    return of_arguments(said["args"]), iteration if known is None else known
