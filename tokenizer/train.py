"""Options and checks for `sov-tokenizer train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, DeclaredCommand, Flag, Fraction, NotNegative, count_cores, excludes_field)
from megatron_sov.work.progress.journal import work_folder
from tokenizer.bpe.split_pattern import build_splitter, check_coverage
from tokenizer.mixture import SourceGroup, gather_groups
from tokenizer.presets import PRESETS, SMALLEST_MEMORY_GB, CountPlan, Preset, load_preset

SUPERWORD_SAMPLE_MB = 100


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


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """Checked input for `train_run.train_tokenizer`."""

    plan: CountPlan
    groups: list[SourceGroup]
    output: Path
    overwrite: bool


def check_train(options: TokenizerTrainOptions) -> TrainRequest:
    preset = apply_superword_options(load_preset(options.preset, options.config), options)
    groups = gather_groups(options.input, options.mixture)
    check_output_folder(options.output, "tokenizer", options.overwrite)
    return TrainRequest(make_plan(preset, options), groups, options.output, options.overwrite)


def apply_superword_options(preset: Preset, args: TokenizerTrainOptions) -> Preset:
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
    if args.vocab_size < preset.smallest_vocab:
        raise UserError(f"--vocab-size {args.vocab_size}: must be at least {preset.smallest_vocab} "
                        f"({preset.num_special_ids} special ids + 256 bytes)")
    if args.max_memory_gb is not None and args.max_memory_gb < SMALLEST_MEMORY_GB:
        raise UserError(f"--max-memory-gb {args.max_memory_gb:g}: must be at least "
                        f"{SMALLEST_MEMORY_GB:g}; leave it out for no bound")
    for pattern in {preset.split_pattern, preset.final_pattern}:
        build_splitter(pattern, preset.name)
        if preset.name not in PRESETS:  # those are known to be whole
            check_coverage(pattern, preset.name)
    transition = max(round(args.vocab_size * (1 - preset.superword_share)), preset.smallest_vocab)
    memory_bytes = None if args.max_memory_gb is None else round(args.max_memory_gb * 1e9)
    work = work_folder(args.output)
    return CountPlan(preset, args.vocab_size, transition, args.transition_size is None,
                     round(args.superword_sample_mb * 1e6), memory_bytes, args.workers, work)


TRAIN = DeclaredCommand(TokenizerTrainOptions, check_train, "tokenizer.train_run:train_tokenizer",
                        proposal_function="tokenizer.train_run:check_proposal")
