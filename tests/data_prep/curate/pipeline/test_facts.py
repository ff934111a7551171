"""What an output's documents are, counted: as a plain loop over them counts, however shards are cut."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.curate.pipeline import facts
from data_prep.curate.pipeline.facts import (
    BINS, Facts, counted_beside, facts_of_file, facts_of_output, write_shard_facts)


def documents(count: int) -> list[dict[str, object]]:
    chosen = random.Random(0)
    urls = ["https://www.a.org/x", "http://user:pw@B.org:8080/?q=1", "HTTPS://a.org.", "", None, "mailto:x@y",
            "no address", "ftp://c.net/a#b"]
    return [{"text": chosen.choice(["", "말 ", "word "]) * chosen.randrange(9),
             "language": chosen.choice(["en", "ko", None]), "synthetic": chosen.random() < 0.5,
             "url": chosen.choice(urls),
             "date": chosen.choice(["2024-03-09", "2024-03", "2021", "", "soon", None]),
             "education": chosen.choice([0.0, 4.99, 5.0, 2.5, None, float("nan"), -3.0]),
             "pii": chosen.choice(["", "email=2 phone=1", "email=1", None])} for _ in range(count)]


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("text", pa.string()), ("language", pa.string()), ("synthetic", pa.bool_()),
                        ("url", pa.string()), ("date", pa.string()), ("education", pa.float32()),
                        ("pii", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


def test_counts_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    rows = documents(300)
    write(tmp_path / "text/all/00000.parquet", rows)
    found = facts_of_file(tmp_path / "text/all/00000.parquet")
    sizes = [len(str(row["text"]).encode()) for row in rows]
    assert (found.num_documents, found.num_bytes) == (300, sum(sizes))
    languages: dict[str, list[int]] = {}
    hosts: Counter[str] = Counter()
    for row, size in zip(rows, sizes, strict=True):
        old = languages.setdefault(str(row["language"] or ""), [0, 0])
        languages[str(row["language"] or "")] = [old[0] + 1, old[1] + size]
        host = urlsplit(str(row["url"] or "")).hostname or ""
        hosts[host.rstrip(".").removeprefix("www.")] += 1
    assert found.values["language"] == languages
    assert {host: n for host, (n, _) in found.hosts.items()} == hosts
    dates = {"2024-03-09": "2024-03", "2024-03": "2024-03", "2021": "2021"}
    assert found.months == Counter(dates.get(str(row["date"]), "") for row in rows)
    assert found.named["pii"]["email"] == sum(
        {"email=2 phone=1": 2, "email=1": 1}.get(str(row["pii"]), 0) for row in rows)
    parts = found.scores["education"]
    missing = sum(row["education"] is None or row["education"] != row["education"] for row in rows)
    assert parts[BINS] == missing and sum(parts) == 300
    assert parts[BINS - 1] == sum(row["education"] in (4.99, 5.0) for row in rows)


def test_sums_do_not_depend_on_how_shards_are_cut(tmp_path: Path) -> None:
    rows = documents(100)
    write(tmp_path / "one/text/all/00000.parquet", rows)
    for i in range(4):
        write(tmp_path / f"four/text/all/{i:05d}.parquet", rows[25 * i:25 * i + 25])
    for i in (1, 3):  # counted when they were written; the others are counted now
        write_shard_facts(tmp_path / f"four/text/all/{i:05d}.parquet")
    one, four = (facts_of_output(tmp_path / name)["all"] for name in ("one", "four"))
    assert one.to_dict() == four.to_dict() == Facts.from_dict(json.loads(json.dumps(one.to_dict()))).to_dict()


def test_of_very_many_hosts_the_largest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MAX_HOSTS", 2)
    counted = Facts(hosts={"a": [1, 10], "b": [1, 30], "c": [2, 20], "d": [4, 5]}).to_dict()["hosts"]
    assert counted == {"b": [1, 30], "c": [2, 20], "(others)": [5, 15]}


def test_counts_of_another_layout_are_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "text/all/00000.parquet"
    write(file, documents(10))
    for damaged in ("{", "[]", '{"format": 99, "scores": {}}', '{"format": 1}'):
        counted_beside(file).write_text(damaged)
        assert facts_of_output(tmp_path)["all"].num_documents == 10
