"""An artifact of token shards as its readers see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.indexed import IndexedSplit, open_split
from data_prep.splits import SPLITS
from megatron_sov.artifacts import Manifest, read_manifest
from megatron_sov.errors import UserError

KIND = "tokens"
CONTENT_VERSION = 2
"""Layout of the manifest's content: since 2 a split is a list of shards, and formats stand beside sources."""
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Shard:
    """One shard of an artifact."""

    source: dict[str, Any]
    """The manifest's record of its source."""
    split: str
    """"train" or "heldout"."""
    prefix: Path
    """Its files without their endings."""
    record: dict[str, Any]
    """The manifest's record of it."""

    def open(self) -> IndexedSplit:
        """Open it by memory map.

        Raises:
            UserError: its files are missing or damaged.
        """
        return open_split(self.prefix)


def read_tokens_manifest(data: Path) -> Manifest:
    """Return the manifest of an artifact of kind "tokens".

    Raises:
        UserError: `data` is no such artifact, or of another layout.
    """
    manifest = read_manifest(data, KIND)
    if (found := manifest.content.get("content_version", 1)) != CONTENT_VERSION:
        raise UserError(f"{data}: was packed in layout {found}, this version reads layout {CONTENT_VERSION}; "
                        "pack the data again")
    return manifest


def num_tokens(content: dict[str, Any]) -> int:
    """Return the tokens of all sources and splits, as the manifest's `content` has them."""
    return sum(split["num_tokens"] for source in content["sources"] for split in source["splits"].values())


def shards_of(data: Path, content: dict[str, Any], source: str | None = None,
              split: str | None = None) -> Iterator[Shard]:
    """Yield the shards of an artifact, or of one source or split, in order.

    Raises:
        UserError: it has no such source.
    """
    names = [s["name"] for s in content["sources"]]
    if source is not None and source not in names:
        raise UserError(f"--source {source!r}: {data} has no such source (sources: {', '.join(names)})")
    for described in content["sources"]:
        if source in (None, described["name"]):
            for name in SPLITS:
                if split in (None, name):
                    for record in described["splits"][name]["shards"]:
                        yield Shard(described, name, data / record["prefix"], record)
