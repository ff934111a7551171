"""Responses of a model as training rows: `written.py:Openings`, `:Written`, `:Measured`."""

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


@dataclass(frozen=True)
class Measured:
    """A row of `megatron-sov eval passk`, as a problem of one answer for `sov-data difficulty label`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the measurement."""
        return {"problem_id": f"{row['prompt_index']}-{row['sample']}", "prompt": row["prompt"],
                "num_right": int(row["reward"]), "num_answers": 1}
