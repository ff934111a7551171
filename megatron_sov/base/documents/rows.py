"""Rows of a user's file in JSON lines: prompts, answers, tasks; each checked before the work, and read
without what Python's JSON lets through and JSON does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_sov.base.documents.files import refuse_tables
from megatron_sov.base.documents.messages import MOST_LEVELS, BadRecord, refuse_deep
from megatron_sov.base.errors import UserError, list_problems


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity (`parse_constant`); raises ValueError."""
    raise ValueError(f"{name} is no JSON")


def finite(text: str) -> float:
    """Return a number (`parse_float`); raises ValueError where it would be written as Infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is more than a float holds")
    return number


def json_line(row: Any, *, allow_nan: bool = True) -> bytes:
    """Return a value as a line of JSON; raises TypeError and ValueError where it is none."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=allow_nan).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(row, allow_nan=allow_nan).encode() + b"\n"


def changed_values(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted name, old and new value, as `short_json` has them, of all in which two trees differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        # the new order first, then what has gone
        for key in [*now, *(k for k in before if k not in now)]:
            yield from changed_values(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield name, short_json(before), short_json(now)


def short_json(value: Any) -> str:
    """Return a value as JSON for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


Row = Mapping[str, Any]
"""A JSON object."""
MAX_LINE_BYTES = 64 << 20
"""Of a row; a longer line is no answer but a file that lost its line ends."""
MAX_TOLD = 10
"""Bad rows that are named."""


FIELDS: dict[str, tuple[tuple[type, ...], str]] = {"response": ((str,), "text"),
                                                  "prompt": ((str, list), "text or messages"), "": ((), "")}
"""Field that a file's rows must have -> its types, and what they are called; "": any object is a row."""


def check_rows(path: Path, option: str = "--input", field: str = "response") -> int:
    """Return how many rows a file has.

    Args:
        path: the file.
        option: of the command, for messages.
        field: what each row must have, one of `FIELDS`; empty: nothing.

    Raises:
        UserError: it cannot be read, has no rows, or bad ones: the first are named by line.
    """
    problems: list[str] = []
    num_rows = num_bad = 0
    for line, raw in read_lines(path, option):
        row = parse_row(raw, field)
        num_rows += 1
        if isinstance(row, str):
            num_bad += 1
            # all are counted, few are named: a file of another form would fill the screen
            if len(problems) < MAX_TOLD:
                problems.append(f"line {line}: {row}")
    if num_bad > MAX_TOLD:
        problems.append(f"and {num_bad - MAX_TOLD} more")
    if problems:
        raise UserError(list_problems(f"{option} {path}", problems, "mend or remove these lines"))
    if not num_rows:
        needs = f" with a {FIELDS[field][1]} `{field}`" if field else ""
        raise UserError(f"{option} {path}: has no rows; each line is a JSON object{needs}")
    return num_rows


def read_rows(path: Path, option: str = "--input", field: str = "response") -> Iterator[tuple[int, Row]]:
    """Yield (line, row) of a file that `check_rows` has passed; arguments as there."""
    for line, raw in read_lines(path, option):
        row = parse_row(raw, field)
        if isinstance(row, str):
            raise UserError(f"{option} {path}: line {line}: {row}; the file has changed since it was checked")
        yield line, row


def read_lines(path: Path, option: str = "--input") -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of all lines that are not blank, as they stand there.

    Raises:
        UserError: it cannot be read, or has a line that is too long.
    """
    refuse_tables(path, option)
    if path.exists() and not path.is_file():  # a pipe would be empty when it is read again
        raise UserError(f"{option} {path}: is no regular file, and it is read more than once; write the rows "
                        "into a file")
    try:
        with open(path, "rb") as f:
            number = 0
            # one byte more than allowed, so that a line of exactly the limit passes
            while raw := f.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise UserError(f"{option} {path}: line {number} is longer than "
                                    f"{MAX_LINE_BYTES >> 20} MiB; write each row on a line of its own")
                if raw.strip():
                    yield number, raw
    except OSError as e:
        raise UserError(f"{option} {path}: cannot be read ({e.strerror or e}); "
                        "name a file of JSON lines") from None


def parse_row(raw: bytes, field: str) -> Row | str:
    """Return a line's row, or what is wrong with it."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), parse_constant=no_constant, parse_float=finite)
    except UnicodeDecodeError as e:
        return f"is no UTF-8 ({e.reason} at byte {e.start})"
    except RecursionError:
        return "is nested too deeply"
    except ValueError as e:
        return f"is no JSON ({e})"
    if not isinstance(row, dict):
        return f"is no JSON object, but a {type(row).__name__}"
    if field and field not in row:
        return f"has no {field!r}"
    types, told = FIELDS[field]
    if field and not isinstance(row[field], types):
        return f"{field} is of type {type(row[field]).__name__}, and must be {told}"
    if raw.count(b"[") + raw.count(b"{") > MOST_LEVELS:  # else it cannot be that deep
        try:
            refuse_deep(row)  # it has to go to other processes, where less than JSON's depth is allowed
        except BadRecord as e:
            return str(e)
    return row


def read_objects(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a file; what is said is named as text that can be written.

    Args:
        path: the file.
        what: names it in messages, e.g. "--tasks".

    Raises:
        UserError: it cannot be read, or a line is no JSON object; the first one is named.
    """
    for line, raw in read_lines(path, what):
        row = parse_row(raw, "")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            row = "holds half of a surrogate pair, which is no text"
        if isinstance(row, str):
            raise UserError(f"{what} {path}: line {line}: {row}; each line is one JSON object")
        yield line, dict(row)
