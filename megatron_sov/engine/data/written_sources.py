"""What a manifest says of a source that models have written: answers to a teacher's prompts, or a round's
responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COUNTS = ("num_documents", "num_tokens", "num_bytes")
"""Of a shard, and of a split over its shards."""


def source_record(name: str, format: str, sidecars: Iterable[str], shards: Sequence[Mapping[str, Any]]
                  ) -> dict[str, Any]:
    """Return the record of a source all of which is trained.

    Args:
        name: of the source.
        format: of its documents ("chat", `documents.ROLLOUTS`), each of which stands alone.
        sidecars: endings of the files beside the tokens.
        shards: `prefix` and `COUNTS` of each.
    """
    counts = {count: sum(shard[count] for shard in shards) for count in COUNTS}
    return {"name": name, "format": format, "group_documents": 1, "sidecars": list(sidecars), "num_bad": {},
            "splits": {"train": {"shards": list(shards), **counts},
                       "heldout": {"shards": [], **dict.fromkeys(COUNTS, 0)}}}
