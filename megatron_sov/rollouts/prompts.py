"""Prompts for rollouts, read from a file and kept on disk; ids and random streams of their responses."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.digests import SHA256, Digest
from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import ARROW_SUFFIXES, COMPRESSED_SUFFIXES, JSON_SUFFIX, PARQUET_SUFFIX
from megatron_sov.base.documents.layouts import Renames, propose_field, rename_fields
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.records import RecordReading, parse_record
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import Fix, RowProblems, UserError, warn
from megatron_sov.base.hints.paths import fix_prompts
from megatron_sov.base.sealed import read_sealed_json, write_sealed_json
from megatron_sov.runs.launch_environment import is_first_rank

OPTION = "--prompts"
HASH_DIGITS, STREAM_DIGITS = 16, 15
"""Hexadecimal digits in the ids of prompts and settings, and in random streams: 60 bits fit an engine's int64
and differ between a run's responses."""
UNUSED_ROWS_FILE = "set_aside.json"
"""File in a store with the prompts that no round uses."""


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt, or a task for an environment."""

    id: str
    """First `HASH_DIGITS` digits of the record's SHA-256."""
    record: Mapping[str, Any]
    """Row in the file: `prompt` or `messages`, or a task, and the reward's fields."""
    place: str = field(default="", compare=False)
    """Place in the file, e.g. "line 7"."""
    option: str = field(default=OPTION, compare=False)
    """Option that names the file."""

    def conversation(self) -> Conversation:
        """Return the prompt for a chat template. Raises `BadRecord`: the record is not a prompt."""
        record = dict(self.record)
        # Files use both names; `parse_record` reads `prompt`.
        if "messages" in record:
            if "prompt" in record:
                raise BadRecord("fields", "has 'prompt' and 'messages'; leave one of them out")
            record["prompt"] = record.pop("messages")
        return parse_record(record, "", 0, RecordReading("prompt")).conversation()


@dataclass(frozen=True, eq=False)
class PromptList(Sequence[RolloutPrompt]):
    """Distinct prompts on disk, in order. A million take 24 MB of memory; `record` is read on access."""

    option: str
    repeats: Mapping[str, Sequence[str]]
    """Id -> places in the file where the prompt is repeated; repetitions are not used."""
    _file: BinaryIO
    """Unnamed temporary file, deleted when the last process closes `_file`."""
    _numbers: np.ndarray
    """[rows in the file] uint64: numeric ids."""
    _starts: np.ndarray
    """[rows in the file + 1] int64: byte offsets."""
    _rows: np.ndarray
    """[prompts] int64: rows in the file, in list order."""
    num_trained: int = 0
    """Prompts removed from `--validation` because training uses these prompts."""

    @classmethod
    def from_prompts(cls, prompts: Iterable[RolloutPrompt], option: str = OPTION) -> PromptList:
        """Write prompts to a temporary file, without repeated ids."""
        with translate_disk_errors(Path(tempfile.gettempdir())):
            # Open until the list is deleted.
            file = tempfile.TemporaryFile()  # noqa: SIM115
            numbers, starts = array("Q"), array("q", [0])
            for prompt in prompts:
                line = json.dumps([prompt.place, prompt.record], ensure_ascii=False)
                file.write(text := line.encode("utf-8", "surrogatepass"))  # file names may not be valid UTF-8
                numbers.append(int(prompt.id, 16))
                starts.append(starts[-1] + len(text))
            file.flush()
        ids = np.array(numbers, np.uint64)
        distinct_rows = np.unique(ids, return_index=True)[1]
        prompt_list = cls(option, {}, file, ids, np.array(starts, np.int64), _rows=np.sort(distinct_rows))
        repeated_rows = np.setdiff1d(np.arange(len(ids)), distinct_rows)
        repeats: dict[str, list[str]] = {}
        for prompt in map(prompt_list._read_prompt, repeated_rows.tolist()):
            repeats.setdefault(prompt.id, []).append(prompt.place)
        return replace(prompt_list, repeats=repeats)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> RolloutPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptList: ...
    def __getitem__(self, index: int | slice) -> RolloutPrompt | PromptList:
        if isinstance(index, slice):
            return replace(self, _rows=self._rows[index])
        return self._read_prompt(int(self._rows[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # An engine's ranks receive pieces, and have no access to `_file`.
        return PromptList.from_prompts, (list(self), self.option)

    @property
    def num_rows(self) -> int:
        """Rows in the file, repetitions included."""
        return len(self._numbers)

    @property
    def ids(self) -> list[str]:
        return [f"{number:0{HASH_DIGITS}x}" for number in self._numbers[self._rows].tolist()]

    def read_record(self, prompt: str) -> Mapping[str, Any]:
        """Return the record of the prompt with id `prompt`, or raise `KeyError`."""
        numbers, order = self._sorted_numbers
        index = int(np.searchsorted(numbers, number := np.uint64(int(prompt, 16))))
        if index == len(numbers) or numbers[index] != number:
            raise KeyError(prompt)
        return self[int(order[index])].record

    @cached_property
    def _sorted_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted numeric ids, and their indices in the list."""
        numbers = self._numbers[self._rows]
        order = numbers.argsort()
        return numbers[order], order

    def select(self, indices: np.ndarray) -> PromptList:
        """Return the prompts at `indices`, in order."""
        return replace(self, _rows=self._rows[indices])

    def find_indices(self, ids: Iterable[str]) -> np.ndarray:
        id_numbers = np.array([int(prompt, 16) for prompt in ids], np.uint64)
        return np.flatnonzero(np.isin(self._numbers[self._rows], id_numbers))

    def exclude(self, ids: Iterable[str]) -> PromptList:
        return self.select(np.delete(np.arange(len(self)), self.find_indices(ids)))

    def _read_prompt(self, row: int) -> RolloutPrompt:
        start, end = self._starts[row:row + 2].tolist()
        # pread: forked processes share the file position.
        place, record = json.loads(os.pread(self._file.fileno(), end - start, start))
        return RolloutPrompt(f"{int(self._numbers[row]):0{HASH_DIGITS}x}", record, place, self.option)


def read_prompts(path: Path, renames: Renames = (), option: str = OPTION, *, is_asked: bool = False
                 ) -> PromptList:
    """Read the distinct prompts of a file (JSON lines, a list in JSON, Parquet, Arrow), or of a folder of
    these as `datasets` saves it, in order. `is_asked`: whether each row must be a prompt for a policy; tasks
    are checked by their environments. Raises `UserError`: the file cannot be read, has no rows, or bad
    rows."""
    problems, columns = RowProblems(), list[str]()
    rows = _iter_prompts(path, renames, option=option, is_asked=is_asked, problems=problems, columns=columns)
    prompts = PromptList.from_prompts(rows, option)
    if problems:
        is_renamed = bool(columns) and not len(prompts)  # else other rows have the fields
        remedy = f"pass --columns {columns[0]}" if is_renamed else "correct or remove these rows"
        fix = Fix(options=("--columns", columns[0])) if is_renamed else fix_prompts(path, list(problems))
        if fix and fix.before:
            remedy = "write its prompts, with the last or chosen message of each as the answer"
        raise UserError(problems.format(f"{option} {path}", remedy), fix)
    if not prompts:
        raise UserError(f"{option} {path}: has no rows")
    return prompts


def _iter_prompts(path: Path, renames: Renames, option: str, is_asked: bool, problems: RowProblems,
                  columns: list[str]) -> Iterator[RolloutPrompt]:
    """Yield the valid rows, repetitions included; append the others to `problems`, and values of
    --columns with which a row may be a prompt to `columns`."""
    unread: dict[str, None] = {}
    for place, record in _iter_records(path, renames, option):
        try:
            record = rename_fields(dict(record), renames)
            # Ids are digests of the content, so added lines leave existing ids unchanged.
            digest = _hash_json(record, HASH_DIGITS, ensure_ascii=False, separators=(",", ":"),
                                allow_nan=False)
            prompt = RolloutPrompt(digest, record, place, option)
            if is_asked:
                # Checked while the row is in memory, so that a million rows are parsed once.
                unread |= dict.fromkeys(name for m in prompt.conversation().messages for name in m.unread)
        except UnicodeEncodeError:
            problems.add(place, "holds half of a surrogate pair, which is not valid text")
        except BadRecord as e:
            problems.add(place, e.fault)
            columns += _propose_columns(record, e, renames)
        except (TypeError, ValueError) as e:  # of a table: a date, bytes, NaN
            problems.add(place, f"holds a value that JSON cannot hold ({e})")
        else:
            yield prompt
    if unread:
        _warn_once(option, f"{path}: does not read {', '.join([*unread][:8])} (fields of messages)")


def _propose_columns(record: Mapping[str, Any], fault: BadRecord, renames: Renames) -> list[str]:
    """Return a value of --columns that names the prompt of a row and its answer, if the row shows them."""
    proposed = fault.options[-1] if fault.options[:1] == ("--columns",) and not renames else ""
    if not proposed or "FIELD" in proposed:
        return []
    others = {name: value for name, value in record.items() if name != proposed.partition("=")[2]}
    answer = "" if "answer" in record else propose_field(others, "answer")
    return [f"{proposed},answer={answer}" if answer else proposed]


def _iter_records(path: Path, renames: Renames, option: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield place and record for each row; null fields in a table are left out."""
    if path.is_dir() or path.suffix.lower() in {*ARROW_SUFFIXES, *COMPRESSED_SUFFIXES, PARQUET_SUFFIX,
                                                JSON_SUFFIX}:
        try:
            for place, record in read_records(path, partial(_warn_once, option), renames):
                yield place, {name: value for name, value in record.items() if value is not None}
        except UserError as e:
            raise UserError(f"{option} {e}") from None
        return
    check_rows(path, option, "")
    yield from ((f"line {line}", row) for line, row in read_rows(path, option, ""))


def _warn_once(option: str, sentence: str) -> None:
    if is_first_rank():
        warn(f"{option} {sentence}")


@dataclass(frozen=True)
class UnusedRows:
    """Rows in a prompt file that no round uses."""

    too_long: Mapping[str, int]
    """Id -> tokens."""
    rows: Sequence[Mapping[str, Any]]
    """Entries in `UNUSED_ROWS_FILE`."""
    account: RecordAccount


def find_unused_rows(prompts: PromptList, too_long: Mapping[str, int], limit: int) -> UnusedRows:
    """Return repeated prompts and prompts longer than `limit`, `rollout.max_prompt_tokens`; `too_long`: id ->
    tokens of these."""
    rows: list[dict[str, Any]] = []
    for index in prompts.find_indices({*too_long, *prompts.repeats}).tolist():
        prompt = prompts[index]
        if prompt.id in too_long:
            rows.append({"place": prompt.place, "id": prompt.id, "tokens": too_long[prompt.id],
                         "why": f"has {too_long[prompt.id]:,} tokens, more than rollout.max_prompt_tokens = "
                                f"{limit:,}"})
        rows += ({"place": place, "why": f"is the same as {prompt.place}"}
                 for place in prompts.repeats.get(prompt.id, ()))
    account = RecordAccount(prompts.num_rows, len(prompts) - len(too_long), {
        f"longer than rollout.max_prompt_tokens = {limit:,}": len(too_long),
        "same as another one": sum(map(len, prompts.repeats.values())),
        "asked in training too": prompts.num_trained}, "prompts", "asked")
    return UnusedRows(too_long, rows, account)


def write_unused_rows(store: Path, unused: UnusedRows) -> None:
    """Write `unused` into a store, so that the trainer orders the same prompts."""
    file = store / UNUSED_ROWS_FILE
    if file.is_file():
        if read_too_long(store) != set(unused.too_long):
            raise UserError(f"{file}: other prompts were set aside when the store was begun; give the "
                            f"{OPTION} and rollout.max_prompt_tokens of its first command, or choose "
                            "another --store")
    elif unused.rows:
        write_sealed_json(file, {"prompts": list(unused.rows)}, UNUSED_ROWS_FILE)


def read_too_long(store: Path) -> set[str]:
    """Return the ids of too long prompts from `UNUSED_ROWS_FILE`."""
    file = store / UNUSED_ROWS_FILE
    if not file.is_file():
        return set()
    rows = read_sealed_json(file, "restore it from a copy", UNUSED_ROWS_FILE)["prompts"]
    return {row["id"] for row in rows if "id" in row}


def find_shared_prompts(prompts: Sequence[RolloutPrompt], others: Sequence[RolloutPrompt]
                        ) -> list[RolloutPrompt]:
    """Return the prompts whose question is also in `others`; further fields in the record may differ."""
    # The table holds `prompts`, a few; `others` may be a million.
    is_shared = {_question_digest(prompt): False for prompt in prompts}
    for candidate in others:
        digest = _question_digest(candidate)
        if digest in is_shared:
            is_shared[digest] = True
    return [prompt for prompt in prompts if is_shared[_question_digest(prompt)]]


def _question_digest(prompt: RolloutPrompt) -> str:
    record = prompt.record
    question = record.get("messages", record.get("prompt", record))
    if isinstance(question, str):
        # A plain text equals a user message with this text.
        question = [{"role": "user", "content": question.strip()}]
    return _hash_json(question, STREAM_DIGITS)


def sampling_digest(settings: Mapping[str, Any]) -> str:
    """Return the digest of sampling settings in a response's `Key`: temperature, limits, seed, chat template,
    environment, and the round, since two rounds of one policy may contain the same prompt."""
    return _hash_json(settings, HASH_DIGITS)


def compute_stream(round: int, prompt: str, sample: int, attempt: int = 0, turn: int = 0) -> int:
    """Return the random stream for a response; stream and seed determine the sampled tokens."""
    return int(_hash_json([round, prompt, sample, attempt, turn], STREAM_DIGITS), 16)


def _hash_json(value: Any, digits: int, **form: Any) -> str:
    digest = Digest(SHA256)
    digest.update(json.dumps(value, sort_keys=True, **form).encode())
    return digest.text().partition(":")[2][:digits]
