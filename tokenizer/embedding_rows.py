"""More rows for the embedding and the output head of a Hugging Face model.

Old rows are copied as bytes. A new row is the mean of all rows of known tokens, which keeps the model's
distribution over old tokens nearly as it was (Hewitt, "Initializing New Word Embeddings for Pretrained
Language Models", 2021), plus noise, without which all new rows would be equal. Memory holds one tensor of a
file that has such rows, and a block of any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError

if TYPE_CHECKING:
    import torch

TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "lm_head.weight",
          "lm_head.bias", "embed_out.weight", "shared_head.head.weight")
"""Ends of the names of tensors with one row per id."""
FLOATS = ("F64", "F32", "BF16", "F16")
BLOCK_BYTES = 16 << 20
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class RowPlan:
    """Which rows of embedding and output head are made."""

    old_rows: int
    new_rows: int
    known_ids: int
    """Rows below it belong to tokens and count for the mean; the rest is padding, which was never trained."""
    made: range
    """Ids of the rows that are made; it ends at or below `new_rows`, and begins at or below `old_rows`."""
    noise: float = 0.0
    """Normal, in standard deviations of each column."""
    seed: int = 0
    """Of the noise."""


def find_tables(files: list[Path], old_rows: int) -> dict[str, Path]:
    """Return the tensors with one row per id -> the file that holds each.

    Raises:
        UserError: a file is damaged, there is no such tensor, one is no floating-point table, or an unknown
            one has as many rows.
    """
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (a method of the reader, not a dict)
                part = opened.get_slice(name)
                if part.get_shape()[:1] != [old_rows]:
                    continue
                if not name.endswith(TABLES):
                    raise UserError(f"{file}: {name} has {old_rows} rows, as many as the vocabulary, "
                                    "but is neither a known embedding nor head, "
                                    "so it is not clear what becomes of it")
                if part.get_dtype() not in FLOATS:
                    raise UserError(f"{file}: {name} has dtype {part.get_dtype()}; rows can be averaged in "
                                    f"{', '.join(FLOATS)}")
                found[name] = file
    if not found:
        raise UserError(f"{files[0].parent}: no tensor has {old_rows} rows, the vocab_size of its "
                        "config.json; restore the folder from its source")
    return found


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: cannot be read as safetensors ({e}); copy or download it again") from None


def copy_file(file: Path, target: Path) -> FileRecord:
    """Copy a file in blocks; returns hash and size."""
    def blocks() -> Iterator[bytes | memoryview]:
        with open(file, "rb") as f:
            while block := f.read(BLOCK_BYTES):
                yield block

    return _write(target, blocks())


def add_rows(file: Path, target: Path, tables: set[str], plan: RowPlan) -> FileRecord:
    """Copy a safetensors file with more rows in `tables`; return hash and size."""
    with _open(file) as source:
        names = source.offset_keys()
        slices = {name: source.get_slice(name) for name in names}
        header: dict[str, Any] = {"__metadata__": source.metadata()} if source.metadata() else {}
        end = 0
        for name in names:
            shape, size_bytes = slices[name].get_shape(), _size_bytes(slices[name])
            if name in tables:
                # rows are whole: the size is a multiple of the old number of rows
                size_bytes = size_bytes // plan.old_rows * plan.new_rows
                shape = [plan.new_rows, *shape[1:]]
            header[name] = {"dtype": slices[name].get_dtype(), "shape": shape,
                            "data_offsets": [end, end + size_bytes]}
            end += size_bytes

        def blocks() -> Iterator[bytes | memoryview]:
            head = json.dumps(header, separators=(",", ":")).encode()
            # safetensors aligns tensors to 8 bytes by spaces behind the header
            head += b" " * (-len(head) % 8)
            # the format: 8 bytes of length, the header, then the tensors in the order of their offsets
            yield len(head).to_bytes(8, "little") + head
            for name in names:
                if name in tables:
                    yield from (_bytes(rows) for rows in _rows(slices[name], plan, name))
                else:
                    yield _bytes(source.get_tensor(name))

        return _write(target, blocks())


def _size_bytes(part: Any) -> int:
    """Return the bytes of a tensor, from its shape and the digits in the name of its
    dtype (BOOL is a byte)."""
    size = 1
    for n in part.get_shape():
        size *= n
    digits = "".join(c for c in part.get_dtype().split("_")[0] if c.isdigit())
    return size * (int(digits) if digits else 8) // 8


def row_bytes(tables: dict[str, Path]) -> int:
    """Return the bytes of one row in all tables together."""
    total = 0
    for name, file in tables.items():
        with _open(file) as source:
            part = source.get_slice(name)
            total += _size_bytes(part) // int(part.get_shape()[0])
    return total


def _rows(table: Any, plan: RowPlan, name: str) -> Iterator[torch.Tensor]:
    """Yield the rows of a table in blocks: the old ones, and those that are made."""
    import torch

    mean, deviation = _mean_and_deviation(table, plan.known_ids)

    def make_row(id_: int) -> torch.Tensor:
        # a function of seed, tensor and id: the number of new rows does not change it
        drawn = torch.Generator().manual_seed(crc32(f"{plan.seed} {name} {id_}".encode()))
        noise = torch.randn(mean.shape, dtype=torch.float64, generator=drawn)
        return (mean + plan.noise * deviation * noise).to(table[0:1].dtype)

    for start in range(0, plan.new_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, plan.new_rows)
        copied = min(stop, plan.made.start)
        if copied > start:
            yield table[start:copied]
        made = [make_row(id_) for id_ in range(max(start, plan.made.start), min(stop, plan.made.stop))]
        if made:
            yield torch.stack(made)
        padding = max(start, plan.made.stop)
        if padding < stop:
            yield table[padding:stop]


def _mean_and_deviation(table: Any, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each column of the first rows, in float64."""
    blocks = [(start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, num_rows, BLOCK_ROWS)]
    mean: torch.Tensor = sum(table[start:stop].double().sum(0) for start, stop in blocks) / num_rows
    # in a second pass: sums of squares minus squares of means lose digits
    squares: torch.Tensor = sum((table[start:stop].double() - mean).square().sum(0) for start, stop in blocks)
    return mean, (squares / num_rows).sqrt()


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    raw: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return raw


def _write(target: Path, blocks: Iterator[bytes | memoryview]) -> FileRecord:
    digest, size_bytes = Digest(), 0
    with open(target, "wb") as f:
        for block in blocks:
            digest.update(block)
            f.write(block)
            size_bytes += len(block)
    return FileRecord(digest.text(), size_bytes)
