"""A codec of small pictures, trained as benchmarks/omni/train_codec.py trains it:
`trained_codec.py:TrainedCodec`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "omni"))


@dataclass(frozen=True)
class TrainedCodec:
    """Trains a VQModel and writes its folder."""

    source: str
    """Folder of pictures."""
    output: str
    """Folder to write."""
    steps: int
    codes: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Train, whatever the row is."""
        import train_codec

        train_codec.train("pictures", Path(self.source), Path(self.output), self.steps, self.codes)
        return [{"text": self.output}]
