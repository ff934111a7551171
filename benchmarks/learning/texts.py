"""Split a corpus into held-out documents and a random training share for each seed: `texts.py:Drawn`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JUDGED_SHARE = 0.1
"""Of all documents; the same for every seed."""


@dataclass(frozen=True)
class Drawn:
    """A share of the documents that are not judged on, or those that are."""

    seed: int = 0
    share: float = 0.0
    """0: those that all seeds are judged on."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the text, or None where it is not drawn."""
        text = row["text"]
        judged = _lot(f"judged {text}") < JUDGED_SHARE
        kept = judged if not self.share else not judged and _lot(f"{self.seed} {text}") < self.share
        return {"text": text} if kept else None


def _lot(text: str) -> float:
    """Return a number from 0 to 1 that a text always draws."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
