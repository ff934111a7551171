"""What a record says of itself beside its text: numbers that travel with its tokens as columns, into the
objective that asks for them, the bucket that it belongs to, as one of a difficulty, and the tags that blends
choose sources by, as its kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_sov.base.documents.messages import BadRecord

COLUMN_NAME = re.compile(r"[a-z_]+")
BUCKET_NAME = re.compile(r"\w[\w.-]{0,59}")
TAG_VALUE = re.compile(r"[\w.:+-]{1,60}")
"""What a tag may be, such as domain:law; no sign among them is one of a pattern."""
RESERVED = ("bin", "extra", "idx", "kind", "loss", "routes", "type")
"""Endings of the other files of a shard."""
LARGEST = 3.4028234663852886e38
"""Of float32."""


def column_problems(names: Iterable[str]) -> list[str]:
    """Return one sentence for each name that no column can have."""
    names = list(names)
    problems = [f"{name!r} cannot name a column (letters a-z and '_', and none of {', '.join(RESERVED)})"
                for name in names if not COLUMN_NAME.fullmatch(name) or name in RESERVED]
    return problems + [f"{name!r} is given {names.count(name)} times"
                       for name in dict.fromkeys(names) if names.count(name) > 1]


def read_columns(record: Mapping[str, Any], names: Iterable[str],
                 num_sequences: int) -> dict[str, tuple[float, ...]]:
    """Return column -> its number for each sequence of a record.

    Args:
        record: has a field for each column: a number, or a list with one for each sequence.
        names: the columns.
        num_sequences: 2 for a preference (chosen, rejected), else 1.

    Raises:
        BadRecord: a field is missing, or holds something else.
    """
    return {name: _numbers(record, name, num_sequences) for name in names}


def read_bucket(record: Mapping[str, Any], field: str) -> str:
    """Return the value of a record's field as the name of a bucket.

    Raises:
        BadRecord: the field is missing, or its value is no name.
    """
    value = record.get(field)
    name = str(value) if isinstance(value, (str, int)) else ""
    if not BUCKET_NAME.fullmatch(name):
        raise BadRecord("fields", f"has {str(value)[:40]!r} in field {field!r}, by which --bucket-by sorts; "
                                  "must be a name of letters, digits, '.', '_', '-', or a whole number")
    return name


def tag_value(value: Any) -> str | None:
    """Return how a value is written as a tag, `True` as "true"; None: it is none."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if isinstance(value, (str, int)) and TAG_VALUE.fullmatch(text) else None


def read_tags(record: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Return the value of each of these fields as a tag; "" where the record has none.

    A record of `sov-data synth` has its provenance in the field `synthetic`, which says that it is.

    Raises:
        BadRecord: a value cannot be one.
    """
    found = []
    for name in names:
        value = record.get(name)
        if name == "synthetic" and isinstance(value, dict):
            value = True
        tag = "" if value is None or value == "" else tag_value(value)
        if tag is None:
            raise BadRecord("fields", f"has {str(value)[:40]!r} in field {name!r}, which --tag names; must "
                                      "be a word of letters, digits, '.', ':', '+', '_', '-', a whole "
                                      "number, true or false")
        found.append(tag)
    return tuple(found)


def _numbers(record: Mapping[str, Any], name: str, num_sequences: int) -> tuple[float, ...]:
    if name not in record:
        raise BadRecord("fields", f"has no field {name!r}, which --column names "
                                  f"(fields: {', '.join(record) or 'none'}); add it")
    value = record[name]
    values = value if isinstance(value, list) else [value] * num_sequences
    if len(values) != num_sequences or not all(map(is_float32, values)):
        wanted = "a number" if num_sequences == 1 else f"a number or a list of {num_sequences}"
        raise BadRecord("fields", f"has {str(value)[:40]!r} in field {name!r}, must be {wanted} that float32 "
                                  "holds, for --column")
    return tuple(map(float, values))


def is_float32(value: Any) -> bool:
    """Return whether a value is a finite number that float32 holds."""
    # a comparison, since a whole number of 400 digits has no float that could be asked whether it is finite
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
