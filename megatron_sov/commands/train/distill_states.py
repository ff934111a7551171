"""`megatron-sov distill states TEACHER --data DIR ... --output DIR`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import AboveZero, Flag, NotNegativeInt, add_options, read_options
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import data_paths
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first

StatesDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DistillStatesOptions(PluginOptions, RankOptions, OverwriteOptions, RedoOptions):
    """Have a teacher read token shards, and keep what it says of them."""

    teacher: Annotated[Path, Flag("TEACHER")]
    """Checkpoint, run (its newest one) or Hugging Face folder."""
    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards of the teacher's own tokenizer."""
    output: Annotated[Path, Flag(value="DIR")]
    """The artifact; a killed command goes on where it was."""
    dtype: StatesDtype = "bfloat16"
    """Of the states."""
    top_k: Annotated[NotNegativeInt, Flag(value="K")] = 0
    """Keep the most probable tokens and their log-probabilities in the place of states."""
    temperature: Annotated[AboveZero, Flag(value="T")] = 1.0
    """--top-k: what the logits are divided by."""
    other_tokenizer: bool = False
    """The data are of another tokenizer than the teacher's: hear it where tokens of both end at the same
    byte (needs --top-k)."""

def run_states(typed: argparse.Namespace) -> int:
    """Read the documents and print what was kept.

    Raises:
        UserError: the data do not belong to the teacher, or cannot be read.
    """
    args = read_options(DistillStatesOptions, typed)
    load_plugins(args.plugins)
    refuse_missing(args.teacher)
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.base.artifacts import read_manifest
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.distillation.state_files import KIND, Kept
    from megatron_sov.post.distillation.teacher import TeacherReading, read_documents

    kept = Kept(args.dtype, args.top_k, args.temperature, args.other_tokenizer)
    reading = TeacherReading(find_target(args.teacher), data_paths(args.data), kept=kept)
    read_documents(reading, args.output, args.settings, args.nproc, overwrite=args.overwrite,
                   redo=args.redo)
    if is_first():
        manifest = read_manifest(args.output, KIND)
        size_bytes = sum(record.size_bytes for record in manifest.files.values())
        what = (f"with the {args.top_k:,} most probable ones behind each" if args.top_k
                else f"of hidden size {manifest.content['hidden_size']:,} in {args.dtype}")
        print(f"{args.output}: {manifest.content['num_tokens']:,} tokens {what}, {size_bytes / 1e6:.1f} MB")
    return ExitCode.OK


STATES = SimpleNamespace(add_arguments=partial(add_options, cls=DistillStatesOptions), run=run_states)
