"""Whether the manifest of a token artifact says what is read of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_sov.errors import UserError

OF_ARTIFACT = ("tokenizer_sha256", "vocab_size", "sources")
OF_SOURCE = ("name", "format", "splits")
OF_SPLIT = ("num_tokens", "shards")


def check_described(path: str, content: dict[str, Any]) -> None:
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
