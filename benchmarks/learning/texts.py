"""Split a corpus into held-out documents and a random training share for each seed: `texts.py:Drawn`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JUDGED_SHARE = 0.1
"""Of all documents; the same for every seed."""


@dataclass(frozen=True)
class Drawn:
    """A random share of the training documents, or the held-out documents."""

    seed: int = 0
    share: float = 0.0
    """0: those that all seeds are judged on."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row's text, or None if the document is not selected."""
        text = row["text"]
        judged = _lot(f"judged {text}") < JUDGED_SHARE
        kept = judged if not self.share else not judged and _lot(f"{self.seed} {text}") < self.share
        return {"text": text} if kept else None


def _lot(text: str) -> float:
    """Map a text to a fixed number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
