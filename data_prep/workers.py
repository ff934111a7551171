"""Encoding units in several processes, with the results in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data_prep.units import UnitEncoder, UnitRecord, UnitSettings
from megatron_sov.documents import Span
from megatron_sov.errors import UserError

Unit = tuple[Span, ...]
_encoder: UnitEncoder
"""The worker process's encoder."""


def encode_units(units: list[Unit], settings: UnitSettings, work: Path, workers: int) -> Generator[UnitRecord, None, None]:
    """Yield the record of each unit, in order; what is there already is kept.

    Processes and not threads: two threads are as quick (benchmarks/data_pack.py), but about a third of the work, reading JSON
    and making arrays, holds Python's lock, so more than three would wait for one another.  One worker is this process.

    Raises:
        UserError: a file cannot be read, the disk refuses, or a worker was ended from outside.
    """
    workers = min(workers, len(units))
    if workers <= 1:
        yield from map(UnitEncoder(settings, work).encode, units)
        return
    # Fresh processes: forking one that runs the tokenizer's threads could deadlock.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (settings, work))
    under_way: deque[Future[UnitRecord]] = deque()
    try:
        for unit in units:
            under_way.append(pool.submit(_encode, unit))
            if len(under_way) >= 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was ended from outside (for want of memory?); run the same command again, with fewer "
                        "--workers: what is encoded is kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(settings: UnitSettings, work: Path) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process; the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = UnitEncoder(settings, work)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed command must not leave workers that wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _encode(unit: Unit) -> UnitRecord:
    return _encoder.encode(unit)
