"""Pictures and sounds of token shards: which feature of which record each placeholder stands for."""

from __future__ import annotations

import contextlib
import mmap
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig
from megatron_sov.omni.media.banks import KINDS, MEDIA, NONE, PICTURES, SIDECAR_DTYPE, BankShape, open_bank
from megatron_sov.omni.media.placed import Media, PlacedMedia, place_media

# Files of a token shard by memory maps: Megatron-Core's index, and flat files of numbers beside it.

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
                                           6: np.float64, 7: np.float32, 8: np.uint16}
"""Dtype codes of the `.idx` header, as in megatron.core.datasets.indexed_dataset."""
_HEADER_BYTES = len(IDX_MAGIC) + 8 + 1 + 8 + 8


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says."""

    dtype: np.dtype
    """Of token ids."""
    lengths: np.ndarray
    """[documents] int32: their tokens."""
    pointers: np.ndarray
    """[documents] int64: the byte of `.bin` at which each begins."""

    @property
    def num_tokens(self) -> int:
        if not len(self.lengths):
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])


def read_index(file: Path) -> Index:
    """Open an index.

    Raises:
        UserError: it is none.
        IndexError, KeyError, ValueError: it is damaged.
    """
    content = mapped(file)
    if content[:9] != IDX_MAGIC:
        raise UserError(f"{file}: is not a Megatron index (its first bytes are {content[:9]!r}); "
                        "pack the data again")
    count = int(np.frombuffer(content, np.uint64, 1, offset=18)[0])
    return Index(np.dtype(IDX_DTYPES[content[17]]),
                 np.frombuffer(content, np.int32, count, offset=_HEADER_BYTES),
                 np.frombuffer(content, np.int64, count, offset=_HEADER_BYTES + 4 * count))


def numbers(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Return the numbers of a flat file.

    Raises:
        UserError: they are not `count`.
    """
    size_bytes, expected_bytes = file.stat().st_size, count * dtype.itemsize
    if size_bytes != expected_bytes:  # a slice beyond the end would silently be short
        raise UserError(f"{file}: has {size_bytes} bytes, the index asks for {expected_bytes}; "
                        "pack the data again")
    return np.frombuffer(mapped(file), dtype)


def mapped(file: Path) -> mmap.mmap | bytes:
    """Return a file's bytes by a memory map."""
    with open(file, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""


def allow_open_files() -> None:
    """Raise this process's limit on open files as far as it may: a mapped file keeps its
    descriptor (CPython's mmap)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


DAMAGED = "`sov-data verify` names what is damaged, pack the data again"


class MediaShard:
    """The sidecar and the banks of one token shard."""

    def __init__(self, prefix: Path, shapes: Mapping[str, BankShape], num_tokens: int) -> None:
        """Open the files.

        Args:
            prefix: path of the shard, without endings.
            shapes: kind -> its bank.
            num_tokens: of the shard.

        Raises:
            UserError: a file is damaged or missing.
        """
        self._sidecar = prefix.with_name(f"{prefix.name}.{MEDIA}")
        try:
            self._numbers = numbers(self._sidecar, np.dtype(SIDECAR_DTYPE).newbyteorder("<"), num_tokens)
        except OSError as e:
            raise UserError(f"{self._sidecar}: cannot be read ({e.strerror or e}); {DAMAGED}") from None
        self._shapes = shapes
        self._banks = {kind: open_bank(prefix.with_name(f"{prefix.name}.{kind}"), shape)
                       for kind, shape in shapes.items()}

    def placed(self, document: int, where: slice, tokens: np.ndarray) -> Media:
        """Return the media of a stretch of the shard, placed from its first token.

        Args:
            document: its number, for messages.
            where: the stretch.
            tokens: its token ids.

        Raises:
            UserError: a placeholder stands for no feature, or a number for none that there is.
        """
        features, found = self._numbers[where], dict[str, PlacedMedia]()
        rest = features != NONE
        for kind, shape in self._shapes.items():
            mine = np.isin(tokens, shape.placeholder_ids)
            if not mine.any():
                continue
            these, bank = features[mine], self._banks[kind]
            if wrong := these[(these < 0) | (these >= len(bank) * shape.slots)][:1].tolist():
                raise UserError(f"{self._sidecar}: document {document} has a placeholder of {kind} for "
                                f"feature {wrong[0]}, and there are {len(bank) * shape.slots}; {DAMAGED}")
            found[kind] = place_media(np.flatnonzero(mine), these, bank, shape.slots)
            rest = rest & ~mine
        if rest.any():
            place = int(np.flatnonzero(rest)[0])
            raise UserError(f"{self._sidecar}: document {document} has feature {features[place]} at token id "
                            f"{tokens[place]}, which is no placeholder; {DAMAGED}")
        return found


def banks_of(documents: Any) -> Mapping[str, BankShape]:
    """Return the banks of documents; those that are made on the fly may know nothing of banks."""
    found: Mapping[str, BankShape] = getattr(documents, "banks", {})
    return found


def media_of(documents: Any, document: int, start: int, count: int) -> Media:
    """Return the pictures and sounds of some tokens, placed from the first of them."""
    if not banks_of(documents):
        return {}
    found: Media = documents.media(document, start, count)
    return found


def check_encoders(model: ModelConfig, sources: Sequence[Any]) -> None:
    """Check that a model can read the pictures and sounds of its data.

    Raises:
        UserError: it has no encoder of such records, or one of others; all of them at once.
    """
    problems = [problem for source in sources for kind in KINDS if kind in source.banks
                if (problem := _unread(model, source.banks[kind], source.name))]
    if problems:
        raise UserError("; ".join(problems))


def _unread(model: ModelConfig, bank: BankShape, source: str) -> str | None:
    """Return why a model cannot read a bank, or None."""
    name, encoder = ("vision", model.vision) if bank.kind == PICTURES else ("audio", model.audio)
    where = f"source {source!r} has {bank.kind}"
    if encoder is None:
        return (f"{where}, and the model has no model.{name}; take a recipe with an encoder, or pack the "
                "data without continuous media")
    if (tuple(bank.shape), bank.slots) != (encoder.record_shape, encoder.slots):
        return (f"{where} of shape {list(bank.shape)} with {bank.slots} features each, and model.{name} "
                f"reads {list(encoder.record_shape)} as {encoder.slots}; write the data "
                "for this encoder again")
    if unknown := sorted(set(bank.placeholder_ids) - set(encoder.placeholder_ids)):
        return (f"{where} at placeholders {unknown}, which are not among model.{name}.placeholder_ids = "
                f"{list(encoder.placeholder_ids)}; pack the data with the model's tokenizer")
    return None
