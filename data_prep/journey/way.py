"""A document's way through a pipeline: what each step made of it, read from the shard that its id names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.journey.facts import Corpus, StepFolder, batches, damage, open_shard, row_of
from megatron_sov.errors import UserError

_ID = re.compile(r"(.+):(\d{1,9}):([0-9a-f]{16})")
READ, KEPT, CHANGED, DROPPED, NOT_DONE = "read", "kept", "changed", "dropped", "not done"
"""What can become of a document at a step; one that a step passes by is kept."""


@dataclass(frozen=True)
class Stop:
    """One step of a document's way."""

    step: str
    """Number and kind."""
    fate: str
    """One of the words above."""
    reason: str = ""
    """Why it was dropped."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the step says of it."""
    text: str | None = None
    """Its text behind this step where the step changed it."""


@dataclass(frozen=True)
class Way:
    """A document's way."""

    id: str
    base: dict[str, Any]
    """What was read: text, source, where, licence and the other columns of its source."""
    stops: list[Stop]
    """In order, up to the one where it ends."""

    @property
    def end(self) -> Stop:
        """Where it ended."""
        return self.stops[-1]

    @property
    def verdict(self) -> str:
        """One sentence on what became of it."""
        if self.end.fate == DROPPED:
            return f"dropped by {self.end.step}: {self.end.reason}"
        if self.end.fate == NOT_DONE:
            return f"on its way; {self.end.step} is not done yet"
        return f"kept through {len(self.stops) - 1} steps"


def parse_id(text: str) -> tuple[str, int, str]:
    """Return an id's source, shard and place.

    Raises:
        UserError: it is no id.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise UserError(f"--id {text[:80]!r}: is no id (SOURCE:SHARD:16 hexadecimal digits, e.g. "
                        "web:3:0123456789abcdef); --where FILE and --text WORDS find ids")
    return found[1], int(found[2]), found[3]


def follow(corpus: Corpus, document: str) -> Way:
    """Return the way of a document.

    Raises:
        UserError: there is no such document, or a shard on its way is damaged.
    """
    source, number, _ = parse_id(document)
    first, *steps = corpus.steps(source)
    file = first.shard(number)
    if not file.is_file():
        raise UserError(f"--id {document}: {file} is missing; source {source!r} has no shard of this number "
                        f"(of its {len(first.numbers())}), so correct the id or run the pipeline again")
    row = _row(file, document)
    base = {"source": source} | row_of(file, row)
    num_rows = open_shard(file).metadata.num_rows
    stops = [Stop(first.name, READ)]
    for step in steps:
        stops.append(_stop(step, number, row, num_rows))
        if stops[-1].fate in (DROPPED, NOT_DONE):
            break
    return Way(document, base, stops)


def _row(file: Path, document: str) -> int:
    """Return the row of a document in its shard."""
    first = 0
    for batch in batches(file, ("id",)):
        at = pc.index(batch.column(0), pa.scalar(document, batch.schema.field(0).type)).as_py()
        if at >= 0:
            return first + int(at)
        first += batch.num_rows
    raise UserError(f"--id {document}: {file} has no such document among its {first:,}; --where FILE and "
                    "--text WORDS find ids")


def _stop(step: StepFolder, number: int, row: int, num_rows: int) -> Stop:
    """Return what a step made of a row."""
    file = step.shard(number)
    if not file.is_file():
        return Stop(step.name, NOT_DONE)
    check_rows(file, num_rows)
    layer = row_of(file, row)
    reason, text = layer.pop("reason", None), layer.pop("text", None)
    layer.pop("id", None)
    columns = {name: value for name, value in layer.items() if value is not None}
    if reason:
        return Stop(step.name, DROPPED, str(reason), columns)
    return Stop(step.name, KEPT if text is None else CHANGED, "", columns, text)


def check_rows(file: Path, num_rows: int) -> None:
    """Raise `UserError` where a layer has not one row for each row of its base shard."""
    found = open_shard(file).metadata.num_rows
    if found != num_rows:
        raise damage(file, f"{found:,} rows over {num_rows:,} documents")


def fates(steps: Sequence[StepFolder], number: int) -> list[str]:
    """Return one sentence on what became of each document of a shard, in order: "kept", "dropped by 02 rules:
    too short", "on its way; 03 level is not done yet".

    Raises:
        UserError: a shard is missing or damaged.
    """
    first, *later = steps
    num_rows = open_shard(first.shard(number)).metadata.num_rows
    said = ["kept"] * num_rows
    for step in later:
        file = step.shard(number)
        if not file.is_file():
            return [f"on its way; {step.name} is not done yet" if one == "kept" else one for one in said]
        check_rows(file, num_rows)
        row = 0
        for batch in batches(file, ("reason",)):
            for reason in batch.column(0).to_pylist():
                if reason and said[row] == "kept":
                    said[row] = f"dropped by {step.name}: {reason}"
                row += 1
    return said
