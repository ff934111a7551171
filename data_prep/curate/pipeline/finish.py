"""Publish task results as a corpus; the manifest marks it as complete."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.curate.pipeline.counts import DocumentCounts
from data_prep.curate.pipeline.plan import OUTPUT, Layer, PipelinePlan, SourcePlan
from data_prep.damaged_files import explain_deletion
from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import (
    ArtifactWriter, FileRecord, create_folder, find_file_damage, read_manifest, translate_disk_errors,
    write_atomically)
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import link_or_copy
from megatron_sov.base.sealed import open_sealed_parquet, read_sealed_json, read_sealed_lines

MAX_PRINTED_NAMES = 6
"""Output names listed on the terminal."""
TEXT, QUARANTINE = "text", "quarantine"
SUMMARY, PIPELINE = "summary.json", "pipeline.json"
EXCLUDED_FOLDERS = frozenset(["shards", "shared", "done", "logs", "plans", "slurm", "tokens"])
"""Folders without files of the corpus: work files, logs, and token shards packed into the run's folder."""
MAX_CLOCK_DIFFERENCE_S = 60.0
"""Maximum difference between the disk's clock and the machine's clock."""


def finish_run(plan: PipelinePlan, output: Path) -> str:
    """Publish the corpus after all tasks; returns lines for the terminal. Raises `UserError`: all documents
    were dropped, or writing fails."""
    with translate_disk_errors(output):
        # The order matters for a killed run: the manifest comes last, and alone marks the corpus as complete.
        published = _publish_text(plan, output)
        _write_quarantine(plan, output)
        summary = build_summary(plan, output)
        summary["output"] = [{"name": name, **published[name]} for name in sorted(published)]
        account = account_documents(summary)
        summary["account"] = account.to_dict()
        write_atomically(output / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False))
        if not published:
            raise UserError(f"{output}: no document is kept, so there is no output ({account.describe()}); "
                            f"change the steps that dropped most, or the files listed in "
                            f"{output / QUARANTINE}, and run the command again")
        _write_manifest(plan, output, summary)
    return describe_output(summary, account, output)


def is_complete(plan: PipelinePlan, output: Path) -> bool:
    """Return whether a folder holds the plan's output; files newer than the manifest are hashed."""
    try:
        manifest = read_manifest(output, CORPUS)
    except UserError:
        return False
    return (manifest.content.get("address") == plan.address
            and all(_is_unchanged(output / name, record, manifest.created_s)
                    for name, record in manifest.files.items()))


def _is_unchanged(file: Path, record: FileRecord, created_s: float) -> bool:
    try:
        stat = file.stat()
    except OSError:
        return False
    if stat.st_size != record.size_bytes:
        return False
    # A status change before the manifest's time rules out later changes and saves the hash.
    return stat.st_ctime < created_s - MAX_CLOCK_DIFFERENCE_S or find_file_damage(file, record) is None


def describe_output(summary: dict[str, Any], account: RecordAccount, output: Path) -> str:
    """Return lines with the output's folders and document counts.

    Args:
        summary: content of summary.json.
        account: result of `account_documents`.
        output: the run's folder.
    """
    names = [entry["name"] for entry in summary["output"]]
    more = f" and {len(names) - MAX_PRINTED_NAMES:,} more" if len(names) > MAX_PRINTED_NAMES else ""
    lines = [f"{output}: complete", f"  {account.num_written:,} documents in {output / TEXT}: "
             f"{', '.join(names[:MAX_PRINTED_NAMES])}{more}", f"  {account.describe()}"]
    if any(source["quarantine"] for source in summary["sources"]):
        lines.append(f"  quarantine: {output / QUARANTINE}")
    return "\n".join([*lines, f"  what each step dropped: sov-data inspect {shlex.quote(str(output))}"])


def account_documents(summary: dict[str, Any]) -> RecordAccount:
    """Balance documents in the sources against output files, drops by steps, and the quarantine."""
    num_read, reasons = 0, Counter[str]()
    for source in summary["sources"]:
        num_read += source["steps"][0]["documents_in"] + sum(source["quarantine"].values())
        for code, number in source["quarantine"].items():
            reasons[f"quarantine: {code}"] += number
        for step in source["steps"]:
            for reason, numbers in step["dropped"].items():
                reasons[f"{step['kind']}: {reason}"] += numbers["documents"]
    return RecordAccount(num_read, sum(entry["num_documents"] for entry in summary["output"]), reasons,
                         "documents")


# The parts of a corpus.


def _publish_text(plan: PipelinePlan, output: Path) -> dict[str, Counter[str]]:
    """Link the output shards to `text/NAME/`; returns name -> numbers of shards, documents and bytes."""
    published: dict[str, Counter[str]] = {}
    with create_folder(output / TEXT) as temporary:
        for source in plan.sources:
            for shard in source.shards:
                for file, num_documents, num_bytes in _list_output_files(source.layers[-1], output, shard):
                    (temporary / file.stem).mkdir(exist_ok=True)
                    sums = published.setdefault(file.stem, Counter())
                    # Hard links take no space, and work files may be deleted.
                    link_or_copy(file, temporary / file.stem / f"{sums['num_shards']:05d}{file.suffix}")
                    sums.update(num_shards=1, num_documents=num_documents, num_bytes=num_bytes)
    return published


def _list_output_files(layer: Layer, output: Path, shard: int) -> list[tuple[Path, int, int]]:
    """Check the seals of a shard's tables and list documents and bytes: no changed file is published."""
    folder, counts_file = layer.get_result_path(output, shard), layer.get_counts_file(output, shard)
    counts = read_sealed_json(counts_file, explain_deletion(counts_file))
    files = []
    for file in sorted(folder.glob("*.parquet")):
        table = open_sealed_parquet(file, explain_deletion(file), is_required=True)
        files.append((file, table.metadata.num_rows, counts["output_bytes"][file.stem]))
    num_rows = sum(num_documents for _, num_documents, _ in files)
    if num_rows != counts["documents_in"]:
        raise UserError(f"{folder}: has {num_rows} documents where {counts_file} says "
                        f"{counts['documents_in']}; {explain_deletion(folder / TEXT)}")
    return files


def _write_quarantine(plan: PipelinePlan, output: Path) -> None:
    with create_folder(output / QUARANTINE) as temporary:
        for source in plan.sources:
            with open(temporary / f"{source.settings.name}.jsonl", "wb") as merged:
                for shard in source.shards:
                    file = source.layers[0].get_quarantine_file(output, shard)
                    merged.writelines(read_sealed_lines(file, explain_deletion(file)))


def build_summary(plan: PipelinePlan, output: Path) -> dict[str, Any]:
    """Return the counts from finished tasks for summary.json, without the keys `output` and `account`."""
    return {"name": plan.pipeline.name,
            "sources": [_summarize_source(plan, source, output) for source in plan.sources]}


def _summarize_source(plan: PipelinePlan, source: SourcePlan, output: Path) -> dict[str, Any]:
    entries = {entry.number: entry for entry in plan.pipeline.steps}
    steps = []
    for layer in source.layers:
        if layer.kind == OUTPUT:
            continue
        files = [layer.get_counts_file(output, shard) for shard in source.shards]
        counts = [read_sealed_json(file, explain_deletion(file)) for file in files if file.is_file()]
        entry = entries.get(layer.number)
        steps.append({"number": layer.number, "kind": layer.kind, "folder": layer.folder,
                      "settings": entry.to_settings() if entry else layer.reasons["settings"],
                      "num_shards_done": len(counts), **DocumentCounts.merge_dicts(counts).to_dict()})
    settings = source.settings
    return {"name": settings.name, "format": settings.format, "path": list(settings.path),
            "kind": settings.kind, "licence": settings.licence, "synthetic": settings.synthetic,
            "priority": settings.priority, "num_shards": len(source.shards), "num_files": source.num_files,
            "raw_bytes": source.raw_bytes, "quarantine": steps[0]["broken"], "steps": steps}


def _write_manifest(plan: PipelinePlan, output: Path, summary: dict[str, Any]) -> None:
    writer = ArtifactWriter(output, CORPUS)
    # Only files of the corpus are in the manifest, so that work files may be deleted.
    writer.excluded_names = EXCLUDED_FOLDERS
    writer.content = {
        "address": plan.address, "name": plan.pipeline.name,
        "sources": [entry["name"] for entry in summary["output"]],
        "num_documents": sum(entry["num_documents"] for entry in summary["output"]),
        "num_bytes": sum(entry["num_bytes"] for entry in summary["output"])}
    writer.settings = {"pipeline": plan.pipeline}
    writer.complete()
