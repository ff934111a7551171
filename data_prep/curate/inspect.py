"""`sov-data inspect`: what an artifact, file of rows or unfinished output is; of token shards their table, of
a pipeline's output what each step kept, changed and dropped, by the counts of its summary.json."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_prep.shards.token_artifact import KIND as TOKENS, format_table
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.figures import format_size
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.runs.inspection import ArtifactKind, InspectionOptions, inspect_path

CORPUS, SUMMARY, PIPELINE = "corpus", "summary.json", "pipeline.json"
MAX_SUMMARY_BYTES = 256 * 2**20
MAX_REASONS = 3
"""Reasons for drops that a line of the table names, most documents first."""
SAMPLE_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class DataInspectOptions(InspectionOptions):
    """Say what something is, from what it was made, and some of its rows."""

    data: Annotated[Path, Flag("PATH")]
    """Any artifact, file of rows, or the --output of a command that was killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("What something is, from what it was made, how far unfinished work on it is, and "
                          "some of its rows. Of what `sov-data run` wrote: documents that each step kept, "
                          "changed and dropped, with reasons, and samples of dropped documents.")
    add_options(parser, DataInspectOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DataInspectOptions, typed)
    kinds = {TOKENS: ArtifactKind(format_table, _token_problems, _token_documents)}
    # `decontaminate`, `difficulty grade` and others write corpora too, without steps.
    if any((args.data / name).exists() for name in (SUMMARY, PIPELINE)):
        kinds[CORPUS] = ArtifactKind(iter_step_lines, find_damaged_files, iter_dropped_samples)
    inspect_path(args.data, args, kinds)
    return 0


def iter_step_lines(output: Path) -> Iterator[str]:
    """Yield a line for each source and step of a pipeline's output, with the most frequent reasons for drops.

    Raises:
        UserError: its summary.json is missing or damaged.
    """
    yield (f"{'source':<16} {'step':<24} {'documents in':>12} {'kept':>12} {'changed':>12} "
           f"{'text kept':>10}  dropped")
    for source, step in _steps(output):
        reasons = Counter({reason: lost["documents"] for reason, lost in step["dropped"].items()})
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(MAX_REASONS))
        if len(reasons) > MAX_REASONS:
            dropped += f", {len(reasons) - MAX_REASONS} more reasons"
        name = f"{step['number']:02d} {step['kind']}"
        yield escape_controls(f"{source:<16} {name:<24} {step['documents_in']:>12,} "
                              f"{step['documents_kept']:>12,} "
                      f"{step['documents_changed']:>12,} {format_size(step['bytes_kept']):>10}  {dropped}"
                      ).rstrip()


def iter_dropped_samples(output: Path, count: int) -> Iterator[str]:
    """Yield up to `count` documents that each step dropped, with the reason and the beginning of their text.

    Raises:
        UserError: its summary.json is missing or damaged.
    """
    for _, step in _steps(output):
        for sample in step["samples"]["dropped"][:count]:
            text = " ".join(sample["before"].split())[:SAMPLE_CHARS]
            yield escape_controls(f"{sample['id']}  {step['kind']}: {sample['reason']}: {text}")


def _steps(output: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (source, counts of a step) in the order of the pipeline's file."""
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
            step["dropped"] = {str(reason): {"documents": int(lost["documents"])}
                               for reason, lost in step["dropped"].items()}
            step["samples"] = {"dropped": [{name: str(sample[name]) for name in ("id", "reason", "before")}
                                           for sample in step["samples"]["dropped"]]}
        return steps
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is missing or damaged ({str(e)[:200]}); run the pipeline again") from None


def _token_problems(data: Path) -> list[str]:
    from data_prep.shards.verify import verify_shards

    return verify_shards(data)[0]


def _token_documents(data: Path, count: int) -> list[str]:
    from data_prep.shards.sample import SampleOptions, sample_documents

    try:
        lines = sample_documents(data, None, "train", count, SampleOptions.max_tokens, 0)
    except UserError as e:  # all are held out, or no tokenizer travels with them
        return [f"no document can be shown: {e}"]
    # `sample` gives three lines for a document: its place, its text, and an empty one.
    return [f"{head} {text}" for head, text in zip(lines[::3], lines[1::3], strict=True)]
