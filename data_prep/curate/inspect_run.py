"""Run `sov-data inspect`, with displays for token shards and for the summary.json of pipelines."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.curate.inspect import DataInspectOptions
from data_prep.curate.pipeline.finish import PIPELINE, SUMMARY
from data_prep.shards.sample import SampleOptions, sample_documents
from data_prep.shards.token_artifact import KIND as TOKENS, format_table
from data_prep.shards.verify import verify_shards
from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.figures import format_size
from megatron_sov.runs.inspection import ArtifactKind, inspect_path

MAX_SUMMARY_BYTES = 256 * 2**20
MAX_REASONS = 3
"""Reasons for drops in each line, most documents first."""
SAMPLE_CHARS = 100


def inspect_data(options: DataInspectOptions) -> None:
    kinds = {TOKENS: ArtifactKind(format_table, lambda data: verify_shards(data)[0], _decode_documents)}
    # Corpora of `decontaminate` and other commands have no steps.
    if any((options.data / name).exists() for name in (SUMMARY, PIPELINE)):
        kinds[CORPUS] = ArtifactKind(iter_step_lines, find_damaged_files, iter_dropped_samples)
    inspect_path(options.data, options, kinds)


def iter_step_lines(output: Path) -> Iterator[str]:
    """Yield a line for each source and step, with the most frequent reasons for drops; raises `UserError` for
    a damaged summary.json."""
    yield (f"{'source':<16} {'step':<24} {'documents in':>12} {'kept':>12} {'changed':>12} "
           f"{'text kept':>10}  dropped")
    for source, step in _read_steps(output):
        reasons = Counter(step["dropped"])
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(MAX_REASONS))
        if len(reasons) > MAX_REASONS:
            dropped += f", {len(reasons) - MAX_REASONS} more reasons"
        name = f"{step['number']:02d} {step['kind']}"
        line = (f"{source:<16} {name:<24} {step['documents_in']:>12,} {step['documents_kept']:>12,} "
                f"{step['documents_changed']:>12,} {format_size(step['bytes_kept']):>10}  {dropped}")
        yield escape_controls(line).rstrip()


def iter_dropped_samples(output: Path, count: int) -> Iterator[str]:
    """Yield id, reason and first characters of up to `count` dropped documents for each step."""
    for _, step in _read_steps(output):
        for sample in step["samples"]["dropped"][:count]:
            text = " ".join(sample["before"].split())[:SAMPLE_CHARS]
            yield escape_controls(f"{sample['id']}  {step['kind']}: {sample['reason']}: {text}")


def _read_steps(output: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (source name, step) from summary.json; the step's fields that are shown have checked types."""
    file = output / SUMMARY
    try:
        if file.stat().st_size > MAX_SUMMARY_BYTES:
            raise UserError(f"{file}: has {file.stat().st_size:,} bytes, at most {MAX_SUMMARY_BYTES:,} are "
                            "read; run the pipeline again")
        summary = json.loads(file.read_text(encoding="utf-8"))
        steps = [(str(source["name"]), step) for source in summary["sources"] for step in source["steps"]]
        for _, step in steps:
            for name in ("number", "documents_in", "documents_kept", "documents_changed", "bytes_kept"):
                step[name] = int(step[name])
            step["kind"] = str(step["kind"])
            step["dropped"] = {str(reason): int(numbers["documents"])
                               for reason, numbers in step["dropped"].items()}
            for sample in step["samples"]["dropped"]:
                sample |= {name: str(sample[name]) for name in ("id", "reason", "before")}
        return steps
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is missing or damaged ({str(e)[:200]}); run the pipeline again") from None


def _decode_documents(data: Path, count: int) -> list[str]:
    try:
        lines = sample_documents(data, None, "train", count, SampleOptions.max_tokens, seed=0)
    except UserError as e:  # all documents are held out, or the shards have no tokenizer
        return [f"no document can be shown: {e}"]
    # `sample_documents` returns three lines for each document: place, text, empty line.
    return [f"{head} {text}" for head, text in zip(lines[::3], lines[1::3], strict=True)]
