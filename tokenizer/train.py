"""Declare `sov-tokenizer train`: options, checks and the counting plan."""

import dataclasses
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import Fix, UserError
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

    The vocabulary has exactly --vocab-size ids. The same text gives the same file, byte for byte, with any
    number of workers and any order of files. A killed command continues when you run it again."""

    preset: Annotated[str, Flag(value="NAME")]
    """The tokenizer's rules. solar-open: BPE; k-exaone: SuperBPE, with tokens that span words; custom: the
    rules in --config."""
    config: Annotated[Path | None, Flag(value="FILE")] = None
    """The rules for --preset custom, JSON or YAML."""
    vocab_size: int
    """Vocabulary size, with special tokens and bytes."""
    input: Annotated[tuple[str, ...], Flag(value="[NAME=]PATH[:WEIGHT]", many=True)]
    """A text, .jsonl (field text, or messages) or .parquet file (also .gz, .zst) or a folder with such files;
    takes several paths, and may be repeated. Inputs with the same NAME form a group. Groups with a weight
    share their bytes by weight, by leaving out or repeating text."""
    mixture: Annotated[str | None, Flag(value="NAME")] = None
    """Published weights for groups named as in the mixture: solar-open, k-exaone."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    superword_share: Annotated[Fraction | None, Flag(value="SHARE")] = None
    """Vocabulary share for superwords (default: the preset's; 0: plain BPE)."""
    transition_size: Annotated[int | None, excludes_field("superword_share")] = None
    """Ids before words join. Merging then continues across and within words, as published, and the number of
    superwords depends on the text."""
    max_superword_words: Annotated[int, Ge(2)] | None = None
    """Most words in one token, at least 2 (default: the preset's, 4)."""
    superword_sample_mb: Annotated[AboveZero, Flag(value="MB")] = SUPERWORD_SAMPLE_MB
    """Megabytes of text for learning superwords, sampled by hash."""
    max_memory_gb: Annotated[NotNegative | None, Flag(value="GB")] = None
    """Bound on memory; the rarest words are left out if they do not fit, and the manifest reports them
    (default: counting uses the disk, learning uses as much memory as the distinct words need)."""
    workers: AtLeastOne = dataclasses.field(default_factory=count_cores)
    """Processes that read; the result does not depend on the number (default: this machine's cores)."""
    overwrite: bool = False
    """Replace an existing tokenizer."""


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """Checked input of `train_run.train_tokenizer`."""

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
    """Return the preset with the superword options applied. Raises `UserError`: the preset has no superword
    pattern, or a number is out of range."""
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
    """Build the counting plan. Raises `UserError`: a number out of range, or a bad regular expression."""
    if args.vocab_size < preset.smallest_vocab:
        raise UserError(f"--vocab-size {args.vocab_size}: must be at least {preset.smallest_vocab} "
                        f"({preset.num_special_ids} special ids + 256 bytes)",
                        Fix(words={str(args.vocab_size): str(preset.smallest_vocab)}))
    if args.max_memory_gb is not None and args.max_memory_gb < SMALLEST_MEMORY_GB:
        raise UserError(f"--max-memory-gb {args.max_memory_gb:g}: must be at least "
                        f"{SMALLEST_MEMORY_GB:g}; leave it out for no bound")
    for pattern in {preset.split_pattern, preset.final_pattern}:
        build_splitter(pattern, preset.name)
        if preset.name not in PRESETS:  # built-in patterns match every character
            check_coverage(pattern, preset.name)
    transition = max(round(args.vocab_size * (1 - preset.superword_share)), preset.smallest_vocab)
    memory_bytes = None if args.max_memory_gb is None else round(args.max_memory_gb * 1e9)
    work = work_folder(args.output)
    return CountPlan(preset, args.vocab_size, transition, args.transition_size is None,
                     round(args.superword_sample_mb * 1e6), memory_bytes, args.workers, work)


TRAIN = DeclaredCommand(TokenizerTrainOptions, check_train, "tokenizer.train_run:train_tokenizer",
                        proposal_function="tokenizer.train_run:check_proposal")
