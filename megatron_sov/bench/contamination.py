"""Whether the items of a score stand in the text that a model was trained on, and the score without them.

An item is found by the same search that `sov-data decontaminate` takes text of benchmarks out by
(`documents.item_search`): its question or its answer shares ten words in a row with a training document, or
stands in one as a whole where it is shorter.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.documents import BadRecord, FileSpan, RecordReading, list_files, plan_units, read_span
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, list_search_forms
from megatron_sov.base.documents.overlap import RUN_WORDS, find_units
from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.results import Contamination, Results
from megatron_sov.bench.score_differences import ScoredItem, is_mean, values_of
from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.work.processes.pool import map_in_processes
from megatron_sov.work.progress.progress_bar import create_bar

MIN_WORDS = 5
"""An item of fewer words is not looked for: it says too little."""
UNIT_DOCUMENTS = 2000
"""Of a token shard that a process searches at a time."""
PIECE_TOKENS, OVERLAP_TOKENS = 1 << 17, 1 << 10
"""A longer document is searched in pieces, which have so much in common that no run of words is parted."""
EXCERPT_CHARS = 200
_ANY_VOCABULARY = sys.maxsize
_FORMATS = ("text", "chat", "preference", "prompt", "rollouts")


@dataclass(frozen=True)
class ItemHit:
    """A place in a training document that an item has too."""

    task: str
    item: str
    """Number or name of the item."""
    field: str
    """`question` or `answer`."""
    where: str
    """The document: a file, or the folder, source and number of a packed one."""
    text: str
    """What stands there, in one case and without what is passed over."""


@dataclass(frozen=True)
class ContaminationCheck:
    results: Results
    """With `contamination` in each task."""
    hits: tuple[ItemHit, ...]
    """The first place of each item and field."""
    too_short: Mapping[str, int]
    """Task -> items with too few words to be searched for, of which nothing is known."""
    num_documents: int


def check(scored: ScoredItem, data: Sequence[Path], reading: RecordReading, workers: int, shows: bool = True
          ) -> ContaminationCheck:
    """Search training text for the items of all tasks.

    Args:
        scored: results and their items.
        data: folders of token shards, whose training split is searched, or files and folders of text.
        reading: what the files hold.
        workers: processes.
        shows: a bar.

    Raises:
        UserError: there are no texts of items, or the data cannot be read.
    """
    texts = read_item_texts(scored)
    units = list_units(data)
    found: dict[tuple[str, str, str], ItemHit] = {}
    num_documents = 0
    with create_bar("searching", len(units), "part", shows) as bar:
        for hits, count in map_in_processes(searching, (texts, reading), units, workers):
            num_documents += count
            for hit in hits:
                # Parts come in order, so the first place is the same with any number of workers.
                found.setdefault((hit.task, hit.item, hit.field), hit)
            bar.update()
    short = set(ItemSearch(texts, RUN_WORDS, MIN_WORDS).too_short)
    searched = {(text.benchmark, text.id) for number, text in enumerate(texts) if number not in short}
    too_short = Counter(task for task, _ in {(text.benchmark, text.id) for text in texts} - searched)
    tasks = dict(scored.results.tasks)
    for name in (name for name in tasks if scored.items[name]):  # a group has no items of its own
        hit_items = {item for task, item, _ in found if task == name}
        tasks[name] = dataclasses.replace(tasks[name], contamination=Contamination(
            ", ".join(map(str, data)), len(hit_items), _value_without(scored, name, hit_items)))
    return ContaminationCheck(dataclasses.replace(scored.results, tasks=tasks), tuple(found.values()),
                              too_short, num_documents)


def read_item_texts(scored: ScoredItem) -> list[SearchItem]:
    """Return the questions and answers of all items.

    Raises:
        UserError: a task's items have none.
    """
    texts = []
    for task, items in scored.items.items():
        own = [SearchItem(task, name, field, text) for name, item in items.items()
               for field, text in (("question", item.question), ("answer", item.answer)) if text.strip()]
        if items and not own:
            raise UserError(f"{scored.path}: the items of task {task} have no text that could be searched "
                            "for; run `megatron-sov eval lm` again")
        texts += own
    return texts


@dataclass(frozen=True)
class _TextPart:
    """Documents of a packed source."""

    folder: str
    source: str
    begin: int
    end: int


def list_units(data: Sequence[Path]) -> list[Any]:
    """Return the parts of training data that processes search one by one.

    Raises:
        UserError: there is nothing to read.
    """
    found: list[Any] = []
    for path in data:
        if not (path / MANIFEST).is_file() or read_manifest(path).kind != "tokens":
            found += plan_units(list_files(path))
            continue
        from megatron_sov.train.data.token_shards import open_sources

        for source in open_sources({str(path): 1.0}, _ANY_VOCABULARY, _FORMATS):
            count = len(source.open_split("train").lengths) if source.num_tokens.get("train") else 0
            found += [_TextPart(str(path), source.name, begin, min(begin + UNIT_DOCUMENTS, count))
                      for begin in range(0, count, UNIT_DOCUMENTS)]
    return found


def searching(texts: list[SearchItem], reading: RecordReading) -> Callable[[Any], tuple[list[ItemHit], int]]:
    """Return what searches a part of the training data: it returns what it found, and how many documents it
    has seen."""
    # Built once in each worker, and not sent to it.
    search = ItemSearch(texts, RUN_WORDS, MIN_WORDS)

    def work(unit: Any) -> tuple[list[ItemHit], int]:
        hits: list[ItemHit] = []
        count = 0
        documents = _read_packed(unit) if isinstance(unit, _TextPart) else _read(unit, reading)
        for where, text, is_first in documents:
            count += is_first
            for units in map(find_units, list_search_forms(text)):
                for one in search.find(units):
                    item = texts[one.item]
                    begin, end = units.span(one.begin, one.end)
                    hits.append(ItemHit(item.benchmark, item.id, item.field, where,
                                        units.folded[begin:end][:EXCERPT_CHARS]))
        return hits, count

    return work


def _read(spans: tuple[FileSpan, ...], reading: RecordReading) -> Iterator[tuple[str, str, bool]]:
    for span in spans:
        for document in read_span(span, reading):
            if isinstance(document, BadRecord):
                # a record that is skipped unread could be the one that holds an item
                if document.code != "empty":
                    raise UserError(f"{span.file}: {document.reason}")
                continue
            for i, text in enumerate(document.texts()):
                yield document.where, text, i == 0


def _read_packed(part: _TextPart) -> Iterator[tuple[str, str, bool]]:
    from megatron_sov.train.data.token_shards import open_sources, tokenizer_folder

    sources = open_sources({part.folder: 1.0}, _ANY_VOCABULARY, _FORMATS)
    folder = tokenizer_folder(sources)
    if folder is None:
        raise UserError(f"{part.folder}: has no tokenizer, without which its tokens are no text; put the "
                        "tokenizer that packed it into its folder tokenizer")
    tokenizer = open_tokenizer(folder)
    documents = next(s for s in sources if s.name == part.source).open_split("train")
    for number in range(part.begin, part.end):
        length, begin = int(documents.lengths[number]), 0
        # The last piece must have more than what the one before had already.
        while begin == 0 or begin + OVERLAP_TOKENS < length:
            ids = documents.tokens(number, begin, min(PIECE_TOKENS, length - begin)).tolist()
            yield (f"{part.folder}: {part.source}, document {number}",
                   tokenizer.decode(ids, skip_special_tokens=True), begin == 0)
            begin += PIECE_TOKENS - OVERLAP_TOKENS


def _value_without(scored: ScoredItem, task: str, hit: set[str]) -> float | None:
    """Return a task's first figure over the items that were not found; None where that is no mean of them."""
    metrics = scored.results.tasks[task].metrics
    if not metrics:
        return None
    values = values_of(scored, task, metrics[0])
    left = [value for item, value in values.items() if item not in hit]
    return math.fsum(left) / len(left) if left and is_mean(metrics[0], values) else None
