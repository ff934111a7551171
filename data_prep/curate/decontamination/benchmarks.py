"""Items of benchmarks: the texts that training data must not hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.json_lines import read_objects
from megatron_sov.base.documents.item_search import SearchItem
from megatron_sov.base.errors import UserError

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
            raise UserError(f"benchmarks: {path}: is no file, and no folder with .jsonl files; "
                            "each line of one is a record of a benchmark")
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
    elif isinstance(value, Mapping) and depth < 4:
        for name, inner in value.items():
            if name != "role":
                yield from _strings(inner, depth + 1)
    elif isinstance(value, list) and depth < 4:
        for inner in value:
            yield from _strings(inner, depth + 1)
