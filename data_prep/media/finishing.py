"""From complete units to the artifact: records in the order of the input, and banks that hold each content
once."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.media.settings import STOP, MediaSettings
from data_prep.media.units import BAD, RECORDS, ROWS, SUMMARY, Unit, bad_medium
from megatron_sov.artifacts import manifest_sha256, new_artifact, read_manifest
from megatron_sov.errors import UserError
from megatron_sov.media.banks import KINDS, MEDIA, BankShape, open_bank
from megatron_sov.media.vocabulary import AUDIO, IMAGE, VIDEO
from megatron_sov.work.parts import part_folder

KIND = "media_corpus"
BAD_MEDIA = "bad_media.jsonl"


@dataclass
class _Joined:
    """The artifact's files as they grow."""

    folder: Path
    banks: dict[str, BankShape]
    out: IO[str]
    bad: IO[str]
    files: dict[str, IO[bytes]]
    stops: bool
    """Whether a bad record, which an earlier command has listed, is an end."""
    rows: dict[str, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    """Bank -> content of a record -> its row."""
    counts: Counter[str] = field(default_factory=Counter)
    num_bad: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)
    codebooks: dict[str, int] = field(default_factory=dict)

    def take(self, unit: Unit, folder: Path) -> None:
        """Append a unit."""
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.counts.update(summary["counts"])
        self.kinds.update(summary["kinds"])
        self.codebooks |= summary["codebooks"]
        with open(folder / BAD, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                row = {"file": str(unit.file), **row, "line": row["line"] + unit.first_line}
                if self.stops:
                    raise bad_medium(unit.file, row["line"], row["medium"], row["reason"])
                self.num_bad[row["code"]] += 1
                self.bad.write(json.dumps(row, ensure_ascii=False) + "\n")
        places = self._banks(folder)
        with open(folder / RECORDS, encoding="utf-8") as f:
            for line in f:
                record = json.loads(line)
                for kind, rows in record[MEDIA].items():
                    record[MEDIA][kind] = [[places[kind][row], used] for row, used in rows]
                self.out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _banks(self, folder: Path) -> dict[str, list[int]]:
        """Append the records that are new; returns the row that each of the unit's records has."""
        keys = json.loads((folder / ROWS).read_text(encoding="utf-8"))
        places: dict[str, list[int]] = {}
        for kind, shape in self.banks.items():
            records: np.ndarray | None = None
            known, places[kind] = self.rows[kind], []
            for number, key in enumerate(keys[kind]):
                if key not in known:
                    records = open_bank(folder / f"{kind}.bin", shape) if records is None else records
                    known[key] = len(known)
                    self.files[kind].write(records[number].tobytes())
                places[kind].append(known[key])
        return places


def finish(settings: MediaSettings, units: list[Unit], identity: str, work: Path, output: Path, *,
           overwrite: bool) -> dict[str, Any]:
    """Write the artifact of units that are all complete; returns the manifest's content.

    Raises:
        UserError: chats and documents are mixed, or nothing is left.
    """
    banks = settings.banks()
    with new_artifact(output, KIND, overwrite=overwrite) as artifact, ExitStack() as stack:
        def opened(name: str, mode: str) -> Any:
            encoding = None if "b" in mode else "utf-8"
            return stack.enter_context(open(artifact.path / name, mode, encoding=encoding))

        joined = _Joined(artifact.path, banks, opened(RECORDS, "w"), opened(BAD_MEDIA, "w"),
                         {kind: opened(f"{kind}.bin", "wb") for kind in banks}, settings.bad_media == STOP)
        for unit in units:
            joined.take(unit, part_folder(work, unit.key(identity)))
        stack.close()
        if len(joined.kinds) > 1:
            raise UserError("--input: holds chats and documents; encode them on their own, as `sov-data "
                            "pack` "
                            "reads one of them at a time")
        if not joined.counts["records"]:
            raise UserError(f"--input: no record is left ({sum(joined.num_bad.values())} are bad: "
                            f"{dict(joined.num_bad)}); mend them")
        for folder in filter(None, (settings.image_tokenizer, settings.audio_tokenizer)):
            artifact.add_input(folder)
        artifact.content = {
            "format": joined.kinds.pop(), "num_records": joined.counts["records"],
            "num_media": {kind: joined.counts[kind] for kind in (IMAGE, AUDIO, VIDEO)},
            "num_bad": dict(sorted(joined.num_bad.items())),
            "codecs": _codecs(settings, joined.codebooks),
            MEDIA: {kind: shape.record() for kind, shape in banks.items()},
            "num_rows": {kind: len(joined.rows[kind]) for kind in banks}}
        artifact.settings = {**vars(settings)}
    return artifact.content


def _codecs(settings: MediaSettings, codebooks: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return kind -> hash and codebook of each codec."""
    found = {}
    for kind, folder in ((IMAGE, settings.image_tokenizer), (AUDIO, settings.audio_tokenizer)):
        if folder is not None:
            found[kind] = {"manifest_sha256": manifest_sha256(folder),
                           "codec": read_manifest(folder).content.get("codec"),
                           "codebook_size": codebooks.get(kind)}
    return found
