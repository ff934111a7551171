"""What the manifest of a token artifact says of its sources: of one that models have written (answers to a
teacher's prompts, a round's responses), and whether it says all that is read of any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_sov.base.errors import UserError

OF_ARTIFACT = ("tokenizer_sha256", "vocab_size", "sources")
OF_SOURCE = ("name", "format", "splits")
OF_SPLIT = ("num_tokens", "shards")
COUNTS = ("num_documents", "num_tokens", "num_bytes")
"""Of a shard, and of a split over its shards."""


def build_source_record(name: str, format: str, sidecars: Iterable[str], shards: Sequence[Mapping[str, Any]]
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


def check_token_manifest(path: str, content: dict[str, Any]) -> None:
    """Refuse a manifest that another program, or a slip in an editor, has left without a part.

    Args:
        path: of the artifact.
        content: of its manifest.

    Raises:
        UserError: parts are missing; all of them are named.
    """
    try:
        lacking = list(_lacking(content))
    except (TypeError, AttributeError, KeyError) as e:
        lacking = [f"readable sources ({e})"]
    if lacking:
        raise UserError(f"{path}: its manifest lacks {', '.join(lacking)}; pack the data again, or restore "
                        "it from a copy")


def _lacking(content: dict[str, Any]) -> Iterator[str]:
    yield from (name for name in OF_ARTIFACT if name not in content)
    for i, source in enumerate(content.get("sources", ())):
        where = f"sources[{i}]"
        yield from (f"{where}.{name}" for name in OF_SOURCE if name not in source)
        splits = source.get("splits", {})
        for split in sorted({"train", *splits} if splits else ()):
            for name in OF_SPLIT:
                if name not in splits.get(split, {}):
                    yield f"{where}.splits.{split}.{name}"
