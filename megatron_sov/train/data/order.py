"""Which document a model sees, when: the order of samples as a function of (seed, ledger),
with resumable cursors.

All state is a few integers per source and the ledger's entries, the same on every process and at any
data-parallel size, and belongs into the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.model.config import RunConfig
from megatron_sov.train.data.ledger import Ledger, LedgerEntry, plan_ledger
from megatron_sov.train.data.rounds import ROUNDS_SOURCE, RoundDocuments, find_round_documents
from megatron_sov.train.data.streams import (
    Cursor, DocumentStream, Packing, Row, pack_units, pack_units_nearby)
from megatron_sov.train.data.token_shards import Documents, Source


@dataclass(frozen=True)
class OrderedSample:
    """What one row of a batch holds; padding fills the rest."""

    source: int
    """Index of the source."""
    segments: Row
    """Parts of documents, in order."""
    contexts: tuple[int, ...] = ()
    """For each segment, how many labels at its beginning do not count, because an earlier sample has them;
    (): all labels count."""


def choose_source(weights: dict[str, float], taken: dict[str, int]) -> str:
    """Return the source of the next sample, so that after n samples each source has more than n w - 1 and
    less than n w + 1.

    Of the sources that would not run ahead, the one whose next sample is due first (Tijdeman, "The chairman
    assignment problem", 1980).  Taking the source that is furthest behind would not do: with many sources
    some fall further back.
    """
    due = sum(taken.values()) + 1
    # a source that is at its share already would be ahead after one more; there is always one below, since
    # shares sum to 1
    behind = [name for name, weight in weights.items() if taken.get(name, 0) < weight * due]
    return min(behind, key=lambda name: ((taken.get(name, 0) + 1) / weights[name], name))


@dataclass
class OrderState:
    """The resumable state of the order; plain values."""

    cursors: dict[str, Cursor] = field(default_factory=dict)
    """Source name -> cursor."""
    history: list[LedgerEntry] = field(default_factory=list)
    """The ledger up to now."""
    step: int = 0
    """Steps whose batches were given."""
    taken: dict[str, int] = field(default_factory=dict)
    """Source name -> samples given since the weights last changed."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> OrderState:
        return OrderState({n: Cursor(**c) for n, c in raw["cursors"].items()},
                          [LedgerEntry(**e) for e in raw["history"]], raw["step"], dict(raw["taken"]))


class SampleOrder:
    """Gives the samples of each global batch, in order of steps."""

    def __init__(self, config: RunConfig, sources: list[Source], state: OrderState | None = None,
                 planned: Sequence[LedgerEntry] | None = None) -> None:
        """Go on behind a state.

        Args:
            config: the run's settings.
            sources: what is read.
            state: where an earlier order stood; None: the beginning.
            planned: the ledger as `plan` gives it for these settings and sources; None: it is planned here.
        """
        self.sources = sources
        self.state = state or OrderState()
        self.ledger = Ledger(plan_ledger(config, sources) if planned is None else planned, self.state.history,
                             self.state.step)
        self._seed = config.train.seed
        self._packing: Packing = config.data.packing
        self._of_chats: Packing = "drop" if config.data.over_long == "drop" else "truncate"
        self._index = {s.name: i for i, s in enumerate(sources)}
        self._rounds, self._steps_per_round = find_round_documents(sources), config.rollout.steps_per_round
        self._policy, self._round_seed = config.policy, config.rollout.seed
        self._unit = config.documents_per_unit
        self._shared_rows = config.train.micro_batch_size if config.may_share_prompts else 1
        self._documents: dict[int, Documents] = {}
        self._streams: dict[str, DocumentStream] = {}

    def next_batch(self) -> tuple[LedgerEntry, list[OrderedSample]]:
        """Return the ledger's entry and the samples of the next global batch,
        and move all cursors behind them."""
        s = self.state
        entry = self.ledger.at(s.step)
        # counts belong to one set of weights: under new ones a source would catch up for its old share
        if s.step and entry.weights != self.ledger.at(s.step - 1).weights:
            s.taken = {}
        if self._rounds is not None and entry.is_round:  # any source may have the name
            # a round's rows do not follow the ledger's weights: all of its documents are learned, whatever
            # their number
            samples = (self._of_round(entry, self._rounds) if self._is_on_policy(s.step)
                       else self._of_texts(entry, entry.global_batch_size))
        else:
            samples = [self._next_sample(entry.weights, entry.seq_len)
                       for _ in range(entry.global_batch_size)]
        s.step += 1
        # after the step: a checkpoint holds what the steps so far followed, and not what was planned behind
        # them
        s.history = self.ledger.history(s.step)
        return entry, samples

    def is_ready(self, step: int) -> bool:
        """Return whether a step's documents are there: those of a round are once it is open."""
        return (self._rounds is None or not self.ledger.at(step).is_round or not self._is_on_policy(step)
                or self._rounds.is_open(step // self._steps_per_round + 1))

    def _is_on_policy(self, step: int) -> bool:
        return self._policy.is_on_policy(self._round_seed, step // self._steps_per_round + 1)

    def _of_round(self, entry: LedgerEntry, rounds: RoundDocuments) -> list[OrderedSample]:
        """Return the rows of a round's step: all of its documents, none of them cut, and the text that is
        learned beside them."""
        number, step = divmod(self.state.step, self._steps_per_round)
        segments = rounds.step_segments(number + 1, step)
        cursor = self.state.cursors.setdefault(ROUNDS_SOURCE, Cursor())
        # the two of a pair share a row
        units = [tuple(segments[i:i + self._unit]) for i in range(0, len(segments), self._unit)]
        # Responses to one prompt follow one another, and share it where they are in one micro-batch.
        rows = (pack_units_nearby(units, entry.seq_len, self._shared_rows) if self._shared_rows > 1
                else pack_units(units, entry.seq_len))
        cursor.tokens += sum(s.count for s in segments)
        cursor.samples += len(rows)
        return [*(OrderedSample(self._index[ROUNDS_SOURCE], row) for row in rows), *self._text_beside(entry)]

    def _text_beside(self, entry: LedgerEntry) -> list[OrderedSample]:
        if not self._policy.has_text_at(self._round_seed, self.state.step + 1):
            return []
        return self._of_texts(entry, self._policy.parts.knowledge_batch_size)

    def _of_texts(self, entry: LedgerEntry, count: int) -> list[OrderedSample]:
        """Return samples of the sources beside the rounds."""
        text = {name: weight for name, weight in entry.weights.items() if name != ROUNDS_SOURCE}
        shares = {name: weight / sum(text.values()) for name, weight in text.items()}
        return [self._next_sample(shares, entry.seq_len) for _ in range(count)]

    def _next_sample(self, weights: dict[str, float], seq_len: int) -> OrderedSample:
        name = choose_source(weights, self.state.taken)
        self.state.taken[name] = self.state.taken.get(name, 0) + 1
        return OrderedSample(self._index[name], self._stream(name).next_sample(seq_len))

    def documents(self, source: int) -> Documents:
        if source not in self._documents:
            self._documents[source] = self.sources[source].open_split("train")
        return self._documents[source]

    def _stream(self, name: str) -> DocumentStream:
        if name not in self._streams:
            index = self._index[name]
            cursor = self.state.cursors.setdefault(name, Cursor())
            source = self.sources[index]
            self._streams[name] = DocumentStream(name, self.documents(index), self._seed,
                                                 self._of_chats if source.is_chat else self._packing, cursor,
                                                 source.group)
        return self._streams[name]

    def epochs(self) -> dict[str, float]:
        """Return how often each source that is in use was gone through so far."""
        return {name: stream.epochs() for name, stream in self._streams.items()}
