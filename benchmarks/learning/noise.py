"""Junk documents in a corpus, labels for a junk classifier, and the pipeline that filters with it:
`noise.py:WithJunk`, `:JunkLabels`, `:JunkPipeline`."""

import base64
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LABELLED_SHARE = 0.2
"""Of all documents; these are labels and nothing else."""


def junk(text: str) -> str:
    """Return junk of about the length of a text, of a sort that the text draws."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    lines: list[str] = []
    sort, size, length = rng.randrange(4), len(text), 0
    first = text.strip().split("\n")[0][:80]
    words = text.split()
    while length < size:
        if sort == 0:
            line = f"{first} ({len(lines)})"
        elif sort == 1:
            line = (f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)} - - "
                    f"\"GET /{rng.choice('abc')}/{rng.randrange(10**6)} HTTP/1.1\" "
                    f"{rng.choice([200, 304, 404])} {rng.randrange(9999)}")
        elif sort == 2:
            line = base64.b64encode(rng.randbytes(54)).decode()
        else:
            line = " ".join(rng.choices(words or ["-"], k=12))
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines)


@dataclass(frozen=True)
class WithJunk:
    """A document and the same amount of junk, without the labeled junk."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return both."""
        return [] if _labelled(row) else [{"text": row["text"]}, {"text": junk(row["text"])}]


@dataclass(frozen=True)
class JunkLabels:
    """Documents with the label 1, and junk with the label 0."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return both."""
        return ([{"text": row["text"], "label": 1}, {"text": junk(row["text"]), "label": 0}]
                if _labelled(row) else [])


@dataclass(frozen=True)
class JunkPipeline:
    """A pipeline file for `sov-data run` that keeps documents with a high classifier score."""

    raw: str
    """JSON lines."""
    scorer: str
    """Folder that `sov-data scorer train` wrote."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return all items; the input row is ignored."""
        return {"name": "filter", "sources": [{"name": "raw", "path": self.raw, "kind": "en"}],
                "steps": [{"quality": {"model": self.scorer, "min_score": 0.5}}],
                "output": {"name": "{source}"}}


def _labelled(row: Mapping[str, Any]) -> bool:
    lot = int.from_bytes(hashlib.sha256(f"label {row['text']}".encode()).digest()[:8], "big")
    return lot / 2**64 < LABELLED_SHARE
