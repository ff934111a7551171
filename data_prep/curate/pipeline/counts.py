"""What a step did to a shard: counts, drops by reason, a few documents as samples; and how far a stage is."""

from __future__ import annotations

import hashlib
import heapq
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from data_prep.damaged_files import explain_deletion
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_duration
from megatron_sov.base.sealed import read_sealed_json

MAX_SAMPLES, SAMPLE_CHARS = 5, 1000
LINE_EVERY_S = 60.0


@dataclass
class DocumentCounts:
    """Counts of one shard, or of several together."""

    documents_in: int = 0
    """Documents that the step looked at."""
    bytes_in: int = 0
    """Their text, in bytes of UTF-8."""
    documents_kept: int = 0
    bytes_kept: int = 0
    """Text of those that are kept, behind the step."""
    documents_changed: int = 0
    """Documents that are kept with another text."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Reason -> documents and bytes."""
    broken: dict[str, int] = field(default_factory=dict)
    """Code of what could not be read, or was left out -> how many."""
    cpu_s: float = 0.0
    """Time of the cores."""
    wall_s: float = 0.0
    """Time on the clock, summed over shards."""
    seals: dict[str, str] = field(default_factory=dict)
    """Name of each file that the shard's task has left beside its counts -> its checksum."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"dropped": []})
    """The dropped documents whose identifiers hash lowest."""

    def count(self, identifier: str, reason: str, before: str, after: str | None) -> None:
        """Count a document.

        Args:
            identifier: its id.
            reason: why it is dropped; "": kept.
            before: its text as it came.
            after: its text as it goes; None: unchanged.
        """
        size_bytes = len(before.encode())
        self.documents_in += 1
        self.bytes_in += size_bytes
        if reason:
            number = self.dropped.setdefault(reason, {"documents": 0, "bytes": 0})
            number["documents"] += 1
            number["bytes"] += size_bytes
            # The lowest hashes win: which samples are shown does not depend on the order or number of shards.
            samples = self.samples["dropped"]
            samples.append({"id": identifier, "reason": reason, "before": before[:SAMPLE_CHARS]})
            self.samples["dropped"] = heapq.nsmallest(MAX_SAMPLES, samples, key=hash_sample_id)
            return
        self.documents_kept += 1
        self.bytes_kept += size_bytes if after is None else len(after.encode())
        self.documents_changed += after is not None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(sorted(self.dropped.items()))}

    @staticmethod
    def together(found: Iterable[dict[str, Any]]) -> DocumentCounts:
        total = DocumentCounts()
        for one in found:
            for name in ("documents_in", "bytes_in", "documents_kept", "bytes_kept", "documents_changed",
                         "cpu_s", "wall_s"):
                setattr(total, name, getattr(total, name) + one[name])
            for reason, number in one["dropped"].items():
                mine = total.dropped.setdefault(reason, {"documents": 0, "bytes": 0})
                for name, value in number.items():
                    mine[name] += value
            for code, value in one["broken"].items():
                total.broken[code] = total.broken.get(code, 0) + value
            total.samples["dropped"] = heapq.nsmallest(
                MAX_SAMPLES, total.samples["dropped"] + one["samples"]["dropped"], key=hash_sample_id)
        return total


def read_recorded_seal(file: Path) -> str:
    """Return the checksum of a shard's file as the counts beside it say it.

    Raises:
        UserError: they are missing or damaged, or name no such file.
    """
    # Output files are in a folder named by the shard's number; its counts are next to that folder.
    shard = file.parent if file.parent.name.isdigit() else file
    counts = shard.with_name(f"{shard.name.partition('.')[0]}.json")
    found = read_sealed_json(counts, explain_deletion(file)).get("seals", {})
    if file.name not in found:
        raise UserError(f"{file}: is not named in {counts}, which says what was written; "
                        f"{explain_deletion(file)}")
    return str(found[file.name])


def hash_sample_id(sample: dict[str, Any]) -> bytes:
    """Return the hash of a document's id, by which samples are chosen: the same in every step, so that a
    document can be followed."""
    return hashlib.blake2b(sample["id"].encode(), digest_size=8).digest()


class StageProgress:
    """How far a stage is, for who looks on: a bar on a terminal, a line every minute in a log; `with
    StageProgress(name, total, what) as progress: ...progress()` for each of `total` tasks, called `what`."""

    def __init__(self, name: str, total: int, what: str) -> None:
        self._name, self._total, self._what, self._num_done = name, total, what, 0
        self._began_s = time.monotonic()
        self._is_over = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Self:
        self._bar: Any = tqdm(total=self._total, desc=self._name, unit="task", disable=None, leave=False)
        if self._bar.disable:
            self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._bar.close()

    def __call__(self) -> None:
        self._num_done += 1
        self._bar.update(1)

    def _tell(self) -> None:
        while not self._is_over.wait(LINE_EVERY_S):
            print(self.line(time.monotonic() - self._began_s), flush=True)

    def line(self, wall_s: float) -> str:
        done = self._num_done
        left = f", about {format_duration(wall_s / done * (self._total - done))} left" if done else ""
        done_text = f"  {self._name}: {done:,} of {self._total:,} {self._what}"
        return f"{done_text} after {format_duration(wall_s)}{left}"
