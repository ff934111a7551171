"""Step `exact_dedup`: of documents with one text the first of the source with the highest priority stays."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from blake3 import blake3

from data_prep.curate.dedup.numbering import Numbering, Register, ranks, registered
from data_prep.curate.dedup.occurrences import (
    KEY_BYTES, OccurrenceRule, read_surplus, write_occurrences, write_surplus)
from data_prep.curate.dedup.work_files import Records
from data_prep.curate.pipeline.step import KEPT, Doc, Pass, ShardRef, Step, StepOutcome, View
from megatron_sov.base.artifacts import new_file, to_json
from megatron_sov.base.documents.overlap import find_units

# Outcomes from a list of documents that go, each because of another one that stays.

class Dropped:
    """Which documents go; the list of one shard is in memory at a time."""

    def __init__(self, numbering: Numbering, register: Register, reason: str,
                 lists: Callable[[int], Records]) -> None:
        """`lists`: rank -> records with `doc` and `keeper` of what goes from a shard."""
        self._numbering, self._register, self._reason, self._lists = numbering, register, reason, lists
        self._rank = -1
        self._keeper_ids: dict[int, str] = {}

    def outcomes(self, documents: Sequence[Doc]) -> list[StepOutcome]:
        """Return the outcomes of documents."""
        return [self._outcome(d) for d in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        rank = self._numbering.rank_of[ShardRef(document.source, document.shard)]
        if rank != self._rank:
            self._load(rank)
        keeper = self._keeper_ids.get(document.row)
        return KEPT if keeper is None else StepOutcome(self._reason, values={"duplicate_of": keeper})

    def _load(self, rank: int) -> None:
        """Read a shard's list, and the ids of those that stay, by the shards that hold them."""
        records = self._lists(rank)
        self._keeper_ids = {}
        keepers = records["keeper"]
        for number in records[keepers.argsort(kind="stable")]:
            row, keeper = int(number["doc"]) & 0xFFFFFFFF, int(number["keeper"])
            self._keeper_ids[row] = self._register.id_of(keeper)
        assert (ranks(records["doc"]) == rank).all()
        self._rank = rank


# What the report's page shows of a search for duplicates: between which sources they lie.

MOST_ROWS = 50


def write_report(view: View, lists: Callable[[int], Records], title: str,
                 bars: list[dict[str, Any]] | None = None) -> None:
    """Write `report.json` into a step's work folder.

    Args:
        view: the pipeline.
        lists: rank -> records with `doc` and `keeper` of what goes from a shard.
        title: of the table.
        bars: charts beside it.
    """
    numbering = Numbering(view)
    between: Counter[tuple[str, str]] = Counter()
    for rank, shard in enumerate(numbering.shards):
        kept_by = Counter(ranks(lists(rank)["keeper"]).tolist())
        for keeper_rank, count in kept_by.items():
            between[shard.source, numbering.shards[keeper_rank].source] += count
    rows = [[dropped, kept, count] for (dropped, kept), count in
            sorted(between.items(), key=lambda item: (-item[1], item[0]))[:MOST_ROWS]]
    write_page(view, {"tables": [{"title": title, "head": ["dropped from", "kept in", "documents"],
                                  "rows": rows}], "bars": bars or [], "notes": []})


def write_page(view: View, page: dict[str, Any]) -> None:
    """Write what the report's page shows of a step."""
    with new_file(view.work / "report.json", makes_parents=True) as temporary:
        temporary.write_text(to_json(page), encoding="utf-8")


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

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
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
        write_surplus(files, task, view.work / "duplicates" / f"{task:05}", OccurrenceRule())

    def _report(self, view: View, task: int) -> None:
        write_report(view, lambda rank: read_surplus(view.work / "duplicates", rank), "Exact duplicates")
