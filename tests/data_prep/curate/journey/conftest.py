"""A pipeline's output, made by hand: two sources, four steps, all that can become of a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sov.base.artifacts import MANIFEST, new_artifact

HOSTILE = "</pre><script>window.hacked = 1</script><img src=x onerror=alert(1)> \x1b]0;owned\x07\x1b[2J"
STEPS = ("parse", "language", "rules", "pii", "minhash_dedup")
SETTINGS: dict[str, dict[str, Any]] = {
    "parse": {}, "language": {"keep": ["en", "ko"], "min_score": 0.5}, "rules": {"preset": "fineweb"},
    "pii": {"mask": ["email", "phone"]}, "minhash_dedup": {"threshold": 0.8}}
TEXTS = {
    "web": ["The ship came in at dawn.\nWrite to ann@example.org for a place.\nIt left at noon.",
            "Click here.", "배가 새벽에 들어왔다.\n정오에 떠났다.",
            HOSTILE + "\nThe rest is quite ordinary text.",
            "The ship came in at dawn.\nIt left at noon.", "Le bateau est arrivé."],
    "books": ["Call me Ishmael. Some years ago, never mind how long precisely."]}
OUTCOMES: dict[str, list[list[str | None]]] = {
    "web": [["", "", "", ""], ["", "too few words"], ["", "", "", ""], ["", "", "", ""],
            ["", "", "", "near duplicate"], ["language not wanted"]],
    "books": [["", "", "", ""]]}
"""Source -> document -> what each step behind the first says; missing: dropped before."""
LANGUAGES = {"web": ["en", "en", "ko", "en", "en", "fr"], "books": ["en"]}


def id_of(source: str, row: int) -> str:
    return f"{source}:0:{hashlib.sha256(f'{source}{row}'.encode()).hexdigest()[:16]}"


def _write(file: Path, columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, compression="zstd", row_group_size=4)


def _after(step: int, text: str) -> str:
    return text.replace("ann@example.org", "<email>") if step >= 3 else text


def _reason(source: str, row: int, step: int) -> str | None:
    said = OUTCOMES[source][row]
    return said[step - 1] if step <= len(said) else None


def _base(source: str) -> dict[str, Any]:
    texts = TEXTS[source]
    n = len(texts)
    return {"id": [id_of(source, row) for row in range(n)], "text": texts, "source": [source] * n,
            "where": [f"pages/{row // 3}.jsonl:{row % 3 + 1}" for row in range(n)], "kind": [""] * n,
            "licence": (["CC-BY-4.0"] * (n - 1) + ["MIT"]) if source == "web" else ["CC0-1.0"],
            "synthetic": [source == "books"] * n,
            "url": [f"https://www.Example.org/{row}" if row % 2 else "http://other.net:80/x"
                    for row in range(n)],
            "title": [HOSTILE if row == 3 else f"Page {row}" for row in range(n)],
            "date": ["2024-03-09" if row % 2 else "2021" for row in range(n)],
            "language_hint": [""] * n, "own_id": [""] * n, "extra": ["{}"] * n}


def _layer(source: str, step: int) -> dict[str, Any]:
    texts = TEXTS[source]
    reasons = [_reason(source, row, step) for row in range(len(texts))]
    changed = [_after(step, t) if reason == "" and _after(step, t) != _after(step - 1, t) else None
               for reason, t in zip(reasons, texts, strict=True)]
    columns: dict[str, Any] = {"reason": reasons, "text": pa.array(changed, pa.string())}
    if STEPS[step] == "language":
        columns |= {"language": LANGUAGES[source],
                    "language_score": pa.array([0.9] * len(texts), pa.float32())}
    if STEPS[step] == "pii":
        columns["pii"] = ["email=1" if c else "" if r == "" else None
                          for r, c in zip(reasons, changed, strict=True)]
    if STEPS[step] == "minhash_dedup":
        columns["duplicate_of"] = [id_of(source, 0) if r else None for r in reasons]
    return columns


def _counts(source: str, step: int) -> dict[str, Any]:
    texts = TEXTS[source]
    rows = [row for row in range(len(texts)) if step == 0 or _reason(source, row, step) is not None]
    kept = [row for row in rows if step == 0 or _reason(source, row, step) == ""]
    size = {row: len(_after(step, texts[row]).encode()) for row in rows}
    samples: dict[str, list[dict[str, str]]] = {"kept": [], "dropped": [], "changed": []}
    dropped: dict[str, dict[str, int]] = {}
    for row in rows:
        reason = "" if row in kept else str(_reason(source, row, step))
        before, after = _after(step - 1, texts[row]), _after(step, texts[row])
        which = "dropped" if reason else "changed" if step and before != after else "kept"
        samples[which].append({"id": id_of(source, row), "reason": reason, "before": before, "after": after})
        if reason:
            old = dropped.setdefault(reason, {"documents": 0, "bytes": 0})
            dropped[reason] = {"documents": old["documents"] + 1, "bytes": old["bytes"] + size[row]}
    return {"documents_in": len(rows),
            "bytes_in": sum(len(_after(step - 1, texts[r]).encode()) for r in rows),
            "documents_kept": len(kept), "bytes_kept": sum(size[r] for r in kept),
            "documents_changed": len(samples["changed"]), "dropped": dropped, "cpu_s": 0.25, "wall_s": 0.5,
            "samples": samples}


def _source(out: Path, source: str) -> dict[str, Any]:
    steps = []
    for number, kind in enumerate(STEPS):
        folder = f"shards/{source}/{number:02d}-{kind}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
        _write(out / folder / "00000.parquet", _layer(source, number) if number else _base(source))
        steps.append({"number": number, "kind": kind, "folder": folder, "settings": SETTINGS[kind],
                      **_counts(source, number)})
    return {"name": source, "format": "jsonl", "path": [f"raw/{source}"], "kind": "", "priority": 0,
            "licence": "CC-BY-4.0" if source == "web" else "CC0-1.0", "synthetic": source == "books",
            "num_shards": 1, "num_files": 2, "raw_bytes": 4096, "steps": steps,
            "quarantine": {"not_json": 1} if source == "web" else {}}


def _output(out: Path, source: str) -> dict[str, Any]:
    base, last = _base(source), len(STEPS) - 1
    rows = [row for row in range(len(TEXTS[source])) if _reason(source, row, last) == ""]
    columns = {name: [values[row] for row in rows] for name, values in base.items()}
    columns |= {"text": [_after(last, TEXTS[source][row]) for row in rows],
                "language": [LANGUAGES[source][row] for row in rows],
                "language_score": pa.array([0.9] * len(rows), pa.float32()),
                "quality": pa.array([0.1 + 0.4 * i for i in range(len(rows))], pa.float32()),
                "level": ["L1"] * len(rows), "topic": ["t00"] * len(rows),
                "pii": ["email=1" if "<email>" in _after(last, TEXTS[source][row]) else "" for row in rows]}
    _write(out / "text" / source / "00000.parquet", columns)
    return {"name": source, "num_documents": len(rows), "num_shards": 1,
            "num_bytes": sum(len(text.encode()) for text in columns["text"])}


def write_corpus(out: Path) -> Path:
    """Write the output of a run, complete with its manifest."""
    with new_artifact(out, "corpus") as artifact:
        folder = artifact.path
        (folder / "pipeline.json").write_text(json.dumps({"name": "ships"}))
        sources = [_source(folder, source) for source in TEXTS]
        output = [_output(folder, source) for source in TEXTS]
        shared = folder / "shared/04-minhash_dedup-0123456789ab"
        shared.mkdir(parents=True)
        (shared / "report.json").write_text(json.dumps({
            "tables": [{"title": "Clusters by size", "head": ["documents", "clusters"], "rows": [[2, 1]]}],
            "bars": [{"title": "Similarity", "labels": ["0.8", HOSTILE], "counts": [1, 2],
                      "note": "Verified."}],
            "notes": [HOSTILE]}))
        (folder / "quarantine").mkdir()
        (folder / "quarantine/web.jsonl").write_text(json.dumps({
            "file": "pages/9.jsonl", "place": "pages/9.jsonl:3", "code": "not_json", "reason": "is no JSON",
            "content": "{"}))
        (folder / "summary.json").write_text(json.dumps({
            "name": "ships", "sources": sources, "output": output,
            "shared": [{"number": 4, "kind": "minhash_dedup",
                        "folder": "shared/04-minhash_dedup-0123456789ab"}]}))
        artifact.content = {"name": "ships", "sources": list(TEXTS),
                            "num_documents": sum(o["num_documents"] for o in output),
                            "num_bytes": sum(o["num_bytes"] for o in output)}
    assert (out / MANIFEST).is_file()
    return out


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run; not to be changed."""
    return write_corpus(tmp_path_factory.mktemp("run") / "corpus")


@pytest.fixture
def own_corpus(tmp_path: Path) -> Path:
    """The same, to be changed."""
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="session")
def ids() -> Callable[[str, int], str]:
    """`ids(source, row)`: the id of a document."""
    return id_of


@pytest.fixture(scope="session")
def hostile() -> str:
    """Text that tries to run in a reader's browser and to command a terminal."""
    return HOSTILE


@pytest.fixture(scope="session")
def texts() -> dict[str, Sequence[str]]:
    """Source -> its documents as they were read."""
    return dict(TEXTS)
