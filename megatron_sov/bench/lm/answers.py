"""Requests to a model (likelihoods and generations) and the cache of their answers.

Equal requests have equal keys in every evaluation. No torch here.

    CACHE/MODEL/records-*       answers, a journal per writing process (`progress.journal`)
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.work.progress.journal import Journal, iter_later_records

Answer = dict[str, float | bool | str | None]
"""`logprob` and `greedy` for a `LikelihoodRequest`, `text` and `finish_reason` for a `GenerationRequest`."""


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
        """Write answers to this process's journal, unless another process has answered meanwhile. Raises
        `UserError`: the disk is full or not writable."""
        if self._journal is None:
            with translate_disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # a file per process, because a journal has a single writer
                self._journal = Journal(self.folder, uuid.uuid4().hex)
        self.load_new_answers()
        new = {key: answer for key, answer in answers.items() if key not in self}
        # disk first: after a kill, answers in memory alone would be computed again
        self._journal.add((key, json.dumps(answer).encode()) for key, answer in new.items())
        self.update(new)

    def load_new_answers(self) -> None:
        """Read answers written since the last call, by any process."""
        records = iter_later_records(self.folder, self._ends)
        self.update((str(key), json.loads(answer)) for key, answer in records)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def iter_open_chunks(self, chunks: Sequence[Sequence[Request]]) -> Iterator[tuple[int, list[int]]]:
        """Yield (chunk index, indices without an answer) for chunks that lack answers.

        A job of a Slurm array begins with its own share of the chunks. It continues with the shares of other
        jobs from their ends, so that two jobs rarely answer the same chunk.
        """
        job, num_jobs = _read_array_index()
        begin, end = (len(chunks) * share // num_jobs for share in (job, job + 1))
        other_chunks = [*range(end, len(chunks)), *range(begin)]
        for number in [*range(begin, end), *reversed(other_chunks)]:
            if self._find_open(chunks[number]):
                self.load_new_answers()  # of other jobs
            if indices := self._find_open(chunks[number]):
                yield number, indices

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
