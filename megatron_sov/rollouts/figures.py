"""What a store holds, in figures: by round and by domain, one part in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_sov.rewards.scoring import Tally
from megatron_sov.rollouts.parts import Part
from megatron_sov.rollouts.rows import Rollout, domain_of, later
from megatron_sov.rollouts.store import Store

_COLUMNS = ("record", "prompt_tokens", "tokens", "versions", "finish_reason")


@dataclass
class Figures:
    """Of the rows of a round, or of a domain of it."""

    rows: int = 0
    prompts: set[str] = field(default_factory=set)
    prompt_tokens: int = 0
    tokens: int = 0
    """Behind the prompts, of all rows."""
    written_tokens: int = 0
    """Of them, those that a policy wrote."""
    longest: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    oldest_version: int | None = None
    newest_version: int | None = None
    version_total: int = 0
    """Sum over the tokens that a policy wrote."""
    rewards: dict[str, Tally] = field(default_factory=dict)
    """By version."""

    def add(self, row: Rollout) -> None:
        """Count one more row."""
        self.rows += 1
        self.prompts.add(row.key.prompt)
        self.prompt_tokens += len(row.prompt_tokens)
        self.tokens += len(row.tokens)
        self.longest = max(self.longest, len(row.tokens))
        self.finish_reasons[row.finish_reason] += 1
        written = row.written_versions
        if len(written):
            oldest, newest = int(written.min()), int(written.max())
            self.oldest_version = oldest if self.oldest_version is None else min(oldest, self.oldest_version)
            self.newest_version = newest if self.newest_version is None else max(newest, self.newest_version)
            self.written_tokens += len(written)
            self.version_total += int(written.sum(dtype=np.int64))

    def plain(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        mean_version = self.version_total / self.written_tokens if self.written_tokens else None
        return {
            "rows": self.rows, "prompts": len(self.prompts), "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens, "written_tokens": self.written_tokens,
            "mean_length": self.tokens / self.rows if self.rows else None, "longest": self.longest,
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "oldest_version": self.oldest_version, "newest_version": self.newest_version,
            "mean_steps_behind_newest": (None if mean_version is None or self.newest_version is None
                                         else self.newest_version - mean_version),
            "rewards": {version: {"mean": found.mean, "rewards": found.num_rewards,
                                  "statuses": dict(sorted(found.statuses.items()))}
                        for version, found in sorted(self.rewards.items())}}


def figures_of(store: Store, round: int | None = None,
               done: Callable[[int], object] = lambda parts: None) -> dict[str, Any]:
    """Return figures of each round, of all its rows and by domain, as JSON has them.

    A row that another attempt goes on behind is counted as replaced alone, and so is what was said of it.

    Args:
        store: to look at.
        round: the one to look at; None: all.
        done: told the number of parts, as they are read.
    """
    rounds: dict[int, list[Part]] = {}
    for part in store.rollout_parts(round):
        rounds.setdefault(part.round, []).append(part)
    judged = {(part.name, part.reward_version): part for version in store.reward_versions()
              for part in store.reward_parts(version, round)}
    return {str(number): _round(store, parts, sorted(judged), done) for number, parts in rounds.items()}


def _round(store: Store, parts: list[Part], judged: Iterable[tuple[str, str]],
           done: Callable[[int], object]) -> dict[str, Any]:
    """Return the figures of a round; the attempts of a piece lie side by side, and are read together."""
    whole, domains, replaced = Figures(), dict[str, Figures](), 0
    for piece in sorted({part.piece for part in parts}):
        here = [part for part in parts if part.piece == piece]
        rows = [row for part in here for row in store.read_rollouts(part.name, _COLUMNS)]
        last = {(row.key, row.attempt): row for row in later(rows)}
        replaced += len(rows) - len(last)
        for row in last.values():
            for figures in (whole, domains.setdefault(domain_of(row.record), Figures())):
                figures.add(row)
        names = {part.name for part in here}
        for name, version in ((name, version) for name, version in judged if name in names):
            for said in store.read_rewards(version, name):
                if (judged_row := last.get((said.key, said.attempt))) is not None:
                    for figures in (whole, domains[domain_of(judged_row.record)]):
                        tally = figures.rewards.setdefault(version, Tally())
                        tally.add(said.reward, said.status)
        done(len(here))
    return {"parts": len(parts), "kept_out": sum(part.num_kept_out for part in parts), "replaced": replaced,
            **whole.plain(), "domains": {name: figures.plain() for name, figures in sorted(domains.items())}}
