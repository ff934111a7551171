"""Learn a vocabulary from inputs: measure groups, count words, merge pairs.

Counts are files in a work folder, so a killed command continues from them.  BPE merges bytes within words
(stage 1).  SuperBPE (arXiv 2503.13423) then splits a sample by the final pattern, whose units span words,
encodes the units with the merges of stage 1 and continues merging (stage 2).  Applying all merges in order
gives the same tokens as stage 1 followed by stage 2.
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
from tokenizer.bpe.merging import JoinRule
from tokenizer.bpe.splitter import Splitter
from tokenizer.bpe.trainer import BATCH_MERGES, MergeLearner, PretokenWords
from tokenizer.bpe.vocabulary import Vocabulary, get_byte_ids
from tokenizer.bpe.word_files import WordFileWriter, gather_words
from tokenizer.mixture import (
    NUM_BUCKETS, CountUnit, GroupShare, GroupSizes, PieceSampler, SourceGroup, TextPiece, UnitSizes,
    add_group_sizes, build_group_facts, choose_share, compute_repeats, count_share_bytes, iter_pieces,
    measure_groups, plan_count_units)
from tokenizer.presets import NUM_BYTES, CountPlan, Preset

UNIT_BYTES = 32 << 20
"""Bytes on disk per unit, which a worker reads again after a kill."""
WORKER_BYTES = 32 << 20
"""Bytes on disk that justify another process."""
COUNTING_BYTES = 1 << 30
"""Memory for all workers' word tables together; larger tables go to disk."""
WORD_BYTES = 120
"""Memory per word in a worker's table: text, table entry, and copies during a write to disk."""
LEAST_WORDS = 1000
"""Minimum words in a worker's table before a write to disk."""
BASE_BYTES = 400_000_000
"""Memory for libraries, vocabulary and buffers."""
LEARNING_BYTES_PER_BYTE = 40
"""Memory of `MergeLearner` per byte in the `WordTable` (measured by benchmarks/tokenizer_train.py)."""
SAMPLE_BYTES = 100_000
"""Text per group for bytes per token and for `check_round_trip`."""
CODE_VERSION = 3
"""In the cache key; increase `CODE_VERSION` when the same text gives other counts."""
BLOCK_WORDS = 10_000
"""Words whose token ids are Python integers at the same time."""
MIN_COUNT = 2
"""Pairs with a lower count are not merged."""
MOST_REPEATS = 100
NEEDED_POWER = 1.6
"""Twice the merges need about 2^1.6 as much text (measured on 2 to 280 MB in ten languages)."""
ANYTHING = r"[\s\S]+"
"""Pattern that does not split."""
Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class LearnedVocabulary:
    """A vocabulary with facts for the manifest and text for the final check."""

    vocabulary: Vocabulary
    stage_1_tokens: int
    """Bytes and merges after stage 1, without special ids."""
    samples: dict[str, str]
    """Group name -> text sample."""
    facts: list[dict[str, Any]]
    """Manifest entries by group."""
    stages: list[dict[str, Any]]
    """Manifest entries by stage: text, distinct and dropped words."""


def learn_vocabulary(plan: CountPlan, groups: list[SourceGroup],
                     before_merging: Callable[[], object] = lambda: None) -> LearnedVocabulary:
    """Learn a vocabulary with `learn_words` and, for SuperBPE, `learn_superwords`.

    `before_merging` runs after the words are counted; merging uses one core. Raises `UserError`: a file
    cannot be read, a weight needs too many repeats, or the text is too small for the vocabulary.
    """
    units = plan_count_units(groups, UNIT_BYTES)
    input_bytes = sum(unit.size_bytes for unit in units)
    plan = dataclasses.replace(plan, workers=min(plan.workers, 1 + input_bytes // WORKER_BYTES))
    vocabulary = Vocabulary(plan.preset.max_token_bytes)
    shares, factors = [GroupShare(1, 0)] * len(groups), [1.0] * len(groups)
    # weights are shares of text bytes, so measure the text before counting words
    if any(group.weight is not None for group in groups):
        with _create_bar("measuring text", input_bytes, "B") as progress:
            sizes = measure_groups(groups, units, plan.work, plan.workers, progress)
        factors = compute_repeats(groups, sizes)
        _check_repeats(groups, sizes, factors)
        shares = [choose_share(s, factor) for s, factor in zip(sizes, factors, strict=True)]
    counted = _count_groups(plan, groups, units, shares, plan.preset.split_pattern, "words")
    sizes = counted.sizes
    facts = [build_group_facts(*row) for row in zip(groups, sizes, shares, strict=True)]
    for group, fact in zip(groups, facts, strict=True):
        repeats = ""
        if group.weight is not None:
            repeats = f", seen {fact['seen_bytes'] / fact['num_bytes']:.2f} times"
        print(f"{group.name}: {fact['num_bytes'] / 1e6:.2f} MB of text{repeats}")
    counted_bytes = sum(fact["seen_bytes"] for fact in facts)
    table = _gather_table(plan, counted, "words")
    stages = [_build_stage_facts(plan.transition_size, counted_bytes, table)]
    target = plan.transition_size - plan.preset.num_special_ids
    before_merging()
    with _create_bar("merging", target - NUM_BYTES, "merges") as progress:
        learn_words(table, vocabulary, target, plan.preset, progress)
    _check_size(plan, vocabulary, plan.transition_size, counted_bytes)
    if plan.transition_size < plan.vocab_size:
        # stage 1 counted the sample too: a smaller share is a subset of a larger share
        fraction = min(1.0, plan.superword_sample_bytes / counted_bytes)
        shares = [choose_share(s, factor * fraction) for s, factor in zip(sizes, factors, strict=True)]
        superwords = _count_groups(plan, groups, units, shares, plan.preset.superword_pattern, "superwords")
        table = _gather_table(plan, superwords, "superwords")
        sample_bytes = sum(map(count_share_bytes, sizes, shares))
        stages.append(_build_stage_facts(plan.vocab_size, sample_bytes, table))
        with _create_bar("joining words", plan.vocab_size - plan.transition_size, "merges") as progress:
            learn_superwords(table, vocabulary, plan.vocab_size - plan.preset.num_special_ids,
                             plan.preset.max_superword_words, plan.only_superwords, progress)
        _check_size(plan, vocabulary, plan.vocab_size, sample_bytes)
    return LearnedVocabulary(vocabulary, target, _choose_samples(groups, counted), facts, stages)


def _create_bar(title: str, total: int, unit: str) -> Any:
    """Return a progress bar whose `with` block gets its `update` function."""
    class Bar(tqdm):
        def __enter__(self) -> Callable[[int], object]:  # type: ignore[override]
            return self.update

    return Bar(total=total, desc=title, unit=unit, unit_scale=True, mininterval=0.5, disable=None)


def _check_repeats(groups: list[SourceGroup], sizes: list[GroupSizes], factors: list[float]) -> None:
    for group, size, factor in zip(groups, sizes, factors, strict=True):
        if factor > MOST_REPEATS:
            raise UserError(f"--input {group.name}: weight {group.weight:g} asks for its "
                            f"{size.num_bytes / 1e6:.3g} MB to be seen {factor:,.0f} times, "
                            f"at most {MOST_REPEATS} make sense; add text to it, or give it a weight of at "
                            f"most {(group.weight or 0) * MOST_REPEATS / factor:.2g}")


@dataclasses.dataclass(frozen=True)
class _CountedUnits:
    files: list[Path]
    """Arrow files by unit."""
    sizes: list[GroupSizes]
    samplers: list[PieceSampler]


def _count_groups(plan: CountPlan, groups: list[SourceGroup], units: list[CountUnit],
                  shares: list[GroupShare], pattern: str, noun: str) -> _CountedUnits:
    settings = CountSettings(plan.preset, pattern, tuple(shares))
    limit_bytes = min(COUNTING_BYTES, (plan.max_memory_bytes or 1 << 62) // 3)
    files, samplers = list[Path](), [PieceSampler(SAMPLE_BYTES) for _ in groups]

    def iter_sizes(progress: Progress) -> Iterator[UnitSizes]:
        """Yield sizes unit by unit; the sum over groups is smaller than all units' sizes."""
        counts = count_units(units, settings, plan.work, plan.workers, limit_bytes)
        # in unit order, so that the result does not depend on worker speed
        for unit, unit_counts in zip(units, counts, strict=True):
            files.append(unit_counts.file)
            for piece in unit_counts.sample_pieces:
                samplers[unit.group].add_piece(piece)
            progress(unit.size_bytes)
            yield unit_counts.sizes

    with _create_bar(f"counting {noun}", sum(unit.size_bytes for unit in units), "B") as progress:
        return _CountedUnits(files, add_group_sizes(groups, units, iter_sizes(progress)), samplers)


def _gather_table(plan: CountPlan, counted: _CountedUnits, noun: str) -> WordTable:
    """Sum the counts within --max-memory-gb."""
    max_bytes = None
    if plan.max_memory_bytes is not None:
        max_bytes = (plan.max_memory_bytes - BASE_BYTES) // LEARNING_BYTES_PER_BYTE
    table = gather_words(counted.files, plan.work, max_bytes)
    sentence = f"{len(table.counts):,} distinct {noun}"
    if table.dropped_words:
        sentence += (f"; {table.dropped_words:,} that occur less than {table.min_count} times are left out "
                     f"for --max-memory-gb, {100 * table.dropped_share:.3f} % of the text")
    print(sentence, flush=True)
    return table


def _build_stage_facts(num_tokens: int, counted_bytes: int, table: WordTable) -> dict[str, Any]:
    return {"reaches_tokens": num_tokens, "seen_bytes": counted_bytes, "distinct_words": len(table.counts),
            "least_count": table.min_count, "dropped_words": table.dropped_words,
            "dropped_share": table.dropped_share}


def _check_size(plan: CountPlan, vocabulary: Vocabulary, target: int, counted_bytes: int) -> None:
    """Raise `UserError` if the text had too few pairs for `target` ids; estimate the text needed."""
    reached = len(vocabulary.tokens) + plan.preset.num_special_ids
    if reached < target:
        base = plan.preset.smallest_vocab
        needed_bytes = counted_bytes * ((target - base) / max(reached - base, 1)) ** NEEDED_POWER
        raise UserError(f"--vocab-size {plan.vocab_size}: the text is too small for it, only {reached} "
                        f"tokens were reached from {counted_bytes / 1e6:.3g} MB (pairs must occur at least "
                        f"{MIN_COUNT} times); give it about "
                        f"{max(needed_bytes, 1.2 * counted_bytes) / 1e6:.3g} MB like it, or ask for at most "
                        f"{reached} tokens", Fix(options=("--vocab-size", str(reached))))


def _choose_samples(groups: list[SourceGroup], counted: _CountedUnits) -> dict[str, str]:
    """Return group name -> sample text, sorted so that the file order does not matter."""
    samples = {}
    for group, sizes, sampler in zip(groups, counted.sizes, counted.samplers, strict=True):
        share = choose_share(sizes, min(1.0, SAMPLE_BYTES / sizes.num_bytes))
        texts = sorted(piece.text for piece in sampler.get_pieces() if share.count_passes(piece.bucket))
        samples[group.name] = "\n".join(texts)[:SAMPLE_BYTES]
    return samples


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """Settings that determine `UnitCounts`."""

    preset: Preset
    pattern: str
    """Regular expression that splits text into words."""
    shares: tuple[GroupShare, ...]

    def build_key(self, unit: CountUnit) -> str:
        """Return the stem for the unit's `.arrow` and `.json` files."""
        share = dataclasses.asdict(self.shares[unit.group])
        return unit.build_key({"normalization": self.preset.normalization, "pattern": self.pattern,
                               "share": share, "code_version": CODE_VERSION})


@dataclasses.dataclass(frozen=True)
class UnitCounts:
    """Word counts and sizes of a `CountUnit`."""

    file: Path
    """Arrow file, `NUM_PARTS` record batches (word, count) per run."""
    counted_bytes: int
    """Counted text, including repeats."""
    sizes: UnitSizes
    """All text, including pieces outside the share."""
    sample_pieces: tuple[TextPiece, ...]
    """Pieces for the group's `PieceSampler`."""


def count_units(units: list[CountUnit], settings: CountSettings, work: Path, workers: int,
                limit_bytes: int) -> Iterator[UnitCounts]:
    """Yield the unit counts in order; reuse files in the folder `work`.

    `limit_bytes` bounds the tables in all workers together. Raises `UserError`: a file cannot be read, the
    disk is full, or a worker was killed.
    """
    limit_words = max(limit_bytes // max(min(workers, len(units)), 1) // WORD_BYTES, LEAST_WORDS)
    splitter = Splitter(settings.preset, settings.pattern)  # built once, not in every worker
    yield from map_in_processes(_create_counter, (settings, splitter, work, limit_words), units, workers)


def _create_counter(settings: CountSettings, splitter: Splitter, work: Path,
                    limit_words: int) -> Callable[[CountUnit], UnitCounts]:
    return _UnitCounter(settings, splitter, work, limit_words).load_or_count


class _UnitCounter:
    """Counts words in a worker process.

    When the `WordCounter` reaches `limit_words`, the worker writes a run to the unit's file.  A run is
    divided by word hash into `NUM_PARTS` parts, so that `gather_words` can sum a part in memory."""

    def __init__(self, settings: CountSettings, splitter: Splitter, work: Path, limit_words: int) -> None:
        self._settings, self._splitter, self._work, self._limit_words = settings, splitter, work, limit_words
        self._limit_text_bytes = limit_words * WORD_BYTES // 2
        self._words = WordCounter()

    def load_or_count(self, unit: CountUnit) -> UnitCounts:
        file = self._work / f"{self._settings.build_key(unit)}.arrow"
        record = file.with_suffix(".json")
        # the record is written last: a kill in between costs a second count
        if not (record.exists() and file.exists()):
            with create_file(file) as temporary:
                facts = self._count(unit, temporary)
            write_atomically(record, json.dumps(facts, ensure_ascii=False))
        # read back even after a write, because a resumed run reads the file too
        facts = json.loads(record.read_text(encoding="utf-8"))
        sizes = UnitSizes(facts["num_documents"], np.array(facts["buckets"], np.int64),
                          np.array(facts["bucket_bytes"], np.int64))
        sample_pieces = tuple(TextPiece(text.encode(), bucket) for bucket, text in facts["lowest"])
        return UnitCounts(file, facts["seen_bytes"], sizes, sample_pieces)

    def _count(self, unit: CountUnit, file: Path) -> dict[str, Any]:
        """Write the unit's Arrow file and return its JSON record."""
        share, splitter, words = self._settings.shares[unit.group], self._splitter, self._words
        counted_bytes, num_documents, is_compared = 0, 0, False
        bucket_bytes, sampler = np.zeros(NUM_BUCKETS, np.int64), PieceSampler(SAMPLE_BYTES)
        words.clear()  # drop the words of a unit that raised an error
        with WordFileWriter(file) as runs:
            for document in unit.iter_documents():
                num_documents += 1
                for piece in iter_pieces(document):
                    bucket_bytes[piece.bucket] += len(piece.raw)
                    sampler.add_piece(piece)
                    num_passes = share.count_passes(piece.bucket)
                    if not num_passes:
                        continue
                    raw = piece.raw
                    if self._settings.preset.normalization != "none":
                        raw = splitter.normalize(piece.text).encode()
                    # one comparison per unit; a difference turns the automaton off
                    if not is_compared:
                        splitter.compare_engines(raw.decode())
                        is_compared = True
                    words.add_text(raw, splitter.find_ends(raw), num_passes)
                    # bytes before normalization, as in the shares
                    counted_bytes += num_passes * len(piece.raw)
                    # scripts without spaces have long words: bound the text too
                    if len(words) > self._limit_words or words.text_bytes > self._limit_text_bytes:
                        runs.write_run(words)
            runs.write_run(words)
        sizes = UnitSizes.from_bucket_bytes(num_documents, bucket_bytes)
        return {"seen_bytes": counted_bytes, "num_documents": num_documents,
                "buckets": sizes.buckets.tolist(), "bucket_bytes": sizes.num_bytes.tolist(),
                "lowest": [(piece.bucket, piece.text) for piece in sampler.get_pieces()]}


def learn_words(table: WordTable, vocabulary: Vocabulary, num_tokens: int, preset: Preset,
                progress: Progress) -> None:
    """Merge bytes within words until the vocabulary has `num_tokens` or no pair reaches `MIN_COUNT`."""
    words = PretokenWords(get_byte_ids()[table.raw], table.lengths_bytes, table.counts)
    # A merge across a letter, or the last byte in a wide space, and a space would join two words in the
    # finished tokenizer before either word is complete.
    rule = JoinRule(vocabulary.max_token_bytes, 0, keeps_words_apart=bool(preset.superword_pattern),
                    only_superwords=False)
    _learn_merges(words, rule, vocabulary, num_tokens, progress)


def learn_superwords(table: WordTable, vocabulary: Vocabulary, num_tokens: int, max_words: int,
                     only_superwords: bool, progress: Progress) -> None:
    """Continue merging over units of several words (stage 2).

    Args:
        table: units split by `Preset.final_pattern`.
        vocabulary: result from `learn_words`; receives the new tokens.
        num_tokens: tokens to reach; fewer if no pair occurs often enough.
        max_words: maximum words in a token.
        only_superwords: learn superwords while the text has any, then fill up within words. False: merge
            across and within words, as published.
        progress: called with the number of new merges.
    """
    passes = (True, False) if only_superwords else (False,)
    for restricts_merges in passes:
        if len(vocabulary.tokens) < num_tokens:
            rule = JoinRule(vocabulary.max_token_bytes, max_words, keeps_words_apart=False,
                            only_superwords=restricts_merges)
            _learn_merges(_encode_units(table, vocabulary), rule, vocabulary, num_tokens, progress)


def _encode_units(table: WordTable, vocabulary: Vocabulary) -> PretokenWords:
    """Encode units with the vocabulary; drop units with a single token, which have no pair."""
    lengths, symbols = _encode_words(table, vocabulary)
    has_pair = lengths > 1
    return PretokenWords(symbols[np.repeat(has_pair, lengths)], lengths[has_pair], table.counts[has_pair])


def _encode_words(table: WordTable, vocabulary: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return token counts by word, [words], and concatenated token ids, [sum of counts]."""
    encode = vocabulary.as_tiktoken(ANYTHING).encode_ordinary
    lengths, symbols = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    words = table.iter_words()
    # in blocks: Python integers for all words would need many times the memory
    while block := [encode(word.decode()) for word in itertools.islice(words, BLOCK_WORDS)]:
        lengths.append(np.fromiter(map(len, block), np.int64, len(block)))
        symbols.append(np.fromiter(itertools.chain.from_iterable(block), np.int32, int(lengths[-1].sum())))
    return np.concatenate(lengths), np.concatenate(symbols)


def _learn_merges(words: PretokenWords, rule: JoinRule, vocabulary: Vocabulary, num_tokens: int,
                  progress: Progress) -> None:
    num_merges = max(num_tokens - len(vocabulary.tokens), 0)
    merges = MergeLearner(words, vocabulary.tokens, rule, MIN_COUNT, num_merges).iter_merges()
    while batch := list(itertools.islice(merges, BATCH_MERGES)):
        for merge in batch:
            vocabulary.add_merge(merge)
        progress(len(batch))
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens), (
        "two merges gave the same bytes, which exact BPE never does")
