"""`sov-data verify`: is an artifact of token shards whole and sound?"""

from __future__ import annotations

import argparse
from array import array
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
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.chat.marks import KIND_NONE, KINDS
from megatron_sov.work.progress.progress_bar import create_bar

_BLOCK_ITEMS = 1 << 22
SIDECAR_VALUES = {"loss": (0.0, 1.0), "type": (0, 1, 2), "kind": (KIND_NONE, *KINDS.values())}


@dataclass(frozen=True, kw_only=True)
class DataVerifyOptions:
    """Check token shards before a run."""

    data: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data pack` or `sov-data mix` wrote."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Check token shards before a run: file hashes, indices, range of ids, "
                          "ends of documents, no document in both splits. Count duplicates.")
    add_options(parser, DataVerifyOptions)


def run(typed: argparse.Namespace) -> int:
    """Check and say so; returns 0 where all is well.

    Raises:
        UserError: listing every problem.
    """
    args = read_options(DataVerifyOptions, typed)
    problems, notes = verify_shards(args.data)
    if problems:
        raise UserError(format_problems(str(args.data), problems,
                                        "pack the data again or restore it from a copy"))
    print(f"{args.data}: sound")
    for note in notes:
        print(note)
    return 0


def verify_shards(data: Path) -> tuple[list[str], list[str]]:
    """Return a sentence for each problem, and one for each thing worth knowing (duplicates).

    Raises:
        UserError: `data` is no artifact of kind "tokens".
    """
    manifest = read_tokens_manifest(data)
    content, notes = manifest.content, []
    with create_bar("hashing", sum(record.size_bytes for record in manifest.files.values()), "B") as bar:
        problems = find_damaged_files(data, on_checked=bar.update)
    # Eight bytes a document: a list of Python's integers would take several times as much.
    hashes: dict[str, array[int]] = {split: array("Q") for split in SPLITS}
    with create_bar("reading", count_tokens(content), "token") as bar:
        for shard in iter_shards(data, content):
            try:
                opened = shard.open()
            except UserError as e:
                problems.append(str(e))
                continue
            problems += _shard_problems(shard, opened, content)
            hashes[shard.split].extend(hash_token_documents(opened, shard.source["group_documents"]))
            bar.update(len(opened.tokens))
    distinct = {split: np.unique(np.frombuffer(values, np.uint64)) if values else np.zeros(0, np.uint64)
                for split, values in hashes.items()}
    if both := len(np.intersect1d(distinct[TRAIN], distinct[HELDOUT], assume_unique=True)):
        problems.append(f"{data}: {both} documents are in both splits, train and heldout")
    for split in SPLITS:
        if repeated := len(hashes[split]) - len(distinct[split]):
            notes.append(f"{split}: {repeated:,} of {len(hashes[split]):,} documents repeat an earlier one, "
                         "token by token")
    return problems, notes


def _shard_problems(shard: PackedShard, split: IndexedSplit, content: dict[str, Any]) -> list[str]:
    problems = []
    prefix, num_documents = shard.prefix, len(split.lengths_tokens)
    for field, value in {"num_documents": num_documents,
                         "num_tokens": int(split.lengths_tokens.sum(dtype=np.int64))}.items():
        if value != shard.record[field]:
            problems.append(f"{prefix}.idx: {field} is {value}, the manifest says {shard.record[field]}")
    if num_documents % shard.source["group_documents"]:
        problems.append(f"{prefix}.idx: holds {num_documents} sequences, "
                        "which are not pairs of chosen and rejected")
    if split.dtype != content["dtype"]:
        problems.append(f"{prefix}.idx: ids are {split.dtype}, the manifest says {content['dtype']}")
    smallest, largest = _range(split.tokens)
    if smallest < 0 or largest >= content["vocab_size"]:
        problems.append(f"{prefix}.bin: ids reach from {smallest} to {largest}, "
                        f"must lie in 0..{content['vocab_size'] - 1}")
    if num_documents:
        stops = np.cumsum(split.lengths_tokens, dtype=np.int64)
        problems += _edge_problems(shard, split.tokens[stops - split.lengths_tokens],
                                   split.tokens[stops - 1], content)
    for suffix in shard.source["sidecars"]:
        file = Path(f"{prefix}.{suffix}")
        if suffix == ROUTES:
            problems += _routes_problems(file, shard.source, len(split.tokens))
        elif suffix == FEATURES:
            from data_prep.media.packing import media_problems

            problems += media_problems(shard.prefix, shard.source, split.tokens)
        elif suffix == WRITTEN:
            wanted, found = -(-len(split.tokens) // 8), file.stat().st_size if file.is_file() else None
            if found not in (None, wanted):
                problems.append(f"{file}: has {found} bytes, {len(split.tokens)} tokens need {wanted}")
        else:
            problems += _sidecar_problems(
                file, suffix, num_documents if suffix.endswith(PER_DOCUMENT) else len(split.tokens))
    return problems


def _routes_problems(file: Path, source: dict[str, Any], num_tokens: int) -> list[str]:
    try:
        shape = RouteShape.from_record(source.get(ROUTES), f"source {source['name']!r}")
    except UserError as e:
        return [str(e)]
    if not file.is_file():
        return []  # a missing file is reported with the hashes
    if file.stat().st_size != num_tokens * shape.bytes_per_token:
        return [f"{file}: has {file.stat().st_size} bytes, {num_tokens} tokens need "
                f"{num_tokens * shape.bytes_per_token}"]
    # Read in blocks, as a file of routes is many times as large as its .bin.
    block_tokens = max(1, _BLOCK_ITEMS // (shape.layers * shape.top_k))
    for first in range(0, num_tokens, block_tokens):
        count = min(block_tokens, num_tokens - first)
        rows = np.fromfile(file, shape.dtype, count * shape.layers * shape.top_k,
                           offset=first * shape.bytes_per_token)
        if problem := shape.problem(rows.reshape(count, shape.layers, shape.top_k)):
            return [f"{file}: from token {first} on, {problem}"]
    return []


def _range(tokens: NDArray[np.generic]) -> tuple[int, int]:
    blocks = [tokens[i : i + _BLOCK_ITEMS] for i in range(0, len(tokens), _BLOCK_ITEMS)]
    return min((int(b.min()) for b in blocks), default=0), max((int(b.max()) for b in blocks), default=0)


def _edge_problems(shard: PackedShard, first: NDArray[np.generic], last: NDArray[np.generic],
                   content: dict[str, Any]) -> list[str]:
    problems = []
    if (content["eod"] == "append" and shard.source["format"] != "prompt"
            and (n := int((last != content["eos_id"]).sum()))):
        problems.append(f"{shard.prefix}.bin: {n} documents do not end with id {content['eos_id']}, "
                        "the end of a document")
    if content["bos_id"] is not None and (n := int((first != content["bos_id"]).sum())):
        problems.append(f"{shard.prefix}.bin: {n} documents do not begin with id {content['bos_id']}, "
                        "the begin of a document")
    return problems


def _sidecar_problems(file: Path, suffix: str, num_tokens: int) -> list[str]:
    dtype = np.dtype(SIDECARS.get(suffix, COLUMN_DTYPE))
    if not file.is_file():
        return []  # a missing file is reported with the hashes
    if file.stat().st_size != num_tokens * dtype.itemsize:
        return [f"{file}: has {file.stat().st_size} bytes, {num_tokens} tokens need "
                f"{num_tokens * dtype.itemsize}"]
    values = np.memmap(file, dtype.newbyteorder("<"), mode="r") if num_tokens else np.zeros(0, dtype)
    for i in range(0, num_tokens, _BLOCK_ITEMS):
        block = values[i : i + _BLOCK_ITEMS]
        if suffix not in SIDECARS:
            if not np.isfinite(block).all():
                wrong = i + int(np.flatnonzero(~np.isfinite(block))[0])
                return [f"{file}: token {wrong} has {values[wrong]} in column {suffix!r}, must be a finite "
                        "number"]
        elif not np.isin(block, SIDECAR_VALUES[suffix]).all():
            return [f"{file}: holds values other than {', '.join(map(str, SIDECAR_VALUES[suffix]))}"]
    return []
