"""`sov-tokenizer train`: from text to a tokenizer artifact that transformers loads."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from megatron_sov.base.artifacts import ArtifactWriter, new_artifact, refuse_existing, sha256_file, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Flag, Fraction, NotNegative, add_options, not_with, num_cores, read_options)
from megatron_sov.work.progress.journal import work_folder
from megatron_sov.work.progress.resumable import open_parts
from tokenizer.mixture import SourceGroup, gather_groups
from tokenizer.presets import PRESETS, Preset, load_preset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokenizer.bpe.count_pipeline import CountPlan, LearnedPattern

SUPERWORD_SAMPLE_MB = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainOptions:
    """Learn a byte-level BPE tokenizer from text; with a preset that has superwords, SuperBPE.

    The vocabulary has exactly the size that you ask for. The same text gives the same file, byte for
    byte, with any number of workers and any order of files. A killed command continues when it is run
    again."""

    preset: Annotated[str, Flag(value="NAME")]
    """The tokenizer's rules: solar-open, k-exaone, custom."""
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
    transition_size: Annotated[int | None, not_with("superword_share")] = None
    """Ids before words join; merging then goes on across words and within them, as published, and how many
    superwords there will be depends on the text."""
    max_superword_words: Annotated[int, Ge(2)] | None = None
    """Most words in one token, at least 2 (default: the preset's, 4)."""
    superword_sample_mb: Annotated[AboveZero, Flag(value="MB")] = SUPERWORD_SAMPLE_MB
    """Text that superwords are learned from, chosen by hash."""
    max_memory_gb: Annotated[NotNegative | None, Flag(value="GB")] = None
    """Bound on memory; the rarest words are left out where they do not fit, and the manifest says so
    (default: counting goes through the disk, learning takes what the distinct words need)."""
    workers: AtLeastOne = dataclasses.field(default_factory=num_cores)
    """Processes that read; the result does not depend on it (default: this machine's cores)."""
    overwrite: bool = False
    """Replace a tokenizer that is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, TokenizerTrainOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(TokenizerTrainOptions, typed)
    preset = adjusted(load_preset(args.preset, args.config), args)
    groups = gather_groups(args.input, args.mixture)
    refuse_existing(args.output, "tokenizer", args.overwrite)  # before the work, not after it
    plan = make_plan(preset, args)
    train_tokenizer(plan, groups, args.output, overwrite=args.overwrite)
    return 0


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
    from tokenizer.formats.round_trip import load_ahead

    started_s = time.monotonic()
    with open_parts(output, "sov-tokenizer train"):
        learned = learn(plan, groups, load_ahead)
        num_superwords = learned.vocabulary.num_superwords()
        print(f"{plan.vocab_size} tokens learned in {time.monotonic() - started_s:.1f} s" + (
            f"; {num_superwords:,} span words, {100 * num_superwords / plan.vocab_size:.2f} %"
            if num_superwords else ""))
        trained = finished(plan.preset, learned.vocabulary)
        with new_artifact(output, "tokenizer", overwrite=overwrite) as artifact:
            _write(artifact, trained, plan, learned)
    print(f"wrote {output}")


def _write(artifact: ArtifactWriter, trained: Tokenizer, plan: CountPlan, learned: LearnedPattern) -> None:
    """Write the two Hugging Face files, check them, and state the facts in the manifest."""
    from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, tokenizer_config
    from tokenizer.formats.round_trip import check

    preset = plan.preset
    trained.save(str(artifact.path / TOKENIZER_JSON), pretty=False)
    (artifact.path / CONFIG_JSON).write_text(to_json(tokenizer_config(preset)), encoding="utf-8")
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
                         "max_memory_bytes": plan.max_memory_bytes, "groups": learned.facts,
                         "stages": learned.stages}
