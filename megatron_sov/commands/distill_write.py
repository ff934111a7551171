"""`megatron-sov distill write STUDENT --prompts DIR ... --output DIR`."""

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
    parser.add_argument("student", metavar="STUDENT", type=Path,
                        help="checkpoint, run (its newest one) or Hugging Face folder")
    parser.add_argument("--prompts", action="append", required=True, metavar="DIR",
                        help="token shards of prompts (`sov-data pack --format prompt`)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="token shards of conversations; a killed command goes on where it was")
    add_sampling_arguments(parser)
    parser.add_argument("--overwrite", action="store_true",
                        help="replace token shards that are already there")
    with_ranks(parser)
    add_plugin_argument(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a student writes."""
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N",
                        help="longest answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="of the answers; 0 takes the most probable token (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the smallest set of tokens that holds this probability "
                             "(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the answers (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Answer the prompts and print what was kept.

    Raises:
        UserError: the prompts do not belong to the student, or cannot be read.
    """
    load_plugins(args.plugins)
    refuse_missing(args.student)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.artifacts import read_manifest
    from megatron_sov.generate.request import Sampling
    from megatron_sov.generate.target import find_target
    from megatron_sov.post.student_writing import KIND, Writing, write_answers

    sampling = Sampling(args.max_new_tokens, args.temperature, top_p=args.top_p, seed=args.seed)
    asked = Writing(find_target(args.student), data_paths(args.prompts), sampling)
    write_answers(asked, args.output, args.settings, args.nproc, overwrite=args.overwrite)
    if is_first():
        for source in read_manifest(args.output, KIND).content["sources"]:
            split = source["splits"]["train"]
            print(f"{args.output}: {split['num_documents']:,} answers to {source['name']}, "
                  f"{split['num_tokens']:,} tokens with their prompts")
    return ExitCode.OK
