"""A document's way, ids that were found, and a run's sources, as lines on a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.curate.journey.facts import QUARANTINE, Corpus, StepFolder, batches, damage, open_shard, row_of
from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.figures import format_size
from megatron_sov.work.progress.progress_bar import work_bar

# A document's way through a pipeline: what each step made of it, read from the shard that its id names.

_ID = re.compile(r"(.+):(\d{1,9}):([0-9a-f]{16})")
READ, KEPT, CHANGED, DROPPED, NOT_DONE = "read", "kept", "changed", "dropped", "not done"
"""What can become of a document at a step; one that a step passes by is kept."""


@dataclass(frozen=True)
class JourneyStop:
    """One step of a document's way."""

    step: str
    """Number and kind."""
    fate: str
    """One of the words above."""
    reason: str = ""
    """Why it was dropped."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the step says of it."""
    text: str | None = None
    """Its text behind this step where the step changed it."""


@dataclass(frozen=True)
class Way:
    """A document's way."""

    id: str
    base: dict[str, Any]
    """What was read: text, source, where, licence and the other columns of its source."""
    stops: list[JourneyStop]
    """In order, up to the one where it ends."""

    @property
    def end(self) -> JourneyStop:
        return self.stops[-1]

    @property
    def verdict(self) -> str:
        if self.end.fate == DROPPED:
            return f"dropped by {self.end.step}: {self.end.reason}"
        if self.end.fate == NOT_DONE:
            return f"on its way; {self.end.step} is not done yet"
        return f"kept through {len(self.stops) - 1} steps"


def parse_id(text: str) -> tuple[str, int, str]:
    """Return an id's source, shard and place.

    Raises:
        UserError: it is no id.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise UserError(f"--id {text[:80]!r}: is no id (SOURCE:SHARD:16 hexadecimal digits, e.g. "
                        "web:3:0123456789abcdef); --where FILE and --text WORDS find ids")
    return found[1], int(found[2]), found[3]


def follow(corpus: Corpus, document: str) -> Way:
    """Return the way of a document.

    Raises:
        UserError: there is no such document, or a shard on its way is damaged.
    """
    source, number, _ = parse_id(document)
    first, *steps = corpus.steps(source)
    file = first.shard(number)
    if not file.is_file():
        raise UserError(f"--id {document}: {file} is missing; source {source!r} has no shard of this number "
                        f"(of its {len(first.numbers())}), so correct the id or run the pipeline again")
    # All layers of a shard have the rows of its base: the row is looked up once.
    row = _row(file, document)
    base = {"source": source} | row_of(file, row)
    num_rows = open_shard(file).metadata.num_rows
    stops = [JourneyStop(first.name, READ)]
    for step in steps:
        stops.append(_stop(step, number, row, num_rows))
        if stops[-1].fate in (DROPPED, NOT_DONE):
            break
    return Way(document, base, stops)


def _row(file: Path, document: str) -> int:
    first = 0
    for batch in batches(file, ("id",)):
        at = pc.index(batch.column(0), pa.scalar(document, batch.schema.field(0).type)).as_py()
        if at >= 0:
            return first + int(at)
        first += batch.num_rows
    raise UserError(f"--id {document}: {file} has no such document among its {first:,}; --where FILE and "
                    "--text WORDS find ids")


def _stop(step: StepFolder, number: int, row: int, num_rows: int) -> JourneyStop:
    file = step.shard(number)
    if not file.is_file():
        return JourneyStop(step.name, NOT_DONE)
    check_rows(file, num_rows)
    layer = row_of(file, row)
    reason, text = layer.pop("reason", None), layer.pop("text", None)
    layer.pop("id", None)
    columns = {name: value for name, value in layer.items() if value is not None}
    if reason:
        return JourneyStop(step.name, DROPPED, str(reason), columns)
    return JourneyStop(step.name, KEPT if text is None else CHANGED, "", columns, text)


def check_rows(file: Path, num_rows: int) -> None:
    """Raise `UserError` where a layer has not one row for each row of its base shard."""
    found = open_shard(file).metadata.num_rows
    if found != num_rows:
        raise damage(file, f"{found:,} rows over {num_rows:,} documents")


def fates(steps: Sequence[StepFolder], number: int) -> list[str]:
    """Return one sentence on what became of each document of a shard, in order: "kept", "dropped by 02 rules:
    too short", "on its way; 03 level is not done yet".

    Raises:
        UserError: a shard is missing or damaged.
    """
    first, *later = steps
    num_rows = open_shard(first.shard(number)).metadata.num_rows
    said = ["kept"] * num_rows
    for step in later:
        file = step.shard(number)
        if not file.is_file():
            return [f"on its way; {step.name} is not done yet" if one == "kept" else one for one in said]
        check_rows(file, num_rows)
        row = 0
        for batch in batches(file, ("reason",)):
            for reason in batch.column(0).to_pylist():
                # The first step that drops a document is the one that counts; later layers are empty for it.
                if reason and said[row] == "kept":
                    said[row] = f"dropped by {step.name}: {reason}"
                row += 1
    return said


# Ids of documents, found by the raw file that they came from, by words in them, or by why they were
# dropped.

Matches = Callable[[pa.RecordBatch], pa.BooleanArray]
_RECORD = re.compile(r":\d+$")
MAX_QUARANTINE_LINE_CHARS = 100_000


@dataclass(frozen=True)
class FoundDocument:
    """A document that was looked for."""

    id: str
    where: str
    """Its place in the raw files."""
    fate: str
    """What became of it, as `fates` says it."""


@dataclass(frozen=True)
class DocumentSearch:
    """What is looked through, and how far."""

    count: int = 20
    """Documents at most."""
    scan_bytes: int = 10 * 2**30
    """Of shards on the disk; what lies behind is not looked at, and that is said."""
    source: str | None = None
    """One source only."""


class Scan:
    """One look through the shards; what it could not reach is told by `rest_bytes`."""

    def __init__(self, corpus: Corpus, search: DocumentSearch) -> None:
        self._corpus = corpus
        self._search = search
        self.rest_bytes = 0
        """Of shards that were not looked at."""

    def by_text(self, words: str) -> Iterator[FoundDocument]:
        """Yield documents whose text, as it was read, has these words, upper and lower case the same."""
        yield from self._found(("text",), lambda batch: pc.match_substring(
            batch.column("text"), words, ignore_case=True))

    def by_file(self, file: str) -> Iterator[FoundDocument]:
        """Yield documents that were read from a file: its name, or the end of its path."""
        def matches(batch: pa.RecordBatch) -> pa.BooleanArray:
            where = _both(batch)[1]
            # A substring is looked for by Arrow; only where one is found are names compared in Python.
            likely = pc.match_substring(where, file)
            if not pc.any(likely).as_py():  # nearly always: no Python for each row
                return likely
            return pa.array([_is_in(place, file) for place in where.to_pylist()], pa.bool_())

        yield from self._found((), matches)

    def dropped(self, reason: str) -> Iterator[FoundDocument]:
        """Yield documents that a step dropped for a reason that has these words in it; "": for any."""
        for steps, number in self._shards():
            ids = (pair for batch in batches(steps[0].shard(number), ("id", "where"))
                   for pair in zip(*(column.to_pylist() for column in _both(batch)), strict=True))
            for fate, (document, where) in zip(fates(steps, number), ids, strict=True):
                if fate.startswith("dropped") and reason.casefold() in fate.partition(": ")[2].casefold():
                    yield FoundDocument(document, where, fate)

    def quarantined(self, file: str) -> Iterator[str]:
        """Yield one sentence for each file or record of that name that could not be read."""
        for name in self._names():
            listed = self._corpus.out / QUARANTINE / f"{name}.jsonl"
            if not listed.is_file():
                continue
            with open(listed, encoding="utf-8", errors="replace") as f:
                # A line may hold a record of any size: what is longer comes in parts, and its parts are no
                # JSON.
                while line := f.readline(MAX_QUARANTINE_LINE_CHARS):
                    row = _row_of(line)
                    if _is_in(str(row.get("file", "")), file):
                        yield (f"{name}: {row.get('place') or row['file']}: {row.get('code', '')}: "
                               f"{row.get('reason', '')}")

    def _names(self) -> list[str]:
        if self._search.source is not None:
            self._corpus.steps(self._search.source)
            return [self._search.source]
        return list(self._corpus.sources)

    def _shards(self) -> Iterator[tuple[list[StepFolder], int]]:
        shards = [(steps, number, steps[0].shard(number).stat().st_size)
                  for steps in map(self._corpus.steps, self._names()) for number in steps[0].numbers()]
        seen_bytes = 0
        with work_bar("searching", sum(size for *_, size in shards), "B") as bar:
            for steps, number, size_bytes in shards:
                if seen_bytes >= self._search.scan_bytes:
                    self.rest_bytes += size_bytes
                    continue
                yield steps, number
                seen_bytes += size_bytes
                bar.update(size_bytes)

    def _found(self, columns: tuple[str, ...], matches: Matches) -> Iterator[FoundDocument]:
        for steps, number in self._shards():
            hits: list[tuple[int, str, str]] = []
            row = 0
            for batch in batches(steps[0].shard(number), ("id", "where", *columns)):
                rows = pc.indices_nonzero(matches(batch))
                ids, places = (column.take(rows).to_pylist() for column in _both(batch))
                hits += zip((row + at for at in rows.to_pylist()), ids, places, strict=True)
                row += batch.num_rows
                if len(hits) >= self._search.count:
                    break
            if hits:
                told = fates(steps, number)
                yield from (FoundDocument(document, where, told[at]) for at, document, where in hits)


def num_documents(corpus: Corpus, source: str) -> int:
    first = corpus.steps(source)[0]
    return sum(open_shard(first.shard(number)).metadata.num_rows for number in first.numbers())


def _both(batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
    return batch.column("id"), batch.column("where").fill_null("")


def _is_in(where: str, file: str) -> bool:
    """Return whether a place, "FILE" or "FILE:RECORD", lies in a file of that name or end of a path."""
    return any(name == file or name.endswith(f"/{file}") for name in (where, _RECORD.sub("", where)))


def _row_of(line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


# What a step changed in a text, as lines that a person reads in a moment.

MAX_PRODUCT = 1_000_000
"""Longest comparison, in pairs of lines or of words; difflib's time grows with it."""
AROUND_CHARS = 40
"""Shown on both sides of a change inside a line."""
LINE_CHARS = 240
"""Shown of a line."""
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


def changes(before: str, after: str, max_lines: int = 40) -> list[str]:
    """Return the lines that differ: "- " removed, "+ " added, "~ " changed inside, with [-removed-] and
    {+added+} as git's word diff has them, "@ " how many lines before are the same.

    Args:
        before: the text that a step met.
        after: the text that it left.
        max_lines: shown at most; the rest is counted.
    """
    old, new = before.splitlines(), after.splitlines()
    # What is the same at both ends is cut off first: difflib's time grows with the product of the lines.
    start, end = _same_ends(old, new)
    middle_old, middle_new = old[start:len(old) - end], new[start:len(new) - end]
    shown: list[str] = []
    if len(middle_old) * len(middle_new) > MAX_PRODUCT:
        shown += [f"@ line {start + 1:,}", *(f"- {cut(line)}" for line in middle_old[:max_lines // 2]),
                  *(f"+ {cut(line)}" for line in middle_new[:max_lines // 2]),
                  f"… {len(middle_old):,} lines became {len(middle_new):,}, too many to be compared"]
        return shown
    matcher = SequenceMatcher(None, middle_old, middle_new, autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            continue
        shown.append(f"@ line {start + a + 1:,}")
        # Lines that were replaced one for one are shown as changed inside, the rest as removed or added.
        pairs = min(b - a, d - c) if what == "replace" else 0
        shown += [f"~ {_inside(middle_old[a + i], middle_new[c + i])}" for i in range(pairs)]
        shown += [f"- {cut(line)}" for line in middle_old[a + pairs:b]]
        shown += [f"+ {cut(line)}" for line in middle_new[c + pairs:d]]
    if not shown and before != after:
        shown = ["~ only the ends of lines differ"]
    if len(shown) > max_lines:
        shown = [*shown[:max_lines], f"… {len(shown) - max_lines:,} more lines of differences"]
    return shown


def cut(text: str, chars: int = LINE_CHARS) -> str:
    return text if len(text) <= chars else f"{text[:chars]} … ({len(text) - chars:,} more characters)"


def _same_ends(old: list[str], new: list[str]) -> tuple[int, int]:
    """Return how many items are the same at the beginning and, of the rest, at the end."""
    most = min(len(old), len(new))
    start = next((i for i in range(most) if old[i] != new[i]), most)
    end = next((i for i in range(most - start) if old[-1 - i] != new[-1 - i]), most - start)
    return start, end


def _inside(old: str, new: str) -> str:
    a, b = _WORD.findall(old), _WORD.findall(new)
    start, end = _same_ends(a, b)
    middle_a, middle_b = a[start:len(a) - end], b[start:len(b) - end]
    codes = ([("replace", 0, len(middle_a), 0, len(middle_b))]
             if len(middle_a) * len(middle_b) > MAX_PRODUCT
             else SequenceMatcher(None, middle_a, middle_b, autojunk=False).get_opcodes())
    parts = [_tail("".join(a[:start]))]
    for what, i, j, k, m in codes:
        removed, added = "".join(middle_a[i:j]), "".join(middle_b[k:m])
        if what == "equal":
            parts.append(removed if len(removed) <= 2 * AROUND_CHARS
                         else f"{removed[:AROUND_CHARS]} … {removed[-AROUND_CHARS:]}")
        else:
            parts += [f"[-{cut(removed)}-]" if removed else "", f"{{+{cut(added)}+}}" if added else ""]
    same = "".join(a[len(a) - end:]) if end else ""
    parts.append(same if len(same) <= AROUND_CHARS else f"{same[:AROUND_CHARS]} …")
    return cut("".join(parts), 4 * LINE_CHARS)


def _tail(text: str) -> str:
    return text if len(text) <= AROUND_CHARS else f"… {text[-AROUND_CHARS:]}"


SHOWN_FIRST = ("where", "url", "title", "date", "licence", "kind", "synthetic", "language_hint", "own_id")
"""Columns of a document's source, in the order in which they are shown; empty ones are not."""
VALUE_CHARS = 200


@dataclass(frozen=True)
class DocumentQuery:
    """What is to be shown; nothing: the sources."""

    id: str | None = None
    where: str | None = None
    text: str | None = None
    dropped: str | None = None
    source: str | None = None
    count: int = 20
    scan_bytes: int = 10 * 2**30
    chars: int = 600
    """Characters of a document's text; 0: all."""
    json: bool = False


def show(corpus: Corpus, asked: DocumentQuery) -> None:
    """Print what is asked for; control characters of documents are shown, not sent.

    Raises:
        UserError: there is no such document or source, or a shard is damaged.
    """
    if asked.id is not None:
        way = follow(corpus, asked.id)
        if asked.json:
            print(json.dumps(asdict(way), indent=1))  # ASCII: what commands a terminal is escaped
            return
        lines: Iterator[str] = iter(way_lines(way, asked.chars))
    elif asked.where is None and asked.text is None and asked.dropped is None:
        lines = iter(source_lines(corpus, asked.source))
    else:
        lines = _found_lines(corpus, asked)
    for line in lines:
        print(visible(line))


def way_lines(way: Way, chars: int) -> list[str]:
    base = way.base
    text = str(base.get("text") or "")
    lines = [way.id, f"  {way.verdict}", ""]
    lines += [f"  {name:<14} {_value(base[name])}" for name in ("source", *SHOWN_FIRST) if base.get(name)]
    if base.get("extra") not in (None, "", "{}"):
        lines.append(f"  {'extra':<14} {_value(base['extra'])}")
    lines += ["", f"  {way.stops[0].step:<22} {len(text):,} characters, {len(text.encode()):,} bytes"]
    for stop in way.stops[1:]:
        said = f"{stop.fate}: {stop.reason}" if stop.reason else stop.fate
        columns = ", ".join(f"{name}={_value(value)}" for name, value in stop.columns.items())
        lines.append(f"  {stop.step:<22} {said}{f'  + {columns}' if columns else ''}")
        if stop.text is not None:
            lines[-1] += f"  {len(text):,} -> {len(stop.text):,} characters"
            lines += [f"    {line}" for line in changes(text, stop.text)]
            text = stop.text
    lines += ["", "  text as it " + ("was when it was dropped" if way.end.reason else "is now") + ":"]
    return lines + [f"  | {line}" for line in cut(text, chars or len(text)).split("\n")]


def source_lines(corpus: Corpus, only: str | None) -> list[str]:
    """Return a line for each source: what was read of it, and what its steps left."""
    if not corpus.is_complete:
        names = corpus.sources if only is None else {only: corpus.steps(only)}
        return [f"{corpus.out}: the run has not come to its end; read so far:",
                *(f"{name:<24} {num_documents(corpus, name):>14,} documents, "
                  f"{len(steps) - 1} steps begun" for name, steps in names.items())]
    if only is not None:
        corpus.steps(only)
    lines = [f"{corpus.out}: pipeline {corpus.summary.name!r}",
             f"{'source':<24} {'step':<22} {'documents in':>14} {'kept':>14} {'bytes kept':>12}  "
             "mostly dropped for"]
    for source in corpus.summary.sources:
        for step in source.steps if only in (None, source.name) else ():
            worst = max(step.dropped.items(), key=lambda item: item[1].documents, default=None)
            lines.append(f"{source.name:<24} {step.name:<22} {step.documents_in:>14,} "
                         f"{step.documents_kept:>14,} {format_size(step.bytes_kept):>12}  "
                         f"{worst[0] if worst else '-'}")
    return lines


def _found_lines(corpus: Corpus, asked: DocumentQuery) -> Iterator[str]:
    scan = Scan(corpus, DocumentSearch(asked.count, asked.scan_bytes, asked.source))
    found = _chosen(scan, asked)
    num_shown = 0
    for one in islice(found, asked.count):
        num_shown += 1
        yield f"{one.id}  {one.where}  {one.fate}"
    if asked.where is not None:
        for sentence in islice(scan.quarantined(asked.where), asked.count):
            num_shown += 1
            yield f"not read  {cut(sentence)}"
    # One more is looked for, to say whether there are others.
    more = next(found, None)
    if more is not None:
        yield f"… and more; --count {asked.count * 10} shows more of them"
    elif not num_shown:
        yield "no document found"
    if scan.rest_bytes:
        yield (f"… not looked at: {format_size(scan.rest_bytes)} of shards; --source NAME narrows the "
               "search, "
               "--scan-bytes N widens it")


def _chosen(scan: Scan, asked: DocumentQuery) -> Iterator[FoundDocument]:
    if asked.text is not None:
        return scan.by_text(asked.text)
    return scan.by_file(asked.where) if asked.where is not None else scan.dropped(asked.dropped or "")


def _value(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return cut(" ".join(shown.split()), VALUE_CHARS)
