"""Search training data for the items of a result file, and compute the scores over the remaining items.

`documents.item_search` finds an item if its question or its answer shares ten consecutive words with a
training document, or stands in the document as a whole if shorter. `sov-data decontaminate` uses the same
search. """

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.documents import BadRecord, FileSpan, RecordReading, list_files, plan_units, read_span
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, list_search_forms
from megatron_sov.base.documents.overlap import RUN_WORDS, find_units
from megatron_sov.base.errors import UserError
from megatron_sov.bench.score_differences import (
    ScoredResults, format_metric_name, get_item_scores, is_mean_of_items)
from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.train.data.sources import open_sources, tokenizer_folder
from megatron_sov.work.processes.pool import map_in_processes
from megatron_sov.work.progress.progress_bar import create_bar

MIN_WORDS = 5
"""Shorter items are not searched: they occur by chance."""
UNIT_DOCUMENTS = 2000
"""Documents from a token shard per work unit."""
EXCERPT_CHARS = 200
_ANY_VOCABULARY = sys.maxsize
_FORMATS = ("text", "chat", "preference", "prompt", "rollouts")


@dataclass(frozen=True)
class ItemHit:
    """A position in the training data that matches an item."""

    task: str
    item: str
    """`ResultItem.item`."""
    field: str
    """`question` or `answer`."""
    where: str
    """Training document: file and line, or folder, source and number in a token shard."""
    text: str
    """Matching text, folded to lower case."""


@dataclass(frozen=True)
class TaskContamination:
    """Items of a task that occur in the training data."""

    items: int
    items_hit: int
    too_short: int
    """Number of items that were too short for the search."""
    metric: str | None
    """Name of the task's first metric, from `format_metric_name`."""
    value: float | None
    """The metric over all items."""
    value_without: float | None
    """The metric over the items not found; None if the metric is no mean over items."""


@dataclass(frozen=True)
class ContaminationCheck:
    tasks: dict[str, TaskContamination]
    hits: tuple[ItemHit, ...]
    """First position per item and field."""
    num_documents: int


def search_training_data(scored: ScoredResults, data: Sequence[Path], reading: RecordReading, workers: int,
                         show_progress: bool = True) -> ContaminationCheck:
    """Search the training split of token shards, and text files in the format `reading`, for items. Raises
    `UserError`: items without text, or unreadable data."""
    texts = list_item_texts(scored)
    units = list_search_units(data)
    hits: dict[tuple[str, str, str], ItemHit] = {}
    num_documents = 0
    with create_bar("searching", len(units), "part", show_progress) as bar:
        for unit_hits, count in map_in_processes(build_search, (texts, reading), units, workers):
            num_documents += count
            for hit in unit_hits:
                # units arrive in order, so the first position does not depend on the number of workers
                hits.setdefault((hit.task, hit.item, hit.field), hit)
            bar.update()
    short = set(ItemSearch(texts, RUN_WORDS, MIN_WORDS).too_short)
    searched = {(text.benchmark, text.id) for number, text in enumerate(texts) if number not in short}
    tasks = {}
    for name, items in scored.items.items():
        if items:  # a group has no items of its own
            too_short = {text.id for text in texts if text.benchmark == name
                         and (name, text.id) not in searched}
            items_hit = {item for task, item, _ in hits if task == name}
            tasks[name] = _count_contamination(scored, name, items_hit, len(too_short))
    return ContaminationCheck(tasks, tuple(hits.values()), num_documents)


def list_item_texts(scored: ScoredResults) -> list[SearchItem]:
    """Return the questions and answers to search for; raise `UserError` for a task without texts."""
    texts = []
    for task, items in scored.items.items():
        task_texts = []
        for name, item in items.items():
            task_texts += [SearchItem(task, name, field, text)
                           for field, text in (("question", item.question), ("answer", item.answer))
                           if text.strip()]
        if items and not task_texts:
            raise UserError(f"{scored.path}: the items of task {task} contain no text to search for; run "
                            "`megatron-sov eval lm` again")
        texts += task_texts
    return texts


@dataclass(frozen=True)
class _ShardUnit:
    """A range of documents from a source in token shards."""

    folder: str
    source: str
    begin: int
    end: int


def list_search_units(data: Sequence[Path]) -> list[Any]:
    """Return the work units of training data: file spans and ranges of `UNIT_DOCUMENTS` packed documents.
    Raises `UserError`: no data files."""
    units: list[Any] = []
    for path in data:
        if not (path / MANIFEST).is_file() or read_manifest(path).kind != "tokens":
            units += plan_units(list_files(path))
            continue
        for source in open_sources({str(path): 1.0}, _ANY_VOCABULARY, _FORMATS):
            count = len(source.open_split("train").lengths) if source.num_tokens.get("train") else 0
            units += [_ShardUnit(str(path), source.name, begin, min(begin + UNIT_DOCUMENTS, count))
                      for begin in range(0, count, UNIT_DOCUMENTS)]
    return units


def build_search(texts: list[SearchItem], reading: RecordReading
                 ) -> Callable[[Any], tuple[list[ItemHit], int]]:
    """Build the function that searches a work unit and returns hits and number of documents."""
    # built in each worker rather than pickled
    search = ItemSearch(texts, RUN_WORDS, MIN_WORDS)

    def search_unit(unit: Any) -> tuple[list[ItemHit], int]:
        hits: list[ItemHit] = []
        num_documents = 0
        documents = _read_shard(unit) if isinstance(unit, _ShardUnit) else _read_files(unit, reading)
        for where, document_texts in documents:
            num_documents += 1
            forms = [form for text in document_texts for form in list_search_forms(text)]
            for words in map(find_units, forms):
                for match in search.find(words):
                    item = texts[match.item]
                    begin, end = words.span(match.begin, match.end)
                    hits.append(ItemHit(item.benchmark, item.id, item.field, where,
                                        words.folded[begin:end][:EXCERPT_CHARS]))
        return hits, num_documents

    return search_unit


def _read_files(spans: tuple[FileSpan, ...], reading: RecordReading) -> Iterator[tuple[str, list[str]]]:
    """Yield (position, texts) for each document in spans of files."""
    for span in spans:
        for document in read_span(span, reading):
            if not isinstance(document, BadRecord):
                yield document.where, list(document.texts())
            elif document.code != "empty":  # a skipped record could contain an item
                raise UserError(f"{span.file}: {document.reason}")


def _read_shard(unit: _ShardUnit) -> Iterator[tuple[str, list[str]]]:
    """Yield (position, decoded text) for each packed document in a unit."""
    sources = open_sources({unit.folder: 1.0}, _ANY_VOCABULARY, _FORMATS)
    folder = tokenizer_folder(sources)
    if folder is None:
        raise UserError(f"{unit.folder}: has no tokenizer to decode its tokens; copy the tokenizer that "
                        "packed the shards into its folder tokenizer")
    tokenizer = open_tokenizer(folder)
    documents = next(source for source in sources if source.name == unit.source).open_split("train")
    for number in range(unit.begin, unit.end):
        ids = documents.tokens(number, 0, int(documents.lengths[number])).tolist()
        yield (f"{unit.folder}: {unit.source}, document {number}",
               [tokenizer.decode(ids, skip_special_tokens=True)])


def _count_contamination(scored: ScoredResults, task: str, items_hit: set[str], too_short: int
                         ) -> TaskContamination:
    counts = len(scored.items[task]), len(items_hit), too_short
    metrics = scored.results.tasks[task].metrics
    if not metrics:
        return TaskContamination(*counts, None, None, None)
    first = metrics[0]
    scores = get_item_scores(scored, task, first)
    remaining = [score for item, score in scores.items() if item not in items_hit]
    value_without = None
    if remaining and is_mean_of_items(first, scores):
        value_without = math.fsum(remaining) / len(remaining)
    return TaskContamination(*counts, format_metric_name(first), first.value, value_without)
