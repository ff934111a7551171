"""Step `decontaminate`: documents that hold text of benchmarks are dropped."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import regex
from annotated_types import Ge, Le, MinLen

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome, View
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, to_plain_form
from megatron_sov.base.documents.overlap import RUN_WORDS, Units, find_units, fold_text
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, Flag, ProblemCode, SettingsProblem, at_most_field

_CLUSTERS = regex.compile(r"\X")


def locate_stretches(text: str, units: Units, stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
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
        size = len(fold_text(found[0]) if is_folded else unicodedata.normalize("NFKC", found[0]))
        starts += [found.start()] * size
        ends += [found.end()] * size
    if len(starts) != len(folded):  # a form that does: the whole text is the place
        return [0] * len(folded), [len(text)] * len(folded)
    return starts, ends


MAX_HITS = 1000
"""Of one text that are told; one that has so many is not worth more room."""
MAX_SHOWN_CHARS = 1000
"""Of a found text that are shown."""


@dataclass(frozen=True)
class BenchmarkHit:
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


def find_hits(text: str, search: ItemSearch, context_chars: int) -> list[BenchmarkHit]:
    """Return what a text has of benchmarks.

    Args:
        text: to search.
        search: for what.
        context_chars: to show on either side.
    """
    # A text is searched twice: as it is, and without its markup. A place that both searches find counts once.
    found = _found(text, search)
    if (other := to_plain_form(text)) is not None:
        known = defaultdict(list)
        for number, start, stop in found:
            known[number].append((start, stop))
        for number, start, stop in _found(other.text, search):
            # Back from the plain text to the one that was written.
            start, stop = int(other.starts[start]), int(other.ends[stop - 1])
            if not any(a < stop and start < b for a, b in known[number]):
                found.append((number, start, stop))
    hits = []
    for number, start, stop in found[:MAX_HITS]:
        item = search.items[number]
        hits.append(BenchmarkHit(item.benchmark, item.id, item.field, start, stop,
                        text[max(0, start - context_chars):start],
                        text[start:min(stop, start + MAX_SHOWN_CHARS)], text[stop:stop + context_chars]))
    return hits


def _found(text: str, search: ItemSearch) -> list[tuple[int, int, int]]:
    units = find_units(text)
    found = search.find(units)[:MAX_HITS]
    spans = locate_stretches(text, units, [(f.begin, f.end) for f in found]) if found else []
    return [(one.item, *span) for one, span in zip(found, spans, strict=True)]


FIELDS = ("question", "problem", "prompt", "query", "instruction", "text")
"""Fields that are searched for where a record has them."""
_IDS = ("id", "task_id", "question_id", "qid")


def list_benchmark_files(paths: Iterable[Path]) -> list[Path]:
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
    for file in list_benchmark_files(paths):
        before = len(found)
        for where, record in read_records(file):
            id_ = next((str(record[name]) for name in _IDS if isinstance(record.get(name), (str, int))),
                       f"line {where.rpartition(':')[2]}")
            texts = {name: text for name in fields if (text := collect_text(_value(record, name))).strip()}
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


def collect_text(value: Any) -> str:
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


@dataclass(frozen=True, kw_only=True)
class BenchmarkSearchSettings:
    """Which texts of benchmarks are looked for."""

    benchmarks: Annotated[tuple[Path, ...], MinLen(1), Flag(many=True)]
    """.jsonl files, or folders of them; each line is a record of a benchmark."""
    fields: Annotated[tuple[str, ...], MinLen(1), Flag(value="NAME", many=True)] = FIELDS
    """Fields of a record, each of which is looked for where it is there; a dot leads into an object."""
    ngram: Annotated[int, Ge(1), Le(1000)] = RUN_WORDS
    """Words in a row that a text may not share with an item; a character of Thai, Chinese or Japanese is a
    quarter of a word, a syllable of Korean a third."""
    min_words: Annotated[AtLeastOne, at_most_field("ngram")] = 5
    """An item that is shorter than `ngram` is found as a whole, if it has at least so many words."""

    def search(self) -> ItemSearch:
        """Read the benchmarks.

        Raises:
            UserError: a file cannot be read, or a record has none of the fields.
        """
        return ItemSearch(read_items(self.benchmarks, self.fields), self.ngram, self.min_words)


class DecontaminateSettings(BenchmarkSearchSettings):
    """Settings of the step."""

    def problems(self) -> list[SettingsProblem]:
        """Return what is wrong with the benchmarks: now, and not when all documents are parsed."""
        try:
            read_items(self.benchmarks, self.fields)
        except UserError as e:
            return [SettingsProblem(ProblemCode.FILE, "benchmarks", str(e))]
        return []


class Decontaminate(Step):
    """Drops documents with text of benchmarks; the column `contamination` names the items."""

    kind = "decontaminate"
    version = 2  # looks at each document alone
    added_columns = {"contamination": "string"}
    Settings = DecontaminateSettings
    settings: DecontaminateSettings

    def list_files(self) -> Sequence[Path]:
        return list_benchmark_files(self.settings.benchmarks)

    def load_inputs(self, view: View) -> None:
        self._search = self.settings.search()

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(document.text) for document in documents]

    def _outcome(self, text: str) -> StepOutcome:
        hits = find_hits(text, self._search, 0)
        items = " ".join(sorted({f"{hit.benchmark}:{hit.item}" for hit in hits}))
        return StepOutcome(REASON if hits else "", values={"contamination": items})
