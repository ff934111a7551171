"""Runs `sov-data pack`: encodes documents into token shards, which Megatron-Core and the trainer memory-map.

Worker processes encode units of the input (`units`) into a hidden folder next to the output. Once all units
are complete, they are joined in input order into shards per source and split (`assemble`). So the bytes
depend neither on the number of workers nor on kills.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.shards.assemble import (
    EncodedSource, iter_bad_records, survey_source, write_quarantine, write_shards)
from data_prep.shards.encode import Encoder, EncodingSettings
from data_prep.shards.heldout import HeldoutRule
from data_prep.shards.pack import PackOptions, PackRequest, PackSettings, PackSource, check_pack
from data_prep.shards.token_artifact import HELDOUT, KIND, QUARANTINE, TRAIN, choose_token_dtype, get_sidecars
from data_prep.shards.units import Unit, UnitSettings, delete_empty_units, encode_units
from data_prep.tags import add_synthetic_tags, check_tag_sources, find_source_artifact, merge_source_tags
from megatron_sov.base.artifacts import (
    ArtifactWriter, check_output_folder, create_artifact, read_manifest, sha256_file)
from megatron_sov.base.documents import (
    BadRecord, Document, FileSpan, RecordReading, list_files, plan_units, read_span)
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import CORPUS_RECORDS, JSON_SUFFIX, RECORD_SUFFIXES, find_media_corpus
from megatron_sov.base.documents.layouts import get_completion_field
from megatron_sov.base.documents.reading import TABLE_SUFFIXES, find_unread_fields
from megatron_sov.base.documents.rows import fix_records
from megatron_sov.base.documents.shard_files import CONTENT_VERSION, FEATURES
from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.base.settings import SettingsError, find_all_problems, use_option_names
from megatron_sov.chat.folder import CONFIG_JSON, TOKENIZER_JSON
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.progress.resumable import open_parts

if TYPE_CHECKING:
    from data_prep.media.packing import MediaCorpora

SAMPLE_SPANS, SAMPLE_CHARS = 16, 32_000
"""Spans and characters per span for the fast encoder's self-check."""
NUM_PARTS, MIN_PART_BYTES, MAX_PART_BYTES = 20, 4_000, 20_000
"""A source with a single text is cut into about `NUM_PARTS` documents within these sizes."""
MAX_BUCKETS = 64
"""Maximum buckets per source: each bucket keeps files open at the same time."""
MAX_CHECKED = 1000
"""Records per source that `check_proposal` reads."""


@dataclass(frozen=True)
class _PackJob:
    """State shared by the steps of `pack_sources`."""

    settings: PackSettings
    unit_settings: UnitSettings
    work: Path
    """Folder for units."""
    rule: HeldoutRule

    @property
    def dtype(self) -> str:
        return self.unit_settings.dtype


def run_pack(request: PackRequest) -> None:
    options = request.options
    pack_sources(options.tokenizer, request.sources, options.output, request.settings,
                 workers=options.workers, overwrite=options.overwrite)


def pack_sources(tokenizer: Path, sources: list[PackSource], output: Path,
                 settings: PackSettings | None = None, *, workers: int = 1, overwrite: bool = False) -> None:
    """Encode sources and write an artifact of kind "tokens".

    Args:
        tokenizer: artifact of kind "tokenizer".
        sources: inputs, each packed separately.
        output: folder for the artifact.
        settings: record layout, held-out share, ends, shard size.
        workers: processes that encode.
        overwrite: replace an existing artifact.

    Raises:
        UserError: settings or input break a rule. No output is written, and encoded units are kept for the
            next attempt.
    """
    settings = settings or PackSettings()
    origins = {source.name: folder for source in sources
               if (folder := find_source_artifact(source.path)) is not None}
    settings = replace(settings, tags=add_synthetic_tags(settings.tags, settings.reading.tags, origins))
    if problems := find_all_problems(settings):
        raise SettingsError("", use_option_names(problems, heldout_share="--heldout", columns="--column",
                                                 renames="--columns", by_line="--lines"))
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    # fast checks precede slow checks
    check_output_folder(output, KIND, overwrite)
    check_tag_sources(settings.tags, [source.name for source in sources])
    corpora = _open_media_corpora({source.name: source.path for source in sources}, settings.reading.kind)
    settings = replace(settings, reading=replace(settings.reading, media=corpora is not None))
    encoder = _open_encoder(tokenizer, settings, corpora)
    can_cut = settings.heldout_share > 0 and not settings.reading.by_line
    units = [(source, unit) for source in sources for unit in _plan_source(source.path, can_cut)]
    _warn_of_completions([unit for _, unit in units], settings.reading)
    fast, sentence = encoder.prove_fast(_sample_texts([unit for _, unit in units], settings.reading))
    unit_settings = UnitSettings(tokenizer, read_manifest(tokenizer).content["tokenizer_sha256"],
                                 sha256_file(tokenizer / CONFIG_JSON), choose_token_dtype(encoder.vocab_size),
                                 settings.reading, replace(encoder.settings, fast=fast))
    with open_parts(output, "sov-data pack") as work:
        job = _PackJob(settings, unit_settings, work, HeldoutRule(settings.heldout_share))
        encoded = _encode_sources(job, sources, units, workers)
        if corpora and encoder.feature_tokens:
            for source in encoded:
                source.banks = corpora.get_banks(source.name, encoder.feature_tokens)
        with create_artifact(output, KIND, overwrite=overwrite) as artifact:
            records, accounts = _write_sources(job, encoded, artifact.path)
            artifact.content = {
                "content_version": CONTENT_VERSION, "tokenizer_sha256": unit_settings.tokenizer_sha256,
                "vocab_size": encoder.vocab_size, "eos_id": encoder.eos_id, "eod": settings.eod,
                "bos_id": encoder.bos_id, "dtype": unit_settings.dtype,
                "heldout": job.rule.to_dict(), "sources": records}
            artifact.settings = {**vars(settings), "encoder": sentence, "inputs": sources}
            copy_tokenizer(artifact, tokenizer)
            for origin in dict.fromkeys([*origins.values(), *(corpora.folders if corpora else ())]):
                artifact.add_input(origin)
    _report_result(records, accounts, output, settings)


def check_proposal(options: PackOptions) -> None:
    """Check the first records of each source, for proposed command lines."""
    request = check_pack(options)
    reading = request.settings.reading
    for source in request.sources:
        units = islice(_plan_source(source.path, False), 1)
        items = (item for unit in units for span in unit for item in read_span(span, reading))
        bad = next((item for item in islice(items, MAX_CHECKED)
                    if isinstance(item, BadRecord) and item.code != "empty"), None)
        if bad is not None and options.on_bad == "refuse":
            line = f":{bad.line}" if bad.line else ""
            raise UserError(f"{source.path}{line}: {bad.reason}",
                            _choose_fix(bad, source.path, options.format))


def _choose_fix(bad: BadRecord, path: Path, kind: str) -> Fix | None:
    """Return the options or the commands with which the file or folder `path` can be packed as `kind`."""
    if bad.options:
        # --columns needs the format to rename fields
        format_options = ("--format", kind) if bad.options[0] == "--columns" else ()
        return Fix(options=(*format_options, *bad.options))
    if path.is_file() and (fix := fix_records(path, bad.reason)):
        return fix
    # the other lines can be packed
    return Fix(options=("--on-bad", "quarantine")) if bad.code in ("json", "duplicate_id") else None


def _open_media_corpora(sources: Mapping[str, Path], kind: str | None) -> "MediaCorpora | None":
    """Return the media corpora among the sources; None: all sources are text. Raises `UserError`: the corpora
    cannot be packed together, or omni libraries are missing."""
    if not any(map(find_media_corpus, sources.values())):
        return None
    from data_prep.media.packing import MediaCorpora  # packing text must not import `megatron_sov.omni`

    return MediaCorpora(sources, kind)


def _open_encoder(tokenizer: Path, settings: PackSettings, corpora: "MediaCorpora | None") -> Encoder:
    """Load the tokenizer, and warn if its chat template opens answers oddly."""
    encoder = Encoder(tokenizer, EncodingSettings(settings.bos, settings.eod,
                                                  media=corpora.encoding if corpora else None))
    if corpora:
        corpora.check_tokenizer(tokenizer)
    if settings.reading.kind not in (None, "text") and (sentence := encoder.odd_opening()):
        warn(sentence)
    return encoder


def _plan_source(path: Path, can_cut: bool) -> Iterator[Unit]:
    """Yield a source's units; `can_cut`: cut its only text into documents, so that some are held out."""
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():  # inside a code folder, tables are text
        raise UserError(f"{path}: is a table; save it as Parquet or JSON lines, e.g. pandas.read_csv(FILE)"
                        ".to_json(OUT, orient='records', lines=True), and pass --text-field COLUMN; a copy "
                        "named .txt is packed as one text")
    files = list_files(path / CORPUS_RECORDS if path.is_dir() and find_media_corpus(path) else path, print)
    for unit in plan_units(files):
        text = unit[0]
        part_bytes = max(MIN_PART_BYTES, min(MAX_PART_BYTES, text.size_bytes // NUM_PARTS))
        if can_cut and len(files) == 1 and part_bytes < text.size_bytes and _is_whole_text(text):
            print(f"{path}: is one text; cut at blank lines into documents of at most {part_bytes:,} bytes, "
                  "so that some are held out")
            unit = (replace(text, document_bytes=part_bytes),)
        yield unit


def _is_whole_text(span: FileSpan) -> bool:
    return span.size_bytes == span.document_bytes and span.suffix not in RECORD_SUFFIXES | {JSON_SUFFIX}


def _sample_texts(units: list[Unit], reading: RecordReading) -> list[str]:
    spans = [span for unit in units for span in unit]
    texts = []
    for span in spans[:: max(1, len(spans) // SAMPLE_SPANS)]:
        remaining_chars = SAMPLE_CHARS
        for item in read_span(span, reading):
            if not isinstance(item, Document):
                break
            texts += [text[:remaining_chars] for text in item.texts()]
            remaining_chars -= sum(map(len, item.texts()))
            if remaining_chars <= 0:
                break
    return texts


def _warn_of_completions(units: list[Unit], reading: RecordReading) -> None:
    """Warn of a completion in the first record for `--format prompt`, which learns no completion."""
    if reading.kind != "prompt":
        return
    for unit in units:
        first = next(iter(read_span(unit[0], reading)), None)
        if isinstance(first, Document) and (name := get_completion_field(json.loads(first.extra))):
            warn(f"{first.where}: has a {name!r}, of which --format prompt learns nothing: it goes along "
                 "as a field beside the prompt; pack it with --format chat to learn it")
            return


def _encode_sources(job: _PackJob, sources: list[PackSource], units: list[tuple[PackSource, Unit]],
                    workers: int) -> list[EncodedSource]:
    reading = job.settings.reading
    encoded = {source.name: EncodedSource(source.name, reading.kind or "text", source.path,
                                          columns=reading.columns) for source in sources}
    num_reused = 0
    total_bytes = sum(span.size_bytes for _, unit in units for span in unit)
    with create_bar("encoding", total_bytes, "B") as bar:
        records = encode_units([unit for _, unit in units], job.unit_settings, job.work, workers)
        for (source, unit), record in zip(units, records, strict=True):
            encoded[source.name].units.append((unit, record))
            bar.update(sum(span.size_bytes for span in unit))
            if not record.encoded_now:
                num_reused += 1
            if job.settings.on_bad == "refuse" and set(record.num_bad) - {"empty"}:
                records.close()
                error = _create_record_error(job, encoded[source.name])
                delete_empty_units(job.work)
                raise error
    _report_unread_fields(units, reading)
    _report_unread_message_fields(encoded.values())
    if num_reused:
        print(f"{num_reused} of {len(units)} units were complete from before")
    return list(encoded.values())


def _create_record_error(job: _PackJob, source: EncodedSource) -> UserError:
    """Return the error for a source's first bad record."""
    reading = job.settings.reading
    row = next(r for r in iter_bad_records(source, job.work, job.dtype) if r["code"] != "empty")
    place = row["file"] if row["line"] is None else f"{row['file']}:{row['line']}"
    items = (item for unit, _ in source.units for span in unit if str(span.file) == row["file"]
             for item in read_span(span, reading))
    # the record again, for its `options`; reading finds neither repeated ids nor faults of encoding
    bad = next((item for item in items if isinstance(item, BadRecord) and item.reason == row["reason"]),
               BadRecord(row["code"], row["reason"]))
    return UserError(f"{place}: {row['reason']}; or list such records and go on: --on-bad quarantine",
                     _choose_fix(bad, Path(row["file"]), reading.kind or "text"))


def _report_unread_fields(units: list[tuple[PackSource, Unit]], reading: RecordReading) -> None:
    """Print unread fields in each source's first record, for chats and preferences."""
    if reading.kind not in ("chat", "preference"):
        return
    for name, unit in {source.name: unit for source, unit in reversed(units)}.items():
        if names := find_unread_fields(unit[0], reading):
            print(f"{name}: does not read {_shorten_list(names)} (fields of its first record)")


def _report_unread_message_fields(encoded: Iterable[EncodedSource]) -> None:
    for source in encoded:
        counts: Counter[str] = Counter()
        for _, record in source.units:
            counts.update(record.num_unread)
        if counts:
            names = _shorten_list([f"{name} ({count:,})" for name, count in counts.most_common()])
            print(f"{source.name}: does not read {names} (fields of messages, with the number of messages)")


def _shorten_list(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _write_sources(job: _PackJob, encoded: list[EncodedSource], artifact: Path
                   ) -> tuple[list[dict[str, Any]], dict[str, RecordAccount]]:
    """Write all shards; return source records for the manifest, and an account per source."""
    _survey_sources(job, encoded)
    records: list[dict[str, Any]] = []
    accounts = {}
    with open(artifact / QUARANTINE, "w", encoding="utf-8") as quarantine:
        for source in encoded:
            written = write_shards(source, job.work, artifact, job.dtype, job.rule, job.settings.shard_tokens)
            num_bad = write_quarantine(source, job.work, job.dtype, quarantine)
            documents = {}
            for bucket, splits in written.items():
                num_sequences = sum(split["num_documents"] for split in splits.values())
                documents[bucket] = num_sequences // source.group
            accounts[source.name] = account = account_source(source, documents, num_bad)
            for bucket, splits in written.items():
                unit_tags = [record.tags.get(bucket, {}) for _, record in source.units]
                tags = merge_source_tags(source.name, unit_tags, job.settings.tags)
                record = _build_source_record(job, source, bucket, splits, tags)
                # bad records have no bucket: count with the first
                is_first = bucket == source.buckets[0]
                num_aside = sum(account.set_aside.values()) if is_first else 0
                record |= {"num_read": documents[bucket] + num_aside, "num_bad": num_bad if is_first else {}}
                records.append(record)
    if not (artifact / QUARANTINE).stat().st_size:
        (artifact / QUARANTINE).unlink()
    return records, accounts


def _survey_sources(job: _PackJob, encoded: list[EncodedSource]) -> None:
    """Drop repeated documents and complete the held-out rule, which needs all sources before writing."""
    for source in encoded:
        num_documents = survey_source(source, job.work, job.dtype, job.rule)
        if source.dropped and job.settings.on_bad == "refuse":
            raise _create_record_error(job, source)
        if source.num_shared_ids:
            print(f"{source.name}: {source.num_shared_ids:,} documents have the id of a document with "
                  "another text in another file, and are kept")
        if not num_documents:
            raise UserError(f"{source.path}: holds no text; pass files with text in them")
    for source in encoded:
        for bucket, largest in source.largest.items():
            if job.rule.keep_for_training(largest):
                warn(f"{source.get_bucket_name(bucket)}: every document would be held out; one of them is "
                     "kept for training (lower --heldout, or add documents, to choose otherwise)")
    _check_buckets(encoded, job.settings.reading.bucket_by)


def account_source(source: EncodedSource, documents: Mapping[str, int],
                   num_bad: Mapping[str, int]) -> RecordAccount:
    """Return a source's account. `documents`: bucket -> documents in shards; `num_bad`: code -> records in
    the quarantine."""
    return RecordAccount(sum(record.num_read for _, record in source.units), sum(documents.values()),
                         Counter(num_bad))


def _check_buckets(encoded: list[EncodedSource], field_name: str) -> None:
    for source in encoded:
        if len(source.buckets) > MAX_BUCKETS:
            raise UserError(f"{source.path}: field {field_name!r} has {len(source.buckets)} values, "
                            f"--bucket-by makes at most {MAX_BUCKETS} sources; name a field with fewer")
    names = Counter(source.get_bucket_name(bucket) for source in encoded for bucket in source.buckets)
    if name := next((name for name, count in names.items() if count > 1), None):
        raise UserError(f"--bucket-by {field_name}: two sources would be named {name!r}; name them apart "
                        "(--input NAME=PATH)")


def _build_source_record(job: _PackJob, source: EncodedSource, bucket: str, splits: dict[str, Any],
                         tags: dict[str, list[str]]) -> dict[str, Any]:
    # unit keys hash input and settings, so a hash over keys identifies the source
    keys = "".join(record.key for _, record in source.units)
    record: dict[str, Any] = {
        "name": source.get_bucket_name(bucket), "format": source.kind, "group_documents": source.group,
        "sidecars": list(get_sidecars(source.kind, source.columns, source.banks is not None))}
    if source.banks:
        record[FEATURES] = source.banks.to_record()
    record["input_sha256"] = hashlib.sha256(keys.encode()).hexdigest()
    if bucket:
        record["bucket"] = {"source": source.name, "field": job.settings.reading.bucket_by, "value": bucket}
    if tags:
        record["tags"] = tags
    return record | {"splits": splits}


def copy_tokenizer(artifact: ArtifactWriter, tokenizer: Path) -> None:
    """Copy the tokenizer into the artifact, which makes the artifact self-contained."""
    (artifact.path / "tokenizer").mkdir()
    for name in (TOKENIZER_JSON, CONFIG_JSON):
        shutil.copyfile(tokenizer / name, artifact.path / "tokenizer" / name)
    artifact.add_input(tokenizer)


def _report_result(records: list[dict[str, Any]], accounts: Mapping[str, RecordAccount], output: Path,
                   settings: PackSettings) -> None:
    for record in records:
        splits = record["splits"]
        if settings.heldout_share and not splits[HELDOUT]["num_tokens"]:
            remedy = "Add records, or raise --heldout"
            if settings.reading.kind == "text":
                remedy = "Pass --lines to make each line a document, or several files"
            warn(f"{record['name']}: has too few documents, so nothing is held out and its loss will not be "
                 f"measured. {remedy}")
        print(f"{record['name']}: {splits[TRAIN]['num_tokens']:,} tokens to train on, "
              f"{splits[HELDOUT]['num_tokens']:,} held out")
    for name, account in accounts.items():
        print(f"{name}: {account.describe()}")
    if (output / QUARANTINE).exists():
        print(f"bad records: {output / QUARANTINE}")
    print(f"wrote {output}")
