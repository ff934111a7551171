"""`sov-data card`: the public summary of corpora, of token shards, or of a mix of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import disk_errors, to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Flag, add_options, read_options

README, CARD, TRAINING_CONTENT = "README.md", "card.json", "training_content.md"


@dataclass(frozen=True, kw_only=True)
class DataCardOptions:
    """Write the card of data."""

    data: Annotated[tuple[Path, ...], Flag("DIR")]
    """Folder that `sov-data run`, `sov-data pack` or `sov-data mix` wrote; of several there is one
    card."""
    about: Annotated[Path | None, Flag(value="FILE.yaml")] = None
    """What no manifest knows: provider, links, categories of sources, opt-outs."""
    elsewhere: Annotated[tuple[Path, ...], Flag("--from", "DIR", many=True)] = ()
    """Corpora and token shards it was made from, where they lie no longer where they were."""
    output: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder for the three files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (f"Write a Hugging Face dataset card ({README}), the same as {CARD}, and the "
                          f"public summary that the EU AI Act asks for ({TRAINING_CONTENT}). Every figure "
                          "comes from manifests, and what was not recorded is marked. Without --output "
                          "the dataset card is printed.")
    add_options(parser, DataCardOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DataCardOptions, typed)
    # Imported here: `--help` loads no pyarrow.
    from data_prep.curate.journey.card.card import About, make_card, read_about
    from data_prep.curate.journey.card.dataset_card import answers, dataset_card, training_content
    from data_prep.curate.journey.card.lineage import lineage

    names = (README, CARD, TRAINING_CONTENT)
    if args.output is not None:
        if args.output.exists() and not args.output.is_dir():
            raise UserError(f"--output {args.output}: is a file; name a folder")
        # All names are checked before the first file is written. A folder that has a card of ours may be
        # written over.
        for name in names:
            check_output("--output", args.output / name)
            if (args.output / name).exists() and not (args.output / CARD).is_file():
                raise UserError(f"--output {args.output}: has a {name} of something else; name another "
                                "folder, or take that file away")
    found = lineage(args.data, args.elsewhere)
    known = [source.name for corpus in found.corpora for source in corpus.summary.sources]
    about = About() if args.about is None else read_about(args.about, known)
    card = make_card(found, about)
    if args.output is None:
        print(dataset_card(card), end="")
        return 0
    content = {**card, "training_content": answers(card, about)}
    with disk_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (dataset_card(card), to_json(content), training_content(card, about)),
                          strict=True):
        write_output(args.output / name, text)
    print(f"wrote {', '.join(str(args.output / name) for name in names)}")
    for sentence in card["not_recorded"]:
        print(f"not recorded: {sentence}")
    return 0
