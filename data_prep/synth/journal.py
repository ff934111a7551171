"""The finished items of a run: JSON lines in parts that appear whole, in the folder `candidates`.

An item that is there is done.  What a kill takes is what stands in no part yet: these items are made again
from the answers that are kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.synth.candidates import CANDIDATES, PARTS
from data_prep.synth.generator import Item, Sample
from megatron_sov.artifacts import atomic_write, disk_errors
from megatron_sov.errors import UserError

MAX_ITEMS = 2000
"""Of a part."""
MIN_WAIT_S, MAX_WAIT_S = 10.0, 900.0
"""Between two parts: a run of days has about a thousand."""


@dataclass(frozen=True)
class Finished:
    """One item that is done."""

    number: int
    """Of the item in its input, from 0."""
    item: Item
    """The item."""
    samples: tuple[Sample, ...]
    """What was made of it."""
    asked: tuple[str, ...]
    """Hashes of what models were asked for it, in order."""
    unusable: str = ""
    """Why models' answers were of no use; empty: they were."""

    def line(self) -> bytes:
        """Return it as a line of JSON; raises ValueError where a record is none."""
        item = {"id": self.item.id, "source": self.item.source, "licence": self.item.licence,
                "digest": digest_of(self.item)}
        said: dict[str, Any] = {"number": self.number, "item": item, "asked": self.asked,
                                "samples": [_plain(sample) for sample in self.samples]}
        if self.unusable:
            said["unusable"] = self.unusable
        return json.dumps(said, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(sample: Sample) -> dict[str, Any]:
    plain: dict[str, Any] = {"record": sample.record,
                             "verdicts": [asdict(verdict) for verdict in sample.verdicts],
                             "notes": sample.notes, "group": sample.group}
    return plain | ({"kind": sample.kind} if sample.kind else {})


def digest_of(item: Item) -> str:
    """Return a hash of what an item holds."""
    text = json.dumps([item.fields, item.source, item.licence], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """Writes parts; from one thread.

    Args:
        output: the run's folder.
        prefix: of the names of parts, so that several processes write beside each other.
    """

    def __init__(self, output: Path, prefix: str = "") -> None:
        self._output, self._folder, self._prefix = output, output / CANDIDATES, f"part-{prefix}"
        with disk_errors(output):
            self._folder.mkdir(exist_ok=True)
            for leftover in self._folder.glob(f".{self._prefix}*.tmp-*"):
                leftover.unlink(missing_ok=True)
        numbers = [int(file.stem.removeprefix(self._prefix)) for file in self._folder.glob(
            f"{self._prefix}{'[0-9]' * 6}.jsonl")]
        self._next = max(numbers, default=-1) + 1
        self._lines: list[tuple[int, bytes]] = []
        self._began_s = self._published_s = time.monotonic()

    def add(self, finished: Finished) -> None:
        """Take an item that is done; it comes to the disk with the next part."""
        self._lines.append((finished.number, finished.line()))

    def is_due(self) -> bool:
        """Return whether it is time for a part."""
        now_s = time.monotonic()
        wait_s = min(max(MIN_WAIT_S, (now_s - self._began_s) / 20), MAX_WAIT_S)
        return bool(self._lines) and (len(self._lines) >= MAX_ITEMS or now_s - self._published_s >= wait_s)

    def publish(self) -> None:
        """Write what there is as a part, which appears whole."""
        if self._lines:
            atomic_write(self._folder / f"{self._prefix}{self._next:06}.jsonl",
                         b"".join(line for _, line in sorted(self._lines)))
            self._next += 1
            self._lines = []
        self._published_s = time.monotonic()


@dataclass(frozen=True)
class Done:
    """What is known of an item that is done."""

    digest: str
    """Of the item when it was made."""
    num_passed: int
    """Samples that pass their own checks."""
    num_failed: int
    """Samples that do not."""
    is_unusable: bool
    """Whether models' answers were of no use."""


def read_done(output: Path) -> dict[str, Done]:
    """Return the items that are done, by id.

    Raises:
        UserError: a part is damaged.
    """
    found = {}
    for file in sorted((output / CANDIDATES).glob(PARTS)):
        for number, line in enumerate(_lines(file), 1):
            try:
                said = json.loads(line)
                passes = [all(verdict["passed"] for verdict in sample["verdicts"])
                          for sample in said["samples"]]
                found[said["item"]["id"]] = Done(said["item"]["digest"], sum(passes),
                                                 len(passes) - sum(passes), "unusable" in said)
            except (ValueError, TypeError, KeyError, RecursionError) as e:
                raise UserError(f"{file}:{number}: is damaged ({type(e).__name__}); delete this file and run "
                                "the same command again: answers are kept, nothing is asked twice") from None
    return found


def _lines(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as f:
        yield from f
