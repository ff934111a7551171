"""Banks: the raw pictures and sounds whose features are put over placeholders of token shards.

A bank is a file of records of one shape.  A medium takes one record, a long sound or a video several.  Each
record becomes as many features as it has slots; the token that stands for a feature says which by
``row * slots + slot``, in a sidecar of the same geometry as the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.documents.files import MEDIA_CORPUS
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.modality import ENCODERS, PICTURES, SOUNDS

KINDS = tuple(ENCODERS)
"""Kinds of banks, and endings of their files."""
MOST_SLOTS, MOST_RECORD_BYTES = 1 << 20, 1 << 30
_DTYPES = {PICTURES: "uint8", SOUNDS: "float16"}
_DIMENSIONS = {PICTURES: 3, SOUNDS: 2}


@dataclass(frozen=True)
class BankShape:
    """What a bank's records are."""

    kind: str
    """`PICTURES` or `SOUNDS`."""
    shape: tuple[int, ...]
    """Of a record: [3, side, side] of pictures, [mels, frames] of sounds."""
    slots: int
    """Features of a record."""
    placeholder_ids: tuple[int, ...] = ()
    """Tokens that stand for a feature; () where no vocabulary is known yet."""
    sample_rate_hz: int = 0
    """Of the sounds that spectrograms were made of; 0: these are pictures."""
    hop_samples: int = 0
    """Samples from one frame of a spectrogram to the next."""

    @property
    def dtype(self) -> str:
        return _DTYPES[self.kind]

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def slots_of(self, num_frames: int) -> int:
        """Return the features of a sound that fills `num_frames` frames of its record: the share of its
        slots, rounded up."""
        return -(-num_frames * self.slots // self.shape[-1])

    def record(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        found = {"shape": list(self.shape), "dtype": self.dtype, "slots": self.slots,
                 "placeholder_ids": list(self.placeholder_ids)}
        if self.kind == SOUNDS:
            found |= {"sample_rate_hz": self.sample_rate_hz, "hop_samples": self.hop_samples}
        return found

    @classmethod
    def from_record(cls, kind: str, record: Any, where: str) -> BankShape:
        """Return what `record` gave.

        Raises:
            UserError: it is none; `where` names it.
        """
        try:
            shape = cls(kind, tuple(int(n) for n in record["shape"]), int(record["slots"]),
                        tuple(int(i) for i in record["placeholder_ids"]),
                        int(record.get("sample_rate_hz", 0)), int(record.get("hop_samples", 0)))
            if len(shape.shape) != _DIMENSIONS[kind] or min(shape.shape) < 1:
                raise ValueError(f"a record has {_DIMENSIONS[kind]} sizes, each at least 1")
            if not 0 < shape.slots <= MOST_SLOTS or not shape.record_bytes <= MOST_RECORD_BYTES:
                raise ValueError("no encoder has such sizes")
            if record["dtype"] != shape.dtype:
                raise ValueError(f"{kind} are {shape.dtype}")
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{where}: {FEATURES}.{kind} = {str(record)[:200]} cannot be read "
                            f"({type(e).__name__}: {e}); must have shape, dtype, slots and placeholder_ids; "
                            "write the data again") from None
        return shape


def read_shapes(record: Any, where: str) -> dict[str, BankShape]:
    """Return the banks that a manifest's record describes, by kind.

    Raises:
        UserError: it is no such record; `where` names it.
    """
    if record is None:
        return {}
    if not isinstance(record, dict) or not set(record) <= set(KINDS):
        raise UserError(f"{where}: {FEATURES} = {str(record)[:200]} must describe {' and '.join(KINDS)}; "
                        "write the data again")
    return {kind: BankShape.from_record(kind, record[kind], where) for kind in KINDS if kind in record}


def open_bank(file: Path, shape: BankShape) -> np.ndarray:
    """Return a bank's records by memory map, [rows, *shape].

    Raises:
        UserError: the file is missing, or does not hold whole records.
    """
    try:
        size_bytes = file.stat().st_size
        if size_bytes % shape.record_bytes:
            raise UserError(f"{file}: has {size_bytes} bytes, which are no whole records of "
                            f"{shape.record_bytes}; write the data again or restore it from a copy")
        # an empty file cannot be mapped; files are little-endian whatever the machine
        numbers = (np.memmap(file, np.dtype(shape.dtype).newbyteorder("<"), "r") if size_bytes
                   else np.zeros(0, shape.dtype))
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); write the data again or restore it "
                        "from a copy") from None
    return numbers.reshape(-1, *shape.shape)


def codecs_of(data: Iterable[str | Path]) -> dict[str, set[str]]:
    """Return kind -> hashes of the codecs of token shards, as far as shards and corpora are still there.

    Args:
        data: folders of token shards.
    """
    found: dict[str, set[str]] = {}
    for folder in data:
        try:
            corpora = [record["path"] for record in read_manifest(split_source_name(str(folder))[1]).inputs
                       if record.get("kind") == MEDIA_CORPUS]
            for corpus in corpora:
                for kind, codec in read_manifest(Path(corpus), MEDIA_CORPUS).content["codecs"].items():
                    found.setdefault(kind, set()).add(codec["manifest_sha256"])
        except (UserError, KeyError, TypeError, AttributeError):
            continue  # moved or deleted: nothing is known of it
    return found


def banks_of(data: Iterable[str | Path]) -> set[str] | None:
    """Return the kinds of banks whose features a model has read; None where its data are not there.

    Args:
        data: folders of token shards.
    """
    found, folders = set[str](), list(data)
    try:
        for folder in folders:
            for source in read_manifest(split_source_name(str(folder))[1]).content["sources"]:
                found |= set(source.get(FEATURES) or {})
    except (UserError, KeyError, TypeError, AttributeError):
        # what was read so far is known, whatever the others held
        return found or None
    return found if folders else None


def refuse_other_codecs(tokenizers: Mapping[str, Path], known: Mapping[str, set[str]], option: str) -> None:
    """Raise `UserError` where a tokenizer is not the one that a model's data were encoded with.

    Args:
        tokenizers: kind -> folder of a codec.
        known: what `codecs_of` returned; a kind of which nothing is known is not judged.
        option: gives them, as in "--{kind}-tokenizer".
    """
    for kind, folder in tokenizers.items():
        if known.get(kind) and (found := manifest_sha256(folder)) not in known[kind]:
            theirs = ", ".join(sorted(digest[:12] for digest in known[kind]))
            raise UserError(f"{option.format(kind=kind)} {folder}: is codec {found[:12]}, and the model's "
                            f"data were encoded with {theirs}; pass that one")
