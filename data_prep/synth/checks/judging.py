"""Samples go through the steps of a pipeline, as documents; what is found comes back to them.

The folder is a pipeline's: a command that finds the same samples and steps judges none of them again.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_prep.curate.pipeline.counts import noted_seal
from data_prep.curate.pipeline.finish import summary_of
from data_prep.curate.pipeline.plan import PipelinePlan, SourcePlan, make_plan
from data_prep.curate.pipeline.running import judge_documents
from data_prep.json_lines import read_objects
from data_prep.shards.shard_damage import way_out
from data_prep.synth.candidates import Candidate, MadeSample, SynthRunRecord, read_made
from data_prep.synth.checks.settings import (
    CONTEXT, INPUT, SOURCES, NoSample, asked_in, read_steps, steps_file, texts_of)
from data_prep.synth.generator import Kind, SampleVerdict
from megatron_sov.base.artifacts import disk_errors, publish
from megatron_sov.base.documents import Document, RecordReading, list_files, read_span
from megatron_sov.base.documents.files import JSONL_SUFFIXES, spans_of
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import open_parquet
from megatron_sov.work.progress.journal import work_folder

FOLDER, TEXTS = "checks", "texts"
LOT_ITEMS = 2000
FORM = "form"
"""Check that a record is what later commands take."""


def input_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each document or record of an input.

    What holds no text is passed over: whether it is what a generator starts from is the generator's to say.

    Raises:
        UserError: it is gone, or cannot be read.
    """
    for file in list_files(path):
        if file.suffix.lower() in JSONL_SUFFIXES:
            found = ((where, asked_in(record)) for where, record in read_objects(file))
        else:
            found = ((f"{file}:{number}", "\n\n".join(document.texts()))
                     for number, document in enumerate(_documents(file), 1))
        yield from ((Path(where).name, text) for where, text in found if text.strip())


def _documents(file: Path) -> Iterator[Document]:
    for span in spans_of(file):
        yield from (item for item in read_span(span, RecordReading()) if isinstance(item, Document))


@dataclass(frozen=True)
class JudgedSample:
    """What the steps say of samples."""

    dropped: Mapping[str, SampleVerdict] = field(default_factory=dict)
    """Id of a document (a sample, or a context) -> why it does not stay."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """Id of a document -> its text where a step has changed it."""
    steps: tuple[Mapping[str, Any], ...] = ()
    """Figures of each step and source, as a pipeline's summary has them."""

    def verdict(self, kind: Kind, candidate: Candidate) -> SampleVerdict | None:
        """Return why a sample that passed its own checks does not stay; None: it does."""
        try:
            # before the steps are asked: a record that no later command takes was never sent to them
            texts = texts_of(kind, candidate.record)
        except NoSample as e:
            return SampleVerdict(FORM, False, str(e))
        ids = (candidate.id, _context_id(texts.get(CONTEXT, "")))
        if found := next(filter(None, map(self.dropped.get, ids)), None):
            return found
        # a changed text cannot be put back into the messages that it was joined from
        if kind != "text" and any(id_ in self.changed for id_ in ids):
            return SampleVerdict("changed by a step", False,
                                 "only texts can follow; use steps that keep or drop")
        return None


def judge_samples(output: Path, run: SynthRunRecord, checks: Path | None, workers: int) -> JudgedSample:
    """Send all samples that passed their own checks through the steps of a file.

    Raises:
        UserError: a step, an input or the disk is in the way.
    """
    folder = work_folder(output) / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # in lots, which are read and judged in parallel
        folders = _write_texts(output, run, folder)
    pipeline = read_steps(steps_file(checks, run.generator, run.kind), folders) if folders else None
    if pipeline is None or not pipeline.steps:
        return JudgedSample()
    plan = make_plan(pipeline, folder)
    judge_documents(plan, folder, workers)
    _delete_earlier(plan, folder)
    dropped, changed = _collect(plan, folder)
    return JudgedSample(dropped, changed, tuple(_figures(summary_of(plan, folder))))


def _write_texts(output: Path, run: SynthRunRecord, folder: Path) -> dict[str, Path]:
    """Write the texts of samples, a file for each lot of items; returns source -> folder."""
    temporary = folder / f".{TEXTS}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    seen: set[str] = set()
    try:
        for number, some in enumerate(_in_lots(read_made(output))):
            with ExitStack() as stack:
                lot = _Lot(temporary, f"{number:06}.jsonl", stack)
                for made in some:
                    for sample in made.samples:
                        _write_sample(run.kind, sample, lot, seen)
        if not temporary.is_dir():  # the input alone is not judged
            return {}
        with ExitStack() as stack:
            lot = _Lot(temporary, "input.jsonl", stack)
            for origin, text in (found for path in run.inputs for found in input_texts(Path(path))):
                lot.write(INPUT, f"input {origin}", text)
        _keep_times(temporary, folder / TEXTS)
        publish(temporary, folder / TEXTS)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {name: folder / TEXTS / name for name in SOURCES if (folder / TEXTS / name).is_dir()}


def _keep_times(new: Path, old: Path) -> None:
    """Give files that stay as they are their old times, by which a pipeline knows its raw files."""
    for file in new.rglob("*.jsonl"):
        before = old / file.relative_to(new)
        if before.is_file() and filecmp.cmp(file, before, shallow=False):
            shutil.copystat(before, file)


def _delete_earlier(plan: PipelinePlan, folder: Path) -> None:
    """Delete the work of earlier plans, each of which has all texts: no later command comes back to it."""
    used = {name for source in plan.sources for layer in source.layers
            for name in (layer.folder, layer.shared)}
    for path in (*folder.glob("shards/*/*"), *folder.glob("shared/*")):
        if path.relative_to(folder).as_posix() not in used:
            shutil.rmtree(path, ignore_errors=True)


class _Lot:
    """Files of the texts of some items, made when the first text comes."""

    def __init__(self, folder: Path, name: str, stack: ExitStack) -> None:
        self._folder, self._name, self._stack = folder, name, stack
        self._files: dict[str, IO[str]] = {}

    def write(self, source: str, id_: str, text: str) -> None:
        if source not in self._files:
            (self._folder / source).mkdir(parents=True, exist_ok=True)
            self._files[source] = self._stack.enter_context(
                (self._folder / source / self._name).open("w", encoding="utf-8"))
        self._files[source].write(json.dumps({"id": id_, "text": text}, ensure_ascii=False) + "\n")


def _in_lots(made: Iterator[MadeSample]) -> Iterator[Iterator[MadeSample]]:
    """Yield items by so many: what comes later changes the last lot's file alone."""
    for first in made:
        yield chain([first], islice(made, LOT_ITEMS - 1))


def _write_sample(kind: Kind, sample: Candidate, lot: _Lot, seen: set[str]) -> None:
    if sample.failed:
        return
    try:
        texts = texts_of(kind, sample.record)
    except NoSample:
        return
    for name, text in texts.items():
        id_ = sample.id
        if name == CONTEXT:
            # system turns repeat: each goes through the steps once, under the hash of its text
            id_ = _context_id(text)
            if id_ in seen:
                continue
            seen.add(id_)
        lot.write(name, id_, text)


def _context_id(text: str) -> str:
    return f"context {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _collect(plan: PipelinePlan, folder: Path) -> tuple[dict[str, SampleVerdict], dict[str, str]]:
    """Return what became of samples and contexts: those that are dropped, and those with another text."""
    found: list[tuple[str, int, str, str]] = []
    changed: dict[str, str] = {}
    for source in plan.sources:
        if source.settings.name == INPUT:
            continue
        for own_id, number, reason, detail, text in _rows(source, folder):
            if reason:
                found.append((own_id, number, reason, detail))
            elif text is not None:
                changed[own_id] = text
    names = _own_ids(plan, folder, {detail for _, _, _, detail in found})
    dropped: dict[str, SampleVerdict] = {}
    # the first step that drops a document gives the reason
    for own_id, _, reason, detail in sorted(found, key=lambda one: one[1]):
        dropped.setdefault(own_id, SampleVerdict(reason, False, names.get(detail, detail)))
    return dropped, {id_: text for id_, text in changed.items() if id_ not in dropped}


def _rows(source: SourcePlan, folder: Path) -> Iterator[tuple[str, int, str, str, str | None]]:
    """Yield own id, number of the step, reason, detail and text of each document that a step drops or
    changes; one that several change comes as often, the last text last."""
    # the first layer holds the documents as they were read, with the ids of ours
    base, *layers = [layer for layer in source.layers if layer.folder and layer.kind != "output"]
    for shard in source.shards:
        ids = _read(base.file(folder, shard), ["own_id"]).column("own_id").to_pylist()
        for layer in layers:
            table = _read(layer.file(folder, shard))
            beside = next((name for name in ("duplicate_of", "contamination") if name in table.column_names),
                          "text")
            for own_id, reason, text, detail in zip(ids, *(
                    table.column(name).to_pylist() for name in ("reason", "text", beside)), strict=True):
                if reason or text is not None:
                    yield own_id, layer.number, reason or "", "" if beside == "text" else detail or "", text


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return open_parquet(file, way_out(file), is_required=True, seal=noted_seal(file)).read(columns)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]}); "
                        f"{way_out(file)}") from None


def _own_ids(plan: PipelinePlan, folder: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Return id in the pipeline -> own id, of the documents that others are the same as."""
    asked = {one for one in wanted if one}
    found: dict[str, str] = {}
    for source in plan.sources if asked else ():
        for shard in source.shards:
            table = _read(source.layers[0].file(folder, shard), ["id", "own_id"])
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
