"""Build a source's record for the manifest of token shards."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
