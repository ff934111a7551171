"""What a model is asked on the way to a score (the likelihood of some tokens, or a continuation), what it has
answered.  No torch here.

Each request has a key, which is the same wherever the same is asked; answers are kept by it.

    CACHE/MODEL/records-*                 answers, in a journal of each asking process (`progress.journal`)
    CACHE/MODEL/asking/*                  chunks that are being asked for, held (`progress.locks`)
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.work.progress.journal import Journal, iter_later_records
from megatron_sov.work.progress.locks import try_lock_folder

Answer = dict[str, float | bool | str | None]
"""What came back: of a `AnswerScore` `logprob` and `greedy`, of a `Write` `text` and `finish_reason`."""
WAIT_S = 1.0
"""Before chunks that others hold are looked at again."""


@dataclass(frozen=True)
class AnswerScore:
    """How likely some tokens are behind others."""

    context: tuple[int, ...]
    """What stands before, at least one token."""
    continuation: tuple[int, ...]
    """What is judged, at least one token."""

    @property
    def read(self) -> tuple[int, ...]:
        """Tokens that the model reads: all but the last one."""
        return (self.context + self.continuation)[:-1]

    @cached_property
    def key(self) -> str:
        return _digest(["score", self.context, self.continuation])


@dataclass(frozen=True)
class Write:
    prompt: tuple[int, ...]
    """Token ids."""
    until: tuple[str, ...]
    """Texts that end it and are no part of it."""
    max_tokens: int
    temperature: float = 0.0
    """0: the most probable tokens."""
    top_k: int = 0
    """0: from all tokens."""
    top_p: float = 1.0
    """Smallest set of tokens that holds this much probability."""
    seed: int = 0
    sample: int = 0
    """Which of several continuations of one prompt; 0 at temperature 0, where all are the same."""

    @property
    def sampling(self) -> tuple[int, float, int, float, int, tuple[str, ...]]:
        """What an engine can be asked for together."""
        return (self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, self.until)

    @cached_property
    def key(self) -> str:
        return _digest(["write", self.prompt, *self.sampling, self.sample, False])

    @property
    def stream(self) -> int:
        """Number of its stream of random numbers: the same wherever the same is asked."""
        # 48 bits fit every engine's seed, and do not depend on the order of requests.
        return int(self.key[:12], 16)


Request = AnswerScore | Write


def readings(scores: Sequence[AnswerScore]) -> list[list[AnswerScore]]:
    """Return scores in groups for which the model reads the same tokens, the longest first: choices of one
    token behind one question are read once."""
    groups: dict[tuple[int, ...], list[AnswerScore]] = {}
    for score in scores:
        groups.setdefault(score.read, []).append(score)
    # The longest first: if memory is too small for them, that shows at once.
    return sorted(groups.values(), key=lambda group: -len(group[0].read))


def _digest(value: list[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def folder_of(cache: Path, identity: Mapping[str, Any]) -> Path:
    """Return the folder of a model's answers in a cache; `identity` has the JSON values on which answers
    depend in addition to the request: the model, and how it runs."""
    return cache / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


class Answers(dict[str, Answer]):
    """What a model has answered, by the keys of requests, in this and other evaluations.

    Args:
        folder: this model's, see `folder_of`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._journal: Journal | None = None
        self._ends: dict[Path, int] = {}
        self.reread()

    def keep(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; a kill behind this loses none of them.

        Raises:
            UserError: the disk is full, or nothing can be written there.
        """
        if self._journal is None:
            with translate_disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # a file of its own for each process, so that none writes into another's lines
                self._journal = Journal(self.folder, uuid.uuid4().hex)
        # on the disk first: what only memory has would be asked and paid for again after a kill
        self._journal.add((key, json.dumps(answer).encode()) for key, answer in answers.items())
        self.update(answers)

    def reread(self) -> None:
        """Take in what has been written since, by this process or others."""
        records = iter_later_records(self.folder, self._ends)
        self.update((str(key), json.loads(answer)) for key, answer in records)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def deal(self, chunks: Sequence[Sequence[Request]], should_stop: Callable[[], bool]
             ) -> Generator[tuple[int, list[int]], None, None]:
        """Yield what this process is to ask for: the number of a chunk, and the places in it that have no
        answer.  Nobody else asks for the chunk until the next one is wanted; where a process ends, so does
        its hold.  While others hold all that is left, the places are none.

        Each job of a Slurm array begins at another chunk and goes once around.
        """
        index, count = _place_in_array()
        # Jobs begin apart, so that they seldom meet at one chunk.
        begin = index * len(chunks) // count
        left = deque([*range(begin, len(chunks)), *range(begin)])
        num_busy = 0
        while left and not should_stop():
            chunk = chunks[number := left.popleft()]
            if not self._places(chunk):
                continue
            name = hashlib.sha256("".join(request.key for request in chunk).encode()).hexdigest()[:24]
            # Named by the requests: other evaluations that ask for the same chunk take turns.
            with try_lock_folder(self.folder / "asking" / name) as is_ours:
                self.reread()  # whoever held it before may have answered
                if is_ours and (places := self._places(chunk)):
                    yield number, places
            if self._places(chunk):  # cut off by a wish to stop, or held by another
                left.append(number)
            # A whole round without a free chunk: wait before the next one.
            num_busy = 0 if is_ours else num_busy + 1
            if left and num_busy >= len(left):
                time.sleep(WAIT_S)
                num_busy = 0
                yield number, []  # processes of the same model must not wait for minutes

    def _places(self, chunk: Sequence[Request]) -> list[int]:
        return [i for i, request in enumerate(chunk) if request.key not in self]


def _place_in_array() -> tuple[int, int]:
    """Return which job of a Slurm array this is, and of how many."""
    try:
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - first
    except ValueError:
        return 0, 1
    return (index, count) if 0 <= index < count else (0, 1)
