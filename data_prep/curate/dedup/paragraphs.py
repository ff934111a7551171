"""Step `paragraph_dedup`: what stands in many documents, such as a menu or a notice, is cut out of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.curate.dedup.exact import Partitions, write_page
from data_prep.curate.dedup.numbering import Numbering
from data_prep.curate.dedup.occurrences import (
    KEY_BYTES, OccurrenceRule, read_surplus, write_occurrences, write_surplus)
from data_prep.curate.pipeline.step import Doc, Pass, ShardRef, Step, StepOutcome, View
from megatron_sov.base.documents.overlap import fold
from megatron_sov.base.settings import AtLeastOne, Share

REPEATED_REASON = "mostly repeated paragraphs"
Border = Literal["lines", "blank_lines"]
_BORDERS: dict[Border, re.Pattern[str]] = {
    "lines": re.compile(r"\n"), "blank_lines": re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")}
"""Setting `split` -> what stands between two paragraphs."""


@dataclass(frozen=True)
class ParagraphSettings:
    """What is cut."""

    min_chars: AtLeastOne = 30
    """Shorter paragraphs stay; blanks at their ends do not count."""
    max_documents: AtLeastOne = 5
    """A paragraph that occurs in more documents than this is cut."""
    keep: Literal["first", "none"] = "first"
    """"first": the first document that has it keeps it, that of the highest priority; "none": none does."""
    split: Border = "lines"
    """"lines": each line is a paragraph; "blank_lines": blank lines part them."""
    max_share: Share = 0.5
    """A document that loses more of its characters is dropped."""
    partitions: Partitions = 64
    """Tasks of the second pass; as many workers can be busy with it."""


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of a text."""

    start: int
    """Where it begins, in characters."""
    stop: int
    """Where what parts it from the next one ends."""
    key: bytes
    """128 bits of it in one case, in Unicode's compatibility form, and with every run of blanks as one;
    empty: it is too short to be cut."""


def paragraphs(text: str, split: Border, min_chars: int) -> Iterator[Paragraph]:
    """Yield the paragraphs of a text, all characters in one of them."""
    begin = 0
    places = [*((m.start(), m.end()) for m in _BORDERS[split].finditer(text)), (len(text), len(text))]
    # neither folding makes or takes away a line's end: lines are folded together, for one call costs as much
    folded = fold(text).split("\n") if split == "lines" else None
    for number, (end, behind) in enumerate(places):
        words = (folded[number] if folded is not None else fold(text[begin:end])).split()
        key = b""
        if sum(map(len, words)) + len(words) - 1 >= min_chars:
            plain = " ".join(words).encode(errors="surrogatepass")
            key = hashlib.blake2b(plain, digest_size=KEY_BYTES).digest()
        yield Paragraph(begin, behind, key)
        begin = behind


class ParagraphDedup(Step):
    """Cuts paragraphs that many documents have."""

    kind = "paragraph_dedup"
    adds = {"paragraphs_cut": "int64"}
    Settings = ParagraphSettings
    settings: ParagraphSettings

    def passes(self) -> Sequence[Pass]:
        """Return: paragraphs of each shard, then those that are in too many documents, by partition, then the
        page's figures."""
        return [Pass("paragraphs", self._write_keys),
                Pass("count", self._count, self.settings.partitions),
                Pass("report", self._report, 1)]

    def start(self, view: View) -> None:
        """Open what the passes left."""
        self._numbering, self._folder = Numbering(view), view.work / "repeated"
        self._rank = -1
        self._cut: dict[int, set[bytes]] = {}

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Cut what is listed, and drop what loses too much."""
        return [self._outcome(d) for d in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        rank = self._numbering.rank_of[ShardRef(document.source, document.shard)]
        if rank != self._rank:
            self._load(rank)
        keys = self._cut.get(document.row)
        if keys is None:
            return StepOutcome(values={"paragraphs_cut": 0})
        parts = list(paragraphs(document.text, self.settings.split, self.settings.min_chars))
        stay = [p for p in parts if p.key not in keys]
        num_cut = len(parts) - len(stay)
        text = "".join(document.text[p.start:p.stop] for p in stay)
        lost = sum(len(document.text[p.start:p.stop].strip()) for p in parts if p.key in keys)
        if not text.strip() or lost > self.settings.max_share * len(document.text.strip()):
            return StepOutcome(REPEATED_REASON, values={"paragraphs_cut": num_cut})
        return StepOutcome(text=text, values={"paragraphs_cut": num_cut})

    def _load(self, rank: int) -> None:
        self._cut = {}
        for record in read_surplus(self._folder, rank):
            key = bytes(record["key"]).ljust(KEY_BYTES, b"\0")  # numpy takes zeros at the end for padding
            self._cut.setdefault(int(record["doc"]) & 0xFFFFFFFF, set()).add(key)
        self._rank = rank

    def _write_keys(self, view: View, task: int) -> None:
        shard = view.shards[task]
        rank = Numbering(view).rank_of[shard]
        keys: list[bytes] = []
        numbers: list[int] = []
        for batch in view.documents(shard):
            for document in batch:
                found = {p.key for p in paragraphs(document.text, self.settings.split,
                                                   self.settings.min_chars) if p.key}
                keys += sorted(found)
                numbers += [rank << 32 | document.row] * len(found)
        write_occurrences(view.work / "keys" / f"{rank:06}", keys, numbers, self.settings.partitions)

    def _count(self, view: View, task: int) -> None:
        files = [view.work / "keys" / f"{rank:06}" for rank in range(len(view.shards))]
        rule = OccurrenceRule(self.settings.max_documents, self.settings.keep == "first")
        write_surplus(files, task, view.work / "repeated" / f"{task:05}", rule)

    def _report(self, view: View, task: int) -> None:
        counts: Counter[str] = Counter()
        for rank, shard in enumerate(Numbering(view).shards):
            counts[shard.source] += len(read_surplus(view.work / "repeated", rank))
        write_page(view, {"tables": [{"title": "Repeated paragraphs", "head": ["source", "paragraphs cut"],
                                      "rows": [[source, count] for source, count in sorted(counts.items())]}],
                          "bars": [], "notes": []})
