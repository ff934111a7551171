"""Samples go through the steps of a pipeline, as documents; what is found comes back to them.

The folder is a pipeline's: what is judged is not judged again when the run goes on, as far as steps look at
one document at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from data_prep.pipeline.finish import summary_of
from data_prep.pipeline.plan import Plan, SourcePlan, make_plan
from data_prep.pipeline.running import judge_documents
from data_prep.synth.candidates import Candidate, RunRecord, parts, read_part
from data_prep.synth.checks.input_texts import input_texts
from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.checks.texts import CONTEXT, INPUT, SAMPLES, SOURCES, NoSample, texts_of
from data_prep.synth.sample import Verdict
from megatron_sov.artifacts import disk_errors, publish

FOLDER, TEXTS = "checks", "texts"
FORM = "form"
"""Check that a record is what later commands take."""


@dataclass(frozen=True)
class Judged:
    """What the steps say of samples."""

    dropped: Mapping[str, Verdict] = field(default_factory=dict)
    """Id of a document (a sample, or a context) -> why it does not stay."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """Id of a sample -> its text where a step has changed it."""
    steps: tuple[Mapping[str, Any], ...] = ()
    """Figures of each step and source, as a pipeline's summary has them."""

    def verdict(self, candidate: Candidate) -> Verdict | None:
        """Return why a sample that passed its own checks does not stay; None: it does."""
        try:
            texts = texts_of(candidate.kind, candidate.record)
        except NoSample as e:
            return Verdict(FORM, False, str(e))
        if found := self.dropped.get(candidate.id):
            return found
        if found := self.dropped.get(_context_id(texts.get(CONTEXT, ""))):
            return found
        if candidate.id in self.changed and candidate.kind != "text":
            return Verdict("changed by a step", False, "only texts can follow; use steps that keep or drop")
        return None


def judge_samples(output: Path, run: RunRecord, settings: CheckSettings, workers: int) -> Judged:
    """Send all samples that passed their own checks through the steps.

    Raises:
        UserError: a step, an input or the disk is in the way.
    """
    folder = output / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = _write_texts(output, run, folder)
    pipeline = settings.pipeline(settings.file(run.generator, run.kind),
                                 {name: folder / TEXTS / name for name in names})
    if not pipeline.steps or SAMPLES not in names:
        return Judged()
    (folder / "inputs").mkdir(exist_ok=True)
    plan = make_plan(pipeline, folder)
    judge_documents(plan, folder, workers)
    dropped, changed = _collect(plan, folder)
    return Judged(dropped, changed, tuple(_figures(summary_of(plan, folder))))


def _write_texts(output: Path, run: RunRecord, folder: Path) -> list[str]:
    """Write what is judged, a file for each part of the candidates; returns the sources that there are."""
    temporary = folder / f".{TEXTS}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    seen: set[str] = set()
    try:
        for name in SOURCES:
            (temporary / name).mkdir(parents=True)
        for part in parts(output):
            with ExitStack() as stack:
                files = {name: stack.enter_context(open(temporary / name / part.name, "w", encoding="utf-8"))
                         for name in SOURCES if name != INPUT}
                for made in read_part(part, run):
                    for sample in made.samples:
                        _write_sample(sample, files, seen)
        with open(temporary / INPUT / "input.jsonl", "w", encoding="utf-8") as f:
            for path in run.inputs:
                for place, text in input_texts(Path(path)):
                    f.write(_line(f"input {place}", text))
        for file in [*temporary.rglob("*.jsonl")]:
            if not file.stat().st_size:
                file.unlink()
        names = [name for name in SOURCES if any((temporary / name).iterdir())]
        publish(temporary, folder / TEXTS)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names


def _write_sample(sample: Candidate, files: Mapping[str, IO[str]], seen: set[str]) -> None:
    if sample.failed:
        return
    try:
        texts = texts_of(sample.kind, sample.record)
    except NoSample:
        return
    for name, text in texts.items():
        id_ = sample.id
        if name == CONTEXT:
            id_ = _context_id(text)
            if id_ in seen:
                continue
            seen.add(id_)
        files[name].write(_line(id_, text))


def _line(id_: str, text: str) -> str:
    return json.dumps({"id": id_, "text": text}, ensure_ascii=False) + "\n"


def _context_id(text: str) -> str:
    return f"context {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _collect(plan: Plan, folder: Path) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Return what became of samples and contexts: those that are dropped, and those with another text."""
    found: list[tuple[str, int, str, str]] = []
    changed: dict[str, str] = {}
    for source in plan.sources:
        if source.settings.name == INPUT:
            continue
        for own_id, number, reason, detail, text in _rows(source, folder):
            if reason:
                found.append((own_id, number, reason, detail))
            elif text is not None and source.settings.name == SAMPLES:
                changed[own_id] = text
    names = _own_ids(plan, folder, {detail for _, _, _, detail in found})
    dropped: dict[str, Verdict] = {}
    for own_id, _, reason, detail in sorted(found, key=lambda one: one[1]):
        dropped.setdefault(own_id, Verdict(reason, False, names.get(detail, detail)))
    return dropped, {id_: text for id_, text in changed.items() if id_ not in dropped}


def _rows(source: SourcePlan, folder: Path) -> Iterator[tuple[str, int, str, str, str | None]]:
    """Yield own id, number of the step, reason, detail and text of each document that a step drops or
    changes; one that several change comes as often, the last text last."""
    base, *layers = [layer for layer in source.layers if layer.folder and layer.kind != "output"]
    for shard in source.shards:
        ids = pq.read_table(base.file(folder, shard), columns=["own_id"]).column("own_id").to_pylist()
        for layer in layers:
            table = pq.read_table(layer.file(folder, shard))
            beside = next((name for name in ("duplicate_of", "contamination") if name in table.column_names),
                          "text")
            for own_id, reason, text, detail in zip(ids, *(
                    table.column(name).to_pylist() for name in ("reason", "text", beside)), strict=True):
                if reason or text is not None:
                    yield own_id, layer.number, reason or "", "" if beside == "text" else detail or "", text


def _own_ids(plan: Plan, folder: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Return id in the pipeline -> own id, of the documents that others are the same as."""
    asked = {one for one in wanted if one}
    found: dict[str, str] = {}
    for source in plan.sources if asked else ():
        for shard in source.shards:
            table = pq.read_table(source.layers[0].file(folder, shard), columns=["id", "own_id"])
            found |= {one: own for one, own in zip(table.column("id").to_pylist(),
                                                   table.column("own_id").to_pylist(), strict=True)
                      if one in asked}
    return {one: f"the same as {own}" for one, own in found.items()}


def _figures(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for source in summary["sources"]:
        if source["name"] != INPUT:
            for step in source["steps"][1:]:
                yield {"step": step["kind"], "number": step["number"], "source": source["name"],
                       "settings": step["settings"], "documents_in": step["documents_in"],
                       "documents_kept": step["documents_kept"],
                       "dropped": {reason: one["documents"] for reason, one in step["dropped"].items()}}
