"""Conversations on documents of a picture and a sentence, as the commands of recipes name them:
`asked.py:PictureChat`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PictureChat:
    """A question about a picture, and its sentence as the answer."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the conversation."""
        picture, said = row["content"]
        question = {"type": "text", "text": "What is shown?"}
        return {"messages": [{"role": "user", "content": [picture, question]},
                             {"role": "assistant", "content": said["text"]}]}
