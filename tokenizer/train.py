"""`sov-tokenizer train`: from text to a tokenizer artifact that transformers loads, and what is proven about
it before its folder appears."""

from __future__ import annotations

import argparse
import contextvars
import dataclasses
import importlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from megatron_sov.base.artifacts import (
    ArtifactWriter, check_output_folder, create_artifact, format_json, sha256_file)
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Flag, Fraction, NotNegative, add_options, count_cores, excludes_field,
    read_options)
from megatron_sov.work.progress.journal import work_folder
from megatron_sov.work.progress.resumable import open_parts
from tokenizer.bpe.segmenting import merged
from tokenizer.bpe.split_pattern import Splitter
from tokenizer.bpe.vocabulary import Vocabulary
from tokenizer.formats.hf_files import TOKENIZER_JSON
from tokenizer.mixture import SourceGroup, gather_groups
from tokenizer.presets import PRESETS, Preset, load_preset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokenizer.bpe.count_pipeline import CountPlan, LearnedPattern

SUPERWORD_SAMPLE_MB = 100
MAX_CHECKED_BYTES = 2 << 20
"""Longest text from which the check of a proposed line learns."""
_CHECKED_INPUTS: set[tuple[str, ...]] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainOptions:
    """Learn a byte-level BPE tokenizer from text; with a preset that has superwords, SuperBPE.

    The vocabulary has exactly the size that you ask for. The same text gives the same file, byte for
    byte, with any number of workers and any order of files. A killed command continues when it is run
    again."""

    preset: Annotated[str, Flag(value="NAME")]
    """The tokenizer's rules. solar-open: BPE; k-exaone: SuperBPE, with tokens of several words too; custom:
    those of --config."""
    config: Annotated[Path | None, Flag(value="FILE")] = None
    """The rules of --preset custom, JSON or YAML."""
    vocab_size: int
    """Number of ids, special ones and bytes included."""
    input: Annotated[tuple[str, ...], Flag(value="[NAME=]PATH[:WEIGHT]", many=True)]
    """A text, .jsonl (field text, or messages) or .parquet file (.gz and .zst too) or a folder of them;
    several may follow, and it may be repeated. Inputs of one NAME are one group. Weighted groups share
    their bytes by weight, by leaving out or repeating text; others are taken as they are."""
    mixture: Annotated[str | None, Flag(value="NAME")] = None
    """Weights as published, for groups named so: solar-open, k-exaone."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    superword_share: Annotated[Fraction | None, Flag(value="SHARE")] = None
    """Part of the vocabulary that spans words (default: the preset's; 0: plain BPE)."""
    transition_size: Annotated[int | None, excludes_field("superword_share")] = None
    """Ids before words join; merging then goes on across words and within them, as published, and how many
    superwords there will be depends on the text."""
    max_superword_words: Annotated[int, Ge(2)] | None = None
    """Most words in one token, at least 2 (default: the preset's, 4)."""
    superword_sample_mb: Annotated[AboveZero, Flag(value="MB")] = SUPERWORD_SAMPLE_MB
    """Text that superwords are learned from, chosen by hash."""
    max_memory_gb: Annotated[NotNegative | None, Flag(value="GB")] = None
    """Bound on memory; the rarest words are left out where they do not fit, and the manifest says so
    (default: counting goes through the disk, learning takes what the distinct words need)."""
    workers: AtLeastOne = dataclasses.field(default_factory=count_cores)
    """Processes that read; the result does not depend on it (default: this machine's cores)."""
    overwrite: bool = False
    """Replace a tokenizer that is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, TokenizerTrainOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(TokenizerTrainOptions, typed)
    preset = adjusted(load_preset(args.preset, args.config), args)
    groups = gather_groups(args.input, args.mixture)
    check_output_folder(args.output, "tokenizer", args.overwrite)  # before the work, not after it
    plan = make_plan(preset, args)
    train_tokenizer(plan, groups, args.output, overwrite=args.overwrite)
    return 0


def check_proposal(args: TokenizerTrainOptions) -> None:
    """Learn from a short text in a temporary folder, to check whether its vocabulary can be reached."""
    from tokenizer.bpe.count_pipeline import learn

    inputs = tuple(map(os.path.abspath, args.input))
    if inputs in _CHECKED_INPUTS:  # the size of the vocabulary has been corrected
        return
    _CHECKED_INPUTS.add(inputs)
    groups = gather_groups(args.input, args.mixture)
    paths = [file for group in groups for path in group.paths for file in (path, *path.rglob("*"))]
    if sum(path.stat().st_size for path in paths if path.is_file()) > MAX_CHECKED_BYTES:
        return
    plan = make_plan(adjusted(load_preset(args.preset, args.config), args), args)
    with tempfile.TemporaryDirectory() as work:
        # an empty context: the work itself is no check
        contextvars.Context().run(learn, dataclasses.replace(plan, work=Path(work)), groups)


def adjusted(preset: Preset, args: TokenizerTrainOptions) -> Preset:
    """Return the preset with what the command line says about superwords.

    Raises:
        UserError: superwords are asked for where the preset has no pattern for them,
            or a number is out of range.
    """
    for option, value in (("--superword-share", args.superword_share),
                          ("--transition-size", args.transition_size),
                          ("--max-superword-words", args.max_superword_words)):
        if value and not preset.superword_pattern:
            raise UserError(f"{option} {value}: preset {preset.name} has no superword_pattern; "
                            "use --preset k-exaone, or add one to your own rules")
    if args.max_superword_words is not None:
        preset = dataclasses.replace(preset, max_superword_words=args.max_superword_words)
    if args.superword_share is not None:
        preset = dataclasses.replace(preset, superword_share=args.superword_share)
    if args.transition_size is not None:
        if not preset.smallest_vocab <= args.transition_size <= args.vocab_size:
            raise UserError(f"--transition-size {args.transition_size}: "
                            f"must lie between {preset.smallest_vocab} (special ids and bytes) and "
                            f"--vocab-size {args.vocab_size}")
        preset = dataclasses.replace(preset, superword_share=1 - args.transition_size / args.vocab_size)
    return preset if preset.superword_share else dataclasses.replace(preset, superword_pattern="")


def make_plan(preset: Preset, args: TokenizerTrainOptions) -> CountPlan:
    """Return what to learn.

    Raises:
        UserError: a number is out of range, or a pattern is no regular expression.
    """
    from tokenizer.bpe.count_pipeline import SMALLEST_MEMORY_GB, CountPlan
    from tokenizer.bpe.split_pattern import check_coverage, oniguruma

    if args.vocab_size < preset.smallest_vocab:
        raise UserError(f"--vocab-size {args.vocab_size}: must be at least {preset.smallest_vocab} "
                        f"({preset.num_special_ids} special ids + 256 bytes)")
    if args.max_memory_gb is not None and args.max_memory_gb < SMALLEST_MEMORY_GB:
        raise UserError(f"--max-memory-gb {args.max_memory_gb:g}: must be at least "
                        f"{SMALLEST_MEMORY_GB:g}; leave it out for no bound")
    for pattern in {preset.split_pattern, preset.final_pattern}:
        oniguruma(pattern, preset.name)
        if preset.name not in PRESETS:  # those are known to be whole
            check_coverage(pattern, preset.name)
    transition = max(round(args.vocab_size * (1 - preset.superword_share)), preset.smallest_vocab)
    memory_bytes = None if args.max_memory_gb is None else round(args.max_memory_gb * 1e9)
    work = work_folder(args.output)
    return CountPlan(preset, args.vocab_size, transition, args.transition_size is None,
                     round(args.superword_sample_mb * 1e6), memory_bytes, args.workers, work)


def train_tokenizer(plan: CountPlan, groups: list[SourceGroup], output: Path, *,
                    overwrite: bool = False) -> None:
    """Train a tokenizer and write it as an artifact of kind "tokenizer".

    Raises:
        UserError: unreadable input, a vocabulary that cannot be reached, or an output that may not be
            replaced; no output is written then, and what is counted is kept for the next try.
    """
    from tokenizer.bpe.count_pipeline import learn
    from tokenizer.formats.hf_files import finished

    started_s = time.monotonic()
    with open_parts(output, "sov-tokenizer train"):
        learned = learn(plan, groups, load_ahead)
        num_superwords = learned.vocabulary.num_superwords()
        print(f"{plan.vocab_size} tokens learned in {time.monotonic() - started_s:.1f} s" + (
            f"; {num_superwords:,} span words, {100 * num_superwords / plan.vocab_size:.2f} %"
            if num_superwords else ""))
        trained = finished(plan.preset, learned.vocabulary)
        with create_artifact(output, "tokenizer", overwrite=overwrite) as artifact:
            _write(artifact, trained, plan, learned)
    print(f"wrote {output}")


def _write(artifact: ArtifactWriter, trained: Tokenizer, plan: CountPlan, learned: LearnedPattern) -> None:
    """Write the two Hugging Face files, check them, and state the facts in the manifest."""
    from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, tokenizer_config

    preset = plan.preset
    trained.save(str(artifact.path / TOKENIZER_JSON), pretty=False)
    (artifact.path / CONFIG_JSON).write_text(format_json(tokenizer_config(preset)), encoding="utf-8")
    samples = learned.samples
    checked = check(trained, preset, learned.vocabulary, learned.stage_1_tokens, artifact.path,
                    list(samples.values()))
    print(checked.sentence)
    ratios = dict(zip(samples, checked.bytes_per_token, strict=True))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} bytes per token")
    artifact.content = {
        "preset": preset.name,
        "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
        "bos_id": preset.special_tokens[preset.bos_token],
        "eos_id": preset.special_tokens[preset.eos_token],
        "pad_id": preset.special_tokens[preset.pad_token],
        "vocab_size": plan.vocab_size,
        "num_superwords": learned.vocabulary.num_superwords(),
        "bytes_per_token": ratios,
        "checked": checked.sentence,
    }
    artifact.settings = {"preset": preset, "vocab_size": plan.vocab_size,
                         "transition_size": plan.transition_size, "only_superwords": plan.only_superwords,
                         "superword_sample_bytes": plan.superword_sample_bytes,
                         "max_memory_bytes": plan.max_memory_bytes, "groups": learned.facts,
                         "stages": learned.stages}


# What is proven about a finished tokenizer.
#
# - One step (all merges in their order) gives the same tokens as two (stage 1, then stage 2), by a naive
#   loop.
# - tiktoken gives the same ids as `transformers`, which runs `tokenizers` on the files that were written.
# - Decoding gives the text back, after the normalization of the preset.

TWO_STEP_CHARS = 50_000
"""Text of each sample that is merged by the naive loop."""
_LOADING = threading.Lock()
BLOCK_CHARS, BLOCK_STEP = 4096, 13
"""Every 13th Unicode character, in blocks: another one of each block in each kind of surrounding."""


class CheckFailed(Exception):
    """A defect of this program, not of the user's input."""


@dataclasses.dataclass(frozen=True)
class RoundTripCheck:
    """What the check found."""

    sentence: str
    """What was proven, and on how much text."""
    bytes_per_token: list[float]
    """UTF-8 bytes of each sample divided by its tokens."""


def load_ahead() -> None:
    """Load `transformers` beside other work: it takes seconds."""
    threading.Thread(target=_transformers).start()


def _transformers() -> Any:
    """Return the module; a thread that met it half loaded by another one would not find all of its names."""
    with _LOADING:
        return importlib.import_module("transformers")


def check(tokenizer: Tokenizer, preset: Preset, vocabulary: Vocabulary, stage_1: int, folder: Path,
          samples: list[str]) -> RoundTripCheck:
    """Check a tokenizer on samples of its text and on Unicode.

    Args:
        tokenizer: as built; it decodes.
        preset: its rules.
        vocabulary: its tokens and merges.
        stage_1: tokens of stage 1.
        folder: holds its files.
        samples: one text of each group.

    Raises:
        CheckFailed: a difference; it should never happen.
    """
    splitter = Splitter(preset, preset.final_pattern)
    texts = [*samples, *_unicode()]
    # from the files, as a user's program loads them
    ids = _by_transformers(folder, texts)
    normal = [splitter.normalize(text) for text in texts]
    _expect("decoding does not give back", texts, tokenizer.decode_batch(ids, skip_special_tokens=False),
            normal)
    encoding = vocabulary.as_tiktoken(preset.final_pattern)
    first = preset.num_special_ids
    # another implementation of the same merges: it shares no code with `tokenizers`
    by_tiktoken = encoding.encode_ordinary_batch(normal, num_threads=len(os.sched_getaffinity(0)))
    _expect("tiktoken and transformers differ on", texts,
            [[i + first for i in found] for found in by_tiktoken], ids)
    if stage_1 < len(vocabulary.tokens):
        heads = [text[:TWO_STEP_CHARS] for text in normal[: len(samples)]]
        # SuperBPE is learned in two steps and encoded in one: both must agree
        one_step = [encoding.encode_ordinary(text) for text in heads]
        _expect("two steps differ from one on", heads,
                list(_in_two_steps(heads, vocabulary, stage_1, splitter)), one_step)
    num_bytes = sum(len(text.encode()) for text in texts)
    sentence = (f"checked on {num_bytes / 1e6:.1f} MB: decoding gives the text back, "
                "tiktoken and transformers give the same ids"
                + (", two steps the same as one" if stage_1 < len(vocabulary.tokens) else ""))
    return RoundTripCheck(sentence, [len(text.encode()) / max(1, len(found))
                                     for text, found in zip(samples, ids, strict=False)])


def _expect(message: str, texts: list[str], found: Sequence[object], expected: Sequence[object]) -> None:
    for text, one, other in zip(texts, found, expected, strict=True):
        if one != other:
            raise CheckFailed(f"{message} {text[:200]!r}")


def _by_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts, by the file; special tokens in them stay text."""
    loaded = _transformers().PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_JSON))
    return list(loaded(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _in_two_steps(texts: list[str], vocabulary: Vocabulary, stage_1: int,
                  splitter: Splitter) -> Iterator[list[int]]:
    """Yield the tokens of texts: each unit by the merges of stage 1, then by those of stage 2."""
    ranks = {(vocabulary.tokens[a], vocabulary.tokens[b]): id_
             for id_, (a, b) in enumerate(vocabulary.merges, 256)}
    ids = {token: id_ for id_, token in enumerate(vocabulary.tokens)}

    def first(left: bytes, right: bytes) -> float | None:
        """Return the rank of a merge of stage 1."""
        return rank if (rank := ranks.get((left, right))) is not None and rank < stage_1 else None

    def second(left: bytes, right: bytes) -> float | None:
        """Return the rank of a merge of stage 2."""
        return rank if (rank := ranks.get((left, right))) is not None and rank >= stage_1 else None

    known: dict[str, list[int]] = {}
    for text in texts:
        found: list[int] = []
        for unit in splitter.split(text):
            if unit not in known:
                # plain BPE by ranks, slow and obvious
                parts = merged([bytes([b]) for b in unit.encode()], first)
                known[unit] = [ids[token] for token in merged(parts, second)]
            found += known[unit]
        yield found


def _unicode() -> Iterator[str]:
    """Yield characters of all of Unicode, in blocks: alone, behind a letter, behind a space."""
    # the planes between have no characters
    for start in (*range(0, 0x40000, BLOCK_CHARS), 0xE0000, 0xF0000, 0x10F000):
        codes = [c for c in range(start, start + BLOCK_CHARS) if not 0xD800 <= c < 0xE000]
        for offset, separator in enumerate(("", "a", " ")):
            if codes:
                yield separator.join(
                    map(chr, codes[(start // BLOCK_CHARS + 4 * offset) % BLOCK_STEP :: BLOCK_STEP]))
