"""What the documents of an output are: languages, levels, kinds, licences, hosts, dates and scores, counted.

The task that writes an output shard counts it too (`write_shard_facts`), so that the summary of thousands of
shards reads small files.  Sums do not depend on the order or the number of shards, but for
values of which there are very many (hosts): of these the largest of each shard are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards.shard_damage import way_out
from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.sealed import open_parquet, try_read_json, write_json

BATCH_ROWS = 4096


def open_shard(file: Path) -> pq.ParquetFile:
    """Open a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return open_parquet(file, _way(file))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; run the pipeline again, which makes it, or restore it from a "
                        "copy") from None
    except (pa.ArrowException, OSError) as e:
        raise damage(file, str(e)) from None


def damage(file: Path, why: str) -> UserError:
    return UserError(f"{file}: is damaged ({visible(why.splitlines()[0])[:200]}); {_way(file)}")


def _way(file: Path) -> str:
    return f"{way_out(file)} (of a complete run delete manifest.json too, so that it is done again)"


def batches(file: Path, texts: Sequence[str], others: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard.

    Args:
        file: the shard.
        texts: columns of text, which it has to have.
        others: further columns, of which those are given that it has.

    Raises:
        UserError: it is missing or damaged.
    """
    opened = open_shard(file)
    columns = opened.schema_arrow
    if odd := [name for name in texts if name not in columns.names
               or not (pa.types.is_string(columns.field(name).type)
                       or pa.types.is_large_string(columns.field(name).type))]:
        raise damage(file, f"it has no column {odd[0]!r} of text")
    wanted = [*texts, *(name for name in others if name in columns.names and name not in texts)]
    try:
        for batch in opened.iter_batches(BATCH_ROWS, columns=wanted):
            batch.validate(full=True)  # bytes that are no UTF-8 would raise where they are read
            yield batch.select(wanted)
    except (pa.ArrowException, OSError) as e:
        raise damage(file, str(e)) from None


FORMAT = 1
TEXT = "text"
"""Folder of an output's sources, below OUT."""
COLUMNS = ("source", "language", "form", "kind", "level", "licence", "topic", "synthetic")
"""Columns of which each value is counted."""
SCORES = {"quality": (0.0, 1.0), "education": (0.0, 5.0), "language_score": (0.0, 1.0)}
"""Column -> lowest and highest score."""
BINS = 20
NAMED_COUNTS = ("pii", "safety")
"""Columns such as "email=2 phone=1", whose numbers are summed."""
MAX_VALUES, MAX_HOSTS = 1_000, 10_000
"""Kept of one column, and of hosts, the largest first; the rest is one value."""
REST = "(others)"
NONE = ""
"""Stands for documents that have no value."""
_HOST = r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?(?P<host>[^/?#:@\s]+)"
_DATE = r"^(?P<year>\d{4})(?:-?(?P<month>0[1-9]|1[0-2]))?"


@dataclass
class Facts:
    """Counts over documents; they can be added up."""

    num_documents: int = 0
    num_bytes: int = 0
    """Of text in UTF-8."""
    values: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Column -> value -> [documents, bytes]; "": no value."""
    hosts: dict[str, list[int]] = field(default_factory=dict)
    """Host of the address, without "www." -> [documents, bytes]."""
    scores: dict[str, list[int]] = field(default_factory=dict)
    """Column -> documents in each of `BINS` equal parts of its range, and last those without a score."""
    months: dict[str, int] = field(default_factory=dict)
    """"YYYY-MM", or "YYYY" -> documents of that date; "": without a readable date."""
    named: dict[str, dict[str, int]] = field(default_factory=dict)
    """Column such as "pii" -> name -> sum of its counts."""

    def add(self, batch: pa.RecordBatch) -> None:
        names = set(batch.schema.names)
        # In Arrow's own loops: a shard has up to millions of rows.
        sizes = pc.binary_length(batch.column("text").cast(pa.large_string())).fill_null(0)
        self.num_documents += batch.num_rows
        self.num_bytes += pc.sum(sizes).as_py() or 0
        for column in COLUMNS:
            if column in names:
                _count(self.values.setdefault(column, {}), batch.column(column), sizes)
        if "url" in names:
            _count(self.hosts, _hosts(batch.column("url")), sizes)
        if "date" in names:
            self._add_dates(batch.column("date"))
        for column, (low, high) in SCORES.items():
            if column in names:
                self._add_scores(column, batch.column(column), low, high)
        for column in NAMED_COUNTS:
            if column in names:
                self._add_named(column, batch.column(column))

    def merge(self, other: Facts) -> None:
        self.num_documents += other.num_documents
        self.num_bytes += other.num_bytes
        for column, counts in other.values.items():
            _merge(self.values.setdefault(column, {}), counts)
        _merge(self.hosts, other.hosts)
        for column, parts in other.scores.items():
            old = self.scores.setdefault(column, [0] * (BINS + 1))
            self.scores[column] = [a + b for a, b in zip(old, parts, strict=True)]
        self.months = dict(Counter(self.months) + Counter(other.months))
        for column, sums in other.named.items():
            self.named[column] = dict(Counter(self.named.get(column, {})) + Counter(sums))

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "num_documents": self.num_documents, "num_bytes": self.num_bytes,
                "values": {c: _largest(counts, MAX_VALUES) for c, counts in sorted(self.values.items())},
                "hosts": _largest(self.hosts, MAX_HOSTS), "scores": dict(sorted(self.scores.items())),
                "months": dict(sorted(self.months.items())),
                "named": {c: dict(sorted(sums.items())) for c, sums in sorted(self.named.items())}}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Facts:
        """Return what `to_dict` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        # Files of another version are counted from the shard instead (`_counted`).
        if raw["format"] != FORMAT or any(len(parts) != BINS + 1 for parts in raw["scores"].values()):
            raise ValueError(f"format {raw['format']!r}, this version reads {FORMAT}")
        return Facts(int(raw["num_documents"]), int(raw["num_bytes"]),
                     {str(c): _pairs(counts) for c, counts in raw["values"].items()}, _pairs(raw["hosts"]),
                     {str(c): [int(n) for n in parts] for c, parts in raw["scores"].items()},
                     {str(m): int(n) for m, n in raw["months"].items()},
                     {str(c): {str(k): int(n) for k, n in sums.items()} for c, sums in raw["named"].items()})

    def _add_dates(self, dates: pa.Array) -> None:
        found = pc.extract_regex(dates.cast(pa.string()).fill_null(""), _DATE)
        years, months = (pc.struct_field(found, name).fill_null("") for name in ("year", "month"))
        for year, month in Counter(zip(years.to_pylist(), months.to_pylist(), strict=True)).items():
            key = "-".join(part for part in year if part)
            self.months[key] = self.months.get(key, 0) + month

    def _add_scores(self, column: str, scores: pa.Array, low: float, high: float) -> None:
        parts = self.scores.setdefault(column, [0] * (BINS + 1))
        scaled = pc.multiply(pc.subtract(scores.cast(pa.float64()), low), BINS / (high - low))
        for value in scaled.to_pylist():
            missing = value is None or value != value  # NaN
            parts[BINS if missing else int(min(max(value, 0), BINS - 1))] += 1

    def _add_named(self, column: str, values: pa.Array) -> None:
        sums = self.named.setdefault(column, {})
        for item in pc.value_counts(values.cast(pa.string()).fill_null("")).to_pylist():
            for word in item["values"].split():
                name, equals, number = word.partition("=")
                # Text of a document may look like a count: a number too long for one counts as a single
                # occurrence.
                times = int(number) if equals and number.isdecimal() and len(number) < 16 else 1
                sums[name] = sums.get(name, 0) + times * item["counts"]


def counted_beside(file: Path) -> Path:
    """Return where the counts of an output shard stand; who reads a folder of Parquet files passes over names
    that begin so."""
    return file.with_name(f"_{file.stem}.json")


def write_shard_facts(file: Path) -> Facts:
    """Count an output shard and write the counts beside it, NAME.parquet -> _NAME.json.

    Raises:
        UserError: the shard is missing or damaged, or the disk refuses.
    """
    facts = facts_of_file(file)
    write_json(counted_beside(file), facts.to_dict())
    return facts


def facts_of_file(file: Path) -> Facts:
    """Count an output shard.

    Raises:
        UserError: it is missing or damaged.
    """
    facts = Facts()
    try:
        for batch in batches(file, ("text",), (*COLUMNS, "url", "date", *SCORES, *NAMED_COUNTS)):
            facts.add(batch)
    except pa.ArrowException as e:  # a column of another type than the pipeline writes
        raise damage(file, str(e)) from None
    return facts


def facts_of_output(out: Path) -> dict[str, Facts]:
    """Return output source -> its facts, in order of their names; what was counted before is read.

    Raises:
        UserError: a shard is damaged.
    """
    found: dict[str, Facts] = {}
    for file in sorted((out / TEXT).glob("*/*.parquet")):
        found.setdefault(file.parent.name, Facts()).merge(_counted(file) or facts_of_file(file))
    return found


def _counted(file: Path) -> Facts | None:
    try:
        return Facts.from_dict(try_read_json(counted_beside(file)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _count(counts: dict[str, list[int]], values: pa.Array, sizes: pa.Array) -> None:
    plain = pc.if_else(values, "true", "false") if pa.types.is_boolean(values.type) else values
    table = pa.table({"value": plain.cast(pa.string()).fill_null(NONE), "size": sizes})
    for row in table.group_by("value").aggregate([("size", "count"), ("size", "sum")]).to_pylist():
        old = counts.setdefault(row["value"], [0, 0])
        counts[row["value"]] = [old[0] + row["size_count"], old[1] + row["size_sum"]]


def _hosts(urls: pa.Array) -> pa.Array:
    found = pc.struct_field(pc.extract_regex(urls.cast(pa.string()).fill_null(""), _HOST), "host")
    lower = pc.utf8_lower(found.fill_null(NONE))
    # "example.com." and "www.example.com" are the host "example.com".
    return pc.replace_substring_regex(pc.utf8_rtrim(lower, characters="."), r"^www\.", "")


def _merge(counts: dict[str, list[int]], other: dict[str, list[int]]) -> None:
    for value, (documents, num_bytes) in other.items():
        old = counts.setdefault(value, [0, 0])
        counts[value] = [old[0] + documents, old[1] + num_bytes]


def _largest(counts: dict[str, list[int]], most: int) -> dict[str, list[int]]:
    # The rest stays last when it is merged and cut again, so it never passes for a value.
    ranked = sorted(counts, key=lambda value: (value == REST, -counts[value][1], value))
    kept = {value: counts[value] for value in sorted(ranked[:most])}
    if ranked[most:]:
        _merge(kept, {REST: [sum(counts[value][i] for value in ranked[most:]) for i in (0, 1)]})
    return kept


def _pairs(raw: dict[str, Any]) -> dict[str, list[int]]:
    return {str(value): [int(documents), int(num_bytes)] for value, (documents, num_bytes) in raw.items()}
