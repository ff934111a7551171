"""`sov-data inspect`: what token shards hold, or a document's way through a pipeline."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep import inspect_tokens
from megatron_sov.artifacts import MANIFEST
from megatron_sov.errors import UserError
from megatron_sov.settings import AtLeastOne, Code, Flag, NotNegativeInt, Problem, add_options, read_options

PIPELINE_ONLY = ("id", "where", "text", "dropped", "source")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Look into token shards, or at a document's way through a pipeline."""

    data: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data pack`, `sov-data mix` or `sov-data run` wrote."""
    id: Annotated[str | None, Flag(value="ID")] = None
    """Show this document at each step."""
    where: Annotated[str | None, Flag(value="FILE")] = None
    """List the documents that were read from this file, and what could not be read."""
    text: Annotated[str | None, Flag(value="WORDS")] = None
    """List documents whose text, as it was read, has these."""
    dropped: Annotated[str | None, Flag(value="REASON", alone="")] = None
    """List documents that were dropped, or those whose reason has these words."""
    source: Annotated[str | None, Flag(value="NAME")] = None
    """Look into one source only."""
    count: AtLeastOne = 20
    """Ids that are listed at most."""
    scan_bytes: AtLeastOne = 10 * 2 ** 30
    """Bytes of shards that a search reads at most."""
    chars: NotNegativeInt = 600
    """Characters of the text that --id shows (0: all)."""
    json: bool = False
    """Print a document's way as JSON."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        first, *others = [name for name in ("id", "where", "text", "dropped")
                          if getattr(self, name) is not None] or [""]
        return [Problem(Code.RULE, name, f"goes without --{first}; ask one thing at a time")
                for name in others]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Of token shards: documents, tokens and bytes per token of each source. Of what "
                          "`sov-data run` wrote: the sources, or with --id a document's way through all "
                          "steps; --where, --text and --dropped find ids.")
    add_options(parser, InspectOptions)


def run(typed: argparse.Namespace) -> int:
    """Print what is asked for; returns 0."""
    args = read_options(InspectOptions, typed)
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


def _check(args: InspectOptions) -> None:
    """Raise `UserError` on values that mean nothing."""
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
