"""The first task of a shard: its pieces of raw files become documents with an identifier and columns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.pipeline.addresses import refuse_changed
from data_prep.pipeline.columns import OF_A_RECORD
from data_prep.pipeline.counts import Counts
from data_prep.pipeline.layers import BASE_SCHEMA, GROUP_BYTES, GROUP_ROWS, TableFile
from data_prep.pipeline.pipeline_file import Pipeline
from data_prep.pipeline.plan import Layer, SourcePlan, pieces_of
from data_prep.sources.formats import reader
from data_prep.sources.source import Broken, Raw, SourceSettings
from megatron_sov.documents.visible import visible
from megatron_sov.errors import UserError
from megatron_sov.sealed import PLACE, SEAL, seal_file

MAX_LISTED = 10_000
"""Of what is broken in a shard; more is only counted."""


@contextmanager
def parse_shard(pipeline: Pipeline, source: SourcePlan, layer: Layer, output: Path,
                shard: int) -> Iterator[Counts]:
    """Write a shard's documents; they get their name when the caller is through with the counts.

    Raises:
        UserError: something is broken, and the pipeline says `on_bad: refuse`.
    """
    counts, group = Counts(), _Group(source.settings, shard)
    listed = layer.broken(output, shard)
    listed.parent.mkdir(parents=True, exist_ok=True)
    temporary = listed.with_name(f".{listed.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    source_reader = reader(source.settings)
    try:
        with (TableFile(layer.file(output, shard), BASE_SCHEMA) as file,
              open(temporary, "w", encoding="utf-8") as quarantine):
            pieces, marks = pieces_of(output, layer, shard)
            for piece in pieces:
                for item in source_reader.read(piece):
                    if isinstance(item, Broken):
                        _note_broken(item, pipeline, quarantine, counts, shard)
                        continue
                    counts.count(group.add(item), "", item.text, None)
                    if group.is_full:
                        file.write(group.take())
            file.write(group.take())
            for name, mark in marks.items():
                refuse_changed(source.settings.file(name), mark)
            if (num_more := sum(counts.broken.values()) - MAX_LISTED) > 0:
                quarantine.write(json.dumps({
                    "shard": shard, "file": "", "place": f"shard {shard}", "code": "more", "content": "",
                    "reason": f"{num_more:,} more are counted, and not listed"}) + "\n")
            quarantine.write(json.dumps({SEAL: PLACE}) + "\n")
            quarantine.flush()
            counts.seals = {layer.file(output, shard).name: file.close(), listed.name: seal_file(temporary)}
            os.replace(temporary, listed)
            yield counts
    finally:
        temporary.unlink(missing_ok=True)


def _note_broken(item: Broken, pipeline: Pipeline, quarantine: IO[str], counts: Counts, shard: int) -> None:
    """Count what is broken, and list it unless much is: a source of a wrong format would fill the disk."""
    if pipeline.on_bad == "refuse" and not item.is_left_out:
        raise UserError(f"{item.place}: {item.reason}; mend it, or list such records and go on: "
                        "on_bad: quarantine")
    counts.broken[item.code] = counts.broken.get(item.code, 0) + 1
    if sum(counts.broken.values()) > MAX_LISTED:
        return
    record = {"shard": shard, "file": item.file, "place": item.place, "code": item.code,
              "reason": item.reason, "content": item.content}
    quarantine.write(json.dumps(record) + "\n")


class _Group:
    """Rows of documents that are not yet written."""

    def __init__(self, source: SourceSettings, shard: int) -> None:
        self.source, self.shard = source, shard
        self._columns: dict[str, list[Any]] = {name: [] for name in BASE_SCHEMA.names}
        self._size_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether it has to be written."""
        return self._size_bytes >= GROUP_BYTES or len(self._columns["id"]) >= GROUP_ROWS

    def add(self, raw: Raw) -> str:
        """Take a document; returns its id."""
        place = hashlib.blake2b(raw.place.encode(), digest_size=8).hexdigest()
        identifier = f"{self.source.name}:{self.shard}:{place}"
        given = {name: None if raw.columns.get(name) in (None, "")
                 else visible(_utf8(str(raw.columns[name])))
                 for name in OF_A_RECORD}
        rest = {name: value for name, value in raw.columns.items() if name not in OF_A_RECORD}
        row = {"id": identifier, "text": raw.text, "where": raw.place, "kind": self.source.kind,
               "synthetic": self.source.synthetic, **given,
               "licence": given["licence"] or self.source.licence or None,
               "extra": _utf8(json.dumps(rest, ensure_ascii=False, sort_keys=True, default=str))
               if rest else None}
        for name, values in self._columns.items():
            values.append(row[name])
        self._size_bytes += len(raw.text.encode())
        return identifier

    def take(self) -> dict[str, list[Any]]:
        """Return the rows, and begin anew."""
        taken, self._columns = self._columns, {name: [] for name in BASE_SCHEMA.names}
        self._size_bytes = 0
        return taken


def _utf8(text: str) -> str:
    """Return a string without halves of surrogate pairs, which columns of strangers may hold anywhere."""
    return text.encode("utf-8", "replace").decode()
