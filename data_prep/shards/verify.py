"""`sov-data verify`: check token shard artifacts for damage and contradictions."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.token_artifact import (
    COLUMN_DTYPE, HELDOUT, SIDECARS, SPLITS, TRAIN, IndexedSplit, PackedShard, count_tokens,
    hash_token_documents, iter_shards, read_tokens_manifest)
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.base.documents.shard_files import FEATURES, PER_DOCUMENT, ROUTES, WRITTEN, RouteShape
from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.chat.marks import KIND_NONE, KINDS
from megatron_sov.work.progress.progress_bar import create_bar

_BLOCK_ITEMS = 1 << 22
SIDECAR_VALUES = {"loss": (0.0, 1.0), "type": (0, 1, 2), "kind": (KIND_NONE, *KINDS.values())}
"""File ending -> all allowed values."""


@dataclass(frozen=True, kw_only=True)
class DataVerifyOptions:
    """Check token shards before a run: file hashes, indices, range of ids, ends of documents, no document in
    both splits. Count duplicates."""

    data: Annotated[Path, Flag("DIR")]
    """Folder from `sov-data pack` or `sov-data mix`."""


def run_verify(options: DataVerifyOptions) -> None:
    """Print notes; raises `UserError` with every problem."""
    problems, notes = verify_shards(options.data)
    if problems:
        raise UserError(format_problems(str(options.data), problems,
                                        "pack the data again or restore it from a copy"))
    print(f"{options.data}: sound")
    for note in notes:
        print(note)


VERIFY = DeclaredCommand(DataVerifyOptions, run_verify)


def verify_shards(data: Path) -> tuple[list[str], list[str]]:
    """Return problems, and notes about duplicates. Raises `UserError`: `data` is no "tokens" artifact."""
    manifest = read_tokens_manifest(data)
    content, notes = manifest.content, []
    with create_bar("hashing", sum(record.size_bytes for record in manifest.files.values()), "B") as bar:
        problems = find_damaged_files(data, on_checked=bar.update)
    # arrays take eight bytes per document, lists several times as much
    hashes: dict[str, array[int]] = {split: array("Q") for split in SPLITS}
    with create_bar("reading", count_tokens(content), "token") as bar:
        for shard in iter_shards(data, content):
            try:
                split = shard.open()
            except UserError as e:
                problems.append(str(e))
                continue
            problems += _find_shard_problems(shard, split, content)
            hashes[shard.split].extend(hash_token_documents(split, shard.source["group_documents"]))
            bar.update(len(split.tokens))
    distinct = {name: np.unique(np.frombuffer(values, np.uint64)) if values else np.zeros(0, np.uint64)
                for name, values in hashes.items()}
    if num_shared := len(np.intersect1d(distinct[TRAIN], distinct[HELDOUT], assume_unique=True)):
        problems.append(f"{data}: {num_shared} documents are in both splits, train and heldout")
    for name in SPLITS:
        if num_repeated := len(hashes[name]) - len(distinct[name]):
            notes.append(f"{name}: {num_repeated:,} of {len(hashes[name]):,} documents repeat an earlier "
                         "one, token by token")
    return problems, notes


def _find_shard_problems(shard: PackedShard, split: IndexedSplit, content: dict[str, Any]) -> Iterator[str]:
    prefix, num_documents = shard.prefix, len(split.lengths_tokens)
    for field, value in {"num_documents": num_documents,
                         "num_tokens": int(split.lengths_tokens.sum(dtype=np.int64))}.items():
        if value != shard.record[field]:
            yield f"{prefix}.idx: {field} is {value}, the manifest says {shard.record[field]}"
    if num_documents % shard.source["group_documents"]:
        yield (f"{prefix}.idx: holds {num_documents} sequences, which are not pairs of chosen and "
               "rejected")
    if split.dtype != content["dtype"]:
        yield f"{prefix}.idx: ids are {split.dtype}, the manifest says {content['dtype']}"
    blocks = [split.tokens[i : i + _BLOCK_ITEMS] for i in range(0, len(split.tokens), _BLOCK_ITEMS)]
    smallest = min((int(block.min()) for block in blocks), default=0)
    largest = max((int(block.max()) for block in blocks), default=0)
    if smallest < 0 or largest >= content["vocab_size"]:
        yield (f"{prefix}.bin: ids reach from {smallest} to {largest}, "
               f"must lie in 0..{content['vocab_size'] - 1}")
    if num_documents:
        yield from _find_end_problems(shard, split, content)
    for suffix in shard.source["sidecars"]:
        yield from _find_sidecar_problems(shard, split, suffix)


def _find_end_problems(shard: PackedShard, split: IndexedSplit, content: dict[str, Any]) -> Iterator[str]:
    """Yield problems with the first and last ids of documents."""
    stops = np.cumsum(split.lengths_tokens, dtype=np.int64)
    last, first = split.tokens[stops - 1], split.tokens[stops - split.lengths_tokens]
    if (content["eod"] == "append" and shard.source["format"] != "prompt"
            and (n := int((last != content["eos_id"]).sum()))):
        yield (f"{shard.prefix}.bin: {n} documents do not end with id {content['eos_id']}, "
               "the end of a document")
    if content["bos_id"] is not None and (n := int((first != content["bos_id"]).sum())):
        yield (f"{shard.prefix}.bin: {n} documents do not begin with id {content['bos_id']}, "
               "the begin of a document")


def _find_sidecar_problems(shard: PackedShard, split: IndexedSplit, suffix: str) -> list[str]:
    file = Path(f"{shard.prefix}.{suffix}")
    num_tokens, num_documents = len(split.tokens), len(split.lengths_tokens)
    if suffix == FEATURES:
        # verifying text must not import `megatron_sov.omni`
        from data_prep.media.packing import find_media_problems

        return list(find_media_problems(shard.prefix, shard.source, split.tokens))
    if suffix == ROUTES:
        return _find_route_problems(file, shard.source, num_tokens)
    if not file.is_file():
        return []  # reported with the hashes
    if suffix == WRITTEN:
        return _find_size_problems(file, num_tokens, -(-num_tokens // 8))
    return _find_value_problems(file, suffix, num_documents if suffix.endswith(PER_DOCUMENT) else num_tokens)


def _find_size_problems(file: Path, num_tokens: int, expected_bytes: int) -> list[str]:
    size_bytes = file.stat().st_size
    if size_bytes == expected_bytes:
        return []
    return [f"{file}: has {size_bytes} bytes, {num_tokens} tokens need {expected_bytes}"]


def _find_route_problems(file: Path, source: dict[str, Any], num_tokens: int) -> list[str]:
    try:
        shape = RouteShape.from_record(source.get(ROUTES), f"source {source['name']!r}")
    except UserError as e:
        return [str(e)]
    if not file.is_file():
        return []  # reported with the hashes
    if problems := _find_size_problems(file, num_tokens, num_tokens * shape.bytes_per_token):
        return problems
    # read in blocks: routes are many times as large as `.bin`
    block_tokens = max(1, _BLOCK_ITEMS // (shape.layers * shape.top_k))
    for first in range(0, num_tokens, block_tokens):
        count = min(block_tokens, num_tokens - first)
        rows = np.fromfile(file, shape.dtype, count * shape.layers * shape.top_k,
                           offset=first * shape.bytes_per_token)
        if problem := shape.problem(rows.reshape(count, shape.layers, shape.top_k)):
            return [f"{file}: from token {first} on, {problem}"]
    return []


def _find_value_problems(file: Path, suffix: str, num_values: int) -> list[str]:
    dtype = np.dtype(SIDECARS.get(suffix, COLUMN_DTYPE))
    if problems := _find_size_problems(file, num_values, num_values * dtype.itemsize):
        return problems
    values: NDArray[Any] = np.zeros(0, dtype)
    if num_values:
        values = np.memmap(file, dtype.newbyteorder("<"), mode="r")
    for i in range(0, num_values, _BLOCK_ITEMS):
        block = values[i : i + _BLOCK_ITEMS]
        if suffix not in SIDECARS:
            if not np.isfinite(block).all():
                token = i + int(np.flatnonzero(~np.isfinite(block))[0])
                return [f"{file}: token {token} has {values[token]} in column {suffix!r}, must be a finite "
                        "number"]
        elif not np.isin(block, SIDECAR_VALUES[suffix]).all():
            return [f"{file}: holds values other than {', '.join(map(str, SIDECAR_VALUES[suffix]))}"]
    return []
