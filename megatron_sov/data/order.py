"""Which document a model sees, when: the order of samples as a function of (seed, curriculum) with resumable cursors.

Each source is a stream of documents, shuffled anew in each epoch.  A sample is filled from one source; the sources take
turns so that none is ever a whole sample away from its weight.  All state is a few integers per source, the same on every
process and at any data-parallel size, and belongs into the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_sov.config import RunConfig
from megatron_sov.data.permutation import Permutation
from megatron_sov.data.shards import Documents, Source
from megatron_sov.errors import UserError, nearest


@dataclass(frozen=True)
class Segment:
    """A contiguous part of one document inside a sample."""

    document: int
    """Index of the document in its shard."""
    start: int
    """First token."""
    count: int
    """Tokens."""


@dataclass(frozen=True)
class Sample:
    """What one row of a batch holds; padding fills the rest."""

    source: int
    """Index of the source."""
    segments: tuple[Segment, ...]
    """Documents in order."""


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase of the curriculum with its steps and weights worked out."""

    name: str
    """Name."""
    first_step: int
    """First step (0-based) of the phase."""
    last_step: int
    """Step after the last one."""
    seq_len: int
    """Tokens of a sample."""
    weights: tuple[float, ...]
    """Weight of each source, summing to 1."""


def resolve_phases(config: RunConfig, sources: list[Source]) -> list[ResolvedPhase]:
    """Return the phases with step bounds and a weight for every source.

    Raises:
        UserError: a blend names a source that the data does not have, or leaves no source with documents.
    """
    names = [s.name for s in sources]
    total = sum(p.share for p in config.data.phases)
    phases, first, passed = [], 0, 0.0
    for i, phase in enumerate(config.data.phases):
        passed += phase.share
        last = config.num_steps() if i == len(config.data.phases) - 1 else round(config.num_steps() * passed / total)
        unknown = [n for n in phase.blend if n not in names]
        if unknown:
            raise UserError(f"data.phases.{i}.blend names source {unknown[0]!r}, which the data does not have"
                            f"{nearest(unknown[0], names)} (sources: {', '.join(names)})")
        raw = [phase.blend.get(s.name, 0.0) if phase.blend else s.share for s in sources]
        for source, weight in zip(sources, raw, strict=True):
            if weight and not source.num_tokens["train"]:
                raise UserError(f"data.phases.{i}.blend gives source {source.name!r} the weight {weight}, but it has no training "
                                "tokens; pack more text for it or leave it out")
        if sum(raw) <= 0:
            raise UserError(f"data.phases.{i} ({phase.name}): none of its sources has training tokens")
        phases.append(ResolvedPhase(phase.name, first, last, phase.seq_len, tuple(w / sum(raw) for w in raw)))
        first = last
    return phases


@dataclass
class Cursor:
    """Where the stream of one source stands."""

    epoch: int = 0
    """Passes over the source that are complete."""
    position: int = 0
    """Documents of this epoch that are complete."""
    offset: int = 0
    """Tokens of the current document that are consumed."""
    tokens: int = 0
    """Tokens consumed in all."""


class SourceStream:
    """The endless shuffled documents of one source."""

    def __init__(self, source: Source, shard: Documents, seed: int, cursor: Cursor) -> None:
        self.source, self.shard, self.cursor = source, shard, cursor
        self._seed = seed
        self._permutation = self._shuffle()

    def _shuffle(self) -> Permutation:
        return Permutation(len(self.shard.lengths), self._seed, self.source.name, self.cursor.epoch)

    def next_sample(self, seq_len: int, whole: bool) -> tuple[Segment, ...]:
        """Return the segments of the next sample of at most `seq_len` tokens and move the cursor behind them."""
        segments: list[Segment] = []
        room = seq_len
        while room > 0:
            document = self._permutation[self.cursor.position]
            length = int(self.shard.lengths[document])
            if whole:
                length = min(length, seq_len)  # the tail of a document longer than a sample is not learned
                if length > room:
                    break
            count = min(room, length - self.cursor.offset)
            if count > 0:
                segments.append(Segment(document, self.cursor.offset, count))
            room -= count
            self._advance(count, length)
        return tuple(segments)

    def _advance(self, count: int, length: int) -> None:
        c = self.cursor
        c.tokens += count
        c.offset += count
        if c.offset >= length:
            c.offset, c.position = 0, c.position + 1
            if c.position == len(self.shard.lengths):
                c.position, c.epoch = 0, c.epoch + 1
                self._permutation = self._shuffle()


def next_source(weights: tuple[float, ...], taken: list[int]) -> int:
    """Return the source of the next sample, so that after n samples each source has more than n w - 1 and less than n w + 1.

    Of the sources that would not run ahead, the one whose next sample is due first (Tijdeman, "The chairman assignment
    problem", 1980).  Taking the source that is furthest behind would not do: with many sources some fall further back.
    """
    due = sum(taken) + 1
    behind = [i for i, w in enumerate(weights) if taken[i] < w * due]
    return min(behind, key=lambda i: ((taken[i] + 1) / weights[i], i))


@dataclass
class OrderState:
    """The resumable state of the order; plain values."""

    cursors: dict[str, Cursor] = field(default_factory=dict)
    """Source name -> cursor."""
    phase: int = -1
    """Index of the phase that `samples` counts."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source name -> weight of the phase that `samples` counts; with other weights or sources counting starts anew."""
    samples: dict[str, int] = field(default_factory=dict)
    """Source name -> samples taken from it under this blend."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"cursors": {n: vars(c) for n, c in self.cursors.items()}, "phase": self.phase, "blend": self.blend,
                "samples": self.samples}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> OrderState:
        """Return the state that `to_dict` gave."""
        return OrderState({n: Cursor(**c) for n, c in raw["cursors"].items()}, raw["phase"], dict(raw["blend"]),
                          dict(raw["samples"]))


class SampleOrder:
    """Gives the samples of each global batch, in order of steps."""

    def __init__(self, config: RunConfig, sources: list[Source], state: OrderState | None = None) -> None:
        self.sources = sources
        self.phases = resolve_phases(config, sources)
        self.state = state or OrderState()
        self._global_batch_size = config.train.global_batch_size
        self._whole = config.data.packing == "whole"
        self._streams = [
            SourceStream(s, s.shard("train"), config.train.seed, self.state.cursors.setdefault(s.name, Cursor()))
            if s.num_tokens["train"] else None for s in sources
        ]

    def phase_of(self, step: int) -> int:
        """Return the index of the phase that step (0-based) belongs to."""
        return next(i for i, p in enumerate(self.phases) if step < p.last_step or i == len(self.phases) - 1)

    def next_batch(self, step: int) -> tuple[ResolvedPhase, list[Sample]]:
        """Return the phase and the samples of the global batch of `step`, and move all cursors behind them."""
        index = self.phase_of(step)
        phase = self.phases[index]
        blend = {s.name: w for s, w in zip(self.sources, phase.weights, strict=True)}
        if (self.state.phase, self.state.blend) != (index, blend):
            self.state.phase, self.state.blend, self.state.samples = index, blend, dict.fromkeys(blend, 0)
        return phase, [self._next_sample(phase) for _ in range(self._global_batch_size)]

    def _next_sample(self, phase: ResolvedPhase) -> Sample:
        chosen = next_source(phase.weights, [self.state.samples[s.name] for s in self.sources])
        self.state.samples[self.sources[chosen].name] += 1
        stream = self._streams[chosen]
        if stream is None:
            raise ValueError(f"source {self.sources[chosen].name} has weight {phase.weights[chosen]} but no training tokens")
        return Sample(chosen, stream.next_sample(phase.seq_len, self._whole or stream.source.is_chat))

    def consumed_tokens(self) -> dict[str, int]:
        """Return the tokens consumed of each source so far."""
        return {name: c.tokens for name, c in self.state.cursors.items()}
