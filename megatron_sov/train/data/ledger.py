"""The ledger: blend, sample length and batch size for each step, as an append-only list in the checkpoint.

The sample order is a function of (seed, ledger, documents). Past steps are never reinterpreted: a changed
setting or an added source becomes a new entry from the step at which the run resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.model.config import PhaseConfig, RunConfig, data
from megatron_sov.train.data.rounds import ROUNDS_SOURCE, RoundDocuments, find_round_documents
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import ChainedLengths, Lengths


class Ledger:
    """Past entries up to the current step, then planned entries."""

    def __init__(self, planned: Sequence[LedgerEntry], history: Sequence[LedgerEntry] = (),
                 step: int = 0) -> None:
        """Join the entries `history` of a checkpoint after `step` steps with the `planned` entries."""
        past = [e for e in history if e.first_step < step]
        running = next((e for e in reversed(planned) if e.first_step <= step), None)
        future = [e for e in planned if e.first_step > step]
        if running is not None and not (past and running.has_same_values(past[-1])):
            past.append(dataclasses.replace(running, first_step=step))
        self.entries = past + future

    def get_entry(self, step: int) -> LedgerEntry:
        return next(e for e in reversed(self.entries) if e.first_step <= step)

    def skip_steps(self, first: int, end: int) -> None:
        """Mark the samples in steps `first` to `end` - 1 (from 0) as not learned."""
        entries: list[LedgerEntry] = []
        for step in sorted({first, end, *(e.first_step for e in self.entries)}):
            entry = self.get_entry(step)
            entries.append(dataclasses.replace(entry, first_step=step,
                                               skip=entry.skip or first <= step < end))
        # one assignment, because a second thread prepares the batches of later steps
        self.entries = _merge_equal_entries(entries)

    def history(self, step: int) -> list[LedgerEntry]:
        """Return the entries that begin before `step`."""
        return [e for e in self.entries if e.first_step < step]

    def max_seq_len(self) -> int:
        return max(e.seq_len for e in self.entries)


@dataclass(frozen=True)
class LedgerEntry:
    """Blend, sample length and batch size from `first_step` to the next entry."""

    first_step: int
    """First optimizer step (from 0)."""
    phase: str
    """Curriculum phase."""
    seq_len: int
    """Tokens per sample."""
    global_batch_size: int
    """Samples per step."""
    weights: dict[str, float]
    """Source -> share of the samples, with sum 1; sources without a share are left out. In rounds, the number
    of rows depends on their documents: `global_batch_size` stands for these rows, without added text."""
    skip: bool = False
    """Whether the samples are drawn but not learned."""

    @property
    def is_round(self) -> bool:
        """Whether samples come from published rounds (`data.rounds`)."""
        return ROUNDS_SOURCE in self.weights

    def has_same_values(self, other: LedgerEntry) -> bool:
        """Return whether this entry equals `other` except for `first_step`."""
        return dataclasses.replace(self, first_step=other.first_step) == other


def plan_ledger(config: RunConfig, sources: list[Source]) -> list[LedgerEntry]:
    """Compute the ledger for a whole run from its settings; phases shorter than a step have no entry.

    Raises `UserError` if a blend names an unknown source or a source without training tokens, or if a phase
    has no training tokens."""
    starts = [*config.phase_starts(), config.num_steps()]
    # `skip_steps` counts from 1 and includes `last`, entries count from 0: they begin at first - 1 and last
    skip_changes: list[int] = []
    for first, last in config.data.skip_steps:
        skip_changes += [first - 1, last]
    rounds = find_round_documents(sources) is not None
    entries: list[LedgerEntry] = []
    for i, (phase, start, end) in enumerate(zip(config.data.phases, starts, starts[1:], strict=False)):
        weights = _compute_round_weights(config, sources) if rounds else _compute_weights(i, phase, sources)
        changes = [start, *data.find_ramp_changes(config.train, phase), *skip_changes]
        for step in sorted({s for s in changes if start <= s < end}):
            skip = any(first - 1 <= step < last for first, last in config.data.skip_steps)
            size = data.batch_size_at(config.train, phase, step)
            entries.append(LedgerEntry(step, phase.name, phase.seq_len, size, weights, skip))
    return _merge_equal_entries(entries)


def _merge_equal_entries(entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Drop entries equal to the previous entry, so that equal sample orders have equal ledgers."""
    merged: list[LedgerEntry] = []
    for entry in entries:
        if not (merged and entry.has_same_values(merged[-1])):
            merged.append(entry)
    return merged


def _compute_weights(index: int, phase: PhaseConfig, sources: list[Source]) -> dict[str, float]:
    """Return source -> share in a phase, from `phase.blend` or else from `Source.share`."""
    tokens = {s.name: s.num_tokens["train"] for s in sources}
    for name, weight in phase.blend.items():
        if name not in tokens:
            raise UserError(f"data.phases.{index}.blend names source {name!r}, which the data does not have"
                            f"{suggest_name(name, tokens)} (sources: {', '.join(tokens)})")
        if weight > 0 and not tokens[name]:
            raise UserError(f"data.phases.{index}.blend gives source {name!r} the weight {weight:g}, "
                            "but it has no training tokens; leave it out or pack more of it")
    raw = phase.blend or {s.name: s.share for s in sources if tokens[s.name]}
    total = sum(raw.values())
    if total <= 0:
        raise UserError(f"data.phases.{index} ({phase.name}): none of its sources has training tokens; "
                        "add one to its blend")
    return {s.name: raw[s.name] / total for s in sources if raw.get(s.name, 0) > 0}


def _compute_round_weights(config: RunConfig, sources: list[Source]) -> dict[str, float]:
    """Return mean shares of round documents, and of text learned in addition (InK-GRPO) or instead (GKD)."""
    policy, parts = config.policy, config.policy.parts
    if policy.has_text:
        rows = parts.knowledge_share * parts.knowledge_batch_size / config.train.global_batch_size
    else:
        rows = 1 - policy.on_policy_share
    shares = {ROUNDS_SOURCE: policy.on_policy_share}
    text = {s.name: s.share for s in sources if s.num_tokens["train"] and rows}
    total = sum(text.values())
    for name, share in text.items():
        if share > 0:
            shares[name] = rows * share / total
    return shares


@dataclass(frozen=True)
class OverLongUnits:
    """A source's conversations or pairs that are longer than its shortest sample."""

    source: str
    """Source name."""
    seq_len: int
    """Tokens in the shortest sample."""
    count: int
    """Over-long conversations or pairs per epoch."""
    total: int
    """Conversations or pairs per epoch."""
    longest_tokens: int
    """Tokens in the longest conversation or pair."""


def count_over_long(sources: Sequence[Source], entries: Sequence[LedgerEntry]) -> list[OverLongUnits]:
    """Count over-long units in each chat source for ledger `entries`; sources that fit are left out."""
    counts = []
    for source in sources:
        # texts may be cut, and `RoundDocuments.read` checks rounds
        if not source.is_chat or isinstance(source.train_documents, RoundDocuments):
            continue
        lengths = [e.seq_len for e in entries if e.weights.get(source.name)]
        if not lengths:
            continue
        tokens = count_unit_tokens(source.open_split("train").lengths, source.group)
        num_over_long = int((tokens > min(lengths)).sum())
        if num_over_long:
            counts.append(OverLongUnits(source.name, min(lengths), num_over_long, len(tokens),
                                        int(tokens.max())))
    return counts


def check_units_fit(over_long: Sequence[OverLongUnits]) -> None:
    """Raise `UserError` for over-long units if `data.over_long` is "refuse"."""
    if over_long:
        counts = "; ".join(f"source {units.source!r}: {units.count:,} of {units.total:,} are longer than a "
                           f"sample of {units.seq_len} tokens, the longest has {units.longest_tokens}"
                           for units in over_long)
        longest_tokens = max(units.longest_tokens for units in over_long)
        raise UserError(f"data.over_long = refuse: {counts}; make samples longer "
                        f"(seq_len={longest_tokens}), or set data.over_long to drop or cut")


def check_pairs_fit(over_long: Sequence[OverLongUnits]) -> None:
    """Raise `UserError` if every pair in a source is longer than a sample.

    After cutting, both responses of most pairs would be equal, and the run would learn nothing."""
    for pairs in over_long:
        if pairs.count == pairs.total:
            raise UserError(f"source {pairs.source!r}: each of its {pairs.total:,} pairs is longer than a "
                            f"sample of {pairs.seq_len} tokens, and a cut may make the responses equal; make "
                            f"samples longer (seq_len={pairs.longest_tokens} fits all)")


def count_unit_tokens(lengths: Lengths, group: int) -> np.ndarray:
    """Return [units] int64: tokens in each unit of `group` documents; no unit spans two shards."""
    parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
    return np.concatenate([np.zeros(0, np.int64), *(
        part[:len(part) // group * group].reshape(-1, group).sum(axis=1, dtype=np.int64) for part in parts)])
