"""Banks: files of raw pictures or spectrograms whose encoder features replace placeholder tokens.

All records of a bank have the same shape. A picture takes one record, a long sound or a video several. The
encoder turns each record into as many features as the bank has slots. A sidecar file next to the token shard
gives the feature for each placeholder token as ``row * slots + slot``.
"""

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

BANK_KINDS = tuple(ENCODERS)
"""Bank kinds, and suffixes for bank files."""
MAX_SLOTS, MAX_RECORD_BYTES = 1 << 20, 1 << 30
_DTYPES = {PICTURES: "uint8", SOUNDS: "float16"}
_NUM_AXES = {PICTURES: 3, SOUNDS: 2}


@dataclass(frozen=True)
class BankShape:
    """Shape and meaning of a bank's records, as stored in manifests."""

    kind: str
    """`PICTURES` or `SOUNDS`."""
    shape: tuple[int, ...]
    """Shape of a record: [3, side, side] for pictures, [mels, frames] for sounds."""
    slots: int
    """Features per record."""
    placeholder_ids: tuple[int, ...] = ()
    """Token ids that features replace; () before a tokenizer is known."""
    sample_rate_hz: int = 0
    """Sample rate for spectrograms; 0 for pictures."""
    hop_samples: int = 0
    """Samples between spectrogram frames; 0 for pictures."""

    @property
    def dtype(self) -> str:
        return _DTYPES[self.kind]

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def count_slots(self, num_frames: int) -> int:
        """Return the slots for a sound with `num_frames` frames: its share in the record, rounded up."""
        return -(-num_frames * self.slots // self.shape[-1])

    def to_record(self) -> dict[str, Any]:
        """Return the manifest record; inverse of `from_record`."""
        record = {"shape": list(self.shape), "dtype": self.dtype, "slots": self.slots,
                  "placeholder_ids": list(self.placeholder_ids)}
        if self.kind == SOUNDS:
            record |= {"sample_rate_hz": self.sample_rate_hz, "hop_samples": self.hop_samples}
        return record

    @classmethod
    def from_record(cls, kind: str, record: Any, where: str) -> "BankShape":
        """Parse a manifest record. Raises `UserError`: the record is malformed; `where` names the manifest.
        """
        try:
            shape = cls(kind, tuple(int(n) for n in record["shape"]), int(record["slots"]),
                        tuple(int(i) for i in record["placeholder_ids"]),
                        int(record.get("sample_rate_hz", 0)), int(record.get("hop_samples", 0)))
            if len(shape.shape) != _NUM_AXES[kind] or min(shape.shape) < 1:
                raise ValueError(f"a record has {_NUM_AXES[kind]} sizes, each at least 1")
            if not 0 < shape.slots <= MAX_SLOTS or shape.record_bytes > MAX_RECORD_BYTES:
                raise ValueError(f"at most {MAX_SLOTS:,} slots and {MAX_RECORD_BYTES:,} bytes per record")
            if record["dtype"] != shape.dtype:
                raise ValueError(f"{kind} are {shape.dtype}")
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{where}: {FEATURES}.{kind} = {str(record)[:200]} cannot be read "
                            f"({type(e).__name__}: {e}); must have shape, dtype, slots and placeholder_ids; "
                            "write the data again") from None
        return shape


def read_bank_shapes(record: Any, where: str) -> dict[str, BankShape]:
    """Return kind -> bank shape from a manifest's `FEATURES` record; {} for None. Raises `UserError`: the
    record is malformed; `where` names the manifest."""
    if record is None:
        return {}
    if not isinstance(record, dict) or not set(record) <= set(BANK_KINDS):
        raise UserError(f"{where}: {FEATURES} = {str(record)[:200]} must describe "
                        f"{' and '.join(BANK_KINDS)}; write the data again")
    return {kind: BankShape.from_record(kind, record[kind], where) for kind in BANK_KINDS if kind in record}


def open_bank(file: Path, shape: BankShape) -> np.ndarray:
    """Memory-map a bank's records, [rows, *shape]. Raises `UserError`: the file is missing, or its size is
    not a multiple of the record size."""
    try:
        size_bytes = file.stat().st_size
        if size_bytes % shape.record_bytes:
            raise UserError(f"{file}: has {size_bytes} bytes, which are not whole records of "
                            f"{shape.record_bytes}; write the data again or restore it from a copy")
        # Empty files cannot be mapped. Bank files are always little-endian.
        values = (np.memmap(file, np.dtype(shape.dtype).newbyteorder("<"), "r") if size_bytes
                  else np.zeros(0, shape.dtype))
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); write the data again or restore it "
                        "from a copy") from None
    return values.reshape(-1, *shape.shape)


def find_data_codecs(data: Iterable[str | Path]) -> dict[str, set[str]]:
    """Return kind -> manifest hashes of the codecs that encoded training data.

    Args:
        data: token shard folders. Folders and corpora that were moved or deleted are skipped.
    """
    codecs: dict[str, set[str]] = {}
    for folder in data:
        try:
            inputs = read_manifest(split_source_name(str(folder))[1]).inputs
            for corpus in [record["path"] for record in inputs if record.get("kind") == MEDIA_CORPUS]:
                for kind, codec in read_manifest(Path(corpus), MEDIA_CORPUS).content["codecs"].items():
                    codecs.setdefault(kind, set()).add(codec["manifest_sha256"])
        except (UserError, KeyError, TypeError, AttributeError):
            continue
    return codecs


def find_data_banks(data: Iterable[str | Path]) -> set[str] | None:
    """Return the bank kinds in training data; None if the folders can no longer be read.

    Args:
        data: token shard folders.
    """
    kinds, folders = set[str](), list(data)
    try:
        for folder in folders:
            for source in read_manifest(split_source_name(str(folder))[1]).content["sources"]:
                kinds |= set(source.get(FEATURES) or {})
    except (UserError, KeyError, TypeError, AttributeError):
        # Kinds from the folders read so far are certain.
        return kinds or None
    return kinds if folders else None


def check_same_codecs(tokenizers: Mapping[str, Path], data_codecs: Mapping[str, set[str]],
                      option: str) -> None:
    """Check that media tokenizers are the codecs that encoded the model's data.

    Args:
        tokenizers: kind -> codec folder.
        data_codecs: result of `find_data_codecs`; kinds without an entry are not checked.
        option: option name for the message, such as "--{kind}-tokenizer".

    Raises:
        UserError: a codec differs.
    """
    for kind, folder in tokenizers.items():
        if data_codecs.get(kind) and (digest := manifest_sha256(folder)) not in data_codecs[kind]:
            expected = ", ".join(sorted(digest[:12] for digest in data_codecs[kind]))
            raise UserError(f"{option.format(kind=kind)} {folder}: is codec {digest[:12]}, and the model's "
                            f"data were encoded with {expected}; pass that codec")
