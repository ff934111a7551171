"""Run generated samples through pipeline steps as documents, and map the results back to samples."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_prep.curate.pipeline.finish import build_summary
from data_prep.curate.pipeline.pipeline_file import check_libraries
from data_prep.curate.pipeline.plan import PipelinePlan, SourcePlan, make_plan
from data_prep.curate.pipeline.running import judge_documents
from data_prep.damaged_files import explain_deletion
from data_prep.synth.checks.settings import (
    INPUT, SOURCES, NoSample, choose_steps_file, extract_question, extract_texts, read_steps)
from data_prep.synth.run_records import SynthRunRecord, read_finished_items
from data_prep.synth.samples import Kind, SampleVerdict
from data_prep.synth.synth import SynthOptions
from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.documents import Document, RecordReading, list_files, read_span
from megatron_sov.base.documents.files import JSONL_SUFFIXES, contains_records, get_ending, iter_spans
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import open_sealed_parquet
from megatron_sov.base.settings import count_cores
from megatron_sov.work.progress.journal import work_folder

FOLDER, TEXTS = "checks", "texts"
"""Folder in the work folder, and in it the folder for the documents."""
FORM, CHANGED = "form", "changed by a step"
"""Names of checks: later commands can read a sample's record, and each step leaves the sample as it is."""


@dataclass(frozen=True)
class JudgedSamples:
    """Verdicts and counts of the steps."""

    rejected: Mapping[str, SampleVerdict]
    """Sample id -> `FORM`, or verdict of the first step that drops or would change the sample."""
    steps: tuple[Mapping[str, Any], ...] = ()
    """Counts for each step and source, as in `summary.json` from a pipeline."""


def judge_samples(output: Path, run: SynthRunRecord, options: SynthOptions) -> JudgedSamples:
    """Run the samples that passed the generator's checks through the steps in `options.checks`, or the
    packaged ones. Raises `UserError`: a step, an input or the disk is wrong."""
    folder = work_folder(output) / FOLDER
    with translate_disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folders, invalid = _write_texts(output, run.kind, options.input, folder / TEXTS)
    if not folders:
        return JudgedSamples(invalid)
    file = choose_steps_file(options.checks, run.generator, run.kind)
    pipeline = read_steps(file, folders)
    if not pipeline.steps:
        return JudgedSamples(invalid)
    check_libraries(pipeline, file)
    plan = make_plan(pipeline, folder)
    judge_documents(plan, folder, options.workers or count_cores())
    return JudgedSamples({**invalid, **_collect_verdicts(plan, folder)},
                         tuple(_iter_step_counts(build_summary(plan, folder))))


def _write_texts(output: Path, kind: Kind, inputs: Sequence[Path], folder: Path
                 ) -> tuple[dict[str, Path], dict[str, SampleVerdict]]:
    """Write a file for each source; return source -> folder, empty without samples, and sample id -> verdict
    for invalid records."""
    files: dict[str, IO[str]] = {}
    invalid: dict[str, SampleVerdict] = {}
    with ExitStack() as stack:
        def write_text(source: str, document_id: str, text: str) -> None:
            if source not in files:
                (folder / source).mkdir(parents=True)
                files[source] = stack.enter_context(open(folder / source / "texts.jsonl", "w",
                                                         encoding="utf-8"))
            files[source].write(json.dumps({"id": document_id, "text": text}, ensure_ascii=False) + "\n")

        for item in read_finished_items(output):
            for sample_id, sample in item.iter_samples():
                if sample.failed_verdict:
                    continue
                try:
                    texts = extract_texts(kind, sample.record)
                except NoSample as e:
                    invalid[sample_id] = SampleVerdict(FORM, False, str(e))
                    continue
                for source, text in texts.items():
                    write_text(source, sample_id, text)
        if files:  # the input is not judged: the steps compare samples with it
            for path in inputs:
                for place, text in iter_input_texts(path):
                    write_text(INPUT, f"input {place}", text)
    return {name: folder / name for name in SOURCES if name in files}, invalid


def iter_input_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each document or record in an input, without empty texts. Raises `UserError`:
    the input is missing or unreadable."""
    for file in list_files(path):
        if get_ending(file.name) in JSONL_SUFFIXES or contains_records(file):
            texts = ((place, extract_question(record)) for place, record in read_records(file))
        else:
            texts = ((f"{file}:{number}", "\n\n".join(document.texts()))
                     for number, document in enumerate(_iter_documents(file), 1))
        yield from ((Path(place).name, text) for place, text in texts if text.strip())


def _iter_documents(file: Path) -> Iterator[Document]:
    for span in iter_spans(file):
        yield from (item for item in read_span(span, RecordReading()) if isinstance(item, Document))


@dataclass(frozen=True)
class _StepResult:
    """A document that a step drops or would change."""

    document_id: str
    step_number: int
    reason: str
    detail: str
    """Pipeline id of the original (duplicate), text of a benchmark (contamination), or ""."""


def _collect_verdicts(plan: PipelinePlan, folder: Path) -> dict[str, SampleVerdict]:
    """Return document id -> verdict for documents that a step drops or would change."""
    results = [result for source in plan.sources if source.settings.name != INPUT
               for result in _iter_results(source, folder)]
    duplicates = _describe_duplicates(plan, folder, {result.detail for result in results})
    verdicts: dict[str, SampleVerdict] = {}
    # the first step gives the reason
    for result in sorted(results, key=lambda result: result.step_number):
        detail = duplicates.get(result.detail, result.detail)
        verdicts.setdefault(result.document_id, SampleVerdict(result.reason, False, detail))
    return verdicts


def _iter_results(source: SourcePlan, folder: Path) -> Iterator[_StepResult]:
    """Yield a result for each step that drops or changes a document, in step order."""
    # the first layer holds the documents with our ids
    base, *layers = [layer for layer in source.layers if layer.folder and layer.kind != "output"]
    for shard in source.shards:
        table = _read_table(base.get_table_file(folder, shard), ["own_id"])
        document_ids = table.column("own_id").to_pylist()
        for layer in layers:
            table = _read_table(layer.get_table_file(folder, shard))
            details: list[str | None] = [None] * len(document_ids)
            for column in ("contamination", "duplicate_of"):
                if column in table.column_names:
                    details = table.column(column).to_pylist()
            for document_id, reason, text, detail in zip(
                    document_ids, table.column("reason").to_pylist(), table.column("text").to_pylist(),
                    details, strict=True):
                if reason or text is not None:
                    yield _StepResult(document_id, layer.number, reason or CHANGED, detail or "")


def _read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return open_sealed_parquet(file, explain_deletion(file), is_required=True).read(columns)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{file}: cannot be read ({' '.join(str(e).split())[:200]}); "
                        f"{explain_deletion(file)}") from None


def _describe_duplicates(plan: PipelinePlan, folder: Path, pipeline_ids: Iterable[str]) -> dict[str, str]:
    """Return pipeline id -> "the same as ID" for duplicated documents."""
    selected_ids = set(filter(None, pipeline_ids))
    originals: dict[str, str] = {}
    for source in plan.sources if selected_ids else ():
        for shard in source.shards:
            table = _read_table(source.layers[0].get_table_file(folder, shard), ["id", "own_id"])
            for pipeline_id, document_id in zip(table.column("id").to_pylist(),
                                                table.column("own_id").to_pylist(), strict=True):
                if pipeline_id in selected_ids:
                    originals[pipeline_id] = f"the same as {document_id}"
    return originals


def _iter_step_counts(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the counts of each source and step, without the input and without the reading step."""
    for source in summary["sources"]:
        if source["name"] != INPUT:
            for step in source["steps"][1:]:
                yield {"step": step["kind"], "number": step["number"], "source": source["name"],
                       "settings": step["settings"], "documents_in": step["documents_in"],
                       "documents_kept": step["documents_kept"],
                       "dropped": {reason: counts["documents"] for reason, counts in step["dropped"].items()}}
