"""Step `decontaminate`: documents that hold text of benchmarks are dropped, or lose it.

First the items of benchmarks, then the places of their units in a text as it was written, then what a report
says of an item that was found.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from annotated_types import Ge, Le, MinLen

from data_prep.curate.dedup.exact import write_page
from data_prep.curate.pipeline.step import Doc, Pass, ShardRef, Step, StepOutcome, View
from data_prep.json_lines import read_objects
from data_prep.shards.shard_damage import place_in_run, way_out
from megatron_sov.base.artifacts import new_file
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, plain
from megatron_sov.base.documents.overlap import WORDS, Units, find_units, fold
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import PLACE, SEAL, read_lines, seal_file
from megatron_sov.base.settings import AtLeastOne, Flag, ProblemCode, SettingsProblem, at_most

_CLUSTERS = regex.compile(r"\X")


def places(text: str, units: Units, stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where stretches of units begin and end in a text, in characters.

    Args:
        text: as it was written.
        units: its units.
        stretches: first unit, and the unit behind the last, of each.
    """
    spans = [units.span(begin, end) for begin, end in stretches]
    # What folds to itself has the same places in both.
    if units.folded == text:
        return spans
    # Folding may make one character of several, or several of one: the place widens to whole graphemes.
    starts, ends = _clusters(text, units.folded)
    return [(starts[start], ends[stop - 1]) for start, stop in spans]


def _clusters(text: str, folded: str) -> tuple[list[int], list[int]]:
    """Return for each character of the folded text where that from which it was made begins and ends:
    what a reader takes for one character, which Unicode's forms do not reach beyond."""
    starts: list[int] = []
    ends: list[int] = []
    is_folded = folded != unicodedata.normalize("NFKC", text)
    for found in _CLUSTERS.finditer(text):
        # `find_units` folds some texts, and others only into NFKC: the same is done here to each grapheme
        # alone, and its length says how many folded characters are its own.
        size = len(fold(found[0]) if is_folded else unicodedata.normalize("NFKC", found[0]))
        starts += [found.start()] * size
        ends += [found.end()] * size
    if len(starts) != len(folded):  # a form that does: the whole text is the place
        return [0] * len(folded), [len(text)] * len(folded)
    return starts, ends


def whole_lines(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the lines that hold places, with their ends, in order and joined where they touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        begin = text.rfind("\n", 0, start) + 1
        end = text.find("\n", stop - 1) + 1 or len(text)
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    kept, at = [], 0
    for start, stop in spans:
        kept.append(text[at:start])
        at = stop
    return "".join([*kept, text[at:]])


MOST_HITS = 1000
"""Of one text that are told; one that has so many is not worth more room."""
MOST_CHARACTERS = 1000
"""Of a found text that are shown."""


@dataclass(frozen=True)
class Hit:
    """A place in a text that an item of a benchmark has too."""

    benchmark: str
    """Name of the benchmark's file."""
    item: str
    """Id of the record, or its line."""
    field: str
    """Field of the record."""
    start: int
    """Where the place begins in the text, in characters."""
    stop: int
    """Where it ends."""
    before: str
    """What stands before it."""
    found: str
    """What stands there."""
    after: str
    """What stands behind it."""

    @staticmethod
    def read(row: dict[str, Any]) -> Hit:
        return Hit(**{name: row[name] for name in Hit.__dataclass_fields__})


def find_hits(text: str, search: ItemSearch, context_chars: int) -> list[Hit]:
    """Return what a text has of benchmarks.

    Args:
        text: to search.
        search: for what.
        context_chars: to show on either side.
    """
    # A text is searched twice: as it is, and without its markup. A place that both searches find counts once.
    found = _found(text, search)
    if (other := plain(text)) is not None:
        known = defaultdict(list)
        for number, start, stop in found:
            known[number].append((start, stop))
        for number, start, stop in _found(other.text, search):
            # Back from the plain text to the one that was written.
            start, stop = int(other.starts[start]), int(other.ends[stop - 1])
            if not any(a < stop and start < b for a, b in known[number]):
                found.append((number, start, stop))
    hits = []
    for number, start, stop in found[:MOST_HITS]:
        item = search.items[number]
        hits.append(Hit(item.benchmark, item.id, item.field, start, stop,
                        text[max(0, start - context_chars):start],
                        text[start:min(stop, start + MOST_CHARACTERS)], text[stop:stop + context_chars]))
    return hits


def _found(text: str, search: ItemSearch) -> list[tuple[int, int, int]]:
    units = find_units(text)
    found = search.find(units)[:MOST_HITS]
    spans = places(text, units, [(f.begin, f.end) for f in found]) if found else []
    return [(one.item, *span) for one, span in zip(found, spans, strict=True)]


FIELDS = ("question", "problem", "prompt", "query", "instruction", "text")
"""Fields that are searched for where a record has them."""
_IDS = ("id", "task_id", "question_id", "qid")


def benchmark_files(paths: Iterable[Path]) -> list[Path]:
    """Return the .jsonl files of paths: files, or folders of them.

    Raises:
        UserError: one does not exist, or a folder has none.
    """
    found: list[Path] = []
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"benchmarks: {path}: is no file, and no folder with .jsonl files of records; "
                            "nothing is fetched by a benchmark's name: save each as .jsonl, e.g. by "
                            "datasets' `to_json`, and pass the files after --benchmarks, with blanks between")
        found += files
    return found


def read_items(paths: Iterable[Path], fields: Sequence[str]) -> list[SearchItem]:
    """Return the items of benchmarks, in order.

    Args:
        paths: .jsonl files, or folders of them.
        fields: names of fields, each of which is an item where a record has it; a dot leads into an object.

    Raises:
        UserError: a file cannot be read, a line is no JSON object, or a record has none of the fields.
    """
    found: list[SearchItem] = []
    for file in benchmark_files(paths):
        before = len(found)
        for where, record in read_objects(file):
            id_ = next((str(record[name]) for name in _IDS if isinstance(record.get(name), (str, int))),
                       f"line {where.rpartition(':')[2]}")
            texts = {name: text for name in fields if (text := text_in(_value(record, name))).strip()}
            # A record that is passed over in silence would be one that nothing is searched for.
            if not texts:
                raise UserError(f"{where}: has text in none of the fields {', '.join(fields)} (fields: "
                                f"{', '.join(record) or 'none'}); name those of the benchmark with `fields`")
            found += [SearchItem(file.stem, id_, name, text) for name, text in texts.items()]
        if len(found) == before:
            raise UserError(f"benchmarks: {file}: has no records; each line is a JSON object")
    return found


def _value(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def text_in(value: Any) -> str:
    """Return a value as text: a string, or all strings of a list, an object, or messages, in order."""
    return "\n".join(_strings(value, 0))


def _strings(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    # The bound on depth is for hostile files: nesting must not end the interpreter's stack.
    elif isinstance(value, Mapping) and depth < 4:
        for name, inner in value.items():
            if name != "role":
                yield from _strings(inner, depth + 1)
    elif isinstance(value, list) and depth < 4:
        for inner in value:
            yield from _strings(inner, depth + 1)


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
        return benchmark_files(self.settings.benchmarks)

    def passes(self) -> Sequence[Pass]:
        """Return the search of each shard, and the page's figures."""
        return [Pass("search", self._search), Pass("report", self._report, 1)]

    def start(self, view: View) -> None:
        self._view = view
        self._shard: ShardRef | None = None
        self._hits: dict[str, list[Hit]] = {}

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(d) for d in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        shard = ShardRef(document.source, document.shard)
        # Documents come shard by shard, so the hits of one shard are in memory at a time.
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
        # At the limit there may be more places than are listed: cutting those that are known would leave
        # others.
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
            # The last line is the place of the checksum. The file is closed before, so that the seal reads
            # all of it.
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
