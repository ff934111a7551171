"""Requests to a model (likelihoods and generations) and the cache of their answers.

Equal requests have equal keys in every evaluation. No torch here.

    CACHE/MODEL/records-*       answers, a journal per writing process (`progress.journal`)
    CACHE/MODEL/asking/*        locks on chunks in progress (`progress.locks`)
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
"""`logprob` and `greedy` for a `LikelihoodRequest`, `text` and `finish_reason` for a `GenerationRequest`."""
WAIT_S = 1.0
"""Pause before looking again at chunks locked by other processes."""


@dataclass(frozen=True)
class LikelihoodRequest:
    """Asks for the log-probability of `continuation` after `context`."""

    context: tuple[int, ...]
    """At least one token."""
    continuation: tuple[int, ...]
    """At least one token."""

    @property
    def input_tokens(self) -> tuple[int, ...]:
        """Context and continuation without the last token."""
        return (self.context + self.continuation)[:-1]

    @cached_property
    def key(self) -> str:
        return _hash_json(["score", self.context, self.continuation])


@dataclass(frozen=True)
class GenerationRequest:
    prompt: tuple[int, ...]
    """Token ids."""
    until: tuple[str, ...]
    """Stop strings, removed from the answer."""
    max_tokens: int
    temperature: float = 0.0
    """0 for greedy."""
    top_k: int = 0
    """0 for no limit."""
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    """Index among samples from one prompt; 0 at temperature 0."""

    @property
    def sampling(self) -> tuple[int, float, int, float, int, tuple[str, ...]]:
        """Values that an engine call takes once for all prompts."""
        return (self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, self.until)

    @cached_property
    def key(self) -> str:
        return _hash_json(["write", self.prompt, *self.sampling, self.sample, False])

    @property
    def stream(self) -> int:
        """Random stream: 48 bits from `key`, independent from the order in a batch."""
        return int(self.key[:12], 16)


Request = LikelihoodRequest | GenerationRequest


def group_by_input(requests: Sequence[LikelihoodRequest]) -> list[list[LikelihoodRequest]]:
    """Group requests with equal `input_tokens`, e.g. one-token choices after a question; a group needs one
    forward pass. The longest come first, so that a lack of memory shows at once."""
    groups: dict[tuple[int, ...], list[LikelihoodRequest]] = {}
    for request in requests:
        groups.setdefault(request.input_tokens, []).append(request)
    return sorted(groups.values(), key=lambda group: -len(group[0].input_tokens))


def _hash_json(value: list[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def get_answer_folder(cache: Path, identity: Mapping[str, Any]) -> Path:
    """Return the model's folder in a cache; `identity` holds the JSON values that determine answers together
    with the request: model hash, engine, precision."""
    return cache / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


class AnswerCache(dict[str, Answer]):
    """Answers of a model by `Request.key`, shared between evaluations.

    Args:
        folder: from `get_answer_folder`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._journal: Journal | None = None
        self._ends: dict[Path, int] = {}
        self.load_new_answers()

    def save_answers(self, answers: Mapping[str, Answer]) -> None:
        """Write answers to this process's journal. Raises `UserError`: the disk is full or not writable."""
        if self._journal is None:
            with translate_disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # a file per process, because a journal has a single writer
                self._journal = Journal(self.folder, uuid.uuid4().hex)
        # disk first: after a kill, answers in memory alone would be computed again
        self._journal.add((key, json.dumps(answer).encode()) for key, answer in answers.items())
        self.update(answers)

    def load_new_answers(self) -> None:
        """Read answers written since the last call, by any process."""
        records = iter_later_records(self.folder, self._ends)
        self.update((str(key), json.loads(answer)) for key, answer in records)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def iter_open_chunks(self, chunks: Sequence[Sequence[Request]], should_stop: Callable[[], bool]
                         ) -> Generator[tuple[int, list[int]], None, None]:
        """Yield (chunk index, indices without an answer) until every request has an answer.

        The chunk stays locked until the next is requested or the process ends. While other processes hold the
        remaining chunks, the indices are []. The jobs of a Slurm array start at different chunks.
        """
        job, num_jobs = _read_array_index()
        begin = job * len(chunks) // num_jobs
        remaining = deque([*range(begin, len(chunks)), *range(begin)])
        num_busy = 0
        while remaining and not should_stop():
            number = remaining.popleft()
            chunk = chunks[number]
            if not self._find_open(chunk):
                continue
            name = hashlib.sha256("".join(request.key for request in chunk).encode()).hexdigest()[:24]
            # named by the requests, so that evaluations with an equal chunk take turns
            with try_lock_folder(self.folder / "asking" / name) as is_locked:
                self.load_new_answers()  # from the previous holder
                if is_locked and (indices := self._find_open(chunk)):
                    yield number, indices
            if self._find_open(chunk):  # interrupted, or locked by another process
                remaining.append(number)
            # wait after a round without a free chunk
            num_busy = 0 if is_locked else num_busy + 1
            if remaining and num_busy >= len(remaining):
                time.sleep(WAIT_S)
                num_busy = 0
                yield number, []  # the other ranks must not wait for minutes in a collective

    def _find_open(self, chunk: Sequence[Request]) -> list[int]:
        return [i for i, request in enumerate(chunk) if request.key not in self]


def _read_array_index() -> tuple[int, int]:
    """Return this job's index in its Slurm array and the number of jobs; (0, 1) outside an array."""
    try:
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - first
    except ValueError:
        return 0, 1
    return (index, count) if 0 <= index < count else (0, 1)
