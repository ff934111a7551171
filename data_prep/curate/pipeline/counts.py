"""Count the documents and bytes that a step keeps, changes and drops in a shard, with samples."""

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.base.documents.records import count_text_bytes

MAX_SAMPLES, SAMPLE_CHARS = 5, 1000
_SUMMED_FIELDS = ("documents_in", "bytes_in", "documents_kept", "bytes_kept", "documents_changed")


@dataclass
class DocumentCounts:
    """Counts for a shard, or summed over shards; field names are keys in the shard's JSON file."""

    documents_in: int = 0
    """Documents passed to the step."""
    bytes_in: int = 0
    """UTF-8 bytes in the text passed to the step."""
    documents_kept: int = 0
    bytes_kept: int = 0
    """UTF-8 bytes in the kept text, after the step."""
    documents_changed: int = 0
    """Kept documents with a changed text."""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Reason -> documents and bytes."""
    broken: dict[str, int] = field(default_factory=dict)
    """Error code -> number of unreadable or excluded records."""
    output_bytes: dict[str, int] = field(default_factory=dict)
    """Output name -> UTF-8 bytes in its texts, for a shard of the output."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"dropped": []})
    """The `MAX_SAMPLES` dropped documents with the lowest hashes from `hash_sample_id`."""

    def add_document(self, identifier: str, reason: str, before: str, after: str | None,
                     output_name: str = "") -> None:
        """Count a document.

        Args:
            identifier: document id.
            reason: why the step drops the document; "": kept.
            before: text passed to the step.
            after: text returned by the step; None: unchanged.
            output_name: name of the output that gets the document; "": the step is not the output.
        """
        size_bytes = count_text_bytes(before)
        self.documents_in += 1
        self.bytes_in += size_bytes
        if output_name:
            self.output_bytes[output_name] = self.output_bytes.get(output_name, 0) + size_bytes
        if not reason:
            self.documents_kept += 1
            self.bytes_kept += size_bytes if after is None else count_text_bytes(after)
            if after is not None:
                self.documents_changed += 1
            return
        totals = self.dropped.setdefault(reason, {"documents": 0, "bytes": 0})
        totals["documents"] += 1
        totals["bytes"] += size_bytes
        self._add_samples([{"id": identifier, "reason": reason, "before": before[:SAMPLE_CHARS]}])

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(sorted(self.dropped.items()))}

    @staticmethod
    def merge_dicts(parts: Iterable[dict[str, Any]]) -> "DocumentCounts":
        """Sum the results of `to_dict`, except `output_bytes`."""
        total = DocumentCounts()
        for part in parts:
            for name in _SUMMED_FIELDS:
                setattr(total, name, getattr(total, name) + part[name])
            for reason, numbers in part["dropped"].items():
                sums = total.dropped.setdefault(reason, {"documents": 0, "bytes": 0})
                for name, number in numbers.items():
                    sums[name] += number
            for code, number in part["broken"].items():
                total.broken[code] = total.broken.get(code, 0) + number
            total._add_samples(part["samples"]["dropped"])
        return total

    def _add_samples(self, samples: list[dict[str, Any]]) -> None:
        # The lowest hashes win, so samples do not depend on the order or number of shards.
        self.samples["dropped"] = heapq.nsmallest(MAX_SAMPLES, self.samples["dropped"] + samples,
                                                  key=hash_sample_id)


def hash_sample_id(sample: dict[str, Any]) -> bytes:
    """Hash a document id for sample selection. Every step uses the same hash, which follows a document."""
    return hashlib.blake2b(sample["id"].encode(), digest_size=8).digest()
