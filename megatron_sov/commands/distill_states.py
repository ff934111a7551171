"""`megatron-sov distill states TEACHER --data DIR ... --output DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sov.commands.eval_options import with_ranks
from megatron_sov.config import data_paths
from megatron_sov.errors import ExitCode
from megatron_sov.recipes.requested import add_plugin_argument, load_plugins
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("teacher", metavar="TEACHER", type=Path,
                        help="checkpoint, run (its newest one) or Hugging Face folder")
    parser.add_argument("--data", action="append", required=True, metavar="DIR",
                        help="token shards of the teacher's own tokenizer")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="the artifact; a killed command goes on where it was")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the states (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K",
                        help="keep the most probable tokens and their log-probabilities in the place of "
                             "states")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="--top-k: what the logits are divided by (default %(default)s)")
    parser.add_argument("--other-tokenizer", action="store_true",
                        help="the data are of another tokenizer than the teacher's: hear it where tokens of "
                             "both end at the same byte (needs --top-k)")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is already there")
    with_ranks(parser)
    add_plugin_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Read the documents and print what was kept.

    Raises:
        UserError: the data do not belong to the teacher, or cannot be read.
    """
    load_plugins(args.plugins)
    refuse_missing(args.teacher)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.artifacts import read_manifest
    from megatron_sov.generate.target import find_target
    from megatron_sov.post.state_files import KIND, Kept
    from megatron_sov.post.teacher import Reading, read_documents

    kept = Kept(args.dtype, args.top_k, args.temperature, args.other_tokenizer)
    reading = Reading(find_target(args.teacher), data_paths(args.data), kept=kept)
    read_documents(reading, args.output, args.settings, args.nproc, overwrite=args.overwrite)
    if is_first():
        manifest = read_manifest(args.output, KIND)
        size_bytes = sum(record.size_bytes for record in manifest.files.values())
        what = (f"with the {args.top_k:,} most probable ones behind each" if args.top_k
                else f"of hidden size {manifest.content['hidden_size']:,} in {args.dtype}")
        print(f"{args.output}: {manifest.content['num_tokens']:,} tokens {what}, {size_bytes / 1e6:.1f} MB")
    return ExitCode.OK
