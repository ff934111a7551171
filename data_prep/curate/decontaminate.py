"""`sov-data decontaminate`: records of text, chats or prompts without those that hold text of benchmarks."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from data_prep.curate.decontamination.step import CONTEXT_CHARS, BenchmarkSearchSettings, find_hits
from data_prep.json_lines import read_objects
from megatron_sov.base.artifacts import ArtifactWriter, check_output_folder, create_artifact, format_json
from megatron_sov.base.documents import BadRecord, Document, RecordReading
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.item_search import ItemSearch
from megatron_sov.base.documents.records import parse_record
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import Flag, add_options, read_options

DESCRIPTION = """Write the records of JSONL files that share no run of ten words, and no short item, with
benchmarks: text, chats, preferences or prompts. Case, punctuation and markup make no difference. What is left
out is listed with the text around it."""
KIND = "corpus"
HITS = "hits.json"
"""What was found. Not .jsonl: the folder may be packed."""


@dataclass(frozen=True, kw_only=True)
class DecontaminateOptions(BenchmarkSearchSettings):
    """Leave out records that hold text of benchmarks."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A .jsonl file; several may follow, and it may be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the records that are kept, and hits.json."""
    format: Literal["text", "chat", "preference", "prompt"] = "text"
    """What the records hold."""
    text_field: Annotated[str, Flag(value="NAME")] = "text"
    """Field that holds the text."""
    overwrite: bool = False
    """Replace a corpus that is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add_options(parser, DecontaminateOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DecontaminateOptions, typed)
    decontaminate(args.input, args.output, args, RecordReading(args.format, args.text_field),
                  overwrite=args.overwrite)
    return 0


def decontaminate(files: Sequence[Path], output: Path, wanted: BenchmarkSearchSettings,
                  reading: RecordReading, *, overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with the records that hold nothing of benchmarks, as they are.

    Args:
        files: of records, each with a name of its own.
        output: the artifact; has a file for each.
        wanted: what is looked for.
        reading: what the records hold.
        overwrite: replace a corpus that is already there.

    Raises:
        UserError: a file cannot be read, or a record is not as it should be.
    """
    for name, count in Counter(file.name for file in files).items():
        if count > 1:
            raise UserError(f"--input: {count} files are named {name}; give them names of their own, for the "
                            "output has a file for each")
        if not name.endswith(".jsonl"):
            raise UserError(f"--input {name}: is no .jsonl file; `sov-data run` decontaminates other kinds "
                            "of files")
    # Refused before benchmarks are read and documents are searched, which may take hours.
    check_output_folder(output, KIND, overwrite)
    search = wanted.search()
    counts: dict[str, dict[str, int]] = {}
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        hits: list[dict[str, Any]] = []
        for file in files:
            counts[file.name] = _write_kept(file, artifact, search, reading, hits)
        (artifact.path / HITS).write_text(format_json(hits), encoding="utf-8")
        artifact.content = {"records": counts, "items": len(search.items),
                            "items_too_short": len(search.too_short), "hits": len(hits)}
        artifact.settings = {"benchmarks": wanted.benchmarks, "fields": wanted.fields, "ngram": wanted.ngram,
                             "min_words": wanted.min_words, "context_chars": CONTEXT_CHARS,
                             "inputs": files, "reading": reading}
    for name, became in counts.items():
        account = RecordAccount(became["read"], became["kept"], {"text of benchmarks": became["left_out"]})
        print(f"{escape_controls(name)}: {account.describe()}")
    print(f"{output / HITS}: {len(hits)} places with text of benchmarks; {len(search.too_short)} of "
          f"{len(search.items)} items are shorter than {wanted.min_words} words and were not looked for")


def _write_kept(file: Path, artifact: ArtifactWriter, search: ItemSearch, reading: RecordReading,
                hits: list[dict[str, Any]]) -> dict[str, int]:
    counts = {"read": 0, "kept": 0, "left_out": 0}
    with open(artifact.path / file.name, "w", encoding="utf-8") as kept:
        for where, record in tqdm(read_objects(file), desc=file.name, unit=" records", disable=None):
            counts["read"] += 1
            found = [hit for text in _texts(record, where, reading)
                     for hit in find_hits(text, search, CONTEXT_CHARS)]
            if found:
                counts["left_out"] += 1
            else:
                kept.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts["kept"] += 1
            # Hits of all files are in memory at once: few records of honest data have any.
            hits += [{"record": where, **asdict(hit)} for hit in found]
    return counts


def _texts(record: dict[str, Any], where: str, reading: RecordReading) -> tuple[str, ...]:
    try:
        document: Document = parse_record(record, where, 0, reading)
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    return document.texts()
