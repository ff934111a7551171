"""`sov-data encode-media`: units are encoded here or by a cluster's array of workers, each with its
share, and joined to an artifact, in the order of the input, with banks that hold each content once.

A unit is some records with their media, encoded into a folder of its own that appears when it is complete.
The folder is named by a hash of the records and of every setting: a command that was killed continues with
the units that are there.  Media themselves are not looked at again: who changes one starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import numpy as np

from data_prep.libraries import find_library_problems
from data_prep.media.encoder import (
    CALL, STOP, TEXT, EncodeMediaOptions, MediaMessage, MediaRecord, MediaRecordEncoder, MediaSettings,
    Medium, MessagePart, UnitBanks, parse_record)
from megatron_sov.base.artifacts import (
    MANIFEST, check_output_folder, create_artifact, format_json, manifest_sha256, read_manifest)
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import CORPUS_RECORDS, MEDIA_CORPUS
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.outputs import check_creatable
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, add_options, read_options, to_problem)
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.banks import BANK_KINDS, BankShape, open_bank
from megatron_sov.omni.media.items import MediaItem, build_drawing_call
from megatron_sov.work.progress.journal import slurm_folder, work_folder
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.progress.resumable import begin_parts, build_part, open_parts, part_folder
from megatron_sov.work.submit.arrays import (
    FINISH_CPUS, SharedWork, check_no_active_jobs, check_restarts, load_array_profile, submit_shares)

RECORDS_PER_UNIT = 128
MOST_LINE_BYTES = 64 << 20
BAD, ROWS, SUMMARY = "bad.jsonl", "rows.json", "unit.json"


# Records as `sov-data pack` reads them: text in which tokens of media stand, and the rows of their banks.


class _Writer:
    """Puts the media of one record in their places."""

    def __init__(self, media: Mapping[MessagePart, Medium], drawn: str) -> None:
        self._media, self._calls, self._numbers = media, drawn == CALL, Counter[str]()
        self.rows: dict[str, list[list[int]]] = {}
        """Bank -> row and used slots of each of its records, in the order of the placeholders."""

    def message(self, message: MediaMessage) -> dict[str, Any]:
        if message.parts is None:
            return message.fields
        if not message.is_drawn:
            return {**message.fields, "content": self.join_parts(message.parts)}
        return self._drawn(message)

    def join_parts(self, parts: tuple[MessagePart, ...]) -> str:
        """Return text and items, each on lines of its own, as the published template joins them."""
        return "\n".join(part.value if part.kind == "text" else self._item(part) for part in parts)

    def _item(self, part: MessagePart) -> str:
        medium = self._media[part]
        if medium.bank:
            # In the order of the placeholders in the text: that is how rows and slots are matched later.
            self.rows.setdefault(medium.bank, []).extend(map(list, medium.rows))
        number = self._numbers[part.kind]
        self._numbers[part.kind] += 1
        name = PurePosixPath(part.value).name
        return MediaItem(part.kind, number, medium.mime_type, name, medium.duration_s, medium.discrete,
                         sum(used for _, used in medium.rows)).format_text()

    def _drawn(self, message: MediaMessage) -> dict[str, Any]:
        """Return what a model says: sounds as discrete blocks in the text, pictures as tool calls or
        likewise."""
        said, calls = [], list(message.fields.get("tool_calls") or [])
        for part in message.parts or ():
            if part.kind == "text":
                said.append(part.value)
                continue
            block = self._media[part].discrete
            if part.kind == VIDEO or not block:
                needed = {IMAGE: "--image-tokenizer", AUDIO: "--audio-tokenizer"}.get(part.kind)
                raise BadRecord("answer", f"has a {part.kind} ({part.value}) in what the assistant says, " + (
                    f"which needs {needed}" if needed else "and a model draws no videos; remove it"))
            if part.kind == IMAGE and self._calls:
                calls.append(build_drawing_call(block))
            else:
                said.append(block)
        return {**message.fields, "content": "\n".join(said), **({"tool_calls": calls} if calls else {})}


def encoded(record: MediaRecord, media: Mapping[MessagePart, Medium], drawn: str = CALL) -> dict[str, Any]:
    """Return a record with text in the place of its media; `drawn` is `MediaSettings.drawn`.

    Raises:
        BadRecord: an assistant's medium has no discrete tokens.
    """
    writer = _Writer(media, drawn)
    if record.kind == TEXT:
        found: dict[str, Any] = {"text": writer.join_parts(record.messages[0].parts or ())}
    else:
        found = {"messages": [writer.message(message) for message in record.messages]}
    rows = {kind: writer.rows[kind] for kind in BANK_KINDS if kind in writer.rows}
    return {**record.fields, **found, FEATURES: rows}


@dataclass(frozen=True)
class MediaUnit:
    """Some lines of a file."""

    file: Path
    start: int
    stop: int
    """The byte behind the last."""
    first_line: int
    """Number of its first line, from 1."""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of each line that is not empty."""
        with open(self.file, "rb") as f:
            f.seek(self.start)
            raw = f.read(self.stop - self.start)
        for number, line in enumerate(raw.split(b"\n"), self.first_line):
            if line.strip():
                yield number, line

    def key(self, identity: str) -> str:
        digest = hashlib.sha256(identity.encode())
        for number, line in self.lines():
            # Relative numbers and lengths: lines that move as a whole keep their unit, lines that merge do
            # not.
            digest.update(f"\n{number - self.first_line} {len(line)} ".encode())
            digest.update(line)
        return digest.hexdigest()


def plan(files: list[Path]) -> Iterator[MediaUnit]:
    """Yield the units of files, in order.

    Raises:
        UserError: a file cannot be read, or has a line that is too long.
    """
    for file in files:
        try:
            with open(file, "rb") as f:
                yield from _of_file(file, f)
        except OSError as e:
            raise UserError(f"--input {file}: cannot be read ({e.strerror or e}); check the path") from None


def _of_file(file: Path, f: Iterator[bytes]) -> Iterator[MediaUnit]:
    start = stop = 0
    first, number = 1, 0
    for number, line in enumerate(f, 1):
        if len(line) > MOST_LINE_BYTES:
            raise UserError(f"{file}:{number}: has {len(line):,} bytes, at most {MOST_LINE_BYTES:,} are "
                            "read; name media by their paths")
        # Bytes, so that a unit can be read without what is before it.
        stop += len(line)
        if number - first + 1 == RECORDS_PER_UNIT:
            yield MediaUnit(file, start, stop, first)
            start, first = stop, number + 1
    if stop > start:
        yield MediaUnit(file, start, stop, first)


class MediaUnitEncoder:
    """Encodes units; one per process, and a context that ends the processes that read."""

    def __init__(self, settings: MediaSettings, work: Path, threads: int) -> None:
        """Take the order; codecs are opened by the first unit that needs them."""
        self._settings, self._work, self._threads = settings, work, threads
        self.identity = settings.identity()
        self._encoder: MediaRecordEncoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._encoder is not None:
            self._encoder.close()

    def is_done(self, unit: MediaUnit) -> bool:
        return (part_folder(self._work, unit.key(self.identity)) / SUMMARY).is_file()

    def encode(self, unit: MediaUnit) -> None:
        """Make a unit, unless it is there.

        Raises:
            UserError: a record or a medium is bad, and that is to stop it; or the disk refuses.
        """
        build_part(self._work, unit.key(self.identity), SUMMARY, partial(self._write, unit))

    def _write(self, unit: MediaUnit, folder: Path) -> None:
        # Codecs load for long: a command that finds all units done opens none.
        if self._encoder is None:
            self._encoder = MediaRecordEncoder(self._settings, self._threads)
        bad: list[dict[str, object]] = []
        records: list[tuple[int, MediaRecord]] = []
        for number, line in unit.lines():
            try:
                records.append((number, parse_record(line)))
            except BadRecord as e:
                self._note(bad, unit, number, "", e)
        files = {kind: folder / f"{kind}.bin" for kind in BANK_KINDS}
        with open(files[PICTURES], "wb") as pictures, open(files[SOUNDS], "wb") as sounds:
            banks = UnitBanks({PICTURES: pictures.write, SOUNDS: sounds.write})
            media = self._encoder.encode([p for _, record in records for p in record.media()], banks)
        good = {part: medium for part, medium in media.items() if not isinstance(medium, BadRecord)}
        counts: Counter[str] = Counter()
        kinds = set()
        with open(folder / CORPUS_RECORDS, "w", encoding="utf-8") as out:
            for number, record in records:
                part = next((p for p in record.media() if p not in good), None)
                try:
                    if part is not None:
                        raise media[part]  # type: ignore[misc]
                    made = encoded(record, good, self._settings.drawn)
                except BadRecord as e:
                    self._note(bad, unit, number, part.value if part else "", e)
                    continue
                out.write(json.dumps(made, ensure_ascii=False) + "\n")
                kinds.add(record.kind)
                counts.update(p.kind for p in record.media())
                counts["records"] += 1
        (folder / BAD).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
        (folder / ROWS).write_text(format_json({kind: banks.keys[kind] for kind in BANK_KINDS}))
        # Last: a folder with a summary is a unit that is done.
        (folder / SUMMARY).write_text(format_json({"counts": counts, "kinds": sorted(kinds),
                                                   "codebooks": self._encoder.codebooks()}))

    def _note(self, bad: list[dict[str, object]], unit: MediaUnit, number: int, medium: str,
              why: BadRecord) -> None:
        if self._settings.bad_media == STOP:
            raise bad_medium(unit.file, number, medium, why.reason)
        # of the unit, for an equal one of another file has its folder too
        bad.append({"line": number - unit.first_line, "medium": medium, "code": why.code,
                    "reason": why.reason})


def bad_medium(file: Path, line: int, medium: str, reason: str) -> UserError:
    named = f" {escape_controls(medium)}" if medium else ""
    return UserError(f"{file}:{line}:{named} {reason} (--bad-media skip lists such records and goes on)")


BAD_MEDIA = "bad_media.jsonl"
MADE_BY = "sov-data encode-media"
SUFFIXES = (".jsonl", ".ndjson")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EncodeMediaOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(EncodeMediaOptions, typed)
    if args.cluster:
        submit(args, 4 if args.workers is None else args.workers)
    else:
        run_here(args)
    return 0


def run_here(asked: EncodeMediaOptions) -> None:
    """Encode what is not encoded, and write the artifact.

    Raises:
        UserError: records, media, settings or the disk are in the way; what is done is kept.
    """
    units = _ready(asked)
    with open_parts(asked.output, MADE_BY):
        check_no_active_jobs(slurm_folder(asked.output))
        _encode(asked, units, shows=True)
        _finish(asked, units)


def submit(asked: EncodeMediaOptions, num_workers: int) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Args:
        asked: what was asked for; its paths are on a disk that all nodes see.
        num_workers: jobs of the array.

    Raises:
        UserError: the profile, what was asked for or the cluster are in the way.
    """
    images, sounds = asked.settings.image_tokenizer, asked.settings.audio_tokenizer
    settings = replace(asked.settings, media_root=asked.settings.media_root.absolute(),
                       image_tokenizer=images and images.absolute(),
                       audio_tokenizer=sounds and sounds.absolute())
    asked = replace(asked, output=asked.output.absolute(), settings=settings,
                    input=tuple(path.absolute() for path in asked.input))
    profile = load_array_profile(asked)
    if (asked.output / MANIFEST).is_file() and not asked.overwrite:
        read_manifest(asked.output, MEDIA_CORPUS)
        print(f"{asked.output}: complete from before")
        return
    units = _ready(asked)
    encoder = MediaUnitEncoder(settings, work_folder(asked.output), asked.threads)
    submit_shares(asked.output, SharedWork(
        "encode", "encode-media", len(units), "units",
        num_done=lambda: sum(map(encoder.is_done, units)), begin=lambda: begin_parts(asked.output, MADE_BY),
        # The number of workers is bound when it is known, the task by the array.
        share=partial(partial, encode_share, asked), finish=partial(finish_run, asked),
        cpus=min(profile.cpus_per_node, asked.threads + 1), gpus=int(settings.device.startswith("cuda")),
        finish_cpus=min(profile.cpus_per_node, FINISH_CPUS)), profile, num_workers)


def encode_share(asked: EncodeMediaOptions, num_workers: int, task: int) -> None:
    """Encode every `num_workers`-th unit, as a job of the array does."""
    check_restarts("sov-data encode-media", "take more --workers")
    # Every n-th, and not the n-th part: neighbours in a file take about as long.
    _encode(asked, list(plan(_files(asked.input)))[task::num_workers], shows=False)


def finish_run(asked: EncodeMediaOptions, task: int) -> None:
    with open_parts(asked.output, MADE_BY):
        _finish(asked, list(plan(_files(asked.input))))


def _files(inputs: tuple[Path, ...]) -> list[Path]:
    """Return the files of records, in order.

    Raises:
        UserError: there are none.
    """
    found: list[Path] = []
    for path in inputs:
        inside = [path] if path.is_file() else sorted(
            p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not inside:
            raise UserError(f"--input {path}: holds no file of records ({' or '.join(SUFFIXES)}); name one")
        found += inside
    return found


def _ready(asked: EncodeMediaOptions) -> list[MediaUnit]:
    """Return the units, with nothing in the way of making them.

    Raises:
        UserError: settings, paths or the output are.
    """
    p = [*map(to_problem, find_library_problems("it", "PIL", "soundfile", "scipy", extra="omni")),
         *(SettingsProblem(ProblemCode.FILE, "--input", "does not exist", path, "check the path")
           for path in asked.input if not path.exists())]
    if not asked.settings.media_root.is_dir():
        p.append(SettingsProblem(ProblemCode.FILE, "--media-root", "is no folder", asked.settings.media_root,
                                 "name the one that paths in the records begin from"))
    if p:
        raise SettingsError("", p)
    check_output_folder(asked.output, MEDIA_CORPUS, asked.overwrite)
    check_creatable(asked.output)
    units = list(plan(_files(asked.input)))
    if not units:
        raise UserError("--input: holds no records; write one JSON object per line")
    return units


def _encode(asked: EncodeMediaOptions, units: list[MediaUnit], *, shows: bool) -> None:
    with (MediaUnitEncoder(asked.settings, work_folder(asked.output), asked.threads) as encoder,
          create_bar("encoding", len(units), "unit", shows) as bar):
        for unit in units:
            encoder.encode(unit)
            bar.update(1)


def _finish(asked: EncodeMediaOptions, units: list[MediaUnit]) -> None:
    """Write the artifact of units that are all complete, and print what it holds.

    Raises:
        UserError: chats and documents are mixed, or nothing is left.
    """
    settings, output = asked.settings, asked.output
    banks, work, identity = settings.banks(), work_folder(output), settings.identity()
    with create_artifact(output, MEDIA_CORPUS, overwrite=asked.overwrite) as artifact, ExitStack() as stack:
        def opened(name: str, mode: str) -> Any:
            encoding = None if "b" in mode else "utf-8"
            return stack.enter_context(open(artifact.path / name, mode, encoding=encoding))

        # Units are joined in the order of the input, however many workers made them.
        joined = _JoinedRecords(banks, opened(CORPUS_RECORDS, "w"), opened(BAD_MEDIA, "w"),
                                {kind: opened(f"{kind}.bin", "wb") for kind in banks},
                                settings.bad_media == STOP)
        for unit in units:
            joined.take(unit, part_folder(work, unit.key(identity)))
        # Files are complete before the manifest hashes them.
        stack.close()
        if len(joined.kinds) > 1:
            raise UserError("--input: holds chats and documents; encode them on their own, as `sov-data "
                            "pack` reads one of them at a time")
        if not joined.counts["records"]:
            raise UserError(f"--input: no record is left ({sum(joined.num_bad.values())} are bad: "
                            f"{dict(joined.num_bad)}); mend them")
        for folder in filter(None, (settings.image_tokenizer, settings.audio_tokenizer)):
            artifact.add_input(folder)
        kind = joined.kinds.pop()
        media = {kind: joined.counts[kind] for kind in (IMAGE, AUDIO, VIDEO)}
        artifact.content = {
            "format": kind, "num_records": joined.counts["records"], "num_media": media,
            "num_bad": dict(sorted(joined.num_bad.items())), "codecs": _codecs(settings, joined.codebooks),
            FEATURES: {kind: shape.to_record() for kind, shape in banks.items()},
            "num_rows": {kind: len(joined.rows[kind]) for kind in banks}}
        artifact.settings = {**vars(settings)}
    print(f"{joined.counts['records']:,} records of kind {kind} with {media[IMAGE]:,} pictures, "
          f"{media[AUDIO]:,} sounds and {media[VIDEO]:,} videos")
    if joined.num_bad:
        listed = ", ".join(f"{count:,} {code}" for code, count in sorted(joined.num_bad.items()))
        print(f"left out: {listed}; see {BAD_MEDIA}")
    print(f"wrote {output}; pack it with `sov-data pack --format {kind} --input {output} ...`")


@dataclass
class _JoinedRecords:
    """The artifact's files as they grow."""

    banks: dict[str, BankShape]
    out: IO[str]
    bad: IO[str]
    files: dict[str, IO[bytes]]
    stops: bool
    """Whether a bad record, which an earlier command has listed, is an end."""
    rows: dict[str, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in BANK_KINDS})
    """Bank -> content of a record -> its row."""
    counts: Counter[str] = field(default_factory=Counter)
    num_bad: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)
    codebooks: dict[str, int] = field(default_factory=dict)

    def take(self, unit: MediaUnit, folder: Path) -> None:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.counts.update(summary["counts"])
        self.kinds.update(summary["kinds"])
        self.codebooks |= summary["codebooks"]
        with open(folder / BAD, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                # Lines are kept relative to the unit, which may also stand in another file.
                row = {"file": str(unit.file), **row, "line": row["line"] + unit.first_line}
                if self.stops:
                    raise bad_medium(unit.file, row["line"], row["medium"], row["reason"])
                self.num_bad[row["code"]] += 1
                self.bad.write(json.dumps(row, ensure_ascii=False) + "\n")
        with open(folder / CORPUS_RECORDS, encoding="utf-8") as f:
            records = list(map(json.loads, f))
        # media of records that were left out are in the unit's banks alone
        named = {kind: sorted({row for record in records for row, _ in record[FEATURES].get(kind, ())})
                 for kind in self.banks}
        places = self._banks(folder, named)
        for record in records:
            for kind, rows in record[FEATURES].items():
                # From rows of the unit's banks to rows of the joined ones.
                record[FEATURES][kind] = [[places[kind][row], used] for row, used in rows]
            self.out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _banks(self, folder: Path, named: dict[str, list[int]]) -> dict[str, dict[int, int]]:
        """Append those of the named rows of the unit's banks that are new; returns the row that each has."""
        keys = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        places: dict[str, dict[int, int]] = {}
        for kind, shape in self.banks.items():
            bank: np.ndarray | None = None
            known, places[kind] = self.rows[kind], {}
            for number in named[kind]:
                if (key := keys[kind][number]) not in known:
                    bank = open_bank(folder / f"{kind}.bin", shape) if bank is None else bank
                    known[key] = len(known)
                    self.files[kind].write(bank[number].tobytes())
                places[kind][number] = known[key]
        return places


def _codecs(settings: MediaSettings, codebooks: dict[str, int]) -> dict[str, dict[str, Any]]:
    found = {}
    for kind, folder in ((IMAGE, settings.image_tokenizer), (AUDIO, settings.audio_tokenizer)):
        if folder is not None:
            found[kind] = {"manifest_sha256": manifest_sha256(folder),
                           "codec": read_manifest(folder).content.get("codec"),
                           "codebook_size": codebooks.get(kind)}
    return found
