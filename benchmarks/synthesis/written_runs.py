"""Folders as a run of synthesis leaves them, of samples that somebody has planted."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.finishing import finish
from megatron_sov.work.progress.journal import Journal, begun, work_folder

LIKE_ANY = {"verdicts": [], "group": "", "notes": {}, "kind": None}


def write_run(folder: Path, generator: str, kind: str,
              samples: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Write samples, as candidates hold them; the item of place i is called i."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({
        "generator": generator, "version": 1, "kind": kind, "model": "scripted"}))
    with begun(folder, "sov-data synth", {}):
        journal = Journal(work_folder(folder))
        for number, some in enumerate(samples):
            journal.add([(number, json.dumps({
                "item": {"id": str(number), "source": "", "licence": "", "digest": ""}, "asked": [],
                "unusable": "", "samples": [{**LIKE_ANY, **one} for one in some]}).encode())])
        journal.close()


def fates(folder: Path, settings: CheckSettings) -> dict[int, str]:
    """Finish a run; returns place of an item -> why no sample of it stays, empty where one does.  An item
    without samples is not there."""
    with contextlib.redirect_stdout(io.StringIO()):
        finish(folder, settings)
    found = {int(row["synthetic"]["item"]): str(row["reason"]) for row in _rows(folder / "rejected.jsonl")}
    return found | {int(row["synthetic"]["item"]): ""
                    for file in folder.glob("kept*.jsonl") for row in _rows(file)}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())
