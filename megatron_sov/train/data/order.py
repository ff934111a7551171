"""The order of training samples: a function of (seed, ledger) with resumable cursors.

The state is a few integers per source and the ledger's entries. It is equal on all ranks and for every
data-parallel size, and part of each checkpoint.
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
    """Content of one row of a batch; padding fills the rest of the row."""

    source: int
    """Index of the source."""
    segments: Row
    """Parts of documents, in order."""
    contexts: tuple[int, ...] = ()
    """Labels at the beginning of each segment that belong to an earlier sample and do not count; (): none."""


def choose_source(weights: dict[str, float], taken: dict[str, int]) -> str:
    """Return the source of the next sample.

    After n samples, a source of weight w has more than n w - 1 and less than n w + 1 samples: among the
    sources below their share, the next sample of the chosen source is due first (Tijdeman, "The chairman
    assignment problem", 1980). The source furthest below its share would not keep this bound.
    """
    due = sum(taken.values()) + 1
    # shares sum to 1, so that at least one source is below its share
    below_share = [name for name, weight in weights.items() if taken.get(name, 0) < weight * due]
    return min(below_share, key=lambda name: ((taken.get(name, 0) + 1) / weights[name], name))


@dataclass
class OrderState:
    """Resumable state of the sample order; plain values."""

    cursors: dict[str, Cursor] = field(default_factory=dict)
    """Source name -> cursor."""
    history: list[LedgerEntry] = field(default_factory=list)
    """Ledger entries of past steps."""
    step: int = 0
    """Steps whose batches were returned."""
    taken: dict[str, int] = field(default_factory=dict)
    """Source name -> samples returned since the weights last changed."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> OrderState:
        return OrderState({n: Cursor(**c) for n, c in raw["cursors"].items()},
                          [LedgerEntry(**e) for e in raw["history"]], raw["step"], dict(raw["taken"]))


class SampleOrder:
    """Returns the samples of each global batch, step by step."""

    def __init__(self, config: RunConfig, sources: list[Source], state: OrderState | None = None,
                 planned: Sequence[LedgerEntry] | None = None) -> None:
        """Continue after `state`.

        Args:
            config: settings of the run.
            sources: training data.
            state: of an earlier order; None: the beginning.
            planned: the ledger as `plan` gives it for these settings and sources; None: it is planned here.
        """
        self.sources = sources
        self.state = state or OrderState()
        self.ledger = Ledger(plan_ledger(config, sources) if planned is None else planned, self.state.history,
                             self.state.step)
        self._seed = config.train.seed
        self._packing: Packing = config.data.packing
        self._chat_packing: Packing = "drop" if config.data.over_long == "drop" else "truncate"
        self._index = {s.name: i for i, s in enumerate(sources)}
        self._rounds, self._steps_per_round = find_round_documents(sources), config.rollout.steps_per_round
        self._policy, self._round_seed = config.policy, config.rollout.seed
        self._unit = config.documents_per_unit
        self._shared_rows = config.train.micro_batch_size if config.may_share_prompts else 1
        self._documents: dict[int, Documents] = {}
        self._streams: dict[str, DocumentStream] = {}

    def next_batch(self) -> tuple[LedgerEntry, list[OrderedSample]]:
        """Return ledger entry and samples of the next global batch, and advance all cursors."""
        s = self.state
        entry = self.ledger.at(s.step)
        # counts belong to one set of weights: with new weights, a source would catch up on its old share
        if s.step and entry.weights != self.ledger.at(s.step - 1).weights:
            s.taken = {}
        if self._rounds is not None and entry.is_round:  # a source of any run may have the name
            # rounds ignore the ledger's weights: all their documents are learned
            samples = (self._build_round_samples(entry, self._rounds) if self._is_on_policy(s.step)
                       else self._take_text_samples(entry, entry.global_batch_size))
        else:
            samples = [self._take_sample(entry.weights, entry.seq_len)
                       for _ in range(entry.global_batch_size)]
        s.step += 1
        # after the step: a checkpoint stores the entries of past steps, not planned ones
        s.history = self.ledger.history(s.step)
        return entry, samples

    def is_ready(self, step: int) -> bool:
        """Return whether the documents of a step exist; those of a round do once it is open."""
        return (self._rounds is None or not self.ledger.at(step).is_round or not self._is_on_policy(step)
                or self._rounds.is_open(step // self._steps_per_round + 1))

    def _is_on_policy(self, step: int) -> bool:
        return self._policy.is_on_policy(self._round_seed, step // self._steps_per_round + 1)

    def _build_round_samples(self, entry: LedgerEntry, rounds: RoundDocuments) -> list[OrderedSample]:
        """Return the rows of a round's step: all its documents, whole, and text that is learned with them."""
        number, step = divmod(self.state.step, self._steps_per_round)
        segments = rounds.step_segments(number + 1, step)
        cursor = self.state.cursors.setdefault(ROUNDS_SOURCE, Cursor())
        # the documents of a pair share a row
        units = [tuple(segments[i:i + self._unit]) for i in range(0, len(segments), self._unit)]
        if self._shared_rows > 1:
            # responses to one prompt are consecutive, and share it if they are in one micro-batch
            rows = pack_units_nearby(units, entry.seq_len, self._shared_rows)
        else:
            rows = pack_units(units, entry.seq_len)
        cursor.tokens += sum(s.count for s in segments)
        cursor.samples += len(rows)
        samples = [OrderedSample(self._index[ROUNDS_SOURCE], row) for row in rows]
        return samples + self._take_knowledge_samples(entry)

    def _take_knowledge_samples(self, entry: LedgerEntry) -> list[OrderedSample]:
        if not self._policy.has_text_at(self._round_seed, self.state.step + 1):
            return []
        return self._take_text_samples(entry, self._policy.parts.knowledge_batch_size)

    def _take_text_samples(self, entry: LedgerEntry, count: int) -> list[OrderedSample]:
        """Take samples from all sources but the rounds."""
        text = {name: weight for name, weight in entry.weights.items() if name != ROUNDS_SOURCE}
        shares = {name: weight / sum(text.values()) for name, weight in text.items()}
        return [self._take_sample(shares, entry.seq_len) for _ in range(count)]

    def _take_sample(self, weights: dict[str, float], seq_len: int) -> OrderedSample:
        name = choose_source(weights, self.state.taken)
        self.state.taken[name] = self.state.taken.get(name, 0) + 1
        return OrderedSample(self._index[name], self._get_stream(name).next_sample(seq_len))

    def documents(self, source: int) -> Documents:
        if source not in self._documents:
            self._documents[source] = self.sources[source].open_split("train")
        return self._documents[source]

    def _get_stream(self, name: str) -> DocumentStream:
        if name not in self._streams:
            index = self._index[name]
            cursor = self.state.cursors.setdefault(name, Cursor())
            source = self.sources[index]
            packing = self._chat_packing if source.is_chat else self._packing
            self._streams[name] = DocumentStream(name, self.documents(index), self._seed,
                                                 packing, cursor, source.group)
        return self._streams[name]

    def epochs(self) -> dict[str, float]:
        """Return source -> passes over it so far, for sources in use."""
        return {name: stream.epochs() for name, stream in self._streams.items()}
