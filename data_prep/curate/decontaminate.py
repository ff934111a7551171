"""`sov-data decontaminate`: leave out records with text from benchmarks."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from data_prep.curate.decontamination.step import CONTEXT_CHARS, BenchmarkSearchSettings, find_hits
from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import ArtifactWriter, check_output_folder, create_artifact, format_json
from megatron_sov.base.documents import BadRecord, Document, RecordReading
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import check_lines_files, name_lines
from megatron_sov.base.documents.item_search import ItemSearch
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.records import parse_record
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import DeclaredCommand, Flag

HITS = "hits.json"
"""List of matches; not .jsonl, because `sov-data pack` may read the folder."""


@dataclass(frozen=True, kw_only=True)
class DecontaminateOptions(BenchmarkSearchSettings):
    """Write the records of JSONL files that share no run of ten words, and no short item, with benchmarks.

    Records are text, chats, preferences or prompts. Case, punctuation and markup make no difference.
    hits.json lists excluded records with the matching text."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A file of JSON lines; takes several paths, and may be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the remaining records, and hits.json."""
    format: Literal["text", "chat", "preference", "prompt"] = "text"
    """Kind of record."""
    text_field: Annotated[str, Flag(value="NAME")] = "text"
    """Field with the text."""
    overwrite: bool = False
    """Replace an existing corpus."""


def run_decontaminate(options: DecontaminateOptions) -> None:
    decontaminate_files(options.input, options.output, options,
                        RecordReading(options.format, options.text_field), overwrite=options.overwrite)


DECONTAMINATE = DeclaredCommand(DecontaminateOptions, run_decontaminate)


def decontaminate_files(files: Sequence[Path], output: Path, settings: BenchmarkSearchSettings,
                        reading: RecordReading, *, overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with the unchanged records that match no benchmark.

    Args:
        files: JSONL files, which differ in `name_lines`.
        output: the artifact, with a file for each input.
        settings: benchmarks and limits of the search.
        reading: format of the records.
        overwrite: replace an existing corpus.

    Raises:
        UserError: an unreadable file or an invalid record.
    """
    check_lines_files(files)
    # Checked before the search, which may take hours.
    check_output_folder(output, CORPUS, overwrite)
    search = settings.build_search()
    counts: dict[str, dict[str, int]] = {}
    with create_artifact(output, CORPUS, overwrite=overwrite) as artifact:
        hits: list[dict[str, Any]] = []
        for file in files:
            counts[name_lines(file)] = _write_clean_records(file, artifact, search, reading, hits)
        (artifact.path / HITS).write_text(format_json(hits), encoding="utf-8")
        artifact.content = {"records": counts, "items": len(search.items),
                            "items_too_short": len(search.too_short), "hits": len(hits)}
        artifact.settings = {"benchmarks": settings.benchmarks, "fields": settings.fields,
                             "ngram": settings.ngram, "min_words": settings.min_words,
                             "context_chars": CONTEXT_CHARS, "inputs": files, "reading": reading}
    for name, count in counts.items():
        account = RecordAccount(count["read"], count["kept"], {"text of benchmarks": count["left_out"]})
        print(f"{escape_controls(name)}: {account.describe()}")
    print(f"{output / HITS}: {len(hits)} places with text of benchmarks; {len(search.too_short)} of "
          f"{len(search.items)} items are shorter than {settings.min_words} words and were not looked for")


def _write_clean_records(file: Path, artifact: ArtifactWriter, search: ItemSearch, reading: RecordReading,
                         hits: list[dict[str, Any]]) -> dict[str, int]:
    counts = {"read": 0, "kept": 0, "left_out": 0}
    with open(artifact.path / name_lines(file), "w", encoding="utf-8") as clean:
        for where, record in tqdm(read_records(file), desc=file.name, unit=" records", disable=None):
            counts["read"] += 1
            record_hits = [hit for text in _extract_texts(record, where, reading)
                           for hit in find_hits(text, search, CONTEXT_CHARS)]
            if record_hits:
                counts["left_out"] += 1
            else:
                clean.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts["kept"] += 1
            # Hits in all files stay in memory: few records have any.
            hits += [{"record": where, **asdict(hit)} for hit in record_hits]
    return counts


def _extract_texts(record: dict[str, Any], where: str, reading: RecordReading) -> tuple[str, ...]:
    try:
        document: Document = parse_record(record, where, 0, reading)
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    return document.texts()
