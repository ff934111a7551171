"""From inputs to a learned vocabulary: count, gather, merge; what is counted survives a kill.

Weights are shares of the text's size, so weighted inputs are looked through before they are counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_sov.base.artifacts import create_file, write_atomically
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.work.processes.pool import map_in_processes
from tokenizer.bpe.counting import WordCounter, WordTable
from tokenizer.bpe.merging import JoinRule, PieceSampler
from tokenizer.bpe.splitter import Splitter
from tokenizer.bpe.trainer import BATCH_MERGES, MergeLearner, PretokenWords
from tokenizer.bpe.vocabulary import Vocabulary, get_byte_ids
from tokenizer.bpe.word_files import WordFileWriter, gather_words
from tokenizer.mixture import (
    NUM_BUCKETS, CountUnit, GroupShare, GroupSizes, SourceGroup, TextPiece, UnitSizes, add_group_sizes,
    build_group_facts, choose_share, compute_repeats, count_share_bytes, iter_pieces, measure_groups,
    plan_count_units)
from tokenizer.presets import NUM_BYTES, CountPlan, Preset

# Counting words: each unit becomes a file of (word, count), written in parts so that memory stays bounded.
#
# A worker's table is written out as a run whenever it has grown to its limit.  Runs are cut by a hash of
# the
# word into `NUM_PARTS` parts; all runs of one part together are small enough to be added up in memory
# (tokenizer/bpe/counting.py).

WORD_BYTES = 120
"""What a word takes in a worker's table: its text, the entry, and the copies while a run is written."""
SAMPLE_BYTES = 100_000
"""Text of each group that bytes per token are measured on and that the finished tokenizer is
checked on, at most."""
LEAST_WORDS = 1000
"""Words in a worker's table before it is written out, however small the bound."""
CODE_VERSION = 3
"""Raise it when the same text is counted differently, so that older files are not taken for new ones."""


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """What the counts of a unit depend on."""

    preset: Preset
    """Its normalization matters here."""
    pattern: str
    """What splits text into words."""
    shares: tuple[GroupShare, ...]
    """How often the pieces of each group are seen."""

    def key(self, unit: CountUnit) -> str:
        """Return the name of a unit's files."""
        return unit.key({"normalization": self.preset.normalization, "pattern": self.pattern,
                         "share": dataclasses.asdict(self.shares[unit.group]), "code_version": CODE_VERSION})


@dataclasses.dataclass(frozen=True)
class UnitCounts:
    """A counted unit."""

    file: Path
    """Arrow file of `NUM_PARTS` record batches (word, count) for each run."""
    counted_bytes: int
    """Text counted, repetitions included."""
    sizes: UnitSizes
    """All text of the unit, whatever is seen of it."""
    lowest: tuple[TextPiece, ...]
    """The pieces that may belong to a sample of its group."""


def count_units(units: list[CountUnit], settings: CountSettings, work: Path, workers: int,
                limit_bytes: int) -> Iterator[UnitCounts]:
    """Yield the counts of each unit, in order; what is there already is kept.

    Args:
        units: what to read.
        settings: how.
        work: folder for the files.
        workers: processes.
        limit_bytes: memory for the tables of all workers together.

    Raises:
        UserError: a file cannot be read, the disk refuses, or a worker was ended from outside.
    """
    # memory is bounded for all workers together, and a worker needs some words to make progress at all
    limit_words = max(limit_bytes // max(min(workers, len(units)), 1) // WORD_BYTES, LEAST_WORDS)
    splitter = Splitter(settings.preset, settings.pattern)  # made once, not by every worker
    yield from map_in_processes(_create_counter, (settings, splitter, work, limit_words), units, workers)


def _create_counter(settings: CountSettings, splitter: Splitter, work: Path,
             limit_words: int) -> Callable[[CountUnit], UnitCounts]:
    return _UnitCounter(settings, splitter, work, limit_words).count


class _UnitCounter:
    """Counts units; one per process."""

    def __init__(self, settings: CountSettings, splitter: Splitter, work: Path, limit_words: int) -> None:
        self._settings, self._splitter, self._work, self._limit_words = settings, splitter, work, limit_words
        self._limit_text_bytes = limit_words * WORD_BYTES // 2
        self._words = WordCounter()

    def count(self, unit: CountUnit) -> UnitCounts:
        """Return the counts of a unit; it is read unless they are there."""
        file = self._work / f"{self._settings.key(unit)}.arrow"
        record = file.with_suffix(".json")
        # the record is written behind the file: a kill between the two only costs a second count
        if not (record.exists() and file.exists()):
            with create_file(file) as temporary:
                facts = self._count(unit, temporary)
            write_atomically(record, json.dumps(facts, ensure_ascii=False))
        # read back also when just written, so a resumed run sees the same values as the first
        facts = json.loads(record.read_text(encoding="utf-8"))
        sizes = UnitSizes(facts["num_documents"], np.array(facts["buckets"], np.int64),
                          np.array(facts["bucket_bytes"], np.int64))
        lowest = tuple(TextPiece(text.encode(), bucket) for bucket, text in facts["lowest"])
        return UnitCounts(file, facts["seen_bytes"], sizes, lowest)

    def _count(self, unit: CountUnit, file: Path) -> dict[str, Any]:
        share, splitter = self._settings.shares[unit.group], self._splitter
        words, seen_bytes, num_documents, checked = self._words, 0, 0, False
        bucket_bytes, lowest = np.zeros(NUM_BUCKETS, np.int64), PieceSampler(SAMPLE_BYTES)
        words.clear()  # of a unit that could not be read
        with WordFileWriter(file) as runs:
            for document in unit.documents():
                num_documents += 1
                for piece in iter_pieces(document):
                    bucket_bytes[piece.bucket] += len(piece.raw)
                    lowest.add(piece)
                    times = share.times(piece.bucket)
                    if not times:
                        continue
                    raw = piece.raw
                    if self._settings.preset.normalization != "none":
                        raw = splitter.normalize(piece.text).encode()
                    # one probe for each unit: a difference between the engines turns the fast one off
                    if not checked:
                        splitter.check(raw.decode())
                        checked = True
                    words.add(raw, splitter.ends(raw), times)
                    # bytes before normalization: that is what shares are computed from
                    seen_bytes += times * len(piece.raw)
                    # words of text without spaces are long: their text is bounded too
                    if len(words) > self._limit_words or words.text_bytes() > self._limit_text_bytes:
                        runs.write(words)
            runs.write(words)
        sizes = UnitSizes.of(num_documents, bucket_bytes)
        return {"seen_bytes": seen_bytes, "num_documents": num_documents, "buckets": sizes.buckets.tolist(),
                "bucket_bytes": sizes.bytes_.tolist(),
                "lowest": [(piece.bucket, piece.text) for piece in lowest.found()]}


# Byte-level BPE and SuperBPE (arXiv 2503.13423) from tables of words.
#
# Stage 1 merges bytes within words.  Stage 2 goes on where words are no longer split: the text is split by
# the
# finished tokenizer's pattern, each of its units is encoded with the merges of stage 1, and merging
# continues
# over those tokens.  Both stages encode by the finished pattern, so that applying all merges in their
# order, in
# one step, gives the same tokens as stage 1 followed by stage 2.

MIN_COUNT = 2
"""A pair that occurs less often is not merged."""
LEARNING_BYTES_PER_BYTE = 40
"""Memory that learning takes for each byte of distinct words (benchmarks/tokenizer_train.py measures it)."""
BLOCK_WORDS = 10_000
"""Words whose tokens are held as Python numbers at a time."""
ANYTHING = r"[\s\S]+"
"""Splits nothing."""
Progress = Callable[[int], object]


def learn_words(table: WordTable, vocabulary: Vocabulary, num_tokens: int, preset: Preset,
                progress: Progress) -> None:
    """Merge bytes within words until there are `num_tokens` tokens, or no pair occurs often enough."""
    words = PretokenWords(get_byte_ids()[table.raw], table.lengths_bytes, table.counts)
    # A letter, or the last byte of a wide space, and then a space: learned in a run of spaces, such a merge
    # would join two words of the finished tokenizer by their bytes before either word is whole.
    rule = JoinRule(vocabulary.max_token_bytes, 0, keeps_words_apart=bool(preset.superword_pattern),
                    only_superwords=False)
    _learn_merges(words, rule, vocabulary, num_tokens, progress)


def learn_superwords(table: WordTable, vocabulary: Vocabulary, num_tokens: int, max_words: int, only: bool,
                     progress: Progress) -> None:
    """Go on merging over units that may hold several words.

    Args:
        table: units of the finished tokenizer's pattern.
        vocabulary: what stage 1 learned.
        num_tokens: tokens to reach; fewer where no pair occurs often enough.
        max_words: most words in one token.
        only: every further token is a superword, as long as the text has any, so that there are as many as
            asked for; else merging also goes on within words, as published, and how many superwords there
            will be depends on the text.
        progress: told how many merges there are more.
    """
    # first superwords alone; when the text has no more of them, merging fills up within words
    for only_superwords in [True] * only + [False]:
        if len(vocabulary.tokens) < num_tokens:
            rule = JoinRule(vocabulary.max_token_bytes, max_words, False, only_superwords)
            _learn_merges(_encode_units(table, vocabulary), rule, vocabulary, num_tokens, progress)


def _encode_units(table: WordTable, vocabulary: Vocabulary) -> PretokenWords:
    """Return the units as the tokens learned so far; one of a single token has nothing to join."""
    lengths, symbols = _encode_words(table, vocabulary)
    several = lengths > 1
    return PretokenWords(symbols[np.repeat(several, lengths)], lengths[several], table.counts[several])


def _encode_words(table: WordTable, vocabulary: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return how many tokens each word has, [words], and all tokens, one word after another."""
    encode = vocabulary.as_tiktoken(ANYTHING).encode_ordinary
    lengths, symbols = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    words = table.words()
    # in blocks: all words as Python numbers would take many times their bytes
    while block := [encode(word.decode()) for word in itertools.islice(words, BLOCK_WORDS)]:
        lengths.append(np.fromiter(map(len, block), np.int64, len(block)))
        symbols.append(np.fromiter(itertools.chain.from_iterable(block), np.int32, int(lengths[-1].sum())))
    return np.concatenate(lengths), np.concatenate(symbols)


def _learn_merges(words: PretokenWords, rule: JoinRule, vocabulary: Vocabulary, num_tokens: int,
           progress: Progress) -> None:
    num_merges = max(num_tokens - len(vocabulary.tokens), 0)
    merges = MergeLearner(words, vocabulary.tokens, rule, MIN_COUNT, num_merges).learn()
    while some := list(itertools.islice(merges, BATCH_MERGES)):
        for merge in some:
            vocabulary.add(merge)
        progress(len(some))
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens), (
        "two merges gave the same bytes, which exact BPE never does")


COUNTING_BYTES = 1 << 30
"""Memory for the tables of all workers while counting; more text goes through the disk."""
BASE_BYTES = 400_000_000
"""Memory of the command itself: libraries, the vocabulary, buffers."""
UNIT_BYTES = 32 << 20
"""Bytes on the disk of a unit: what is read again after a kill, at most, by each worker."""
WORKER_BYTES = 32 << 20
"""Input on the disk for which a further process is worth its start."""
MOST_REPEATS = 100
NEEDED_POWER = 1.6
"""Text for twice the merges is about 2^1.6 as much: measured on 2 to 280 MB of
documentation in ten languages."""


@dataclasses.dataclass(frozen=True)
class LearnedVocabulary:
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


def learn_vocabulary(plan_: CountPlan, groups: list[SourceGroup],
          before_merging: Callable[[], object] = lambda: None) -> LearnedVocabulary:
    """Learn a vocabulary.

    Args:
        plan_: what to learn.
        groups: from what.
        before_merging: called when all words are counted; merging takes one core.

    Raises:
        UserError: unreadable input, weights that the text cannot follow,
            or too little text for the vocabulary.
    """
    units = plan_count_units(groups, UNIT_BYTES)
    input_bytes = sum(unit.size_bytes for unit in units)
    # a process more than the input is worth costs more than it brings
    plan_ = dataclasses.replace(plan_, workers=min(plan_.workers, 1 + input_bytes // WORKER_BYTES))
    special = plan_.preset.num_special_ids
    vocabulary = Vocabulary(plan_.preset.max_token_bytes)
    # without weights everything is seen once, and nothing needs to be looked through
    shares, factors = [GroupShare(1, 0)] * len(groups), [1.0] * len(groups)
    if any(group.weight is not None for group in groups):
        with _create_bar("looking through", input_bytes, "B") as progress:
            sizes = measure_groups(groups, units, plan_.work, plan_.workers, progress)
        factors = compute_repeats(groups, sizes)
        _check_repeats(groups, sizes, factors)
        shares = [choose_share(s, factor) for s, factor in zip(sizes, factors, strict=True)]
    counted = _count_groups(plan_, groups, units, shares, plan_.preset.split_pattern, "words")
    sizes = counted.sizes
    facts = [build_group_facts(g, s, share) for g, s, share in zip(groups, sizes, shares, strict=True)]
    for group, fact in zip(groups, facts, strict=True):
        _print_group(group, fact)
    seen_bytes = sum(fact["seen_bytes"] for fact in facts)
    table = _gather_table(plan_, counted, "words")
    stages = [_build_stage_facts(plan_.transition_size, seen_bytes, table)]
    target = plan_.transition_size - special
    # words are counted, so the cores are free: what is needed later loads beside the merging
    before_merging()
    with _create_bar("merging", target - NUM_BYTES, "merges") as progress:
        learn_words(table, vocabulary, target, plan_.preset, progress)
    _check_reached(plan_, vocabulary, plan_.transition_size, seen_bytes)
    if plan_.transition_size < plan_.vocab_size:
        # the sample is a part of what stage 1 saw: a smaller share is contained in a larger one
        fraction = min(1.0, plan_.superword_sample_bytes / seen_bytes)
        some = [choose_share(s, factor * fraction) for s, factor in zip(sizes, factors, strict=True)]
        units_counted = _count_groups(plan_, groups, units, some, plan_.preset.superword_pattern,
                                      "superwords")
        table = _gather_table(plan_, units_counted, "superwords")
        sample_bytes = sum(count_share_bytes(s, share) for s, share in zip(sizes, some, strict=True))
        stages.append(_build_stage_facts(plan_.vocab_size, sample_bytes, table))
        with _create_bar("joining words", plan_.vocab_size - plan_.transition_size, "merges") as progress:
            # stage 2 goes on with the merges of stage 1 in the same vocabulary
            learn_superwords(table, vocabulary, plan_.vocab_size - special,
                                      plan_.preset.max_superword_words, plan_.only_superwords, progress)
        _check_reached(plan_, vocabulary, plan_.vocab_size, sample_bytes)
    return LearnedVocabulary(vocabulary, target, _choose_samples(groups, counted), facts, stages)


def _create_bar(title: str, total: int, unit: str) -> Any:
    """Return a context manager that shows progress and gives the function to report it to."""
    class Bar(tqdm):
        def __enter__(self) -> Callable[[int], object]:  # type: ignore[override]
            return self.update

    return Bar(total=total, desc=title, unit=unit, unit_scale=True, mininterval=0.5, disable=None)


def _check_repeats(groups: list[SourceGroup], sizes: list[GroupSizes], factors: list[float]) -> None:
    """Refuse a weight that the text cannot follow."""
    for group, found, factor in zip(groups, sizes, factors, strict=True):
        if factor > MOST_REPEATS:
            raise UserError(f"--input {group.name}: weight {group.weight:g} asks for its "
                            f"{found.num_bytes / 1e6:.3g} MB to be seen {factor:,.0f} times, "
                            f"at most {MOST_REPEATS} make sense; add text to it, or give it a weight of at "
                            f"most {(group.weight or 0) * MOST_REPEATS / factor:.2g}")


def _print_group(group: SourceGroup, fact: dict[str, Any]) -> None:
    """Print a group's size."""
    seen = f", seen {fact['seen_bytes'] / fact['num_bytes']:.2f} times" if group.weight is not None else ""
    print(f"{group.name}: {fact['num_bytes'] / 1e6:.2f} MB of text{seen}")


@dataclasses.dataclass(frozen=True)
class _CountedUnits:
    """All units counted."""

    files: list[Path]
    """Words and counts of each unit."""
    sizes: list[GroupSizes]
    """Text of each group."""
    lowest: list[PieceSampler]
    """Pieces of each group, for a sample of it."""


def _count_groups(plan_: CountPlan, groups: list[SourceGroup], units: list[CountUnit],
                  shares: list[GroupShare],
           pattern: str, what: str) -> _CountedUnits:
    """Count the words of all units."""
    settings = CountSettings(plan_.preset, pattern, tuple(shares))
    limit_bytes = min(COUNTING_BYTES, (plan_.max_memory_bytes or 1 << 62) // 3)
    files, lowest = list[Path](), [PieceSampler(SAMPLE_BYTES) for _ in groups]

    def sizes(progress: Callable[[int], object]) -> Iterator[UnitSizes]:
        """Yield each unit's sizes; what is known of one unit is not kept beside that of all others."""
        counted = count_units(units, settings, plan_.work, plan_.workers, limit_bytes)
        # in the order of units, so samples and files do not depend on which worker was faster
        for unit, found in zip(units, counted, strict=True):
            files.append(found.file)
            for piece in found.lowest:
                lowest[unit.group].add(piece)
            progress(unit.size_bytes)
            yield found.sizes

    with _create_bar(f"counting {what}", sum(unit.size_bytes for unit in units), "B") as progress:
        return _CountedUnits(files, add_group_sizes(groups, units, sizes(progress)), lowest)


def _gather_table(plan_: CountPlan, counted: _CountedUnits, what: str) -> WordTable:
    """Return the distinct words of all units."""
    max_bytes = None
    if plan_.max_memory_bytes is not None:
        max_bytes = (plan_.max_memory_bytes - BASE_BYTES) // LEARNING_BYTES_PER_BYTE
    table = gather_words(counted.files, plan_.work, max_bytes)
    print(f"{len(table.counts):,} distinct {what}" + (
        f"; {table.dropped_words:,} that occur less than {table.min_count} times are left out for "
        f"--max-memory-gb, {100 * table.dropped_share:.3f} % of the text" if table.dropped_words else ""),
          flush=True)
    return table


def _build_stage_facts(reaches: int, seen_bytes: int, table: WordTable) -> dict[str, Any]:
    return {"reaches_tokens": reaches, "seen_bytes": seen_bytes, "distinct_words": len(table.counts),
            "least_count": table.min_count, "dropped_words": table.dropped_words,
            "dropped_share": table.dropped_share}


def _check_reached(plan_: CountPlan, vocabulary: Vocabulary, wanted: int, seen_bytes: int) -> None:
    """Raise where the text ran out of pairs."""
    reached = len(vocabulary.tokens) + plan_.preset.num_special_ids
    if reached < wanted:
        least = plan_.preset.smallest_vocab
        # an estimate for the message alone
        needed_bytes = seen_bytes * ((wanted - least) / max(reached - least, 1)) ** NEEDED_POWER
        raise UserError(f"--vocab-size {plan_.vocab_size}: the text is too small for it, only {reached} "
                        f"tokens were reached from {seen_bytes / 1e6:.3g} MB (pairs must occur at least "
                        f"{MIN_COUNT} times); give it about "
                        f"{max(needed_bytes, 1.2 * seen_bytes) / 1e6:.3g} MB like it, or ask for at most "
                        f"{reached} tokens", Fix(options=("--vocab-size", str(reached))))


def _choose_samples(groups: list[SourceGroup], counted: _CountedUnits) -> dict[str, str]:
    """Return each group's sample; its pieces are sorted, since units come in the order of files."""
    samples = {}
    for group, sizes, lowest in zip(groups, counted.sizes, counted.lowest, strict=True):
        share = choose_share(sizes, min(1.0, SAMPLE_BYTES / sizes.num_bytes))
        # pieces of the lowest hashes, cut at the share that the sample needs
        found = sorted(piece.text for piece in lowest.found() if share.times(piece.bucket))
        samples[group.name] = "\n".join(found)[:SAMPLE_BYTES]
    return samples
