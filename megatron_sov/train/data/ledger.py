"""The ledger: from which step on which sources were mixed, at which length and batch size.

It is append-only and lives in the checkpoint.  The order of all samples is a function of (seed, ledger,
documents): what has happened is never reinterpreted, and a changed setting or an added source is one more
entry from the step on which the run resumed with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.model.config import PhaseConfig, RunConfig, data
from megatron_sov.train.data.rounds import ROUNDS_SOURCE, RoundDocuments, find_round_documents
from megatron_sov.train.data.token_shards import ChainedLengths, Lengths, Source


@dataclass(frozen=True)
class LedgerEntry:
    """What holds from one step on, until the next entry."""

    first_step: int
    """First optimizer step (0-based)."""
    phase: str
    """Name of the curriculum's phase."""
    seq_len: int
    """Tokens of a sample."""
    global_batch_size: int
    """Samples of a step."""
    weights: dict[str, float]
    """Source -> share of the samples, summing to 1; sources without a share are left out.  A round has as
    many rows as its documents need; `global_batch_size` stands for them, and text beside comes on top."""
    skip: bool = False
    """Whether the steps' samples are passed over: drawn, and not learned."""

    @property
    def is_round(self) -> bool:
        """Whether the samples of its steps are those of a published round (`data.rounds`)."""
        return ROUNDS_SOURCE in self.weights

    def continues(self, other: LedgerEntry) -> bool:
        """Return whether this entry says the same as `other`, apart from the step."""
        return dataclasses.replace(self, first_step=other.first_step) == other


def plan_ledger(config: RunConfig, sources: list[Source]) -> list[LedgerEntry]:
    """Return the entries that the settings ask for, over the whole run; phases too short
    for a step have none.

    Raises:
        UserError: a blend names a source that the data does not have or that has no training
            tokens, or leaves none.
    """
    starts = [*config.phase_starts(), config.num_steps()]
    # steps of `skip_steps` count from 1 and are inclusive, entries count from 0: an entry begins at first -
    # 1, and the next one behind last
    skips = [s for first, last in config.data.skip_steps for s in (first - 1, last)]
    rounds = find_round_documents(sources) is not None
    entries: list[LedgerEntry] = []
    for i, (phase, start, end) in enumerate(zip(config.data.phases, starts, starts[1:], strict=False)):
        weights = _round_weights(config, sources) if rounds else _weights(i, phase, sources)
        changes = [start, *data.find_ramp_changes(config.train, phase), *skips]
        for step in sorted({s for s in changes if start <= s < end}):
            skip = any(first - 1 <= step < last for first, last in config.data.skip_steps)
            size = data.batch_size_at(config.train, phase, step)
            entries.append(LedgerEntry(step, phase.name, phase.seq_len, size, weights, skip))
    # a skip or a ramp may change nothing at its step; equal neighbours would make two ledgers of one order
    return [e for e, before in zip(entries, [None, *entries], strict=False)
            if before is None or not e.continues(before)]


def _weights(index: int, phase: PhaseConfig, sources: list[Source]) -> dict[str, float]:
    """Return the phase's shares: its blend's, or those that the sources have by themselves."""
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
        raise UserError(f"data.phases.{index} ({phase.name}): none of its sources has training tokens")
    return {s.name: raw[s.name] / total for s in sources if raw.get(s.name, 0) > 0}


def _round_weights(config: RunConfig, sources: list[Source]) -> dict[str, float]:
    """Return the shares of a round's rows, and of the data that are learned beside them (InK-GRPO) or in
    their place (GKD), which is what it is on average over the steps."""
    policy, parts = config.policy, config.policy.parts
    rows = (parts.knowledge_share * parts.knowledge_batch_size / config.train.global_batch_size
            if policy.has_text else 1 - policy.on_policy_share)
    text = {s.name: s.share for s in sources if s.num_tokens["train"] and rows}
    total = sum(text.values())
    return {ROUNDS_SOURCE: policy.on_policy_share} | {
        name: rows * share / total for name, share in text.items() if share > 0}


class Ledger:
    """History up to the current step, and the plan from there on."""

    def __init__(self, planned: Sequence[LedgerEntry], history: Sequence[LedgerEntry] = (),
                 step: int = 0) -> None:
        past = [e for e in history if e.first_step < step]
        running = next((e for e in reversed(planned) if e.first_step <= step), None)
        future = [e for e in planned if e.first_step > step]
        if running is not None and not (past and running.continues(past[-1])):
            past.append(dataclasses.replace(running, first_step=step))
        self.entries = past + future

    def at(self, step: int) -> LedgerEntry:
        return next(e for e in reversed(self.entries) if e.first_step <= step)

    def skip_steps(self, first: int, end: int) -> None:
        """Mark the steps from `first` to before `end` (0-based): their samples were drawn,
        and are not learned."""
        entries: list[LedgerEntry] = []
        for step in sorted({first, end, *(e.first_step for e in self.entries)}):
            at = self.at(step)
            entry = dataclasses.replace(at, first_step=step, skip=at.skip or first <= step < end)
            if not (entries and entry.continues(entries[-1])):
                entries.append(entry)
        self.entries = entries  # at once: the batches of later steps are prepared in another thread

    def history(self, step: int) -> list[LedgerEntry]:
        """Return the entries that the steps before `step` followed."""
        return [e for e in self.entries if e.first_step < step]

    def max_seq_len(self) -> int:
        return max(e.seq_len for e in self.entries)


# Conversations (and pairs of them) that are longer than a sample, counted before a run begins.

@dataclass(frozen=True)
class OverLongUnits:
    """What is too long of one source, at the shortest sample that it is read at."""

    source: str
    """Name."""
    seq_len: int
    """Tokens of that sample."""
    count: int
    """Units (a conversation, or a pair) that do not fit, of one pass over the source."""
    total: int
    """Units in all."""
    longest_tokens: int
    """Of the longest unit."""


def count_over_long(sources: Sequence[Source], entries: Sequence[LedgerEntry]) -> list[OverLongUnits]:
    """Return what does not fit of each source whose documents stay whole; sources that fit are left out.

    Args:
        sources: what is read.
        entries: the ledger.
    """
    found = []
    for source in sources:
        # what a round holds is seen when it is opened
        stays_whole = source.is_chat and not isinstance(source.train_documents, RoundDocuments)
        lengths = [e.seq_len for e in entries if stays_whole and e.weights.get(source.name)]
        if lengths:
            tokens = count_unit_tokens(source.open_split("train").lengths, source.group)
            too_long = int((tokens > min(lengths)).sum())
            if too_long:
                found.append(OverLongUnits(source.name, min(lengths), too_long, len(tokens),
                                           int(tokens.max())))
    return found


def check_units_fit(found: Sequence[OverLongUnits]) -> None:
    """Refuse data of which something does not fit, for `data.over_long=refuse`.

    Raises:
        UserError: there is such data.
    """
    if found:
        told = "; ".join(f"source {f.source!r}: {f.count:,} of {f.total:,} are longer than a sample of "
                         f"{f.seq_len} tokens, the longest has {f.longest_tokens}" for f in found)
        raise UserError(f"data.over_long = refuse, and {told}; make samples longer "
                        f"(seq_len={max(f.longest_tokens for f in found)}), or set data.over_long to drop or "
                        "cut")


def check_pairs_fit(found: Sequence[OverLongUnits]) -> None:
    """Refuse pairs of which not one fits: cut to half a sample each, most would be the same text twice, and
    a run would learn nothing without a word.

    Args:
        found: what is too long of sources of pairs.

    Raises:
        UserError: there are such pairs.
    """
    for f in found:
        if f.count == f.total:
            raise UserError(f"source {f.source!r}: each of its {f.total:,} pairs is longer than a sample of "
                            f"{f.seq_len} tokens, and cut they may not differ any more; make samples longer "
                            f"(seq_len={f.longest_tokens} fits all)")


def count_unit_tokens(lengths: Lengths, group: int) -> np.ndarray:
    """Return [units] int64: the tokens of each; a unit never lies in two shards."""
    parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
    return np.concatenate([np.zeros(0, np.int64), *(
        part[:len(part) // group * group].reshape(-1, group).sum(axis=1, dtype=np.int64) for part in parts)])
