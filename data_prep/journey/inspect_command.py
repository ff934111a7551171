"""`sov-data inspect`: what token shards hold, or a document's way through a pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep import inspect_tokens
from megatron_sov.artifacts import MANIFEST
from megatron_sov.errors import UserError

PIPELINE_ONLY = ("id", "where", "text", "dropped", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Of token shards: documents, tokens and bytes per token of each source. Of what "
                          "`sov-data run` wrote: the sources, or with --id a document's way through all "
                          "steps; --where, --text and --dropped find ids.")
    parser.add_argument("data", type=Path, metavar="DIR",
                        help="folder that `sov-data pack`, `sov-data mix` or `sov-data run` wrote")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", metavar="ID", help="show this document at each step")
    which.add_argument("--where", metavar="FILE",
                       help="list the documents that were read from this file, and what could not be read")
    which.add_argument("--text", metavar="WORDS", help="list documents whose text, as it was read, has these")
    which.add_argument("--dropped", nargs="?", const="", metavar="REASON",
                       help="list documents that were dropped, or those whose reason has these words")
    parser.add_argument("--source", metavar="NAME", help="look into one source only")
    parser.add_argument("--count", type=int, default=20, metavar="N",
                        help="ids that are listed at most (default %(default)s)")
    parser.add_argument("--scan-bytes", type=int, default=10 * 2**30, metavar="N",
                        help="bytes of shards that a search reads at most (default %(default)s)")
    parser.add_argument("--chars", type=int, default=600, metavar="N",
                        help="characters of the text that --id shows (default %(default)s; 0: all)")
    parser.add_argument("--json", action="store_true", help="print a document's way as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what is asked for; returns 0."""
    from data_prep.journey import telling
    from data_prep.journey.folder import Corpus, is_corpus

    _check(args)
    asked = [f"--{name}" for name in PIPELINE_ONLY if getattr(args, name) is not None]
    if not is_corpus(args.data):
        if asked or args.json:
            raise UserError(f"{asked[0] if asked else '--json'}: {args.data} is no output of `sov-data run`, "
                            "which alone knows each document's way; token shards keep no ids")
        if not (args.data / MANIFEST).is_file():
            raise UserError(f"{args.data}: {'holds' if args.data.is_dir() else 'is'} neither a run of "
                            "`sov-data run` that has begun nor token shards; check the path")
        return inspect_tokens.show(args.data)
    telling.show(Corpus.open(args.data), telling.Asked(
        args.id, args.where, args.text, args.dropped, args.source, args.count, args.scan_bytes, args.chars,
        args.json))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` on values that mean nothing."""
    for name, least in (("count", 1), ("scan_bytes", 1), ("chars", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    for name in PIPELINE_ONLY:
        value = getattr(args, name)
        if value == "" and name != "dropped":
            raise UserError(f"--{name}: is empty; say what to look for")
        if value is not None and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # bytes of the command line that are no text
                raise UserError(f"--{name} {value!a}: is no UTF-8; nothing here is spelt so") from None
    if args.json and args.id is None:
        raise UserError("--json: goes with --id; name a document")
