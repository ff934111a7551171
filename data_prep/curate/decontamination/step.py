"""Step `decontaminate`: documents that hold text of benchmarks are dropped, or lose it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from data_prep.curate.decontamination.benchmarks import FIELDS, benchmark_files, read_items
from data_prep.curate.decontamination.hits import MOST_HITS, Hit, find_hits
from data_prep.curate.decontamination.places import whole_lines, without
from data_prep.curate.dedup.exact import write_page
from data_prep.curate.pipeline.step import Doc, Pass, ShardRef, Step, StepOutcome, View
from data_prep.shards.shard_damage import place_in_run, way_out
from megatron_sov.base.artifacts import new_file
from megatron_sov.base.documents.item_search import ItemSearch
from megatron_sov.base.documents.overlap import WORDS
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import PLACE, SEAL, read_lines, seal_file
from megatron_sov.base.settings import AtLeastOne, Flag, ProblemCode, SettingsProblem, at_most

REASON = "text of a benchmark"
CONTEXT_CHARS = 100
"""Characters shown on either side of a place."""
MOST_SHOWN = 50
"""Hits on the report's page."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSearchSettings:
    """Which texts of benchmarks are looked for."""

    benchmarks: Annotated[tuple[Path, ...], MinLen(1), Flag(many=True)]
    """.jsonl files, or folders of them; each line is a record of a benchmark."""
    fields: Annotated[tuple[str, ...], MinLen(1), Flag(value="NAME", many=True)] = FIELDS
    """Fields of a record, each of which is looked for where it is there; a dot leads into an object."""
    ngram: Annotated[int, Ge(1), Le(1000)] = WORDS
    """Words in a row that a text may not share with an item; a character of Thai, Chinese or Japanese is a
    quarter of a word, a syllable of Korean a third."""
    min_words: Annotated[AtLeastOne, at_most("ngram")] = 5
    """An item that is shorter than `ngram` is found as a whole, if it has at least so many words."""

    def search(self) -> ItemSearch:
        """Read the benchmarks.

        Raises:
            UserError: a file cannot be read, or a record has none of the fields.
        """
        return ItemSearch(read_items(self.benchmarks, self.fields), self.ngram, self.min_words)


@dataclass(frozen=True, kw_only=True)
class DecontaminateSettings(BenchmarkSearchSettings):
    """What is looked for, and what is done where it is found."""

    context_chars: Annotated[int, Ge(0), Le(10_000)] = CONTEXT_CHARS
    """Characters on either side of a place that the report shows."""
    action: Literal["drop", "cut"] = "drop"
    """"drop": the document goes; "cut": the lines that hold the place go, and the document where nothing
    else is left."""

    def problems(self) -> list[SettingsProblem]:
        """Return what is wrong with the benchmarks: now, and not when all documents are parsed."""
        try:
            read_items(self.benchmarks, self.fields)
        except UserError as e:
            return [SettingsProblem(ProblemCode.FILE, "benchmarks", str(e))]
        return []


class Decontaminate(Step):
    """Takes text of benchmarks out; each place is listed in the step's folder, `hits/SOURCE-SHARD.jsonl`."""

    kind = "decontaminate"
    adds = {"contamination": "string"}
    Settings = DecontaminateSettings
    settings: DecontaminateSettings

    def files(self) -> Sequence[Path]:
        """Return the benchmarks."""
        return benchmark_files(self.settings.benchmarks)

    def passes(self) -> Sequence[Pass]:
        """Return the search of each shard, and the page's figures."""
        return [Pass("search", self._search), Pass("report", self._report, 1)]

    def start(self, view: View) -> None:
        """Note where the hits lie."""
        self._view = view
        self._shard: ShardRef | None = None
        self._hits: dict[str, list[Hit]] = {}

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Drop or cut what is listed."""
        return [self._outcome(d) for d in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        shard = ShardRef(document.source, document.shard)
        if shard != self._shard:
            self._hits = defaultdict(list)
            for row in _rows(_file(self._view, shard)):
                self._hits[row["document"]].append(Hit.read(row))
            self._shard = shard
        hits = self._hits.get(document.id, [])
        values = {"contamination": " ".join(sorted({f"{h.benchmark}:{h.item}" for h in hits}))}
        if not hits:
            return StepOutcome(values=values)
        left = ""
        if self.settings.action == "cut" and len(hits) < MOST_HITS:
            left = without(document.text, whole_lines(document.text, [(h.start, h.stop) for h in hits]))
        return StepOutcome(text=left, values=values) if left.strip() else StepOutcome(REASON, values=values)

    def _search(self, view: View, task: int) -> None:
        search, shard = self.settings.search(), view.shards[task]
        with (new_file(_file(view, shard), makes_parents=True) as temporary,
              open(temporary, "w", encoding="utf-8") as f):
            for batch in view.documents(shard):
                for document in batch:
                    for hit in find_hits(document.text, search, self.settings.context_chars):
                        row = {"document": document.id, "source": document.source, **asdict(hit)}
                        # a document may hold half of a surrogate pair, which UTF-8 does not
                        f.write(json.dumps(row, ensure_ascii=True) + "\n")
            f.write(json.dumps({SEAL: PLACE}) + "\n")
            f.close()
            seal_file(temporary, place_in_run(temporary))

    def _report(self, view: View, task: int) -> None:
        search = self.settings.search()
        items = Counter(item.benchmark for item in search.items)
        short = Counter(search.items[number].benchmark for number in search.too_short)
        found: dict[str, set[str]] = defaultdict(set)
        documents: dict[str, set[str]] = defaultdict(set)
        shown: list[list[str | int]] = []
        for shard in view.shards:
            for row in _rows(_file(view, shard)):
                found[row["benchmark"]].add(row["item"])
                documents[row["benchmark"]].add(row["document"])
                if len(shown) < MOST_SHOWN:
                    shown.append([row["benchmark"], row["item"], row["document"],
                                  f"{row['before']}[{row['found']}]{row['after']}"])
        rows = [[name, items[name], short[name], len(found[name]), len(documents[name])] for name in items]
        write_page(view, {
            "tables": [{"title": "Benchmarks", "rows": rows,
                        "head": ["benchmark", "texts", "too short to look for", "items found", "documents"]},
                       {"title": "Places", "head": ["benchmark", "item", "document", "text"], "rows": shown}],
            "bars": [], "notes": []})


def _file(view: View, shard: ShardRef) -> Path:
    return view.work / "hits" / f"{shard.source}-{shard.number:05}.jsonl"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, read_lines(file, way_out(file), place_in_run(file)))
