"""What a run has made so far: its record, and the samples of the items that are done, with their verdicts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from data_prep.synth.generator import Kind, Verdict
from megatron_sov.documents.strict_json import finite, no_constant
from megatron_sov.errors import UserError, first_line

RUN, CANDIDATES, PARTS = "run.json", "candidates", "part-*.jsonl"
_NUMBER = re.compile(rb'\{"number": ?(\d{1,18}),')
"""What a line begins with: the place of its item in the input."""
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class RunRecord:
    """What made the samples of a folder."""

    generator: str
    """Name on the command line."""
    version: int
    """Of the generator."""
    kind: Kind
    """Form of its records, unless a sample says otherwise."""
    model: str
    """Of the writer, as its endpoint calls it."""
    judge: str = ""
    """Of the judge; empty: none of its own."""
    templates: Mapping[str, int] = field(default_factory=dict)
    """Name -> version."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the generator, defaults filled in."""
    inputs: tuple[str, ...] = ()
    """Files and folders that items were made from."""
    input_price: Price = 0.0
    """Of a million tokens that the writer reads; 0: not stated."""
    output_price: Price = 0.0
    """Of a million tokens that it writes; 0: not stated."""


@dataclass(frozen=True)
class Candidate:
    """One sample of a finished item."""

    id: str
    """ITEM/NUMBER, the number counted from 0 among the samples of its item."""
    item: str
    """Id of its item."""
    source: str
    """Where the item comes from."""
    licence: str
    """Of what it was made from; empty: not stated."""
    kind: Kind
    """Form of its record."""
    record: Mapping[str, Any]
    """As the generator made it."""
    verdicts: tuple[Verdict, ...]
    """Of the generator's own checks."""
    group: str = ""
    """What it shares with others of its item."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures that are not for training."""
    asked: tuple[str, ...] = ()
    """Hashes of what models were asked for it."""

    @property
    def failed(self) -> Verdict | None:
        """Return the first verdict that it does not pass."""
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)


@dataclass(frozen=True)
class Made:
    """What was made of one item."""

    item: str
    """Its id."""
    samples: tuple[Candidate, ...]
    """In order."""
    unusable: str = ""
    """Why no answer was of use; empty: some were."""


@dataclass(frozen=True)
class _Item:
    id: str
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class _Sample:
    record: Mapping[str, Any]
    verdicts: tuple[Verdict, ...] = ()
    kind: Kind | None = None
    group: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Line:
    item: _Item
    samples: tuple[_Sample, ...] = ()
    asked: tuple[str, ...] = ()
    unusable: str = ""


_RUN, _LINE = TypeAdapter(RunRecord), TypeAdapter(_Line)


def read_run(output: Path) -> RunRecord:
    """Return what made the samples of a folder.

    Raises:
        UserError: it is no folder of `sov-data synth`, or its record is damaged.
    """
    file = output / RUN
    try:
        return _RUN.validate_python(_object(file.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: does not exist; pass a folder that `sov-data synth` wrote") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({_told(e)}); run the same `sov-data synth` again") from None


def read_made(output: Path, run: RunRecord) -> Iterator[Made]:
    """Yield what was made of all finished items, in the order of the input: in which part an item stands, and
    where, depends on when it was finished.

    Raises:
        UserError: a line is damaged.
    """
    seen: set[str] = set()
    parts = sorted((output / CANDIDATES).glob(PARTS))
    for _, file, start, line in sorted(chain.from_iterable(map(_places, parts))):
        with open(file, "rb") as f:  # anew for each: a long run has more parts than files may be open
            f.seek(start)
            made = _made(f.readline(), f"{file}:{line}", run)
        if made.item not in seen:
            seen.add(made.item)
            yield made


def _places(file: Path) -> Iterator[tuple[int, Path, int, int]]:
    """Yield the item's number, the file, the place in it and the line's number of each line."""
    start = 0
    with open(file, "rb") as f:
        for number, line in enumerate(f, 1):
            found = _NUMBER.match(line)
            yield int(found[1]) if found else 0, file, start, number
            start += len(line)


def _made(raw: bytes, where: str, run: RunRecord) -> Made:
    try:
        line = _LINE.validate_python(_object(raw))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is damaged ({_told(e)}); delete this file and run the same command again: "
                        "answers are kept, nothing is asked twice") from None
    return Made(line.item.id, tuple(
        Candidate(f"{line.item.id}/{i}", line.item.id, line.item.source, line.item.licence,
                  one.kind or run.kind, one.record, one.verdicts, one.group, one.notes,
                  one.asked or line.asked)
        for i, one in enumerate(line.samples)), line.unusable)


def _object(raw: bytes) -> Any:
    return json.loads(raw.decode(), parse_constant=no_constant, parse_float=finite)


def _told(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
    return first_line(error)[:200]
