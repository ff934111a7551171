"""Encoding units in several processes, with the results in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

from data_prep.units import UnitEncoder, UnitRecord, UnitSettings
from megatron_sov.documents import Span
from megatron_sov.work.pool import in_processes

Unit = tuple[Span, ...]


def encode_units(units: list[Unit], settings: UnitSettings, work: Path,
                 workers: int) -> Generator[UnitRecord, None, None]:
    """Yield the record of each unit, in order; what is there already is kept.

    Processes and not threads: two threads are as quick (benchmarks/data_pack.py), but about a third of the
    work, reading JSON and making arrays, holds Python's lock, so more than three would wait for one another.

    Raises:
        UserError: a file cannot be read, the disk refuses, or a worker was ended from outside.
    """
    yield from in_processes(_encoder, (settings, work), units, workers)


def _encoder(settings: UnitSettings, work: Path) -> Callable[[Unit], UnitRecord]:
    return UnitEncoder(settings, work).encode
