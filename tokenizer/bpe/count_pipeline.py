"""From inputs to a learned vocabulary: look through, count, gather, merge;
what is counted survives a kill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sov.errors import UserError
from tokenizer.bpe import superbpe
from tokenizer.bpe.count_units import Unit, look_through, plan
from tokenizer.bpe.pretoken_counts import CountSettings, UnitCounts, count_units
from tokenizer.bpe.pretoken_table import WordTable, gather_words
from tokenizer.bpe.vocabulary import Vocabulary
from tokenizer.mixture import Group, Share, Sizes, describe, repeats, share_bytes, share_of
from tokenizer.presets import NUM_BYTES, Preset

COUNTING_BYTES = 1 << 30
"""Memory for the tables of all workers while counting; more text goes through the disk."""
BASE_BYTES = 400_000_000
"""Memory of the command itself: libraries, the vocabulary, buffers."""
SMALLEST_MEMORY_GB = 1.0
SAMPLE_BYTES = 100_000
"""Text of each group that bytes per token are measured on and that the finished tokenizer is
checked on, at most."""
UNIT_BYTES = 32 << 20
"""Bytes on the disk of a unit: what is read again after a kill, at most, by each worker."""
WORKER_BYTES = 32 << 20
"""Input on the disk for which a further process is worth its start."""
MOST_REPEATS = 100
NEEDED_POWER = 1.6
"""Text for twice the merges is about 2^1.6 as much: measured on 2 to 280 MB of
documentation in ten languages."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to learn."""

    preset: Preset
    """Rules."""
    vocab_size: int
    """Ids, special ones included."""
    transition_size: int
    """Ids at which words begin to join; `vocab_size` where they never do."""
    only_superwords: bool
    """From there on every token is a superword, as long as the text has any;
    else merging goes on within words too."""
    superword_sample_bytes: int
    """Text that superwords are learned from, at most."""
    max_memory_bytes: int | None
    """Bound on memory; None: learning takes what the distinct words need."""
    workers: int
    """Processes that read and count."""
    work: Path
    """Folder for what is counted."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """What came out."""

    vocabulary: Vocabulary
    """Tokens and merges."""
    stage_1_tokens: int
    """Bytes and merges before words joined."""
    samples: dict[str, str]
    """Group -> some of its text."""
    facts: list[dict[str, Any]]
    """For the manifest: one object for each group."""
    stages: list[dict[str, Any]]
    """For the manifest: text, distinct words and what was left out, for each stage."""


def learn(plan_: Plan, groups: list[Group]) -> Learned:
    """Learn a vocabulary.

    Raises:
        UserError: unreadable input, weights that the text cannot follow,
            or too little text for the vocabulary.
    """
    units = plan(groups, UNIT_BYTES)
    input_bytes = sum(unit.size_bytes for unit in units)
    plan_ = dataclasses.replace(plan_, workers=min(plan_.workers, 1 + input_bytes // WORKER_BYTES))
    with _bar("looking through", input_bytes, "B") as progress:
        sizes = look_through(groups, units, plan_.work, plan_.workers, progress)
    factors = repeats(groups, sizes)
    shares = [share_of(s, factor) for s, factor in zip(sizes, factors, strict=True)]
    facts = [describe(g, s, share) for g, s, share in zip(groups, sizes, shares, strict=True)]
    for group, fact, factor in zip(groups, facts, factors, strict=True):
        _tell_group(group, fact, factor)
    seen_bytes = sum(fact["seen_bytes"] for fact in facts)
    special = plan_.preset.num_special_ids
    vocabulary = Vocabulary(plan_.preset.max_token_bytes)
    counts, table = _count(plan_, units, sizes, shares, plan_.preset.split_pattern, "words")
    stages = [_stage(plan_.transition_size, seen_bytes, table)]
    target = plan_.transition_size - special
    with _bar("merging", target - NUM_BYTES, "merges") as progress:
        superbpe.learn_words(table, vocabulary, target, plan_.preset, progress)
    _check_reached(plan_, vocabulary, plan_.transition_size, seen_bytes)
    if plan_.transition_size < plan_.vocab_size:
        fraction = min(1.0, plan_.superword_sample_bytes / seen_bytes)
        some = [share_of(s, factor * fraction) for s, factor in zip(sizes, factors, strict=True)]
        counts, table = _count(plan_, units, sizes, some, plan_.preset.superword_pattern, "superwords")
        sample_bytes = sum(share_bytes(s, share) for s, share in zip(sizes, some, strict=True))
        stages.append(_stage(plan_.vocab_size, sample_bytes, table))
        with _bar("joining words", plan_.vocab_size - plan_.transition_size, "merges") as progress:
            superbpe.learn_superwords(table, vocabulary, plan_.vocab_size - special,
                                      plan_.preset.max_superword_words, plan_.only_superwords, progress)
        _check_reached(plan_, vocabulary, plan_.vocab_size, sample_bytes)
    return Learned(vocabulary, target, _samples(groups, counts), facts, stages)


def _bar(title: str, total: int, unit: str) -> Any:
    """Return a context manager that shows progress and gives the function to report it to."""
    class Bar(tqdm):
        def __enter__(self) -> Callable[[int], object]:  # type: ignore[override]
            return self.update

    return Bar(total=total, desc=title, unit=unit, unit_scale=True, mininterval=0.5)


def _tell_group(group: Group, fact: dict[str, Any], factor: float) -> None:
    """Print a group's size, and refuse a weight that the text cannot follow."""
    if factor > MOST_REPEATS:
        raise UserError(f"--input {group.name}: weight {group.weight:g} asks for its "
                        f"{fact['num_bytes'] / 1e6:.3g} MB to be seen {factor:,.0f} times, "
                        f"at most {MOST_REPEATS} make sense; add text to it, or give it a weight of at most "
                        f"{(group.weight or 0) * MOST_REPEATS / factor:.2g}")
    seen = f", seen {fact['seen_bytes'] / fact['num_bytes']:.2f} times" if group.weight is not None else ""
    print(f"{group.name}: {fact['num_bytes'] / 1e6:.2f} MB of text{seen}")


def _count(plan_: Plan, units: list[Unit], sizes: list[Sizes], shares: list[Share], pattern: str,
           what: str) -> tuple[list[UnitCounts], WordTable]:
    """Count the words of all units and gather them."""
    samples = tuple(share_of(s, min(1.0, SAMPLE_BYTES / s.num_bytes)) for s in sizes)
    settings = CountSettings(plan_.preset, pattern, tuple(shares), samples)
    limit_bytes = min(COUNTING_BYTES, (plan_.max_memory_bytes or 1 << 62) // 3)
    counts = []
    with _bar(f"counting {what}", sum(unit.size_bytes for unit in units), "B") as progress:
        for unit, counted in zip(units, count_units(units, settings, plan_.work, plan_.workers, limit_bytes),
                                 strict=True):
            counts.append(counted)
            progress(unit.size_bytes)
    max_bytes = None
    if plan_.max_memory_bytes is not None:
        max_bytes = (plan_.max_memory_bytes - BASE_BYTES) // superbpe.LEARNING_BYTES_PER_BYTE
    table = gather_words([counted.file for counted in counts], plan_.work, max_bytes)
    print(f"{len(table.counts):,} distinct {what}" + (
        f"; {table.dropped_words:,} that occur less than {table.min_count} times are left out for "
        f"--max-memory-gb, {100 * table.dropped_share:.3f} % of the text" if table.dropped_words else ""),
          flush=True)
    return counts, table


def _stage(reaches: int, seen_bytes: int, table: WordTable) -> dict[str, Any]:
    return {"reaches_tokens": reaches, "seen_bytes": seen_bytes, "distinct_words": len(table.counts),
            "least_count": table.min_count, "dropped_words": table.dropped_words,
            "dropped_share": table.dropped_share}


def _check_reached(plan_: Plan, vocabulary: Vocabulary, wanted: int, seen_bytes: int) -> None:
    """Raise where the text ran out of pairs."""
    reached = len(vocabulary.tokens) + plan_.preset.num_special_ids
    if reached < wanted:
        least = plan_.preset.smallest_vocab
        needed_bytes = seen_bytes * ((wanted - least) / max(reached - least, 1)) ** NEEDED_POWER
        raise UserError(f"--vocab-size {plan_.vocab_size}: the text is too small for it, only {reached} "
                        f"tokens were reached from {seen_bytes / 1e6:.3g} MB (pairs must occur at least "
                        f"{superbpe.MIN_COUNT} times); give it about "
                        f"{max(needed_bytes, 1.2 * seen_bytes) / 1e6:.3g} MB like it, or ask for at most "
                        f"{reached} tokens")


def _samples(groups: list[Group], counts: list[UnitCounts]) -> dict[str, str]:
    """Return each group's sample; its pieces are sorted, since units come in the order of files."""
    found: dict[int, list[str]] = {number: [] for number in range(len(groups))}
    for counted in counts:
        found[counted.group] += counted.sample
    return {group.name: "\n".join(sorted(found[number]))[:SAMPLE_BYTES]
            for number, group in enumerate(groups)}
