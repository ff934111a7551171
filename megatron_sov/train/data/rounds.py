"""Published reinforcement-learning rounds: a source whose documents the trainer opens round by round.

A round is a token artifact RUN/rounds/0001 whose manifest lists the documents of each step. The trainer opens
a round before the round's first step."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.train.data.sources import Source, open_sources
from megatron_sov.train.data.streams import PackedSegment
from megatron_sov.train.data.token_shards import Documents, DocumentView

ROUNDS_SOURCE = "rollouts"
"""Source name."""
BEHAVIOUR, ADVANTAGE, GROUP_SHARE = "behaviour_logprobs", "advantage", "group_share"
"""Columns of published rounds. `GROUP_SHARE` is 1 / responses in the group, for objectives over groups."""
DOCUMENT_DOMAINS = "document_domains"
"""Manifest field for teachers: [domain, document count] for consecutive documents."""
_ROUND_BITS = 32
"""Lower bits of a document number: index in the round; the upper bits are the round."""


def round_folder(rounds: Path, number: int) -> Path:
    """Return the folder for round `number` (from 1) in RUN/rounds."""
    return rounds / f"{number:04d}"


def first_document(number: int) -> int:
    return number << _ROUND_BITS


@dataclass(frozen=True)
class PublishedRound:
    """A round's documents, in the order of its optimizer steps."""

    path: Path
    """Token artifact folder."""
    documents: Documents | None
    """Documents, or None if nothing in the round is learned."""
    steps: tuple[range, ...]
    """Document indices for each optimizer step."""
    trainer_columns: dict[str, np.ndarray]
    """Column -> number for each token, computed by the trainer after publication."""
    starts: np.ndarray
    """[documents + 1] int64: each document's first index in `trainer_columns`."""
    idle: frozenset[int] = frozenset()
    """Skipped steps, which would change no weight."""


class RoundDocuments(DocumentView):
    """Documents in open rounds.

    A second thread prepares batches: a round is open completely or not at all."""

    is_plain = False

    def __init__(self, rounds: Path, vocab_size: int = sys.maxsize, columns: Sequence[str] = (),
                 published: Sequence[str] = (BEHAVIOUR, ADVANTAGE)) -> None:
        """Start without an open round, in the folder `rounds` (RUN/rounds).

        `published` are columns in the published artifacts, `columns` are computed by the trainer, see `open`.
        """
        self.folder, self.vocab_size = rounds, vocab_size
        self.trainer_columns = tuple(columns)
        self.columns = (*published, *columns)
        self._rounds: dict[int, PublishedRound] = {}
        self.lengths = _Lengths(self)

    def is_open(self, number: int) -> bool:
        return number in self._rounds

    def verify(self, number: int, rank: int = 0, size: int = 1) -> None:
        """Check a published round's file hashes, each time a run opens the round.

        Each of `size` processes checks every `size`-th file from index `rank` on. Raises `UserError` if a
        file is missing or changed."""
        path = round_folder(self.folder, number)
        if damage := find_damaged_files(path, sorted(read_manifest(path).files)[rank::size]):
            raise UserError(f"{damage[0]}; delete {path}, and the round is published again from the store")

    def read(self, number: int, seq_len: int, num_steps: int) -> PublishedRound:
        """Read a published round, without opening it.

        Raises `UserError` if the artifact cannot be read, its number of steps is not `num_steps`, or a
        document has more than `seq_len` tokens."""
        path = round_folder(self.folder, number)
        content = read_manifest(path, "tokens").content
        steps = _parse_steps(path, content)
        if content.get("round") != number or len(steps) != num_steps:
            raise UserError(f"{path}: is round {content.get('round')} with {len(steps)} steps, must be round "
                            f"{number} with rollout.steps_per_round = {num_steps}; delete the folder, and "
                            "the round is published again")
        if not steps[-1].stop:
            return PublishedRound(path, None, steps, {}, np.zeros(1, np.int64))
        [source] = open_sources({str(path): 1.0}, self.vocab_size, (ROLLOUTS,))
        documents = source.open_split("train")
        lengths = np.asarray(documents.lengths[np.arange(len(documents.lengths))], np.int64)
        if steps[-1].stop != len(lengths):
            raise UserError(f"{path}: has {len(lengths)} documents, but its steps cover {steps[-1].stop}; "
                            "delete the folder, and the round is published again")
        # checked here, because the thread that prepares batches would fail in the middle of a step
        if lengths.max() > seq_len:
            raise UserError(f"{path}: document {int(lengths.argmax())} has {lengths.max()} tokens, more "
                            f"than data.phases.0.seq_len = {seq_len}, and responses are never cut; raise "
                            "seq_len, or lower rollout.max_new_tokens")
        return PublishedRound(path, documents, steps, {}, np.concatenate([[0], np.cumsum(lengths)]))

    def open(self, number: int, published_round: PublishedRound) -> None:
        """Open round `number`, and close the rounds before its predecessor.

        `published_round` is the result of `read`, with a value for each of `self.trainer_columns`."""
        missing = [name for name in self.trainer_columns if name not in published_round.trainer_columns]
        if missing and published_round.documents is not None:
            raise ValueError(f"round {number} lacks the columns {missing}")
        # The previous round stays open, because its last batches may not be prepared yet.
        recent_rounds = {other: opened for other, opened in self._rounds.items() if other >= number - 1}
        # One assignment, because a second thread reads the table.
        self._rounds = recent_rounds | {number: published_round}

    def step_segments(self, number: int, step: int) -> list[PackedSegment]:
        """Return whole documents for `step` (from 0 in the round), in order."""
        first = first_document(number)
        return [PackedSegment(first + i, 0, self.lengths[first + i])
                for i in self._rounds[number].steps[step]]

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        if name not in self.trainer_columns:
            return super().column(name, document, start, count)
        _, index, _ = self.locate(document)
        published_round = self._rounds[document >> _ROUND_BITS]
        first = published_round.starts[index] + start
        column: np.ndarray = published_round.trainer_columns[name][first:first + count]
        return column

    def locate(self, document: int) -> tuple[Documents, int, int]:
        documents = self._rounds[document >> _ROUND_BITS].documents
        assert documents is not None, f"document {document} of a round without any"
        return documents, document & ((1 << _ROUND_BITS) - 1), 0


class _Lengths:
    """Token counts for documents in open rounds."""

    def __init__(self, rounds: RoundDocuments) -> None:
        self._rounds = rounds

    def __len__(self) -> int:
        return sum(len(published.starts) - 1 for published in self._rounds._rounds.values())

    def __getitem__(self, documents: Any) -> Any:
        if isinstance(documents, int):
            round_documents, index, _ = self._rounds.locate(documents)
            return int(round_documents.lengths[index])
        return np.array([self[int(document)] for document in documents], np.int64)

    def __iter__(self) -> Iterator[int]:
        for _, published in sorted(self._rounds._rounds.items()):
            yield from np.diff(published.starts).tolist()


def build_rounds_source(documents: RoundDocuments, tokenizer: Path | None, routes: RouteShape | None = None
                        ) -> Source:
    """Build the source for published rounds.

    Args:
        documents: the rounds.
        tokenizer: tokenizer folder of the responses.
        routes: shape of the published routes.
    """
    return Source(ROUNDS_SOURCE, None, ROLLOUTS, {}, {"train": 0}, 0.0, train_documents=documents,
                  vocab_size=documents.vocab_size, tokenizer=tokenizer, routes=routes)


def find_round_documents(sources: Sequence[Source]) -> RoundDocuments | None:
    """Return the `RoundDocuments` among the sources, or None without rounds."""
    return next((s.train_documents for s in sources if isinstance(s.train_documents, RoundDocuments)), None)


def _parse_steps(path: Path, content: dict[str, Any]) -> tuple[range, ...]:
    """Parse each step's document indices from a round's manifest."""
    try:
        steps = tuple(range(int(first), int(first) + int(count)) for first, count in content["steps"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: is not a published round (steps: {type(e).__name__}: {e}); delete the "
                        "folder, and the round is published again") from None
    if not steps or [s.start for s in steps] != [0, *(s.stop for s in steps[:-1])]:
        raise UserError(f"{path}: its steps {content['steps']} are not consecutive; delete the folder, "
                        "and the round is published again")
    return steps
