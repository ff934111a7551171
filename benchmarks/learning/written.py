"""Openings for a model to write on from, and what it wrote as documents: what the commands of recipes name as
`written.py:Openings` and `:Written`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPENING_CHARS, MIN_LINE_CHARS = 8, 24


@dataclass(frozen=True)
class Openings:
    """First characters of each line of a document that is long enough."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return them as prompts."""
        return [{"prompt": line.strip()[:OPENING_CHARS]} for line in row["text"].split("\n")
                if len(line.strip()) >= MIN_LINE_CHARS]


@dataclass(frozen=True)
class Written:
    """An opening with its continuation, a row of `megatron-sov generate --output`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the document."""
        return {"text": row["prompt"] + row["response"]}
