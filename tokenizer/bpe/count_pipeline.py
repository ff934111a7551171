"""From inputs to a learned vocabulary: count, gather, merge; what is counted survives a kill.

Weights are shares of the text's size, so weighted inputs are looked through before they are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sov.errors import UserError
from tokenizer.bpe import superbpe
from tokenizer.bpe.count_units import Unit, UnitSizes, group_sizes, look_through, plan
from tokenizer.bpe.lowest_pieces import LowestPieces
from tokenizer.bpe.pretoken_counts import SAMPLE_BYTES, CountSettings, count_units
from tokenizer.bpe.pretoken_table import WordTable, gather_words
from tokenizer.bpe.vocabulary import Vocabulary
from tokenizer.mixture import Group, Share, Sizes, describe, repeats, share_bytes, share_of
from tokenizer.presets import NUM_BYTES, Preset

COUNTING_BYTES = 1 << 30
"""Memory for the tables of all workers while counting; more text goes through the disk."""
BASE_BYTES = 400_000_000
"""Memory of the command itself: libraries, the vocabulary, buffers."""
SMALLEST_MEMORY_GB = 1.0
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


def learn(plan_: Plan, groups: list[Group], before_merging: Callable[[], object] = lambda: None) -> Learned:
    """Learn a vocabulary.

    Args:
        plan_: what to learn.
        groups: from what.
        before_merging: called when all words are counted; merging takes one core.

    Raises:
        UserError: unreadable input, weights that the text cannot follow,
            or too little text for the vocabulary.
    """
    units = plan(groups, UNIT_BYTES)
    input_bytes = sum(unit.size_bytes for unit in units)
    plan_ = dataclasses.replace(plan_, workers=min(plan_.workers, 1 + input_bytes // WORKER_BYTES))
    special = plan_.preset.num_special_ids
    vocabulary = Vocabulary(plan_.preset.max_token_bytes)
    shares, factors = [Share(1, 0)] * len(groups), [1.0] * len(groups)
    if any(group.weight is not None for group in groups):
        with _bar("looking through", input_bytes, "B") as progress:
            sizes = look_through(groups, units, plan_.work, plan_.workers, progress)
        factors = repeats(groups, sizes)
        _refuse_many_repeats(groups, sizes, factors)
        shares = [share_of(s, factor) for s, factor in zip(sizes, factors, strict=True)]
    counted = _count(plan_, groups, units, shares, plan_.preset.split_pattern, "words")
    sizes = counted.sizes
    facts = [describe(g, s, share) for g, s, share in zip(groups, sizes, shares, strict=True)]
    for group, fact in zip(groups, facts, strict=True):
        _tell_group(group, fact)
    seen_bytes = sum(fact["seen_bytes"] for fact in facts)
    table = _gather(plan_, counted, "words")
    stages = [_stage(plan_.transition_size, seen_bytes, table)]
    target = plan_.transition_size - special
    before_merging()
    with _bar("merging", target - NUM_BYTES, "merges") as progress:
        superbpe.learn_words(table, vocabulary, target, plan_.preset, progress)
    _check_reached(plan_, vocabulary, plan_.transition_size, seen_bytes)
    if plan_.transition_size < plan_.vocab_size:
        fraction = min(1.0, plan_.superword_sample_bytes / seen_bytes)
        some = [share_of(s, factor * fraction) for s, factor in zip(sizes, factors, strict=True)]
        units_counted = _count(plan_, groups, units, some, plan_.preset.superword_pattern, "superwords")
        table = _gather(plan_, units_counted, "superwords")
        sample_bytes = sum(share_bytes(s, share) for s, share in zip(sizes, some, strict=True))
        stages.append(_stage(plan_.vocab_size, sample_bytes, table))
        with _bar("joining words", plan_.vocab_size - plan_.transition_size, "merges") as progress:
            superbpe.learn_superwords(table, vocabulary, plan_.vocab_size - special,
                                      plan_.preset.max_superword_words, plan_.only_superwords, progress)
        _check_reached(plan_, vocabulary, plan_.vocab_size, sample_bytes)
    return Learned(vocabulary, target, _samples(groups, counted), facts, stages)


def _bar(title: str, total: int, unit: str) -> Any:
    """Return a context manager that shows progress and gives the function to report it to."""
    class Bar(tqdm):
        def __enter__(self) -> Callable[[int], object]:  # type: ignore[override]
            return self.update

    return Bar(total=total, desc=title, unit=unit, unit_scale=True, mininterval=0.5)


def _refuse_many_repeats(groups: list[Group], sizes: list[Sizes], factors: list[float]) -> None:
    """Refuse a weight that the text cannot follow."""
    for group, found, factor in zip(groups, sizes, factors, strict=True):
        if factor > MOST_REPEATS:
            raise UserError(f"--input {group.name}: weight {group.weight:g} asks for its "
                            f"{found.num_bytes / 1e6:.3g} MB to be seen {factor:,.0f} times, "
                            f"at most {MOST_REPEATS} make sense; add text to it, or give it a weight of at "
                            f"most {(group.weight or 0) * MOST_REPEATS / factor:.2g}")


def _tell_group(group: Group, fact: dict[str, Any]) -> None:
    """Print a group's size."""
    seen = f", seen {fact['seen_bytes'] / fact['num_bytes']:.2f} times" if group.weight is not None else ""
    print(f"{group.name}: {fact['num_bytes'] / 1e6:.2f} MB of text{seen}")


@dataclasses.dataclass(frozen=True)
class _Counted:
    """All units counted."""

    files: list[Path]
    """Words and counts of each unit."""
    sizes: list[Sizes]
    """Text of each group."""
    lowest: list[LowestPieces]
    """Pieces of each group, for a sample of it."""


def _count(plan_: Plan, groups: list[Group], units: list[Unit], shares: list[Share], pattern: str,
           what: str) -> _Counted:
    """Count the words of all units."""
    settings = CountSettings(plan_.preset, pattern, tuple(shares))
    limit_bytes = min(COUNTING_BYTES, (plan_.max_memory_bytes or 1 << 62) // 3)
    files, lowest = list[Path](), [LowestPieces(SAMPLE_BYTES) for _ in groups]

    def sizes(progress: Callable[[int], object]) -> Iterator[UnitSizes]:
        """Yield each unit's sizes; what is known of one unit is not kept beside that of all others."""
        counted = count_units(units, settings, plan_.work, plan_.workers, limit_bytes)
        for unit, found in zip(units, counted, strict=True):
            files.append(found.file)
            for piece in found.lowest:
                lowest[unit.group].add(piece)
            progress(unit.size_bytes)
            yield found.sizes

    with _bar(f"counting {what}", sum(unit.size_bytes for unit in units), "B") as progress:
        return _Counted(files, group_sizes(groups, units, sizes(progress)), lowest)


def _gather(plan_: Plan, counted: _Counted, what: str) -> WordTable:
    """Return the distinct words of all units."""
    max_bytes = None
    if plan_.max_memory_bytes is not None:
        max_bytes = (plan_.max_memory_bytes - BASE_BYTES) // superbpe.LEARNING_BYTES_PER_BYTE
    table = gather_words(counted.files, plan_.work, max_bytes)
    print(f"{len(table.counts):,} distinct {what}" + (
        f"; {table.dropped_words:,} that occur less than {table.min_count} times are left out for "
        f"--max-memory-gb, {100 * table.dropped_share:.3f} % of the text" if table.dropped_words else ""),
          flush=True)
    return table


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


def _samples(groups: list[Group], counted: _Counted) -> dict[str, str]:
    """Return each group's sample; its pieces are sorted, since units come in the order of files."""
    samples = {}
    for group, sizes, lowest in zip(groups, counted.sizes, counted.lowest, strict=True):
        share = share_of(sizes, min(1.0, SAMPLE_BYTES / sizes.num_bytes))
        found = sorted(piece.text for piece in lowest.found() if share.times(piece.bucket))
        samples[group.name] = "\n".join(found)[:SAMPLE_BYTES]
    return samples
