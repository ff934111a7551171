"""Responses that were judged, as measurements of how hard their questions are: what commands of recipes name
as `measured.py:Measured`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A row of `megatron-sov eval passk`, as a problem of one answer for `sov-data difficulty label`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the measurement."""
        return {"problem_id": f"{row['prompt_index']}-{row['sample']}", "prompt": row["prompt"],
                "num_right": int(row["reward"]), "num_answers": 1}
