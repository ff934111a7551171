"""Manifests of token artifacts: the record of a source, and the check for required fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_sov.base.errors import UserError

ARTIFACT_FIELDS = ("tokenizer_sha256", "vocab_size", "sources")
SOURCE_FIELDS = ("name", "format", "splits")
SPLIT_FIELDS = ("num_tokens", "shards")
COUNTS = ("num_documents", "num_tokens", "num_bytes")
"""Counts of a shard, summed over the shards of a split."""


def build_source_record(name: str, format: str, sidecars: Iterable[str], shards: Sequence[Mapping[str, Any]]
                  ) -> dict[str, Any]:
    """Build the manifest's record of a source without held-out documents.

    Args:
        name: of the source.
        format: of its documents ("chat", `documents.ROLLOUTS`); each document is a unit.
        sidecars: suffixes of the files next to the tokens.
        shards: `prefix` and `COUNTS` of each shard.
    """
    counts = {count: sum(shard[count] for shard in shards) for count in COUNTS}
    return {"name": name, "format": format, "group_documents": 1, "sidecars": list(sidecars), "num_bad": {},
            "splits": {"train": {"shards": list(shards), **counts},
                       "heldout": {"shards": [], **dict.fromkeys(COUNTS, 0)}}}


def check_token_manifest(path: str, content: dict[str, Any]) -> None:
    """Raise `UserError` if the manifest lacks fields; the message names all of them.

    Args:
        path: of the artifact.
        content: of its manifest.
    """
    try:
        lacking = list(_iter_missing_fields(content))
    except (TypeError, AttributeError, KeyError) as e:
        lacking = [f"readable sources ({e})"]
    if lacking:
        raise UserError(f"{path}: its manifest lacks {', '.join(lacking)}; pack the data again, or restore "
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
