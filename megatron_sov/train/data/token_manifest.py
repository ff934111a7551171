"""Token artifact manifests: building a source's record, and checking for required fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_sov.base.errors import UserError

ARTIFACT_FIELDS = ("tokenizer_sha256", "vocab_size", "sources")
SOURCE_FIELDS = ("name", "format", "splits")
SPLIT_FIELDS = ("num_tokens", "shards")
COUNTS = ("num_documents", "num_tokens", "num_bytes")
"""Counts per shard, summed over a split's shards."""


def build_source_record(name: str, format: str, sidecars: Iterable[str],
                        shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Build the manifest record for a source without held-out documents; each document is a unit.

    `format` is "chat" or `documents.ROLLOUTS`, `sidecars` are suffixes of files next to the tokens, and
    `shards` has `prefix` and `COUNTS` of each shard.
    """
    counts = {count: sum(shard[count] for shard in shards) for count in COUNTS}
    return {"name": name, "format": format, "group_documents": 1, "sidecars": list(sidecars), "num_bad": {},
            "splits": {"train": {"shards": list(shards), **counts},
                       "heldout": {"shards": [], **dict.fromkeys(COUNTS, 0)}}}


def check_token_manifest(path: str, content: dict[str, Any]) -> None:
    """Raise `UserError` with the fields missing from `content`, the manifest in the artifact `path`."""
    try:
        missing = list(_iter_missing_fields(content))
    except (TypeError, AttributeError, KeyError) as e:
        missing = [f"readable sources ({e})"]
    if missing:
        raise UserError(f"{path}: its manifest lacks {', '.join(missing)}; pack the data again, or restore "
                        "it from a copy")


def _iter_missing_fields(content: dict[str, Any]) -> Iterator[str]:
    yield from (name for name in ARTIFACT_FIELDS if name not in content)
    for i, source in enumerate(content.get("sources", ())):
        where = f"sources[{i}]"
        yield from (f"{where}.{name}" for name in SOURCE_FIELDS if name not in source)
        splits = source.get("splits", {})
        for split in sorted({"train", *splits} if splits else ()):
            for name in SPLIT_FIELDS:
                if name not in splits.get(split, {}):
                    yield f"{where}.splits.{split}.{name}"
