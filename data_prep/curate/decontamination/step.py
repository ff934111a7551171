"""Step `decontaminate`: drop documents that contain benchmark text."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import regex
from annotated_types import Ge, Le, MinLen

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome, View
from megatron_sov.base.documents.files import is_records, walk_files
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, to_plain_form
from megatron_sov.base.documents.overlap import RUN_WORDS, Units, find_units, fold_text
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, Flag, ProblemCode, SettingsProblem, at_most_field

REASON = "text of a benchmark"
FIELDS = ("question", "problem", "prompt", "query", "instruction", "text")
"""Record fields to search for by default."""
CONTEXT_CHARS = 100
"""Characters in `BenchmarkHit.before` and `BenchmarkHit.after`."""
MAX_HITS = 1000
"""Maximum hits to report for a text."""
MAX_SHOWN_CHARS = 1000
"""Maximum characters in `BenchmarkHit.found`."""
MAX_FIELD_DEPTH = 4
"""Nested lists and objects in a field; deeper strings are ignored, so that no file overflows the stack."""
_ID_FIELDS = ("id", "task_id", "question_id", "qid")
_GRAPHEME = regex.compile(r"\X")

Span = tuple[int, int]
"""First index and end index, exclusive."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSearchSettings:
    """Benchmarks to search for, and minimum lengths for a match."""

    benchmarks: Annotated[tuple[Path, ...], MinLen(1), Flag(many=True)]
    """.jsonl files, or folders with such files; each line is a benchmark record."""
    fields: Annotated[tuple[str, ...], MinLen(1), Flag(value="NAME", many=True)] = FIELDS
    """Record fields to search, if present; a dot leads into an object."""
    ngram: Annotated[int, Ge(1), Le(1000)] = RUN_WORDS
    """Words in a row that a text may not share with an item; a Thai, Chinese or Japanese character counts as
    a quarter word, a Korean syllable as a third."""
    min_words: Annotated[AtLeastOne, at_most_field("ngram")] = 5
    """Minimum words in an item shorter than `ngram`, which matches only as a whole."""

    def build_search(self) -> ItemSearch:
        """Read the benchmarks; raises `UserError` as `read_items`."""
        return ItemSearch(read_items(self.benchmarks, self.fields), self.ngram, self.min_words)


class DecontaminateSettings(BenchmarkSearchSettings):
    """Settings for `decontaminate`."""

    def problems(self) -> list[SettingsProblem]:
        """Read the benchmarks now, so that a bad file stops the run before its documents are parsed."""
        try:
            read_items(self.benchmarks, self.fields)
        except UserError as e:
            return [SettingsProblem(ProblemCode.FILE, "benchmarks", str(e))]
        return []


class Decontaminate(Step):
    """Drops documents with benchmark text; the column `contamination` names the items."""

    kind = "decontaminate"
    version = 2  # looks at each document alone
    added_columns = {"contamination": "string"}
    Settings = DecontaminateSettings
    settings: DecontaminateSettings

    def list_files(self) -> Sequence[Path]:
        return list_benchmark_files(self.settings.benchmarks)

    def load_inputs(self, view: View) -> None:
        self._search = self.settings.build_search()

    def judge_document(self, document: Doc) -> StepOutcome:
        hits = find_hits(document.text, self._search, 0)
        items = " ".join(sorted({f"{hit.benchmark}:{hit.item}" for hit in hits}))
        return StepOutcome(REASON if hits else "", values={"contamination": items})


@dataclass(frozen=True)
class BenchmarkHit:
    """A passage of a text that matches a benchmark item; field names are keys in hits.json."""

    benchmark: str
    """Stem of the benchmark's file name."""
    item: str
    """Id of the benchmark's record, or its line."""
    field: str
    """Field of the benchmark's record."""
    start: int
    """First character of the passage in the text."""
    stop: int
    """End character, exclusive."""
    before: str
    """Text before the passage."""
    found: str
    """The passage, cut to `MAX_SHOWN_CHARS`."""
    after: str
    """Text after the passage."""


def find_hits(text: str, search: ItemSearch, context_chars: int) -> list[BenchmarkHit]:
    """Search a text for benchmark items, both as written and without markup.

    Args:
        text: the text.
        search: benchmark items.
        context_chars: maximum characters in `BenchmarkHit.before` and `BenchmarkHit.after`.
    """
    matches = _find_matches(text, search)
    if (plain := to_plain_form(text)) is not None:
        spans_by_item = defaultdict(list)
        for item_index, span in matches:
            spans_by_item[item_index].append(span)
        for item_index, (start, stop) in _find_matches(plain.text, search):
            # From the plain form to the written text.
            start, stop = int(plain.starts[start]), int(plain.ends[stop - 1])
            # Both searches may find the same passage.
            if not any(begin < stop and start < end for begin, end in spans_by_item[item_index]):
                matches.append((item_index, (start, stop)))
    hits = []
    for item_index, (start, stop) in matches[:MAX_HITS]:
        item = search.items[item_index]
        hits.append(BenchmarkHit(
            item.benchmark, item.id, item.field, start, stop, text[max(0, start - context_chars):start],
            text[start:min(stop, start + MAX_SHOWN_CHARS)], text[stop:stop + context_chars]))
    return hits


def _find_matches(text: str, search: ItemSearch) -> list[tuple[int, Span]]:
    """Return index into `search.items` and span in `text` for each match."""
    units = find_units(text)
    matches = search.find(units)[:MAX_HITS]
    if not matches:
        return []
    spans = locate_stretches(text, units, [(match.begin, match.end) for match in matches])
    return [(match.item, span) for match, span in zip(matches, spans, strict=True)]


def locate_stretches(text: str, units: Units, stretches: Sequence[Span]) -> list[Span]:
    """Convert spans in units to spans in characters.

    Args:
        text: the text as written.
        units: units of `text`.
        stretches: first unit and end unit, exclusive.
    """
    spans = [units.span(begin, end) for begin, end in stretches]
    if units.folded == text:
        return spans
    # Folding may split or join characters: spans widen to whole graphemes.
    starts, ends = _map_folded_characters(text, units.folded)
    return [(starts[start], ends[stop - 1]) for start, stop in spans]


def _map_folded_characters(text: str, folded: str) -> tuple[list[int], list[int]]:
    """Return start and end of the grapheme in `text` for each character in `folded`.

    Unicode's normal forms never combine characters across graphemes.
    """
    starts: list[int] = []
    ends: list[int] = []
    is_folded = folded != unicodedata.normalize("NFKC", text)
    for match in _GRAPHEME.finditer(text):
        # `find_units` folds some texts and only normalizes other texts; the same function on a grapheme gives
        # its number of folded characters.
        form = fold_text(match[0]) if is_folded else unicodedata.normalize("NFKC", match[0])
        starts += [match.start()] * len(form)
        ends += [match.end()] * len(form)
    if len(starts) != len(folded):  # characters did combine: use the whole text
        return [0] * len(folded), [len(text)] * len(folded)
    return starts, ends


def list_benchmark_files(paths: Iterable[Path]) -> list[Path]:
    """List the files of records in `paths`; raises `UserError` for a missing file or an empty folder."""
    benchmark_files: list[Path] = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in map(Path, walk_files(path, [])) if is_records(file.name))
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"benchmarks: {path}: is no file, and no folder with files of records (.jsonl); "
                            "nothing is fetched by a benchmark's name: save each as .jsonl, e.g. by "
                            "datasets' `to_json`, and pass the files after --benchmarks, with blanks between")
        benchmark_files += files
    return benchmark_files


def read_items(paths: Iterable[Path], fields: Sequence[str]) -> list[SearchItem]:
    """Read benchmark items, in order.

    Args:
        paths: files of records, or folders with such files.
        fields: each field with text is an item; a dot leads into an object.

    Raises:
        UserError: a file cannot be read or has no records, a line is no JSON object, or a record has text in
            none of the fields.
    """
    items: list[SearchItem] = []
    for file in list_benchmark_files(paths):
        num_before = len(items)
        for where, record in read_records(file):
            texts = {name: collect_text(_get_field(record, name)) for name in fields}
            texts = {name: text for name, text in texts.items() if text.strip()}
            # Without the error, the record would silently not be searched for.
            if not texts:
                raise UserError(f"{where}: has text in none of the fields {', '.join(fields)} (fields: "
                                f"{', '.join(record) or 'none'}); name those of the benchmark with `fields`")
            item_id = _get_item_id(record, where)
            items += [SearchItem(file.stem, item_id, name, text) for name, text in texts.items()]
        if len(items) == num_before:
            raise UserError(f"benchmarks: {file}: has no records; each line is a JSON object")
    return items


def _get_item_id(record: Mapping[str, Any], where: str) -> str:
    for name in _ID_FIELDS:
        if isinstance(record.get(name), (str, int)):
            return str(record[name])
    return f"line {where.rpartition(':')[2]}"


def _get_field(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def collect_text(value: Any) -> str:
    """Join the strings in a value from JSON: a string, list, object, or messages without their roles."""
    return "\n".join(_iter_strings(value, 0))


def _iter_strings(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif depth < MAX_FIELD_DEPTH:
        if isinstance(value, Mapping):
            value = [inner for name, inner in value.items() if name != "role"]
        if isinstance(value, list):
            for inner in value:
                yield from _iter_strings(inner, depth + 1)
