"""`sov-data verify`: is an artifact of token shards whole and sound?"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.indexed import SIDECARS, IndexedSplit, open_split
from data_prep.pack import KIND
from data_prep.splits import HELDOUT, SPLITS, TRAIN
from megatron_sov.artifacts import damaged_files, read_manifest
from megatron_sov.errors import UserError

HELP = "check token shards: hashes, indices, ids, splits"
_BLOCK_ITEMS = 1 << 22
SIDECAR_VALUES = {"loss": (0.0, 1.0), "type": (0, 1, 2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Check token shards: file hashes, indices, range of ids, ends of documents, no document in both splits."
    parser.add_argument("data", type=Path, metavar="DIR", help="folder that `sov-data pack` wrote")


def run(args: argparse.Namespace) -> int:
    """Check and say so; returns 0 where all is well.

    Raises:
        UserError: listing every problem.
    """
    problems = find_problems(args.data)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{args.data}: {count}; pack the data again or restore it from a copy\n"
                        + "\n".join(f"  {p}" for p in problems))
    print(f"{args.data}: sound")
    return 0


def find_problems(data: Path) -> list[str]:
    """Return one sentence for each problem of an artifact of kind "tokens".

    Raises:
        UserError: `data` is no such artifact.
    """
    content = read_manifest(data, KIND).content
    problems = damaged_files(data)
    hashes: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    for source in content["sources"]:
        for split in SPLITS:
            record = source["splits"][split]
            prefix = data / record["prefix"]
            try:
                opened = open_split(prefix)
            except UserError as e:
                problems.append(str(e))
                continue
            problems += _split_problems(prefix, opened, record, content)
            hashes[split].update(hashlib.blake2b(d.tobytes(), digest_size=16).digest() for d in opened.documents())
    if both := len(hashes[TRAIN] & hashes[HELDOUT]):
        problems.append(f"{data}: {both} documents are in both splits, train and heldout")
    return problems


def _split_problems(prefix: Path, split: IndexedSplit, record: dict[str, Any], content: dict[str, Any]) -> list[str]:
    problems = []
    found = {"num_documents": len(split.lengths_tokens), "num_tokens": int(split.lengths_tokens.sum(dtype=np.int64))}
    for field, value in found.items():
        if value != record[field]:
            problems.append(f"{prefix}.idx: {field} is {value}, the manifest says {record[field]}")
    if split.dtype != content["dtype"]:
        problems.append(f"{prefix}.idx: ids are {split.dtype}, the manifest says {content['dtype']}")
    largest = max((int(split.tokens[i : i + _BLOCK_ITEMS].max()) for i in range(0, len(split.tokens), _BLOCK_ITEMS)), default=0)
    smallest = min((int(split.tokens[i : i + _BLOCK_ITEMS].min()) for i in range(0, len(split.tokens), _BLOCK_ITEMS)), default=0)
    if smallest < 0 or largest >= content["vocab_size"]:
        problems.append(f"{prefix}.bin: ids reach from {smallest} to {largest}, must lie in 0..{content['vocab_size'] - 1}")
    last = split.tokens[np.cumsum(split.lengths_tokens, dtype=np.int64) - 1] if len(split.lengths_tokens) else split.tokens
    if open_ended := int((last != content["eos_id"]).sum()):
        problems.append(f"{prefix}.bin: {open_ended} documents do not end with id {content['eos_id']}, the end of a document")
    for suffix in content["sidecars"]:
        problems += _sidecar_problems(Path(f"{prefix}.{suffix}"), suffix, len(split.tokens))
    return problems


def _sidecar_problems(file: Path, suffix: str, num_tokens: int) -> list[str]:
    dtype = np.dtype(SIDECARS[suffix])
    if not file.is_file():
        return []  # a missing file is reported with the hashes
    if file.stat().st_size != num_tokens * dtype.itemsize:
        return [f"{file}: has {file.stat().st_size} bytes, {num_tokens} tokens need {num_tokens * dtype.itemsize}"]
    values = np.memmap(file, dtype.newbyteorder("<"), mode="r") if num_tokens else np.zeros(0, dtype)
    for i in range(0, num_tokens, _BLOCK_ITEMS):
        if not np.isin(values[i : i + _BLOCK_ITEMS], SIDECAR_VALUES[suffix]).all():
            return [f"{file}: holds values other than {', '.join(map(str, SIDECAR_VALUES[suffix]))}"]
    return []
