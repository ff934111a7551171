"""The prompts of a run: read from a file, in an order that is a function of seed and round, cut into pieces
of work; and by which settings and random numbers responses to them are written.

All of it is a function of what was asked, so that a piece that is written again is the same piece.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.base.digests import SHA256, Digest
from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.accounting import RecordAccount
from megatron_sov.base.documents.files import ARROW_SUFFIXES, JSON_SUFFIX, PARQUET_SUFFIX
from megatron_sov.base.documents.layouts import Renames, rename_fields
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.records import RecordReading, parse_record
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import UserError, list_problems, warn
from megatron_sov.base.sealed import read_json, write_json
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.rows import part_name
from megatron_sov.runs.launch_environment import is_first_rank

if TYPE_CHECKING:
    import numpy as np

OPTION = "--prompts"
TARGET = "target_tokens"
"""Field of a prompt's record."""
HASH_DIGITS, STREAM_DIGITS = 16, 15
"""Of the hash that a prompt, or settings, are known by, and of a stream's: 60 bits, by which streams of all
responses of a run differ, and an engine may take them as int64."""
MAX_TOLD = 10
"""Bad prompts that are named."""
_FURTHER = 1
"""Beside seed and round: an order of its own, since that of epochs asks each prompt once."""


@dataclass(frozen=True)
class RolloutPrompt:
    """What a policy is asked, or the task of an environment."""

    id: str
    """First hexadecimal digits of the record's SHA-256."""
    record: Mapping[str, Any]
    """The line of the file: `prompt` or `messages`, or a task; and what the reward needs."""
    place: str = field(default="", compare=False)
    """Where it stands, e.g. "line 7"."""
    option: str = field(default=OPTION, compare=False)
    """That it was given by."""

    def conversation(self) -> Conversation:
        """Return the prompt as a chat template takes it.

        Raises:
            BadRecord: it is none.
        """
        record = dict(self.record)
        # both names are in use; `parse_record` knows one
        if "messages" in record:
            if "prompt" in record:
                raise BadRecord("fields", "has 'prompt' and 'messages'; leave one of them out")
            record["prompt"] = record.pop("messages")
        return parse_record(record, "", 0, RecordReading("prompt")).conversation()


@dataclass(frozen=True, eq=False)
class PromptList(Sequence[RolloutPrompt]):
    """Prompts in an order, each once, that lie on the disk: a million take 24 MB of memory, and one is read
    where it is asked for."""

    option: str
    """That they were given by."""
    repeats: Mapping[str, Sequence[str]]
    """Id -> where the same stands again in the file; it is asked once."""
    _file: BinaryIO
    """Without a name: it ends with whoever has it open."""
    _numbers: np.ndarray
    """[rows] uint64: ids as numbers, of the rows of the file."""
    _starts: np.ndarray
    """[rows + 1] int64: where each begins in the file."""
    _rows: np.ndarray
    """[prompts] of the file that are among these, in their order."""
    num_trained: int = 0
    """Prompts of a file of --validation that were removed because training asks them."""

    @classmethod
    def of(cls, prompts: Iterable[RolloutPrompt], option: str = OPTION) -> PromptList:
        """Return prompts, of those of one id the first.

        Raises:
            UserError: the folder of temporary files is full.
        """
        import numpy as np

        with disk_errors(Path(tempfile.gettempdir())):
            # open as long as the list lives
            file = tempfile.TemporaryFile()  # noqa: SIM115
            numbers, starts = array("Q"), array("q", [0])
            for prompt in prompts:
                told = json.dumps([prompt.place, prompt.record], ensure_ascii=False)
                file.write(text := told.encode("utf-8", "surrogatepass"))  # a file's name may be no text
                numbers.append(int(prompt.id, 16))
                starts.append(starts[-1] + len(text))
            file.flush()
        ids = np.array(numbers, np.uint64)
        first = np.unique(ids, return_index=True)[1]
        found = cls(option, {}, file, ids, np.array(starts, np.int64), np.sort(first))
        again = np.setdiff1d(np.arange(len(ids)), first)
        repeats: dict[str, list[str]] = {}
        for prompt in map(found._read, again.tolist()):
            repeats.setdefault(prompt.id, []).append(prompt.place)
        return replace(found, repeats=repeats)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> RolloutPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptList: ...
    def __getitem__(self, index: int | slice) -> RolloutPrompt | PromptList:
        if isinstance(index, slice):
            return replace(self, _rows=self._rows[index])
        return self._read(int(self._rows[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # pieces go to the other ranks of an engine, which have no part of this file
        return PromptList.of, (list(self), self.option)

    @property
    def num_rows(self) -> int:
        """Return the rows of the file, repeats included."""
        return len(self._numbers)

    @property
    def ids(self) -> list[str]:
        """Return the ids; no record is read."""
        return [f"{number:0{HASH_DIGITS}x}" for number in self._numbers[self._rows].tolist()]

    def record_of(self, prompt: str) -> Mapping[str, Any]:
        """Return the record of one by its id; raises KeyError where there is none."""
        import numpy as np

        found, order = self._by_number
        place = int(np.searchsorted(found, number := np.uint64(int(prompt, 16))))
        if place == len(found) or found[place] != number:
            raise KeyError(prompt)
        return self[int(order[place])].record

    @cached_property
    def _by_number(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids as numbers in order of size, and the place of each."""
        numbers = self._numbers[self._rows]
        order = numbers.argsort()
        return numbers[order], order

    def take(self, places: np.ndarray) -> PromptList:
        """Return those at these places, in their order."""
        return replace(self, _rows=self._rows[places])

    def places_of(self, ids: Iterable[str]) -> np.ndarray:
        """Return where those of some ids stand, in order of place."""
        import numpy as np

        wanted = np.array([int(prompt, 16) for prompt in ids], np.uint64)
        return np.flatnonzero(np.isin(self._numbers[self._rows], wanted))

    def without(self, ids: Iterable[str]) -> PromptList:
        """Return all but those of some ids."""
        import numpy as np

        return self.take(np.delete(np.arange(len(self)), self.places_of(ids)))

    def _read(self, row: int) -> RolloutPrompt:
        start, end = self._starts[row:row + 2].tolist()
        # at a place: processes that were forked share where the file is read
        place, record = json.loads(os.pread(self._file.fileno(), end - start, start))
        return RolloutPrompt(f"{int(self._numbers[row]):0{HASH_DIGITS}x}", record, place, self.option)


@dataclass(frozen=True)
class PromptPiece:
    """Some prompts of a round: what one job takes up, and publishes as one part of the store."""

    round: int
    """From 1."""
    number: int
    """Among the pieces of its round, from 0."""
    prompts: PromptList

    def part(self, attempt: int = 0) -> str:
        return part_name(self.round, self.number, attempt)


def read_prompts(path: Path, renames: Renames = (), option: str = OPTION, *, is_asked: bool = False
                 ) -> PromptList:
    """Return the prompts of a file, or of the folder of a dataset, in its order, each once.

    Args:
        path: JSON lines, a list in JSON, Parquet, Arrow, or a folder of these as `datasets` saves it.
        renames: its fields of other names.
        option: that it was given by.
        is_asked: whether a policy is asked each row, which has to be a prompt then; tasks are checked by
            their environments.

    Raises:
        UserError: it cannot be read, has no rows, or bad ones: the first are named.
    """
    problems: list[str] = []
    found = PromptList.of(_prompts(path, renames, option, is_asked, problems), option)
    if problems:
        more = [f"and {len(problems) - MAX_TOLD} more"] if len(problems) > MAX_TOLD else []
        raise UserError(list_problems(f"{option} {path}", [*problems[:MAX_TOLD], *more],
                                      "mend or remove these rows"))
    if not found:
        raise UserError(f"{option} {path}: has no rows")
    return found


def _prompts(path: Path, renames: Renames, option: str, is_asked: bool, problems: list[str]
             ) -> Iterator[RolloutPrompt]:
    """Yield the rows of a file, the same ones too, and note what is wrong with the others."""
    unread: dict[str, None] = {}
    for place, record in _records(path, renames, option):
        try:
            record = rename_fields(dict(record), renames)
            # the id is that of the content: a file with lines added keeps the ids of the others
            digest = _hash(record, HASH_DIGITS, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            prompt = RolloutPrompt(digest, record, place, option)
            if is_asked:
                # here, where the row is in memory: a second look at a million rows parses them again
                unread |= dict.fromkeys(name for m in prompt.conversation().messages for name in m.unread)
        except UnicodeEncodeError:
            problems.append(f"{place}: holds half of a surrogate pair, which is no text")
        except BadRecord as e:
            problems.append(f"{place}: {e}")
        except (TypeError, ValueError) as e:  # of a table: a date, bytes, NaN
            problems.append(f"{place}: holds what JSON does not ({e})")
        else:
            yield prompt
    if unread:
        _tell(option, f"{path}: does not read {', '.join([*unread][:8])} (fields of messages)")


def _records(path: Path, renames: Renames, option: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where each row stands, and the row; what a table's row has no value for, it does not have."""
    if path.is_dir() or path.suffix.lower() in {*ARROW_SUFFIXES, PARQUET_SUFFIX, JSON_SUFFIX}:
        try:
            for place, record in read_records(path, partial(_tell, option), renames):
                yield place, {name: value for name, value in record.items() if value is not None}
        except UserError as e:
            raise UserError(f"{option} {e}") from None
        return
    check_rows(path, option, "")
    yield from ((f"line {line}", row) for line, row in read_rows(path, option, ""))


def _tell(option: str, sentence: str) -> None:
    if is_first_rank():
        warn(f"{option} {sentence}")


SET_ASIDE = "set_aside.json"
"""File of a store: prompts of the file that are not asked, and why."""


@dataclass(frozen=True)
class SetAside:
    """Rows of a file of prompts that are not asked."""

    too_long: Mapping[str, int]
    """Id -> tokens."""
    rows: Sequence[Mapping[str, Any]]
    """What the store's list says of each."""
    account: RecordAccount
    """Of all rows of the file."""


def set_aside(prompts: PromptList, too_long: Mapping[str, int], limit: int) -> SetAside:
    """Return what is not asked of a file of prompts.

    Args:
        prompts: all of it.
        too_long: id -> tokens of those that are longer than `rollout.max_prompt_tokens`.
        limit: that setting.
    """
    rows: list[dict[str, Any]] = []
    for place in prompts.places_of({*too_long, *prompts.repeats}).tolist():
        prompt = prompts[place]
        if prompt.id in too_long:
            rows.append({"place": prompt.place, "id": prompt.id, "tokens": too_long[prompt.id],
                         "why": f"has {too_long[prompt.id]:,} tokens, more than rollout.max_prompt_tokens = "
                                f"{limit:,}"})
        rows += ({"place": again, "why": f"is the same as {prompt.place}"}
                 for again in prompts.repeats.get(prompt.id, ()))
    account = RecordAccount(prompts.num_rows, len(prompts) - len(too_long), {
        f"longer than rollout.max_prompt_tokens = {limit:,}": len(too_long),
        "same as another one": sum(map(len, prompts.repeats.values())),
        "asked in training too": prompts.num_trained}, "prompts", "asked")
    return SetAside(too_long, rows, account)


def list_set_aside(store: Path, aside: SetAside) -> None:
    """Write into a store what is not asked, so that whoever trains its rounds counts the same prompts.

    Raises:
        UserError: others are set aside in it.
    """
    file = store / SET_ASIDE
    if file.is_file():
        if too_long_in(store) != set(aside.too_long):
            raise UserError(f"{file}: other prompts were set aside when the store was begun; give the "
                            f"{OPTION} and rollout.max_prompt_tokens that it was begun with, or choose "
                            "another --store")
    elif aside.rows:
        write_json(file, {"prompts": list(aside.rows)}, SET_ASIDE)


def too_long_in(store: Path) -> set[str]:
    """Return the ids of the prompts that a store does not ask for their length."""
    file = store / SET_ASIDE
    return {row["id"] for row in read_json(file, "restore it from a copy", SET_ASIDE)["prompts"]
            if "id" in row} if file.is_file() else set()


def asked_too(prompts: Sequence[RolloutPrompt], others: Sequence[RolloutPrompt]) -> list[RolloutPrompt]:
    """Return the prompts that ask what one of the others asks, whatever else their rows say."""
    # marked among the few: the others may be a million
    asked = {_question(prompt): False for prompt in prompts}
    for other in others:
        if (question := _question(other)) in asked:
            asked[question] = True
    return [prompt for prompt in prompts if asked[_question(prompt)]]


def _question(prompt: RolloutPrompt) -> str:
    record = prompt.record
    asked = record.get("messages", record.get("prompt", record))
    if isinstance(asked, str):
        # a text is what a user says
        asked = [{"role": "user", "content": asked.strip()}]
    return _hash(asked, STREAM_DIGITS)


def round_prompts(prompts: PromptList, rollout: RolloutConfig, number: int) -> PromptList:
    """Return the prompts of a round, in order: a function of the seed and the round's number alone.

    Each epoch is a permutation; a round that begins in one goes on in the next, where the prompts that it
    has already come later, so that no round has a prompt twice.

    Args:
        prompts: all of the file.
        rollout: seed and number of prompts.
        number: of the round, from 1.

    Raises:
        UserError: there are fewer prompts than a round has.
    """
    import numpy as np

    count, wanted = len(prompts), rollout.prompts_per_round
    if wanted > count:
        raise UserError(f"rollout.prompts_per_round = {wanted}: there are {count} prompts, and a round asks "
                        "each of its own once; lower it, or add prompts")
    # where the round begins, had all epochs been written one behind the other
    epoch, place = divmod((number - 1) * wanted, count)
    order = _epoch_order(rollout.seed, epoch, count, wanted)[place:place + wanted]
    # the round ends in the next epoch, whose order avoids what this one has used
    if len(order) < wanted:
        order = np.append(order, _epoch_order(rollout.seed, epoch + 1, count, wanted)[:wanted - len(order)])
    return prompts.take(order)


def pieces(prompts: PromptList, number: int, piece_prompts: int, begin: int = 0) -> list[PromptPiece]:
    """Return prompts of a round, as `round_prompts` gives them, in pieces that are counted from `begin`."""
    return [PromptPiece(number, i, prompts[first:first + piece_prompts])
            for i, first in enumerate(range(0, len(prompts), piece_prompts), begin)]


def round_pieces(prompts: PromptList, rollout: RolloutConfig, number: int, more: int = 0
                 ) -> list[PromptPiece]:
    """Return the pieces of a round: those of its own prompts, and behind them pieces of others, which stand
    in for groups that do not learn.

    These are a function of seed and number too, however many are asked at a time, so that every run over a
    store asks the same.

    Args:
        prompts: all of the file.
        rollout: seed, number of prompts, and those of a piece.
        number: of the round, from 1.
        more: pieces of others; there are fewer where the file has no more prompts.

    Raises:
        UserError: as `round_prompts`.
    """
    import numpy as np

    own = round_prompts(prompts, rollout, number)
    found = pieces(own, number, rollout.piece_prompts)
    if more:
        order = _permutation(len(prompts), rollout.seed, number, _FURTHER)
        others = order[~np.isin(order, prompts.places_of(own.ids))][:more * rollout.piece_prompts]
        found += pieces(prompts.take(others), number, rollout.piece_prompts, len(found))
    return found


def _epoch_order(seed: int, epoch: int, count: int, per_round: int) -> np.ndarray:
    """Return the order of an epoch's prompts.

    The prompts of a round that began in the epoch before move behind that round.  The end of that epoch has
    been touched by the one before it only where an epoch has fewer than two rounds.
    """
    import numpy as np

    # back to an epoch that begins with a round, or whose end no earlier epoch has touched
    first = epoch
    while first * count % per_round and (count < 2 * per_round or first == epoch):
        first -= 1
    order = _permutation(count, seed, first)
    for number in range(first + 1, epoch + 1):
        # prompts of the epoch before that belong to the round which goes on in this one
        carried, before = number * count % per_round, order
        order = _permutation(count, seed, number)
        if carried:
            ahead = ~np.isin(order, before[-carried:])
            # as many others go ahead as the round still needs; the rest keeps its order
            ahead &= np.cumsum(ahead) <= per_round - carried
            order = np.concatenate([order[ahead], order[~ahead]])
    return order


def _permutation(count: int, *entropy: int) -> np.ndarray:
    import numpy as np

    # seed and epoch as a sequence of entropy: seeds that are near give unrelated orders
    return np.random.default_rng(entropy).permutation(count)


def rounds_between(given: str) -> range:
    """Return the rounds that --rounds names.

    Raises:
        UserError: it has another form.
    """
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", given)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--rounds {given}: must be a round, or the first and the last one, from 1, e.g. "
                        "--rounds 2 or --rounds 3-7")
    return range(first, last + 1)


def budget_of(rollout: RolloutConfig, prompt: str, record: Mapping[str, Any], sample: int) -> int | None:
    """Return the tokens that a response is asked to have; None: it may have any number.

    Args:
        rollout: whose `budgets_tokens` divide a group into equal parts, in order of samples.
        prompt: its id, for sentences.
        record: the prompt's, whose field `target_tokens` counts where there are no budgets.
        sample: number of the response in its group.

    Raises:
        UserError: the record's is no number of tokens.
    """
    budgets = rollout.budgets_tokens
    if budgets:
        # equal parts of a group, also where the samples cannot be divided evenly
        return budgets[sample * len(budgets) // rollout.samples_per_prompt]
    target = record.get(TARGET)
    if target is None:
        return None
    if not isinstance(target, int) or isinstance(target, bool) or target < 1:
        raise UserError(f"--prompts: prompt {prompt} has {TARGET} = {target!r}; write a whole number from 1, "
                        "or leave it out")
    return target


def sampling_digest(settings: Mapping[str, Any]) -> str:
    """Return what stands in a response's key for the settings that its tokens were chosen by.

    Args:
        settings: JSON values: temperature, limits, seed, chat template, environment; and the round, since one
            policy may be asked the same prompt in two rounds.
    """
    return _hash(settings, HASH_DIGITS)


def stream_of(round: int, prompt: str, sample: int, attempt: int = 0, turn: int = 0) -> int:
    """Return the number of a response's stream of random numbers, which with the seed decides its samples.

    Args:
        round: that it is written for.
        prompt: its id.
        sample: number in its group.
        attempt: how often it was gone on with.
        turn: of an episode.
    """
    # of what the response is, and not of when it is written: a piece written again is the same piece
    return int(_hash([round, prompt, sample, attempt, turn], STREAM_DIGITS), 16)


def _hash(value: Any, digits: int, **form: Any) -> str:
    digest = Digest(SHA256)
    digest.update(json.dumps(value, sort_keys=True, **form).encode())
    return digest.text().partition(":")[2][:digits]
