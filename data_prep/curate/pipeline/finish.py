"""The end of a run: what its tasks have left in many places becomes one corpus, complete when its manifest
stands."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.curate.pipeline.counts import Counts, noted_seal
from data_prep.curate.pipeline.facts import counted_beside, facts_of_output
from data_prep.curate.pipeline.pipeline_file import named_columns
from data_prep.curate.pipeline.plan import OUTPUT, Layer, PipelinePlan, SourcePlan, link
from data_prep.curate.pipeline.tasks import pass_marks
from data_prep.damaged_files import explain_deletion, get_place_in_run
from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, FileRecord, create_folder, find_file_damage, manifest_sha256, read_manifest,
    translate_disk_errors, write_atomically)
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.sealed import check_seal, open_sealed_parquet, read_sealed_json, read_sealed_lines

MAX_NAMES = 6
"""Names of the output that are told."""
KIND = "corpus"
TEXT, TOKENS, QUARANTINE = "text", "tokens", "quarantine"
SUMMARY, PIPELINE = "summary.json", "pipeline.json"
NOT_THE_CORPUS = frozenset(["shards", "shared", "done", "logs", "plans", "slurm", TOKENS])
"""Folders beside the corpus: what it was made of and with, and what was made of it."""
CLOCKS_DIFFER_S = 60.0
"""A disk's clock and this machine's."""
TAGS = ("kind", "level", "synthetic")
"""Columns that blends choose sources by, whatever the names are made of."""
NAMED_TAGS = ("language",)
"""Columns that become tags where names are made of them, so that a source has one value."""


# What a run ends with, in a sentence: where its output is, or why there is none.


def what_stands(summary: dict[str, Any], output: Path, text: Path, quarantine: Path) -> str:
    """Return where the output of a complete run lies.

    Args:
        summary: the run's.
        output: its folder.
        text: folder with a folder for each name of the output.
        quarantine: folder with a list for each source of what could not be read.
    """
    names = [one["name"] for one in summary["output"]]
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    kept = sum(one["num_documents"] for one in summary["output"])
    account = account_documents(summary)
    lines = [f"{output}: complete",
             f"  {kept:,} documents in {text}: {', '.join(names[:MAX_NAMES])}{more}",
             f"  {account.describe()}"]
    if _broken(summary):
        lines.append(f"  quarantine: {quarantine}")
    return "\n".join([*lines, f"  what each step dropped: sov-data inspect {shlex.quote(str(output))}"])


def account_documents(summary: dict[str, Any]) -> RecordAccount:
    """Return the account of a run's documents: those that its sources read, against those of its output files
    and those that its steps and readers set aside."""
    aside = _broken(summary)
    reasons: Counter[str] = Counter()
    for source in summary["sources"]:
        for step in source["steps"]:
            reasons.update({f"{step['kind']}: {reason}": number["documents"]
                            for reason, number in step["dropped"].items()})
    for (_, code), number in aside.items():
        reasons[f"quarantine: {code}"] += number
    num_read = sum(source["steps"][0]["documents_in"] for source in summary["sources"]) + aside.total()
    return RecordAccount(num_read, sum(one["num_documents"] for one in summary["output"]), reasons,
                         "documents")


def why_empty(summary: dict[str, Any], quarantine: Path) -> str:
    """Return what took most documents, or kept them from being read, and what to do.

    Args:
        summary: the run's.
        quarantine: folder with a list for each source of what could not be read.
    """
    dropped = Counter({f"{step['kind']} ({reason})": number["documents"] for source in summary["sources"]
                       for step in source["steps"] for reason, number in step["dropped"].items()})
    broken = _broken(summary)
    if not dropped and not broken:
        return "the sources' files are empty; name others"
    if dropped.total() >= broken.total():
        return f"most were dropped by {dropped.most_common(1)[0][0]}; change that step"
    (name, code), number = broken.most_common(1)[0]
    listed = quarantine / f"{name}.jsonl"
    with open(listed, encoding="utf-8") as f:
        first = next(record for record in map(json.loads, f) if record["code"] == code)
    return escape_controls(f"most could not be read, as the first of {number:,} {code!r} in {listed}: "
                           f"{first['place']} {first['reason']}")


def _broken(summary: dict[str, Any]) -> Counter[tuple[str, str]]:
    return Counter({(source["name"], code): number for source in summary["sources"]
                    for code, number in source["quarantine"].items()})


def is_complete(plan: PipelinePlan, output: Path) -> bool:
    """Return whether a run's folder holds what a plan would make: also its files, of which those that have
    changed since are read."""
    try:
        manifest = read_manifest(output, KIND)
    except UserError:
        return False
    # Shards of tokens have a manifest of their own and are no part of the corpus.
    packed = plan.pipeline.pack is None or (output / TOKENS / MANIFEST).is_file()
    return (manifest.content.get("address") == plan.address and packed
            and all(_is_as_written(output / name, record, manifest.created_s)
                    for name, record in manifest.files.items()))


def _is_as_written(file: Path, record: FileRecord, created_s: float) -> bool:
    try:
        stat = file.stat()
    except OSError:
        return False
    return stat.st_size == record.size_bytes and (
        # A file whose status is older than the manifest was not touched since: only others are hashed.
        stat.st_ctime < created_s - CLOCKS_DIFFER_S or find_file_damage(file, record) is None)


def finish(plan: PipelinePlan, output: Path, workers: int) -> str:
    """Bring a run whose tasks are all done to its end; returns where its output lies, in lines.

    Raises:
        UserError: nothing is kept, the tokenizer does not fit, or the disk refuses.
    """
    with translate_disk_errors(output):
        # The order matters to a run that is killed: text, lists, summary, shards, and last the manifest,
        # which alone says that the corpus is complete.
        named = _publish_text(plan, output)
        _write_quarantine(plan, output)
        summary = summary_of(plan, output) | {"output": list(_described(output, named))}
        summary["account"] = account_documents(summary).to_dict()
        write_atomically(output / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False))
        if not named:
            raise UserError(f"{output}: no document is kept, so there is no output; "
                            f"{why_empty(summary, output / QUARANTINE)} (all steps: {output / SUMMARY})")
        if plan.pipeline.pack is not None:
            _pack(plan, output, sorted(named), workers)
        _write_manifest(plan, output, summary)
    return what_stands(summary, output, output / TEXT, output / QUARANTINE)


def _publish_text(plan: PipelinePlan, output: Path) -> dict[str, int]:
    named: dict[str, int] = {}
    with create_folder(output / TEXT) as temporary:
        for source in plan.sources:
            for shard in source.shards:
                for file in _output_files(source.layers[-1], output, shard):
                    number = named.setdefault(file.stem, 0)
                    named[file.stem] += 1
                    (temporary / file.stem).mkdir(exist_ok=True)
                    shard_file = temporary / file.stem / f"{number:05d}{file.suffix}"
                    # Hard links: the output takes no room of its own, and work files may be deleted.
                    link(file, shard_file)
                    link(counted_beside(file), counted_beside(shard_file))
    return named


def _output_files(layer: Layer, output: Path, shard: int) -> list[Path]:
    files = sorted(layer.rows(output, shard).glob("*.parquet"))
    # Seals were noted when the shard was written: a file that has changed since is found before it is
    # published.
    num_rows = sum(open_sealed_parquet(file, explain_deletion(file), is_required=True, seal=noted_seal(file)
                                ).metadata.num_rows for file in files)
    for facts in map(counted_beside, files):
        check_seal(facts, explain_deletion(facts), seal=noted_seal(facts))
    counts = layer.counts(output, shard)
    if num_rows != (wanted := read_sealed_json(counts, explain_deletion(counts))["documents_in"]):
        raise UserError(f"{layer.rows(output, shard)}: has {num_rows} documents where {counts} says "
                        f"{wanted}; {explain_deletion(layer.rows(output, shard) / TEXT)}")
    return files


def _write_quarantine(plan: PipelinePlan, output: Path) -> None:
    with create_folder(output / QUARANTINE) as temporary:
        for source in plan.sources:
            with open(temporary / f"{source.settings.name}.jsonl", "wb") as whole:
                for shard in source.shards:
                    file = source.layers[0].broken(output, shard)
                    whole.writelines(read_sealed_lines(file, explain_deletion(file), seal=noted_seal(file)))


def summary_of(plan: PipelinePlan, output: Path) -> dict[str, Any]:
    return {"name": plan.pipeline.name, "sources": [_source_summary(plan, s, output) for s in plan.sources],
            "shared": [{"number": step.entry.number, "kind": step.entry.kind, "folder": folder,
                        "passes": list(_pass_times(pass_marks(output / folder)))}
                       for step in plan.steps for folder in _shared(plan, step.entry.number)]}


def _shared(plan: PipelinePlan, number: int) -> list[str]:
    found = {layer.shared for source in plan.sources for layer in source.layers if layer.number == number}
    return sorted(found - {""})


def _pass_times(done: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted(done.glob("*")):
        times = [read_sealed_json(mark, explain_deletion(mark), get_place_in_run(mark))
                 for mark in sorted(folder.iterdir())
                 if not mark.name.startswith(".")]
        yield {"name": folder.name.partition("-")[2], "num_tasks_done": len(times),
               "cpu_s": sum(one["cpu_s"] for one in times), "wall_s": sum(one["wall_s"] for one in times)}


def _source_summary(plan: PipelinePlan, source: SourcePlan, output: Path) -> dict[str, Any]:
    settings = {entry.number: entry for entry in plan.pipeline.steps}
    steps = []
    for layer in source.layers:
        if layer.kind == OUTPUT:
            continue
        found = [read_sealed_json(file, explain_deletion(file)) for shard in source.shards
                 if (file := layer.counts(output, shard)).is_file()]
        entry = settings.get(layer.number)
        steps.append({"number": layer.number, "kind": layer.kind, "folder": layer.folder,
                      "settings": entry.settings() if entry else layer.reasons["settings"],
                      "num_shards_done": len(found), **Counts.together(found).to_dict()})
    asked = source.settings
    return {"name": asked.name, "format": asked.format, "path": list(asked.path), "kind": asked.kind,
            "licence": asked.licence, "synthetic": asked.synthetic, "priority": asked.priority,
            "num_shards": len(source.shards), "num_files": source.num_files, "raw_bytes": source.raw_bytes,
            "quarantine": steps[0]["broken"], "steps": steps}


def _described(output: Path, named: dict[str, int]) -> Iterator[dict[str, Any]]:
    for name, facts in facts_of_output(output / TEXT).items():
        yield {"name": name, "num_shards": named[name], **facts}


def _pack(plan: PipelinePlan, output: Path, names: list[str], workers: int) -> None:
    asked = plan.pipeline.pack
    assert asked is not None
    tokens, mark = output / TOKENS, output / "done" / f"pack-{plan.address}"
    # Packing may take hours: a run that was killed behind it does not pack again. The mark has the plan's
    # address, so another plan packs again.
    if mark.exists() and (tokens / MANIFEST).is_file():
        return
    # Tags of a packed source need one value for all its documents: names and columns decide which have.
    columns, named = plan.columns(), named_columns(plan.pipeline.output.name)
    tags = tuple(name for name in (*TAGS, *(one for one in NAMED_TAGS if one in named)) if name in columns)
    settings = PackSettings(heldout_share=asked.heldout, bos=asked.bos, eod=asked.eod,
                            shard_tokens=asked.shard_tokens, reading=RecordReading("text", tags=tags))
    pack_sources(asked.tokenizer, [PackSource(name, output / TEXT / name) for name in names], tokens,
                 settings, workers=workers, overwrite=tokens.exists())
    mark.parent.mkdir(exist_ok=True)
    write_atomically(mark, "")


def _write_manifest(plan: PipelinePlan, output: Path, summary: dict[str, Any]) -> None:
    writer = ArtifactWriter(output, KIND)
    # The manifest vouches for the corpus alone, so that work files may be deleted.
    writer.excluded_names = NOT_THE_CORPUS
    writer.content = {
        "address": plan.address, "name": plan.pipeline.name,
        "sources": [one["name"] for one in summary["output"]],
        "num_documents": sum(one["num_documents"] for one in summary["output"]),
        "num_bytes": sum(one["num_bytes"] for one in summary["output"])}
    if plan.pipeline.pack is not None:
        writer.content["tokens_manifest_sha256"] = manifest_sha256(output / TOKENS)
    writer.settings = {"pipeline": plan.pipeline}
    writer.complete()
