"""Units of work: some records with their media, encoded into a folder of its own that appears when it is
complete.

A unit's folder is named by a hash of its records and of every setting.  A command that was killed
continues with the units that are there.  Media themselves are not looked at again: who changes one starts
anew.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_prep.media.encoder import (
    CALL, STOP, TEXT, MediaMessage, MediaRecord, MediaRecordEncoder, MediaSettings, Medium, MessagePart,
    UnitBanks, parse_record)
from megatron_sov.base.artifacts import to_json
from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE, VIDEO
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import CORPUS_RECORDS
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError, visible
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.banks import KINDS
from megatron_sov.omni.media.items import MediaItem, drawing_call
from megatron_sov.work.progress.resumable import make_part, part_folder

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
                         sum(used for _, used in medium.rows)).text()

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
                calls.append(drawing_call(block))
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
    rows = {kind: writer.rows[kind] for kind in KINDS if kind in writer.rows}
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
        make_part(self._work, unit.key(self.identity), SUMMARY, partial(self._write, unit))

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
        files = {kind: folder / f"{kind}.bin" for kind in KINDS}
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
        (folder / ROWS).write_text(to_json({kind: banks.keys[kind] for kind in KINDS}))
        # Last: a folder with a summary is a unit that is done.
        (folder / SUMMARY).write_text(to_json({"counts": counts, "kinds": sorted(kinds),
                                               "codebooks": self._encoder.codebooks()}))

    def _note(self, bad: list[dict[str, object]], unit: MediaUnit, number: int, medium: str,
              why: BadRecord) -> None:
        if self._settings.bad_media == STOP:
            raise bad_medium(unit.file, number, medium, why.reason)
        # of the unit, for an equal one of another file has its folder too
        bad.append({"line": number - unit.first_line, "medium": medium, "code": why.code,
                    "reason": why.reason})


def bad_medium(file: Path, line: int, medium: str, reason: str) -> UserError:
    named = f" {visible(medium)}" if medium else ""
    return UserError(f"{file}:{line}:{named} {reason} (--bad-media skip lists such records and goes on)")
