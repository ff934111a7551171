"""`sov-data pack`: documents to token shards that Megatron-Core and the trainer read by memory map.

The input is cut into units that worker processes encode (`units`), each kept in a hidden folder beside the
output until the whole is complete; then the units are joined, in the order of the input, into shards per
source and split (`assemble`).  So the bytes depend neither on the number of workers nor on how often the
command was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Lt

from data_prep.shards.assemble import (
    EncodedSource, iter_bad_records, survey_source, write_quarantine, write_shards)
from data_prep.shards.encode import (
    CONFIG_JSON, TOKENIZER_JSON, Encoder, EncodingSettings, explain_foreign, fix_foreign)
from data_prep.shards.token_artifact import (
    CONTENT_VERSION, HELDOUT, KIND, QUARANTINE, TRAIN, HeldoutRule, choose_token_dtype, get_sidecars)
from data_prep.shards.units import SEQUENCES_PER_DOCUMENT, Unit, UnitSettings, encode_units
from data_prep.tags import (
    AssignedTag, add_synthetic_tags, check_tag_sources, find_source_artifact, merge_source_tags, parse_tags)
from megatron_sov.base.artifacts import (
    ArtifactWriter, check_output_folder, create_artifact, read_manifest, sha256_file)
from megatron_sov.base.documents import (
    BadRecord, Document, FileSpan, RecordReading, list_files, plan_units, read_span)
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import CORPUS_RECORDS, JSON_SUFFIX, RECORD_SUFFIXES, find_media_corpus
from megatron_sov.base.documents.layouts import get_completion_field, parse_renames
from megatron_sov.base.documents.reading import TABLE_SUFFIXES, find_unread_fields
from megatron_sov.base.documents.records import find_column_problems
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.base.settings import (
    AtLeastOne, Flag, Fraction, ProblemCode, SettingsError, SettingsProblem, add_options, count_cores,
    find_all_problems, read_options, use_option_names)
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.progress.resumable import open_parts

if TYPE_CHECKING:
    from data_prep.media.packing import MediaCorpora

DESCRIPTION = """Turn text, chats, preferences or prompts into token shards (.bin and .idx in Megatron-Core's
format), with a part of the documents held out. Special tokens that are spelled out in documents stay ordinary
text. A killed command continues where it was when it is run again."""
SAMPLE_SPANS, SAMPLE_CHARS = 16, 32_000
"""Places of each source from which the self-check of the fast encoder takes text, and how much at each."""
NUM_PARTS, MIN_PART_BYTES, MAX_PART_BYTES = 20, 4_000, 20_000
"""A source that is one text becomes about so many documents, within these bounds of their size."""
MAX_BUCKETS = 64
"""Sources that one may be sorted into; each writes files of its own at the same time."""
_NAME = re.compile(r"\w[\w.-]*")


Bos = Literal["none", "start"]
Eod = Literal["append", "none"]
OnBad = Literal["refuse", "quarantine"]


@dataclass(frozen=True)
class PackSource:
    name: str
    """Name in blends, evaluations and folders."""
    path: Path


@dataclass(frozen=True)
class PackSettings:
    """How sources are packed."""

    heldout_share: Fraction = 0.02
    """Expected part of the documents in the split "heldout", in [0, 1)."""
    reading: RecordReading = field(default_factory=lambda: RecordReading("text"))
    """What records hold; its kind is the format."""
    bos: Bos = "none"
    """"start" or "none": whether documents begin with the tokenizer's bos."""
    eod: Eod = "append"
    """"append" or "none": whether documents end with the tokenizer's eos."""
    on_bad: OnBad = "refuse"
    """"refuse": stop at the first bad record; "quarantine": list them and go on."""
    shard_tokens: AtLeastOne = 2_000_000_000
    """Most tokens of one shard."""
    tags: tuple[AssignedTag, ...] = ()
    """Tags of sources beside those that are read from records (`RecordReading.tags`)."""

    def problems(self) -> list[SettingsProblem]:
        p = [SettingsProblem(ProblemCode.BOUND, "columns",
                             said) for said in find_column_problems(self.reading.columns)]
        if self.reading.columns and self.reading.kind == "prompt":
            p.append(SettingsProblem(ProblemCode.RULE, "columns",
                                     "a prompt has no response to which its number "
                                     "could belong; its fields travel in .extra.jsonl as they are",
                                     self.reading.columns[0]))
        if self.reading.by_line and self.reading.kind not in (None, "text"):
            p.append(SettingsProblem(ProblemCode.RULE, "by_line", "is for text, and the format is "
                                     f"{self.reading.kind}; leave it out"))
        if self.reading.renames and self.reading.kind in (None, "text"):
            p.append(SettingsProblem(ProblemCode.RULE, "renames",
                                     "is for chats, preferences and prompts; name the field of a text by "
                                     "--text-field", ",".join(target for target, _ in self.reading.renames)))
        return p


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Turn text, chats, preferences or prompts into token shards."""

    tokenizer: Annotated[Path, Flag(value="DIR")]
    """Tokenizer that `sov-tokenizer train` wrote."""
    input: Annotated[tuple[str, ...], Flag(value="[NAME=]PATH", many=True)]
    """A text, .jsonl, .json, .parquet or .arrow file (text and JSON also .gz and .zst) or a folder of them;
    each is one source, named after the file or folder unless NAME is given; several may follow, and it may
    be repeated."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the token shards."""
    heldout: Annotated[Fraction, Flag(value="SHARE")] = PackSettings.heldout_share
    """Part of the documents kept from training, chosen by a hash of their text."""
    format: Literal["text", "chat", "preference", "prompt"] = "text"
    """What records hold: text; chat: messages; preference: chosen and rejected; prompt: a prompt to respond
    to."""
    text_field: Annotated[str, Flag(value="NAME")] = RecordReading.text_field
    """Field or column that holds the text."""
    lines: bool = False
    """Make each line of a text file a document."""
    renames: Annotated[tuple[str, ...], Flag("--columns", "TARGET=FIELD,...")] = ()
    """Read fields of other names, as prompt=instruction,response=output; FIELD+FIELD joins two by a line
    feed."""
    columns: Annotated[tuple[str, ...], Flag("--column", "NAME")] = ()
    """A field with a number (of a preference, also a list of two: chosen, rejected) that goes with each
    token into the objective; it may be repeated."""
    bucket_by: Annotated[str | None, Flag(value="FIELD")] = None
    """Make each value of this field a source of its own, NAME-VALUE, for a curriculum's blends."""
    tags: Annotated[tuple[str, ...], Flag("--tag", "KEY|[SOURCE:]KEY=VALUE")] = ()
    """Say in the manifest what each source is, for blends: by a field of its records (kind), or by a value
    (ko:kind=ko); it may be repeated."""
    bos: Bos = "none"
    """start: documents begin with bos."""
    eod: Eod = "append"
    """append: documents end with eos; prompts never do."""
    on_bad: OnBad = "refuse"
    """Bad records: stop at the first, or list them in quarantine.jsonl and go on."""
    max_document_bytes: Annotated[AtLeastOne, Lt(1 << 31)] = RecordReading.max_document_bytes
    """A longer record is a bad one."""
    shard_tokens: AtLeastOne = PackSettings.shard_tokens
    """Most tokens of one shard."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Processes that encode; the output does not depend on it (default: this machine's cores)."""
    overwrite: bool = False
    """Replace token shards that are already there."""

    def problems(self) -> list[SettingsProblem]:
        problem = explain_foreign(self.tokenizer) if self.tokenizer.exists() else ""
        return [SettingsProblem(ProblemCode.FILE, "tokenizer", problem, self.tokenizer,
                                fix=fix_foreign(self.tokenizer) or "")] if problem else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add_options(parser, PackOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(PackOptions, typed)
    if args.bucket_by == "":
        raise UserError("--bucket-by '': is no field; name one, or leave it out")
    tag_fields, tags = parse_tags(args.tags)
    reading = RecordReading(args.format, args.text_field, args.max_document_bytes, args.columns,
                            args.bucket_by or "", tag_fields, parse_renames(args.renames), args.lines)
    settings = PackSettings(args.heldout, reading, args.bos, args.eod, args.on_bad, args.shard_tokens, tags)
    pack_sources(args.tokenizer, parse_sources(args.input), args.output, settings, workers=args.workers,
         overwrite=args.overwrite)
    return 0


MAX_CHECKED = 1000
"""Records of a source that the check of a proposed line reads."""


def check_proposal(args: PackOptions) -> None:
    """Check the options and the first records of each source, for proposed lines."""
    tag_fields, _ = parse_tags(args.tags)
    reading = RecordReading(args.format, args.text_field, args.max_document_bytes, args.columns,
                            args.bucket_by or "", tag_fields, parse_renames(args.renames), args.lines)
    for source in parse_sources(args.input):
        units = _units_of(source.path, False)
        items = (item for unit in islice(units, 1) for span in unit for item in read_span(span, reading))
        bad = next((item for item in islice(items, MAX_CHECKED) if isinstance(item, BadRecord)
                    and item.code != "empty"), None)
        if bad is not None and args.on_bad == "refuse":
            fix = Fix(options=("--on-bad", "quarantine")) if bad.code == "json" else None
            line = f":{bad.line}" if bad.line else ""
            raise UserError(f"{source.path}{line}: {bad.reason}", _fix_record(bad, args.format) or fix)


def _fix_record(fault: BadRecord | None, kind: str) -> Fix | None:
    if fault is None or not fault.options:
        return None
    # --columns names fields of records of a format
    return Fix(options=(*(("--format", kind) * (fault.options[0] == "--columns")), *fault.options))


def parse_sources(arguments: Sequence[str]) -> list[PackSource]:
    """Read `[NAME=]PATH` arguments.

    Raises:
        UserError: a name that cannot be a folder's name, or one given twice.
    """
    sources: list[PackSource] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            path = argument
            name = os.path.basename(os.path.realpath(argument))  # which a loop of links does not stop
            if Path(argument).is_file():
                name = name.split(".")[0] if name.endswith((".gz", ".zst")) else Path(name).stem
        if not path:
            raise UserError(f"--input {argument!r}: names no file or folder; write NAME=PATH")
        file, colon, weight = path.rpartition(":")
        if colon and re.fullmatch(r"[0-9.]+", weight) and not Path(path).exists() and Path(file).exists():
            raise UserError(f"--input {argument!r}: packing takes no weight; pack {file}, and pass --data "
                            f"SHARDS:{weight} to the training command")
        if "*" in path and not Path(path).exists():  # a shell passes a pattern on if nothing matches
            raise UserError(f"--input {argument!r}: no file matches it; check the folder")
        if not _NAME.fullmatch(name) or name == "tokenizer":
            raise UserError(f"--input {argument!r}: {name!r} cannot name a source (letters, digits, '.', "
                            f"'_', '-', and not 'tokenizer'); give a name, e.g. --input "
                            f"{shlex.quote(f'web={path}')}")
        if name in (s.name for s in sources):
            raise UserError(f"--input {argument!r}: a source named {name!r} is given already; "
                            f"name them apart, e.g. --input {shlex.quote(f'{name}2={path}')}")
        sources.append(PackSource(name, Path(path)))
    return sources


def pack_sources(tokenizer: Path, sources: list[PackSource], output: Path,
                 settings: PackSettings | None = None, *, workers: int = 1, overwrite: bool = False) -> None:
    """Encode sources with a tokenizer and write an artifact of kind "tokens".

    Args:
        tokenizer: artifact of kind "tokenizer".
        sources: names and paths, each packed on its own.
        output: the new artifact.
        settings: how.
        workers: processes that encode.
        overwrite: replace an artifact that is already there.

    Raises:
        UserError: settings or input that break a rule; no output is written then,
            and what is encoded is kept for the next try.
    """
    settings = settings or PackSettings()
    origins = {source.name: found for source in sources
               if (found := find_source_artifact(source.path)) is not None}
    settings = replace(settings, tags=add_synthetic_tags(settings.tags, settings.reading.tags, origins))
    if problems := find_all_problems(settings):
        raise SettingsError("", use_option_names(problems, heldout_share="--heldout", columns="--column",
                                              renames="--columns", by_line="--lines"))
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    # From here on what is cheap to find out comes before what takes time.
    check_output_folder(output, KIND, overwrite)
    check_tag_sources(settings.tags, [source.name for source in sources])
    corpora = _media_corpora({source.name: source.path for source in sources}, settings.reading.kind)
    settings = replace(settings, reading=replace(settings.reading, media=corpora is not None))
    encoder = _open_encoder(tokenizer, settings, corpora)
    units = [(source, unit) for source in sources
             for unit in _units_of(source.path, settings.heldout_share > 0 and not settings.reading.by_line)]
    _warn_of_unlearned([unit for _, unit in units], settings.reading)
    # Proven on this very input, before any of it is encoded.
    fast, sentence = encoder.prove_fast(sample_texts([unit for _, unit in units], settings.reading))
    unit_settings = UnitSettings(tokenizer, read_manifest(tokenizer).content["tokenizer_sha256"],
                                 sha256_file(tokenizer / CONFIG_JSON), choose_token_dtype(encoder.vocab_size),
                                 settings.reading, replace(encoder.settings, fast=fast))
    with open_parts(output, "sov-data pack") as work:
        encoded = _encode(sources, units, unit_settings, work, workers, settings.on_bad)
        if corpora and encoder.feature_tokens:
            for source in encoded:
                source.banks = corpora.banks(source.name, encoder.feature_tokens)
        with create_artifact(output, KIND, overwrite=overwrite) as artifact:
            rule = HeldoutRule(settings.heldout_share)
            records, accounts = _write(artifact.path, encoded, unit_settings, work, settings, rule)
            artifact.content = {
                "content_version": CONTENT_VERSION, "tokenizer_sha256": unit_settings.tokenizer_sha256,
                "vocab_size": encoder.vocab_size, "eos_id": encoder.eos_id, "eod": settings.eod,
                "bos_id": encoder.bos_id, "dtype": unit_settings.dtype,
                "heldout": rule.to_dict(), "sources": records}
            artifact.settings = {**vars(settings), "encoder": sentence, "inputs": sources}
            carry_tokenizer(artifact, tokenizer)
            for origin in dict.fromkeys([*origins.values(), *(corpora.folders if corpora else ())]):
                artifact.add_input(origin)
    _tell(artifact.content["sources"], accounts, output, settings)


def _media_corpora(sources: Mapping[str, Path], kind: str | None) -> MediaCorpora | None:
    """Return the media corpora among what is packed together; None: it is all text.

    Raises:
        UserError: they cannot be packed so, or the part that packs them is not installed.
    """
    if not any(map(find_media_corpus, sources.values())):
        return None
    from data_prep.media.packing import MediaCorpora

    return MediaCorpora(sources, kind)


def _open_encoder(tokenizer: Path, settings: PackSettings, corpora: MediaCorpora | None) -> Encoder:
    """Return the tokenizer, ready to encode, and warn of a chat template that opens answers oddly."""
    encoder = Encoder(tokenizer, EncodingSettings(settings.bos, settings.eod,
                                                  media=corpora.encoding if corpora else None))
    if corpora:
        corpora.check_tokenizer(tokenizer)
    if settings.reading.kind not in (None, "text") and (sentence := encoder.odd_opening()):
        warn(sentence)
    return encoder


def _units_of(path: Path, cut: bool) -> Iterator[tuple[FileSpan, ...]]:
    """Yield the units of a source; `cut` is whether a text that is all of it becomes several documents, of
    which some can be held out."""
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():  # inside a folder of code it is text
        raise UserError(f"{path}: is a table; save it as Parquet or JSON lines, e.g. pandas.read_csv(FILE)"
                        ".to_json(OUT, orient='records', lines=True), and pass --text-field COLUMN; a copy "
                        "named .txt is packed as one text")
    # Of a media corpus its records alone are read.
    files = list_files(path / CORPUS_RECORDS if path.is_dir() and find_media_corpus(path) else path, print)
    for unit in plan_units(files):
        text = unit[0]
        part_bytes = max(MIN_PART_BYTES, min(MAX_PART_BYTES, text.size_bytes // NUM_PARTS))
        # One text alone would be a single document: nothing of it could be held out.
        if (cut and len(files) == 1 and part_bytes < text.size_bytes == text.document_bytes
                and text.suffix not in RECORD_SUFFIXES | {JSON_SUFFIX}):
            print(f"{path}: is one text; cut at blank lines into documents of at most {part_bytes:,} bytes, "
                  "so that some are held out")
            unit = (replace(text, document_bytes=part_bytes),)
        yield unit


def sample_texts(units: list[Unit], reading: RecordReading) -> list[str]:
    spans = [span for unit in units for span in unit]
    texts = []
    for span in spans[:: max(1, len(spans) // SAMPLE_SPANS)]:
        left = SAMPLE_CHARS
        for item in read_span(span, reading):
            if isinstance(item, Document):
                texts += [text[:left] for text in item.texts()]
                left -= sum(map(len, item.texts()))
            if left <= 0 or not isinstance(item, Document):
                break
    return texts


def _tell_unread(units: list[tuple[PackSource, Unit]], reading: RecordReading) -> None:
    """Say which fields of each source of chats or preferences are not read, by its first record."""
    if reading.kind not in ("chat", "preference"):
        return
    for name, unit in {source.name: unit for source, unit in reversed(units)}.items():
        if names := find_unread_fields(unit[0], reading):
            print(f"{name}: does not read {_first_of(names)} (fields of its first record)")


def _tell_unread_of_messages(encoded: Iterable[EncodedSource]) -> None:
    """Say which fields of messages are not read, and how many messages of each source have them."""
    for source in encoded:
        counts = sum((Counter(record.num_unread) for _, record in source.units), Counter[str]())
        if counts:
            told = _first_of([f"{name} ({count:,})" for name, count in counts.most_common()])
            print(f"{source.name}: does not read {told} (fields of messages, with the number of messages)")


def _first_of(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _warn_of_unlearned(units: list[Unit], reading: RecordReading) -> None:
    """Warn of a completion that is packed beside a prompt, where nothing is learned."""
    for span in (unit[0] for unit in units if reading.kind == "prompt"):
        first = next(iter(read_span(span, reading)), None)
        if isinstance(first, Document) and (name := get_completion_field(json.loads(first.extra))):
            warn(f"{first.where}: has a {name!r}, of which --format prompt learns nothing: it goes along "
                 "as a field beside the prompt; pack it with --format chat to learn it")
            return


def _encode(sources: list[PackSource], units: list[tuple[PackSource, Unit]], settings: UnitSettings,
            work: Path, workers: int, on_bad: str) -> list[EncodedSource]:
    encoded = {source.name: EncodedSource(source.name, settings.reading.kind or "text", source.path,
                                          columns=settings.reading.columns)
               for source in sources}
    kept = 0
    total_bytes = sum(span.size_bytes for _, unit in units for span in unit)
    with create_bar("encoding", total_bytes, "B") as bar:
        records = encode_units([unit for _, unit in units], settings, work, workers)
        for (source, unit), record in zip(units, records, strict=True):
            encoded[source.name].units.append((unit, record))
            bar.update(sum(span.size_bytes for span in unit))
            if not record.encoded_now:
                kept += 1
            if on_bad == "refuse" and set(record.num_bad) - {"empty"}:
                records.close()
                raise _refusal(encoded[source.name], work, settings.dtype, settings.reading)
    _tell_unread(units, settings.reading)
    _tell_unread_of_messages(encoded.values())
    if kept:
        print(f"{kept} of {len(units)} units were complete from before")
    return list(encoded.values())


def _refusal(source: EncodedSource, work: Path, dtype: str, reading: RecordReading) -> UserError:
    row = next(r for r in iter_bad_records(source, work, dtype) if r["code"] != "empty")
    place = row["file"] if row["line"] is None else f"{row['file']}:{row['line']}"
    items = (item for unit, _ in source.units for span in unit for item in read_span(span, reading))
    first = next((item for item in items if isinstance(item, BadRecord) and item.code != "empty"), None)
    fix = _fix_record(first, reading.kind or "text")
    if fix is None and row["code"] == "json":  # the other lines can be packed
        fix = Fix(options=("--on-bad", "quarantine"))
    return UserError(f"{place}: {row['reason']}; or list such records and go on: --on-bad quarantine", fix)


def _write(artifact: Path, encoded: list[EncodedSource], settings: UnitSettings, work: Path,
           pack_settings: PackSettings, rule: HeldoutRule
           ) -> tuple[list[dict[str, Any]], dict[str, RecordAccount]]:
    """Write the shards of all sources; return their records for the manifest, and the account of each."""
    # All sources are surveyed before the first is written: the rule has to know each one's smallest and
    # largest hash.
    for source in encoded:
        left = survey_source(source, work, settings.dtype, rule)
        if source.dropped and pack_settings.on_bad == "refuse":
            raise _refusal(source, work, settings.dtype, settings.reading)
        if source.num_shared_ids:
            print(f"{source.name}: {source.num_shared_ids:,} documents have the id of a document with "
                  "another text in another file, and are kept")
        if not left:
            raise UserError(f"{source.path}: holds no text; pass files with text in them")
    for source in encoded:
        _keep_one_for_training(source, rule)
    _refuse_buckets(encoded, settings.reading.bucket_by)
    records: list[dict[str, Any]] = []
    accounts = {}
    with open(artifact / QUARANTINE, "w", encoding="utf-8") as quarantine:
        for source in encoded:
            written = write_shards(source, work, artifact, settings.dtype, rule, pack_settings.shard_tokens)
            num_bad = write_quarantine(source, work, settings.dtype, quarantine)
            documents = {bucket: sum(split["num_documents"] for split in splits.values()) // source.group
                         for bucket, splits in written.items()}
            accounts[source.name] = account = account_source(source, documents, num_bad)
            for bucket, splits in written.items():
                tags = merge_source_tags(source.name,
                                         [record.tags.get(bucket, {}) for _, record in source.units],
                                   pack_settings.tags)
                record = _record(source, settings, bucket, splits, tags)
                # Records that are set aside belong to no bucket: they are counted with the first.
                is_first = bucket == source.buckets[0]
                num_aside = sum(account.set_aside.values()) if is_first else 0
                record |= {"num_read": documents[bucket] + num_aside, "num_bad": num_bad if is_first else {}}
                records.append(record)
    if not (artifact / QUARANTINE).stat().st_size:
        (artifact / QUARANTINE).unlink()
    return records, accounts


def account_source(source: EncodedSource, documents: Mapping[str, int],
                    num_bad: Mapping[str, int]) -> RecordAccount:
    """Return the account of a source.

    Args:
        source: its units count the records that their readers yield.
        documents: bucket -> documents in its shards.
        num_bad: code -> records in the quarantine.
    """
    return RecordAccount(sum(record.num_read for _, record in source.units), sum(documents.values()),
                         Counter(num_bad))


def _keep_one_for_training(source: EncodedSource, rule: HeldoutRule) -> None:
    """Have a source, or a bucket of it, of which every document would be held out train on one: a few
    documents are no reason to give up the work on all the others."""
    for bucket, largest in source.largest.items():
        if rule.keep_one(largest):
            warn(f"{source.name_of(bucket)}: every document would be held out; one of them is kept for "
                 "training (lower --heldout, or add documents, to choose otherwise)")


def _refuse_buckets(encoded: list[EncodedSource], field_name: str) -> None:
    for source in encoded:
        if len(source.buckets) > MAX_BUCKETS:
            raise UserError(f"{source.path}: field {field_name!r} has {len(source.buckets)} values, "
                            f"--bucket-by makes at most {MAX_BUCKETS} sources; name a field with fewer")
    names = Counter(source.name_of(bucket) for source in encoded for bucket in source.buckets)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise UserError(f"--bucket-by {field_name}: two sources would be named {twice!r}; name them apart "
                        "(--input NAME=PATH)")


def _record(source: EncodedSource, settings: UnitSettings, bucket: str, splits: dict[str, Any],
            tags: dict[str, list[str]]) -> dict[str, Any]:
    return {"name": source.name_of(bucket), "format": source.kind,
            "group_documents": SEQUENCES_PER_DOCUMENT[source.kind],
            "sidecars": list(get_sidecars(source.kind, source.columns, source.banks is not None)),
            **({FEATURES: source.banks.record()} if source.banks else {}),
            # Keys of units hash their input and settings, so their hash identifies the source.
            "input_sha256": hashlib.sha256("".join(r.key for _, r in source.units).encode()).hexdigest(),
            **({"bucket": {"source": source.name, "field": settings.reading.bucket_by, "value": bucket}}
               if bucket else {}), **({"tags": tags} if tags else {}), "splits": splits}


def carry_tokenizer(artifact: ArtifactWriter, tokenizer: Path) -> None:
    """Copy the tokenizer into the artifact, so that later steps need only this folder."""
    (artifact.path / "tokenizer").mkdir()
    for name in (TOKENIZER_JSON, CONFIG_JSON):
        shutil.copyfile(tokenizer / name, artifact.path / "tokenizer" / name)
    artifact.add_input(tokenizer)


def _tell(records: list[dict[str, Any]], accounts: Mapping[str, RecordAccount], output: Path,
          settings: PackSettings) -> None:
    for record in records:
        splits = record["splits"]
        if settings.heldout_share and not splits[HELDOUT]["num_tokens"]:
            way = "Add records, or raise --heldout"
            if settings.reading.kind == "text":
                way = "Pass --lines to make each line a document, or several files"
            warn(f"{record['name']}: has too few documents, so nothing is held out and its loss will not be "
                 f"measured. {way}")
        print(f"{record['name']}: {splits[TRAIN]['num_tokens']:,} tokens to train on, "
              f"{splits[HELDOUT]['num_tokens']:,} held out")
    for name, account in accounts.items():
        print(f"{name}: {account.describe()}")
    if (output / QUARANTINE).exists():
        print(f"bad records: {output / QUARANTINE}")
    print(f"wrote {output}")
