"""Samples go through the steps of a pipeline, as documents; what is found comes back to them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_prep.curate.pipeline.counts import read_recorded_seal
from data_prep.curate.pipeline.finish import build_summary
from data_prep.curate.pipeline.plan import PipelinePlan, SourcePlan, make_plan
from data_prep.curate.pipeline.running import judge_documents
from data_prep.damaged_files import explain_deletion
from data_prep.json_lines import read_objects
from data_prep.synth.candidates import SynthRunRecord, read_finished
from data_prep.synth.checks.settings import (
    CONTEXT, INPUT, SOURCES, NoSample, asked_in, read_steps, steps_file, texts_of)
from data_prep.synth.generator import GeneratedSample, Kind, SampleVerdict
from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.documents import Document, RecordReading, list_files, read_span
from megatron_sov.base.documents.files import JSONL_SUFFIXES, iter_spans
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import open_sealed_parquet
from megatron_sov.work.progress.journal import work_folder

FOLDER, TEXTS = "checks", "texts"
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
    for span in iter_spans(file):
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

    def verdict(self, kind: Kind, id_: str, sample: GeneratedSample) -> SampleVerdict | None:
        """Return why a sample that passed its own checks does not stay; None: it does."""
        try:
            # before the steps are asked: a record that no later command takes was never sent to them
            texts = texts_of(kind, sample.record)
        except NoSample as e:
            return SampleVerdict(FORM, False, str(e))
        ids = (id_, _context_id(texts.get(CONTEXT, "")))
        if found := next(filter(None, map(self.dropped.get, ids)), None):
            return found
        # a changed text cannot be put back into the messages that it was joined from
        if kind != "text" and any(one in self.changed for one in ids):
            return SampleVerdict("changed by a step", False,
                                 "only texts can follow; use steps that keep or drop")
        return None


def judge_samples(output: Path, run: SynthRunRecord, checks: Path | None, workers: int) -> JudgedSample:
    """Send all samples that passed their own checks through the steps of a file.

    Raises:
        UserError: a step, an input or the disk is in the way.
    """
    folder = work_folder(output) / FOLDER
    with translate_disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folders = _write_texts(output, run, folder / TEXTS)
    pipeline = read_steps(steps_file(checks, run.generator, run.kind), folders) if folders else None
    if pipeline is None or not pipeline.steps:
        return JudgedSample()
    plan = make_plan(pipeline, folder)
    judge_documents(plan, folder, workers)
    dropped, changed = _collect(plan, folder)
    return JudgedSample(dropped, changed, tuple(_figures(build_summary(plan, folder))))


def _write_texts(output: Path, run: SynthRunRecord, folder: Path) -> dict[str, Path]:
    """Write a file for each source of texts, and return source -> its folder; nothing without samples."""
    files: dict[str, IO[str]] = {}
    contexts: set[str] = set()
    with ExitStack() as stack:
        def write(source: str, id_: str, text: str) -> None:
            if source not in files:
                (folder / source).mkdir(parents=True)
                files[source] = stack.enter_context(open(folder / source / "texts.jsonl", "w",
                                                         encoding="utf-8"))
            files[source].write(json.dumps({"id": id_, "text": text}, ensure_ascii=False) + "\n")

        for item in read_finished(output):
            for id_, sample in item.numbered():
                for source, text in _texts_to_judge(run.kind, sample).items():
                    if source != CONTEXT:
                        write(source, id_, text)
                    # system turns repeat: each goes through the steps once, under the hash of its text
                    elif (context := _context_id(text)) not in contexts:
                        contexts.add(context)
                        write(source, context, text)
        if files:  # the input alone is not judged
            for path in run.inputs:
                for origin, text in input_texts(Path(path)):
                    write(INPUT, f"input {origin}", text)
    return {name: folder / name for name in SOURCES if name in files}


def _texts_to_judge(kind: Kind, sample: GeneratedSample) -> dict[str, str]:
    """Return source -> text of a sample that passes its own checks and has the form of its kind."""
    try:
        return {} if sample.failed else texts_of(kind, sample.record)
    except NoSample:
        return {}


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
        ids = _read(base.get_table_file(folder, shard), ["own_id"]).column("own_id").to_pylist()
        for layer in layers:
            table = _read(layer.get_table_file(folder, shard))
            beside = next((name for name in ("duplicate_of", "contamination") if name in table.column_names),
                          "text")
            for own_id, reason, text, detail in zip(ids, *(
                    table.column(name).to_pylist() for name in ("reason", "text", beside)), strict=True):
                if reason or text is not None:
                    yield own_id, layer.number, reason or "", "" if beside == "text" else detail or "", text


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return open_sealed_parquet(file, explain_deletion(file), is_required=True,
                                   seal=read_recorded_seal(file)).read(columns)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]}); "
                        f"{explain_deletion(file)}") from None


def _own_ids(plan: PipelinePlan, folder: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Return id in the pipeline -> own id, of the documents that others are the same as."""
    asked = {one for one in wanted if one}
    found: dict[str, str] = {}
    for source in plan.sources if asked else ():
        for shard in source.shards:
            table = _read(source.layers[0].get_table_file(folder, shard), ["id", "own_id"])
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
