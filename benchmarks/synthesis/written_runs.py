"""Folders as a run of synthesis leaves them, of samples that somebody has planted."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.finishing import finish


def write_run(folder: Path, generator: str, kind: str,
              samples: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Write samples, as candidates hold them; the item of place i is called i."""
    (folder / "candidates").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({
        "generator": generator, "version": 1, "kind": kind, "model": "scripted"}))
    with open(folder / "candidates/part-000000.jsonl", "w", encoding="utf-8") as f:
        for number, some in enumerate(samples):
            f.write(json.dumps({"number": number, "item": {"id": str(number)}, "samples": list(some)}) + "\n")


def kept_items(folder: Path, settings: CheckSettings) -> set[int]:
    """Finish a run; returns the places of the items of which it keeps something."""
    with contextlib.redirect_stdout(io.StringIO()):
        finish(folder, settings)
    return {int(json.loads(line)["synthetic"]["item"])
            for file in folder.glob("kept*.jsonl") for line in file.read_text().splitlines()}
