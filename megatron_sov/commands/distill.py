"""`megatron-sov distill states TEACHER --data DIR ... --output DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sov.commands.eval import with_ranks
from megatron_sov.config import data_paths
from megatron_sov.errors import ExitCode
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the parts of a distillation."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    text = "have a teacher read token shards and keep its final hidden states and its output head"
    states = parts.add_parser("states", help=text, description=text)
    states.add_argument("teacher", metavar="TEACHER", type=Path,
                        help="checkpoint, run (its newest one) or Hugging Face folder")
    states.add_argument("--data", action="append", required=True, metavar="DIR",
                        help="token shards of the teacher's own tokenizer")
    states.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="the artifact; a killed command goes on where it was")
    states.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the states (default %(default)s)")
    states.add_argument("--overwrite", action="store_true", help="replace an artifact that is already there")
    with_ranks(states)


def run(args: argparse.Namespace) -> int:
    """Read the documents and print what was kept.

    Raises:
        UserError: the data do not belong to the teacher, or cannot be read.
    """
    refuse_missing(args.teacher)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.artifacts import read_manifest
    from megatron_sov.generate.target import find_target
    from megatron_sov.post.state_files import KIND
    from megatron_sov.post.teacher import Reading, read_documents

    reading = Reading(find_target(args.teacher), data_paths(args.data), dtype=args.dtype)
    read_documents(reading, args.output, args.settings, args.nproc, overwrite=args.overwrite)
    if is_first():
        manifest = read_manifest(args.output, KIND)
        size_bytes = sum(record.size_bytes for record in manifest.files.values())
        print(f"{args.output}: {manifest.content['num_tokens']:,} tokens of hidden size "
              f"{manifest.content['hidden_size']:,} in {args.dtype}, {size_bytes / 1e6:.1f} MB")
    return ExitCode.OK
