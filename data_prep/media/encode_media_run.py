"""Runs `sov-data encode-media`: encodes units locally or in cluster jobs, and joins them in input order.

A unit holds some records with their media, in a folder that appears when complete. The folder is named by a
hash of records and settings, so after a kill complete units are reused. Media files are not part of the hash:
a changed file needs another output folder.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from data_prep.libraries import find_library_problems
from data_prep.media.encode_media import STOP, EncodeMediaOptions, MediaSettings
from data_prep.media.encoder import MediaRecordEncoder, UnitBanks
from data_prep.media.records import MediaRecord, Medium, MessagePart, format_record, parse_record
from megatron_sov.base.artifacts import (
    MANIFEST, check_output_folder, create_artifact, format_json, manifest_sha256, read_manifest)
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import CORPUS_RECORDS, JSONL_SUFFIXES, MEDIA_CORPUS
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import ProblemCode, SettingsError, SettingsProblem, to_problem
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.banks import BANK_KINDS, BankShape, open_bank
from megatron_sov.work.progress.journal import slurm_folder, work_folder
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.progress.resumable import begin_parts, build_part, open_parts, part_folder
from megatron_sov.work.submit.arrays import (
    FINISH_CPUS, SharedWork, check_no_active_jobs, check_restarts, load_array_profile, submit_shares)

RECORDS_PER_UNIT = 128
MAX_LINE_BYTES = 64 << 20
BAD, ROWS, SUMMARY = "bad.jsonl", "rows.json", "unit.json"
BAD_MEDIA = "bad_media.jsonl"
PROGRAM = "sov-data encode-media"
DEFAULT_WORKERS = 4


def run_encode_media(options: EncodeMediaOptions) -> None:
    """Encode missing units and write the artifact, here or by cluster jobs. Raises `UserError`: records,
    media, settings, the disk or the cluster prevent it; complete units are kept."""
    if options.cluster:
        submit_encoding(options)
        return
    units = _prepare_units(options)
    with open_parts(options.output, PROGRAM):
        check_no_active_jobs(slurm_folder(options.output))
        _encode_units(options, units, shows_bar=True)
        _write_corpus(options, units)


def submit_encoding(options: EncodeMediaOptions) -> None:
    """Submit cluster jobs for missing units, or report the progress of active jobs. Raises `UserError`:
    profile, options or cluster prevent it."""
    settings = options.settings
    images, sounds = settings.image_tokenizer, settings.audio_tokenizer
    settings = replace(settings, media_root=settings.media_root.absolute(),
                       image_tokenizer=images and images.absolute(),
                       audio_tokenizer=sounds and sounds.absolute())
    options = replace(options, output=options.output.absolute(), settings=settings,
                      input=tuple(path.absolute() for path in options.input))
    profile = load_array_profile(options)
    if (options.output / MANIFEST).is_file() and not options.overwrite:
        read_manifest(options.output, MEDIA_CORPUS)
        print(f"{options.output}: complete from before")
        return
    units = _prepare_units(options)
    encoder = MediaUnitEncoder(settings, work_folder(options.output), options.threads)
    submit_shares(options.output, SharedWork(
        "encode", "encode-media", len(units), "units",
        num_done=lambda: sum(map(encoder.is_complete, units)),
        begin=lambda: begin_parts(options.output, PROGRAM),
        # `submit_shares` passes the number of workers, the array job a task number
        share=partial(partial, encode_share, options), finish=partial(finish_run, options),
        cpus=min(profile.cpus_per_node, options.threads + 1), gpus=int(settings.device.startswith("cuda")),
        finish_cpus=min(profile.cpus_per_node, FINISH_CPUS)), profile, options.workers or DEFAULT_WORKERS)


def encode_share(options: EncodeMediaOptions, num_workers: int, task: int) -> None:
    """Encode every `num_workers`-th unit, in an array job."""
    check_restarts(PROGRAM, "take more --workers")
    # interleaved, because adjacent units take similar time
    _encode_units(options, list(plan_media_units(_list_files(options.input)))[task::num_workers],
                  shows_bar=False)


def finish_run(options: EncodeMediaOptions, task: int) -> None:
    with open_parts(options.output, PROGRAM):
        _write_corpus(options, list(plan_media_units(_list_files(options.input))))


def _prepare_units(options: EncodeMediaOptions) -> "list[MediaUnit]":
    """Check options, libraries and output, and return the units. Raises `UserError` with every problem."""
    p = list(map(to_problem, find_library_problems("it", "PIL", "soundfile", "scipy", extra="omni")))
    p += [SettingsProblem(ProblemCode.FILE, "--input", "does not exist", path, "check the path")
          for path in options.input if not path.exists()]
    if not options.settings.media_root.is_dir():
        p.append(SettingsProblem(ProblemCode.FILE, "--media-root", "is no folder",
                                 options.settings.media_root,
                                 "name the one that paths in the records begin from"))
    if p:
        raise SettingsError("", p)
    check_output_folder(options.output, MEDIA_CORPUS, options.overwrite)
    units = list(plan_media_units(_list_files(options.input)))
    if not units:
        raise UserError("--input: holds no records; write one JSON object per line")
    return units


def _list_files(inputs: tuple[Path, ...]) -> list[Path]:
    """Return record files in order; raises `UserError` for an input without."""
    files: list[Path] = []
    for path in inputs:
        found = [path]
        if not path.is_file():
            found = sorted(p for p in path.rglob("*") if p.suffix in JSONL_SUFFIXES and p.is_file())
        if not found:
            endings = " or ".join(sorted(JSONL_SUFFIXES))
            raise UserError(f"--input {path}: holds no file of records ({endings}); name one")
        files += found
    return files


def _encode_units(options: EncodeMediaOptions, units: "list[MediaUnit]", *, shows_bar: bool) -> None:
    with (MediaUnitEncoder(options.settings, work_folder(options.output), options.threads) as encoder,
          create_bar("encoding", len(units), "unit", shows_bar) as bar):
        for unit in units:
            encoder.encode(unit)
            bar.update(1)


@dataclass(frozen=True)
class MediaUnit:
    """Consecutive lines of a file."""

    file: Path
    start: int
    stop: int
    """Byte offset after the last line."""
    first_line: int
    """Counted from 1."""

    def iter_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line number, bytes) for nonempty lines."""
        with open(self.file, "rb") as f:
            f.seek(self.start)
            raw = f.read(self.stop - self.start)
        for number, line in enumerate(raw.split(b"\n"), self.first_line):
            if line.strip():
                yield number, line

    def compute_key(self, identity: str) -> str:
        digest = hashlib.sha256(identity.encode())
        for number, line in self.iter_lines():
            # relative line numbers keep the key of a moved unit; lengths detect merged lines
            digest.update(f"\n{number - self.first_line} {len(line)} ".encode())
            digest.update(line)
        return digest.hexdigest()


def plan_media_units(files: list[Path]) -> Iterator[MediaUnit]:
    """Yield units in order. Raises `UserError`: a file is unreadable, or a line is too long."""
    for file in files:
        try:
            with open(file, "rb") as f:
                yield from _cut_units(file, f)
        except OSError as e:
            raise UserError(f"--input {file}: cannot be read ({e.strerror or e}); check the path") from None


def _cut_units(file: Path, lines: Iterable[bytes]) -> Iterator[MediaUnit]:
    start = stop = 0
    first = 1
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{file}:{number}: has {len(line):,} bytes, at most {MAX_LINE_BYTES:,} are "
                            "read; name media by their paths")
        stop += len(line)
        if number - first + 1 == RECORDS_PER_UNIT:
            yield MediaUnit(file, start, stop, first)
            start, first = stop, number + 1
    if stop > start:
        yield MediaUnit(file, start, stop, first)


class MediaUnitEncoder:
    """Encodes units; one instance per process. The context ends decoder processes."""

    def __init__(self, settings: MediaSettings, work: Path, threads: int) -> None:
        self._settings, self._work, self._threads = settings, work, threads
        self._identity = settings.format_identity()
        self._encoder: MediaRecordEncoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._encoder is not None:
            self._encoder.close()

    def is_complete(self, unit: MediaUnit) -> bool:
        return (part_folder(self._work, unit.compute_key(self._identity)) / SUMMARY).is_file()

    def encode(self, unit: MediaUnit) -> None:
        """Encode a unit unless its folder exists. Raises `UserError`: a record or medium is bad and
        `bad_media` is "stop", or the disk is full."""
        build_part(self._work, unit.compute_key(self._identity), SUMMARY, partial(self._write_unit, unit))

    def _write_unit(self, unit: MediaUnit, folder: Path) -> None:
        if self._encoder is None:  # codecs load slowly: open them for the first incomplete unit
            self._encoder = MediaRecordEncoder(self._settings, self._threads)
        bad: list[dict[str, object]] = []
        records: list[tuple[int, MediaRecord]] = []
        for number, line in unit.iter_lines():
            try:
                records.append((number, parse_record(line)))
            except BadRecord as e:
                self._add_bad(bad, unit, number, "", e)
        files = {kind: folder / f"{kind}.bin" for kind in BANK_KINDS}
        with open(files[PICTURES], "wb") as pictures, open(files[SOUNDS], "wb") as sounds:
            banks = UnitBanks({PICTURES: pictures.write, SOUNDS: sounds.write})
            media = self._encoder.encode([p for _, record in records for p in record.iter_media()], banks)
        counts, kinds = self._write_records(folder / CORPUS_RECORDS, unit, records, media, bad)
        (folder / BAD).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
        (folder / ROWS).write_text(format_json({kind: banks.keys[kind] for kind in BANK_KINDS}))
        # the summary marks a complete unit, so write the file last
        (folder / SUMMARY).write_text(format_json({"counts": counts, "kinds": sorted(kinds),
                                                   "codebooks": self._encoder.get_codebook_sizes()}))

    def _write_records(self, file: Path, unit: MediaUnit, records: list[tuple[int, MediaRecord]],
                       media: dict[MessagePart, Medium | BadRecord],
                       bad: list[dict[str, object]]) -> tuple[Counter[str], set[str]]:
        """Write good records; return counts of records and media, and the record kinds."""
        good = {part: medium for part, medium in media.items() if isinstance(medium, Medium)}
        counts: Counter[str] = Counter()
        kinds = set()
        with open(file, "w", encoding="utf-8") as out:
            for number, record in records:
                bad_part = next((part for part in record.iter_media() if part not in good), None)
                try:
                    if bad_part is not None:
                        raise media[bad_part]  # type: ignore[misc]
                    formatted = format_record(record, good, self._settings.drawn)
                except BadRecord as e:
                    self._add_bad(bad, unit, number, bad_part.value if bad_part else "", e)
                    continue
                out.write(json.dumps(formatted, ensure_ascii=False) + "\n")
                kinds.add(record.kind)
                counts.update(part.kind for part in record.iter_media())
                counts["records"] += 1
        return counts, kinds

    def _add_bad(self, bad: list[dict[str, object]], unit: MediaUnit, number: int, medium: str,
                 error: BadRecord) -> None:
        if self._settings.bad_media == STOP:
            raise _create_bad_error(unit.file, number, medium, error.reason)
        # relative to the unit, because equal units in two files share a folder
        bad.append({"line": number - unit.first_line, "medium": medium, "code": error.code,
                    "reason": error.reason})


def _create_bad_error(file: Path, line: int, medium: str, reason: str) -> UserError:
    medium_text = f" {escape_controls(medium)}" if medium else ""
    return UserError(f"{file}:{line}:{medium_text} {reason} (--bad-media skip lists such records and goes "
                     "on)")


def _write_corpus(options: EncodeMediaOptions, units: list[MediaUnit]) -> None:
    """Join complete units to the artifact, and print its counts. Raises `UserError`: chats and documents are
    mixed, or no record remains."""
    settings, output = options.settings, options.output
    banks, work, identity = settings.get_banks(), work_folder(output), settings.format_identity()
    with create_artifact(output, MEDIA_CORPUS, overwrite=options.overwrite) as artifact:
        with ExitStack() as stack:
            def open_file(name: str, mode: str) -> Any:
                encoding = None if "b" in mode else "utf-8"
                return stack.enter_context(open(artifact.path / name, mode, encoding=encoding))

            joined = _JoinedRecords(banks, open_file(CORPUS_RECORDS, "w"), open_file(BAD_MEDIA, "w"),
                                    {kind: open_file(f"{kind}.bin", "wb") for kind in banks},
                                    settings.bad_media == STOP)
            for unit in units:
                joined.add_unit(unit, part_folder(work, unit.compute_key(identity)))
        if len(joined.kinds) > 1:
            raise UserError("--input: holds chats and documents; encode them on their own, as `sov-data "
                            "pack` reads one of them at a time")
        counts, num_bad = joined.counts, dict(sorted(joined.num_bad.items()))
        if not counts["records"]:
            raise UserError(f"--input: no record is left ({sum(num_bad.values())} are bad: {num_bad}); mend "
                            "them")
        for folder in filter(None, (settings.image_tokenizer, settings.audio_tokenizer)):
            artifact.add_input(folder)
        record_kind = joined.kinds.pop()
        artifact.content = {
            "format": record_kind, "num_records": counts["records"],
            "num_media": {kind: counts[kind] for kind in (IMAGE, AUDIO, VIDEO)},
            "num_bad": num_bad, "codecs": _describe_codecs(settings, joined.codebooks),
            FEATURES: {kind: shape.to_record() for kind, shape in banks.items()},
            "num_rows": {kind: len(joined.rows[kind]) for kind in banks}}
        artifact.settings = vars(settings)
    print(f"{counts['records']:,} records of kind {record_kind} with {counts[IMAGE]:,} pictures, "
          f"{counts[AUDIO]:,} sounds and {counts[VIDEO]:,} videos")
    if num_bad:
        print(f"left out: {', '.join(f'{count:,} {code}' for code, count in num_bad.items())}; see "
              f"{BAD_MEDIA}")
    print(f"wrote {output}; pack it with `sov-data pack --format {record_kind} --input {output} ...`")


@dataclass
class _JoinedRecords:
    """Files of the artifact under construction."""

    banks: dict[str, BankShape]
    out: IO[str]
    bad: IO[str]
    files: dict[str, IO[bytes]]
    stops_at_bad: bool
    """Whether a bad record from an earlier command with `--bad-media skip` is an error."""
    rows: dict[str, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in BANK_KINDS})
    """Bank kind -> content name -> row."""
    counts: Counter[str] = field(default_factory=Counter)
    num_bad: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)
    codebooks: dict[str, int] = field(default_factory=dict)

    def add_unit(self, unit: MediaUnit, folder: Path) -> None:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.counts.update(summary["counts"])
        self.kinds.update(summary["kinds"])
        self.codebooks |= summary["codebooks"]
        with open(folder / BAD, encoding="utf-8") as f:
            for row in map(json.loads, f):
                row = {"file": str(unit.file), **row, "line": row["line"] + unit.first_line}
                if self.stops_at_bad:
                    raise _create_bad_error(unit.file, row["line"], row["medium"], row["reason"])
                self.num_bad[row["code"]] += 1
                self.bad.write(json.dumps(row, ensure_ascii=False) + "\n")
        with open(folder / CORPUS_RECORDS, encoding="utf-8") as f:
            records = list(map(json.loads, f))
        # the unit's banks also hold media from rejected records
        unit_rows = {kind: sorted({row for record in records for row, _ in record[FEATURES].get(kind, ())})
                     for kind in self.banks}
        new_rows = self._append_rows(folder, unit_rows)
        for record in records:
            for kind, rows in record[FEATURES].items():
                record[FEATURES][kind] = [[new_rows[kind][row], used] for row, used in rows]
            self.out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _append_rows(self, folder: Path, unit_rows: dict[str, list[int]]) -> dict[str, dict[int, int]]:
        """Append new contents among a unit's rows; return bank kind -> unit row -> row."""
        keys = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        new_rows: dict[str, dict[int, int]] = {}
        for kind, shape in self.banks.items():
            bank: np.ndarray | None = None
            rows, new_rows[kind] = self.rows[kind], {}
            for unit_row in unit_rows[kind]:
                if (key := keys[kind][unit_row]) not in rows:
                    bank = open_bank(folder / f"{kind}.bin", shape) if bank is None else bank
                    rows[key] = len(rows)
                    self.files[kind].write(bank[unit_row].tobytes())
                new_rows[kind][unit_row] = rows[key]
        return new_rows


def _describe_codecs(settings: MediaSettings, codebooks: dict[str, int]) -> dict[str, dict[str, Any]]:
    codecs = {}
    for kind, folder in ((IMAGE, settings.image_tokenizer), (AUDIO, settings.audio_tokenizer)):
        if folder is not None:
            codecs[kind] = {"manifest_sha256": manifest_sha256(folder),
                            "codec": read_manifest(folder).content.get("codec"),
                            "codebook_size": codebooks.get(kind)}
    return codecs
