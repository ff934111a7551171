"""Training sample order: a function of (seed, ledger) with resumable cursors.

Its state is a few integers per source and the ledger's entries, equal on every rank and for every
data-parallel size. Checkpoints contain the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.model.config import RunConfig
from megatron_sov.train.data.ledger import Ledger, LedgerEntry, plan_ledger
from megatron_sov.train.data.rounds import ROUNDS_SOURCE, RoundDocuments, find_round_documents
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.streams import (
    Cursor, DocumentStream, Packing, Row, pack_units, pack_units_nearby)
from megatron_sov.train.data.token_shards import Documents


class SampleOrder:
    """Returns the samples for global batches, step by step."""

    def __init__(self, config: RunConfig, sources: list[Source], state: OrderState | None = None,
                 planned: Sequence[LedgerEntry] | None = None) -> None:
        """Continue after `state`, or begin; `planned` is the result of `plan_ledger`, computed by default."""
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
        """Return ledger entry and samples for the next global batch, and advance the cursors."""
        state = self.state
        entry = self.ledger.get_entry(state.step)
        # after a change of weights, old counts would make a source catch up on its old share
        if state.step and entry.weights != self.ledger.get_entry(state.step - 1).weights:
            state.taken = {}
        # a source outside rounds may have the name `ROUNDS_SOURCE`, too
        if self._rounds is None or not entry.is_round:
            samples = [self._take_sample(entry.weights, entry.seq_len)
                       for _ in range(entry.global_batch_size)]
        elif self._is_on_policy(state.step):
            # the ledger's weights do not apply: every document of the round is learned
            samples = self._build_round_samples(entry, self._rounds)
        else:
            samples = self._take_text_samples(entry, entry.global_batch_size)
        state.step += 1
        # after the step, because checkpoints store only the entries of past steps
        state.history = self.ledger.history(state.step)
        return entry, samples

    def is_ready(self, step: int) -> bool:
        """Return whether the documents for `step` exist; a step of a round waits until the round is open."""
        if self._rounds is None or not self.ledger.get_entry(step).is_round or not self._is_on_policy(step):
            return True
        return self._rounds.is_open(step // self._steps_per_round + 1)

    def _is_on_policy(self, step: int) -> bool:
        return self._policy.is_on_policy(self._round_seed, step // self._steps_per_round + 1)

    def _build_round_samples(self, entry: LedgerEntry, rounds: RoundDocuments) -> list[OrderedSample]:
        """Return the rows for a round's step: its documents, whole, and text learned in the same step."""
        number, step = divmod(self.state.step, self._steps_per_round)
        segments = rounds.step_segments(number + 1, step)
        cursor = self.state.cursors.setdefault(ROUNDS_SOURCE, Cursor())
        # both documents of a pair share a row
        units = [tuple(segments[i:i + self._unit]) for i in range(0, len(segments), self._unit)]
        if self._shared_rows > 1:
            # responses to a prompt are consecutive, and share the prompt's tokens inside a micro-batch
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
        """Take `count` samples from sources other than rounds."""
        text = {name: weight for name, weight in entry.weights.items() if name != ROUNDS_SOURCE}
        shares = {name: weight / sum(text.values()) for name, weight in text.items()}
        return [self._take_sample(shares, entry.seq_len) for _ in range(count)]

    def _take_sample(self, weights: dict[str, float], seq_len: int) -> OrderedSample:
        name = choose_source(weights, self.state.taken)
        self.state.taken[name] = self.state.taken.get(name, 0) + 1
        return OrderedSample(self._index[name], self._get_stream(name).next_sample(seq_len))

    def open_documents(self, source: int) -> Documents:
        if source not in self._documents:
            self._documents[source] = self.sources[source].open_split("train")
        return self._documents[source]

    def _get_stream(self, name: str) -> DocumentStream:
        if name not in self._streams:
            index = self._index[name]
            cursor = self.state.cursors.setdefault(name, Cursor())
            source = self.sources[index]
            packing = self._chat_packing if source.is_chat else self._packing
            self._streams[name] = DocumentStream(name, self.open_documents(index), seed=self._seed,
                                                 packing=packing, cursor=cursor, group=source.group)
        return self._streams[name]

    def count_epochs(self) -> dict[str, float]:
        """Return source -> passes over the source so far, for sources in use."""
        return {name: stream.count_epochs() for name, stream in self._streams.items()}


@dataclass(frozen=True)
class OrderedSample:
    """Content for a batch row; padding fills the rest."""

    source: int
    """Source index."""
    segments: Row
    """Document parts, in order."""
    contexts: tuple[int, ...] = ()
    """For each segment, the number of leading labels that an earlier sample evaluates; (): 0."""


@dataclass
class OrderState:
    """Resumable `SampleOrder` state."""

    cursors: dict[str, Cursor] = field(default_factory=dict)
    """Source name -> cursor."""
    history: list[LedgerEntry] = field(default_factory=list)
    """Ledger entries for past steps."""
    step: int = 0
    """Batches returned so far."""
    taken: dict[str, int] = field(default_factory=dict)
    """Source name -> samples returned since weights last changed."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> OrderState:
        return OrderState({name: Cursor(**cursor) for name, cursor in raw["cursors"].items()},
                          [LedgerEntry(**entry) for entry in raw["history"]], raw["step"], dict(raw["taken"]))


def choose_source(weights: dict[str, float], taken: dict[str, int]) -> str:
    """Choose the next sample's source, for source -> weight and source -> samples taken.

    After n samples, a source with weight w has more than n w - 1 and fewer than n w + 1 samples: among the
    sources below their share, the next sample of the chosen source is due first (Tijdeman, "The chairman
    assignment problem", 1980). Choosing the source furthest below its share would break the bound."""
    due = sum(taken.values()) + 1
    # shares sum to 1, so that at least one source is below its share
    below_share = [name for name, weight in weights.items() if taken.get(name, 0) < weight * due]
    return min(below_share, key=lambda name: ((taken.get(name, 0) + 1) / weights[name], name))
