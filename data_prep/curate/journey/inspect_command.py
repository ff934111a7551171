"""`sov-data inspect`: what token shards hold, or a document's way through a pipeline."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep.shards.token_artifact import KIND as TOKENS, table
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, Flag, NotNegativeInt, ProblemCode, SettingsProblem, add_options, read_options)
from megatron_sov.runs.inspecting import ArtifactKind, LookOptions, look

PIPELINE_ONLY = ("id", "where", "text", "dropped", "source")


@dataclass(frozen=True, kw_only=True)
class DataInspectOptions(LookOptions):
    """Say what something is, or show a document's way through a pipeline."""

    data: Annotated[Path, Flag("PATH")]
    """Any artifact, file of rows, or the --output of a command that was killed."""
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

    def problems(self) -> list[SettingsProblem]:
        first, *others = [name for name in ("id", "where", "text", "dropped")
                          if getattr(self, name) is not None] or [""]
        return [SettingsProblem(ProblemCode.RULE, name, f"goes without --{first}; ask one thing at a time")
                for name in others]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("What something is, from what it was made, how far unfinished work on it is, and "
                          "some of its rows. Of what `sov-data run` wrote: with --id a document's way "
                          "through all steps; --where, --text and --dropped find ids.")
    add_options(parser, DataInspectOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DataInspectOptions, typed)
    from data_prep.curate.journey.facts import Corpus, is_corpus
    from data_prep.curate.journey.telling import DocumentQuery, show

    _check(args)
    asked = [f"--{name}" for name in PIPELINE_ONLY if getattr(args, name) is not None]
    if not is_corpus(args.data):
        if asked:
            raise UserError(f"{asked[0]}: {args.data} is no output of `sov-data run`, which alone knows each "
                            "document's way; token shards keep no ids")
        look(args.data, args, {TOKENS: ArtifactKind(table, _problems, _documents)})
        return 0
    if not asked and (args.json or args.verify or args.clear or args.page):
        look(args.data, args, {})
        return 0
    show(Corpus.open(args.data), DocumentQuery(
        args.id, args.where, args.text, args.dropped, args.source, args.count, args.scan_bytes, args.chars,
        args.json))
    return 0


def _check(args: DataInspectOptions) -> None:
    for name in PIPELINE_ONLY:
        value = getattr(args, name)
        if value == "" and name != "dropped":
            raise UserError(f"--{name}: is empty; say what to look for")
        if value is not None and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # bytes of the command line that are no text
                raise UserError(f"--{name} {value!a}: is no UTF-8; nothing here is spelt so") from None
    if args.json and args.id is None and any(getattr(args, name) is not None for name in PIPELINE_ONLY):
        raise UserError("--json: goes with --id, or with no other question; name a document")


def _problems(data: Path) -> list[str]:
    from data_prep.shards.verify import check

    return check(data)[0]


def _documents(data: Path, count: int) -> list[str]:
    from data_prep.shards.sample import SampleOptions, sample

    try:
        lines = sample(data, None, "train", count, SampleOptions.max_tokens, 0)
    except UserError as e:  # all are held out, or no tokenizer travels with them
        return [f"no document can be shown: {e}"]
    # `sample` gives three lines for a document: its place, its text, and an empty one.
    return [f"{head} {text}" for head, text in zip(lines[::3], lines[1::3], strict=True)]
