"""The right ones of responses that were judged, as conversations to be fine-tuned on: what commands of
recipes name as `right_ones.py:RightOnes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RightOnes:
    """A row of `megatron-sov eval passk`, where its reward is 1."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return question and response, or None of a wrong one."""
        if row["reward"] != 1:
            return None
        return {"messages": [{"role": "user", "content": row["prompt"]},
                             {"role": "assistant", "content": row["response"]}]}
