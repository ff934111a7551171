"""`megatron-sov distill write STUDENT --prompts DIR ... --output DIR`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.infer.request import RankOptions, Temperature, WholeSampling
from megatron_sov.model.config import data_paths
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first


@dataclass(frozen=True)
class StudentSampling(WholeSampling):
    """How each token of a student's answer is chosen."""

    max_new_tokens: AtLeastOne = 2048
    """Longest answer."""
    temperature: Temperature = 1.0


@dataclass(frozen=True, kw_only=True)
class DistillWriteOptions(PluginOptions, RankOptions, OverwriteOptions, RedoOptions):
    """Have a student answer prompts, as conversations that a teacher can read."""

    student: Annotated[Path, Flag("STUDENT")]
    """Checkpoint, run (its newest one) or Hugging Face folder."""
    prompts: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards of prompts (`sov-data pack --format prompt`)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Token shards of conversations; a killed command goes on where it was."""
    sampling: StudentSampling = field(default_factory=StudentSampling)

def run_write(typed: argparse.Namespace) -> int:
    """Answer the prompts and print what was kept.

    Raises:
        UserError: the prompts do not belong to the student, or cannot be read.
    """
    args = read_options(DistillWriteOptions, typed)
    load_plugins(args.plugins)
    refuse_missing(args.student)
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.base.artifacts import read_manifest
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.distillation.student_writing import KIND, StudentWriting, write_answers

    asked = StudentWriting(find_target(args.student), data_paths(args.prompts), args.sampling)
    write_answers(asked, args.output, args.settings, args.nproc, overwrite=args.overwrite,
                  redo=args.redo)
    if is_first():
        for source in read_manifest(args.output, KIND).content["sources"]:
            split = source["splits"]["train"]
            print(f"{args.output}: {split['num_documents']:,} answers to {source['name']}, "
                  f"{split['num_tokens']:,} tokens with their prompts")
    return ExitCode.OK


WRITE = SimpleNamespace(add_arguments=partial(add_options, cls=DistillWriteOptions), run=run_write)
