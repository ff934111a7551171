"""Read and check a user's JSONL rows (prompts, answers, tasks) strictly: no NaN, Infinity or deep nesting."""

import contextlib
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from megatron_sov.base.documents.files import refuse_tables
from megatron_sov.base.documents.layouts import propose_columns, propose_field
from megatron_sov.base.documents.messages import MAX_LEVELS, BadRecord, check_depth
from megatron_sov.base.errors import Fix, RowProblems, UserError, choose_free_path

Row = Mapping[str, Any]
"""A JSON object."""
MAX_JUDGED_ROWS = 10_000
"""Rows that are searched for a prompt with two responses."""
MAX_LINE_BYTES = 64 << 20
"""Limit of a row; longer lines mean that the file lost its line ends."""
ROW_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {"response": ((str,), "text"),
                                                  "prompt": ((str, list), "text or messages"), "": ((), "")}
"""Required field -> accepted types, and the types' name in messages; "": no required field."""


def replace_surrogates(text: str) -> str:
    """Replace half surrogate pairs, which UTF-8 cannot encode, by question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def reject_constant(name: str) -> NoReturn:
    """Reject NaN and Infinity with ValueError (for `parse_constant`)."""
    raise ValueError(f"{name} is not JSON")


def parse_finite(text: str) -> float:
    """Parse a number (for `parse_float`); raise ValueError if it overflows to Infinity."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is more than a float holds")
    return number


def format_json_line(row: Any, *, allow_nan: bool = True) -> bytes:
    """Format a value as a JSON line; raise TypeError or ValueError if JSON cannot hold the value."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=allow_nan).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: JSON can escape it, UTF-8 cannot encode it
        return json.dumps(row, allow_nan=allow_nan).encode() + b"\n"


def iter_changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, old value, new value) per difference between two trees, as short JSON."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        # keys in the new order, then removed keys
        for key in [*now, *(k for k in before if k not in now)]:
            yield from iter_changes(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield name, format_short_json(before), format_short_json(now)


def format_short_json(value: Any) -> str:
    """Format a value as JSON for a message, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_rows(path: Path, option: str = "--input", field: str = "response") -> int:
    """Check every row in a file, and return the number of rows.

    Args:
        option: its command-line option, for messages.
        field: required field of each row, a key of `FIELDS`; "": none.

    Raises:
        UserError: the file is unreadable, empty, or has bad rows; names the first ones by line.
    """
    problems = RowProblems()
    num_rows = 0
    for line, raw in read_lines(path, option):
        row = parse_row(raw, field)
        num_rows += 1
        if isinstance(row, str):
            problems.add(f"line {line}", row)
    if problems:
        fix = fix_text_rows(path, field or "prompt") or _fix_field(path, field, list(problems))
        raise UserError(problems.format(f"{option} {path}", "correct or remove these lines"), fix)
    if not num_rows:
        needs = f" with a {ROW_FIELDS[field][1]} `{field}`" if field else ""
        raise UserError(f"{option} {path}: has no rows; each line is a JSON object{needs}")
    return num_rows


def fix_text_rows(file: Path, field: str) -> Fix | None:
    """Return the command that writes the lines of a text file as rows with `field`; None for other files."""
    if file.suffix not in (".txt", ".md", ".list"):
        return None
    return _fix_by_rewriting(file, f"{file.with_suffix('')}.jsonl", f"{{{field!r}: line.rstrip()}}")


def _fix_by_rewriting(file: Path, target: str, row: str, *before: str) -> Fix:
    """Return the command that writes `row`, an expression over `line`, for each line of a file."""
    code = f"import json; [print(json.dumps({row})) for line in open({str(file)!r}) if line.strip()]"
    command = f"{shlex.join([sys.executable, '-c', code])} > {shlex.quote(target)}"
    return Fix(words={str(file): target}, before=(command, *before))


def fix_records(file: Path, reason: str) -> Fix | None:
    """Return the commands that turn a file of records into one that can be packed, by the fault of the first
    record: an object over several lines, a JSON array, a text in another field, messages as text, or
    responses with scores; None: another fault."""
    if match := re.search(r"iconv -f ([\w-]+) -t UTF-8", reason):
        target = choose_free_path(f"{file.with_suffix('')}-utf8{file.suffix}")
        command = f"{shlex.join(['iconv', '-f', match[1], '-t', 'UTF-8', str(file)])} > {shlex.quote(target)}"
        return Fix(words={str(file): target}, before=(command,))
    begin = file.open("rb").readline(MAX_LINE_BYTES) if file.suffix in (".jsonl", ".json") else b""
    if begin.strip() == b"{":
        target = choose_free_path(f"{file.with_suffix('')}-lines.jsonl")
        return Fix(words={str(file): target}, before=(
            f"{shlex.join(['jq', '-c', '.', str(file)])} > {shlex.quote(target)}",))
    if "sov-data pairs" in reason and (fix := fix_judged(file)):
        return fix
    if "an array of records" in reason:
        target = choose_free_path(f"{file.with_suffix('')}.json")
        return Fix(words={str(file): target}, before=(shlex.join(["cp", str(file), target]),))
    if match := re.search(r"jq -c '\.(\w+) \|= fromjson'", reason):
        row = f"json.loads(line) | {{{match[1]!r}: json.loads(json.loads(line)[{match[1]!r}])}}"
        return _fix_by_rewriting(file, choose_free_path(f"{file.with_suffix('')}-parsed.jsonl"), row)
    record = json.loads(begin) if "has no " in reason and begin else {}
    field = propose_columns(record, "text").split()[1]
    if "has no string field 'text'" in reason and field in record:
        return _fix_by_rewriting(file, choose_free_path(f"{file.with_suffix('')}-text.jsonl"),
                                 f"{{'text': json.loads(line)[{field!r}]}}")
    lists = {name: value for name, value in record.items() if isinstance(value, list) and value}
    texts = next((name for name, value in lists.items() if isinstance(value[0], str)), "")
    scores = next((name for name, value in lists.items() if isinstance(value[0], (int, float))), "")
    if "prompt" not in record or not texts or not scores:
        return None
    row = ("(lambda r: {'prompt': r['prompt'], 'responses': [{'content': c, 'reward': s} for c, s in "
           f"zip(r[{texts!r}], r[{scores!r}])]}})(json.loads(line))")
    groups, pairs = (shlex.quote(choose_free_path(f"{file.with_suffix('')}-{end}"))
                     for end in ("groups.jsonl", "pairs"))
    fix = _fix_by_rewriting(file, groups, row, f"sov-data pairs --input {groups} --output {pairs}")
    return replace(fix, words={str(file): f"{pairs}/pairs.jsonl"})


def fix_judged(file: Path) -> Fix | None:
    """Return the command that makes pairs of singly judged responses; None: no prompt has two."""
    rows = islice(read_lines(file, "--input"), MAX_JUDGED_ROWS) if file.suffix == ".jsonl" else ()
    prompts = Counter[str]()
    with contextlib.suppress(ValueError, AttributeError):  # the command reports a damaged row
        prompts.update(json.dumps(json.loads(row).get("prompt")) for _, row in rows)
    if prompts and max(prompts.values()) == 1:
        return None
    folder = choose_free_path(f"{file.stem}-pairs")
    return Fix(words={str(file): f"{folder}/pairs.jsonl"}, left_out=("--method kto",),
               before=(f"sov-data pairs {shlex.join(['--input', str(file), '--output', folder])}",))


def _fix_field(file: Path, field: str, problems: Sequence[str]) -> Fix | None:
    """Return the command that renames a field in all rows, if a row names its content otherwise."""
    names = re.findall(r"; rename '([\w-]+)' to", " ".join(problems))
    if len(problems) > 1 or not names:
        return None
    target = f"{file.with_suffix('')}-{field}{file.suffix}"
    words = ["sed", f's/"{names[0]}":/"{field}":/', str(file)]
    return Fix(words={str(file): target}, before=(f"{shlex.join(words)} > {shlex.quote(target)}",))


def read_rows(path: Path, option: str = "--input", field: str = "response") -> Iterator[tuple[int, Row]]:
    """Yield (line, row) from a file checked by `check_rows`, with the same arguments."""
    for line, raw in read_lines(path, option):
        row = parse_row(raw, field)
        if isinstance(row, str):
            raise UserError(f"{option} {path}: line {line}: {row}; the file has changed since it was checked")
        yield line, row


def read_lines(path: Path, option: str = "--input") -> Iterator[tuple[int, bytes]]:
    """Yield (line number, raw bytes) for lines that are not blank. Raises `UserError`: the file is unreadable
    or has a line over `MAX_LINE_BYTES`."""
    refuse_tables(path, option)
    if path.exists() and not path.is_file():  # a pipe would be empty at the second reading
        raise UserError(f"{option} {path}: is not a regular file, and it is read more than once; write the "
                        "rows into a file")
    try:
        with open(path, "rb") as f:
            number = 0
            # a byte over the limit, so that a line at the limit passes
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
    """Parse a line to a row; return a sentence if the line is invalid."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), parse_constant=reject_constant, parse_float=parse_finite)
    except UnicodeDecodeError as e:
        return f"is not UTF-8 ({e.reason} at byte {e.start})"
    except RecursionError:
        return "is nested too deeply"
    except ValueError as e:
        return f"is not JSON ({e})"
    if not isinstance(row, dict):
        return f"is not a JSON object, but a {type(row).__name__}"
    if field and field not in row:
        # a field `answer` holds the reference, not the response
        near = propose_field({name: row[name] for name in row if name != "answer"}, field)
        hint = f"; rename {near!r} to {field!r}" if near else ""
        return f"has no {field!r} (fields: {', '.join(list(row)[:8]) or 'none'}){hint}"
    types, type_name = ROW_FIELDS[field]
    if field and not isinstance(row[field], types):
        return f"{field} is of type {type(row[field]).__name__}, and must be {type_name}"
    if raw.count(b"[") + raw.count(b"{") > MAX_LEVELS:  # only rows with many brackets can be too deep
        try:
            check_depth(row)  # other processes that receive the row allow fewer levels than the JSON parser
        except BadRecord as e:
            return str(e)
    return row
