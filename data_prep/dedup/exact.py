"""Step `exact_dedup`: of documents with one text the first of the source with the highest priority stays."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from blake3 import blake3

from data_prep.dedup.dropping import Dropped
from data_prep.dedup.numbering import Numbering, Register, registered
from data_prep.dedup.occurrences import KEY_BYTES, Rule, read_surplus, write_occurrences, write_surplus
from data_prep.dedup.report import write_report
from data_prep.pipeline.step import Doc, Outcome, Pass, Step, View
from megatron_sov.documents.overlap import find_units

REASON = "exact duplicate"


def _text(text: str) -> bytes:
    return " ".join(unicodedata.normalize("NFKC", text).split()).encode(errors="surrogatepass")


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _words(text: str) -> bytes:
    found = find_units(text)
    # what has no words is compared by its signs
    return found.hashes.tobytes() if len(found.hashes) else b"\0" + _text(text)


Compare = Literal["text", "bytes", "words"]
COMPARE: dict[Compare, Callable[[str], bytes]] = {"text": _text, "bytes": _bytes, "words": _words}
"""Setting `compare` -> what of a text is compared."""
Partitions = Annotated[int, Ge(1), Le(65536)]
"""Tasks of a second pass; a file each."""


@dataclass(frozen=True)
class ExactSettings:
    """What counts as the same text."""

    compare: Compare = "text"
    """"text": the text in Unicode's compatibility form (NFKC) with every run of blanks and line ends as one
    blank; "bytes": the text as it is; "words": its words alone, without case, punctuation and markup."""
    partitions: Partitions = 64
    """Tasks of the second pass; as many workers can be busy with it."""


class ExactDedup(Step):
    """Drops documents whose text stands elsewhere."""

    kind = "exact_dedup"
    adds = {"duplicate_of": "string"}
    Settings = ExactSettings
    settings: ExactSettings

    def passes(self) -> Sequence[Pass]:
        """Return: keys of each shard, then who has to go, by partition, then the page's figures."""
        return [Pass("keys", self._write_keys),
                Pass("compare", self._compare, self.settings.partitions),
                Pass("report", self._report, 1)]

    def start(self, view: View) -> None:
        """Open what the passes left."""
        numbering = Numbering(view)
        self._dropped = Dropped(numbering, Register(view.work / "documents"), REASON,
                                lambda rank: read_surplus(view.work / "duplicates", rank))

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[Outcome]:
        """Drop what is listed."""
        return self._dropped.outcomes(documents)

    def _write_keys(self, view: View, task: int) -> None:
        numbering, shard = Numbering(view), view.shards[task]
        rank, take = numbering.rank_of[shard], COMPARE[self.settings.compare]
        keys: list[bytes] = []
        numbers: list[int] = []
        for batch in registered(view, shard, Register(view.work / "documents"), rank):
            keys += [blake3(take(d.text)).digest(KEY_BYTES) for d in batch]
            numbers += [rank << 32 | d.row for d in batch]
        write_occurrences(view.work / "keys" / f"{rank:06}", keys, numbers, self.settings.partitions)

    def _compare(self, view: View, task: int) -> None:
        files = [view.work / "keys" / f"{rank:06}" for rank in range(len(view.shards))]
        write_surplus(files, task, view.work / "duplicates" / f"{task:05}", Rule())

    def _report(self, view: View, task: int) -> None:
        write_report(view, lambda rank: read_surplus(view.work / "duplicates", rank), "Exact duplicates")
