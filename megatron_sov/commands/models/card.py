"""`megatron-sov card RUN [RUN ...] --output DIR`: the card of a model, from manifests and events alone."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.artifacts import sha256_file, to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Flag, add_options, read_options

if TYPE_CHECKING:
    from megatron_sov.publish.card.content import ScoreFile

README, CARD = "README.md", "card.json"
MAX_README_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Write a model card for the Hugging Face hub, the same as data with the origin of each figure, and the
    provenance graph with a picture.  Also write the technical documentation that the EU AI Act asks for, and
    the card of the data.  What was not recorded is marked."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Folder of the run that made the model; before it the runs that it continues, where its events do not
    name them."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the card."""
    eval: Annotated[tuple[Path, ...], Flag(value="OUT.json", many=True)] = ()
    """Results of `megatron-sov eval lm` of this run's checkpoint or export."""
    answers: Annotated[Path | None, Flag(value="FILE.yaml")] = None
    """What no manifest knows of the model: licence, contact, intended use, grams of CO2 of a kWh; marked as
    stated."""
    about: Annotated[Path | None, Flag(value="FILE.yaml")] = None
    """What no manifest knows of the data, as `sov-data card` takes it."""
    elsewhere: Annotated[tuple[Path, ...], Flag("--from", "DIR", many=True)] = ()
    """Runs, checkpoints, corpora and token shards that it was made from, where they lie no longer where
    they were."""
    hf_folder: Annotated[Path | None, Flag(value="DIR")] = None
    """An export of the run; its card is written into it as well."""
    overwrite: bool = False
    """Replace a README.md that is not ours in --output and --hf-folder."""


add_arguments = partial(add_options, cls=CardOptions)


def run(typed: argparse.Namespace) -> int:
    """Write the card; returns 0.

    Raises:
        UserError: a folder is no run, a file is damaged or of another model, or nothing can be written there.
    """
    args = read_options(CardOptions, typed)
    from megatron_sov.publish.card.content import card_json, make_card
    from megatron_sov.publish.card.data_summary import DATA, add_data, data_card
    from megatron_sov.publish.card.lineage import lineage, picture
    from megatron_sov.publish.card.model_card import ANNEX, PICTURE, PROVENANCE, annex_xi, model_card
    from megatron_sov.publish.card.run_record import CardAnswers, read_answers

    # all places first: hashing checkpoints takes minutes, and nothing should be half-written then
    _check_places(args, (README, CARD, PROVENANCE, PICTURE, ANNEX))
    answers = CardAnswers() if args.answers is None else read_answers(args.answers)
    scores = _scores(args.eval)
    found = lineage(args.runs, args.elsewhere, args.hf_folder)
    data = None
    if found.data:
        elsewhere = [path for path in args.elsewhere if (path / "manifest.json").is_file()]
        data = data_card(found.data, elsewhere, args.about)
        add_data(found.graph, data)
    elif args.about is not None:
        raise UserError(f"--about {args.about}: none of the data was found, so there is nothing to tell "
                        "of; pass --from with where the token shards lie")
    answers_sha256 = "" if args.answers is None else sha256_file(args.answers)
    card = make_card(found, data, scores, answers, answers_sha256)
    # README.md is written last: a card is there when everything that it names is
    files: dict[str, str | bytes] = {
        **({f"{DATA}/{name}": text for name, text in data.files.items()} if data is not None else {}),
        CARD: to_json(card_json(card)), PROVENANCE: to_json(found.graph.as_json()),
        PICTURE: picture(found.graph), ANNEX: annex_xi(card), README: model_card(card)}
    for name, text in files.items():
        write_output(args.output / name, _bytes(text))
    written = [args.output / name for name in files]
    if args.hf_folder is not None:
        write_output(args.hf_folder / README, _bytes(model_card(card, is_alone=True)))
        written.append(args.hf_folder / README)
    print(f"wrote {', '.join(map(str, written))}")
    for sentence in card["not_known"]:
        print(f"not known: {sentence}")
    return 0


def _bytes(text: str | bytes) -> bytes:
    """Return text as UTF-8; names may hold halves of characters, which have no bytes."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")


def _check_places(args: CardOptions, names: tuple[str, ...]) -> None:
    """Refuse places where nothing can be written, or where a README of someone else lies."""
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file; name a folder")
    for name in names:
        check_output("--output", args.output / name)
    _refuse_other(args.output / README, "--output", args.overwrite)
    if args.hf_folder is not None:
        check_output("--hf-folder", args.hf_folder / README)
        _refuse_other(args.hf_folder / README, "--hf-folder", args.overwrite)


def _refuse_other(readme: Path, option: str, overwrite: bool) -> None:
    """Refuse to replace a README that no card command wrote."""
    from megatron_sov.base.pages.markdown import CARD_MARK, slug

    if overwrite or not readme.exists():
        return
    with open(readme, encoding="utf-8", errors="replace") as f:
        # the metadata stand at the top: of a stranger's file no more is read
        text = f.read(MAX_README_BYTES)
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if front is None or f"\n- {slug(CARD_MARK)}\n" not in f"{front[1]}\n":
        raise UserError(f"{option} {readme.parent}: has a {README} of something else; pass --overwrite to "
                        "replace it, or take it away")


def _scores(files: Sequence[Path]) -> list[ScoreFile]:
    """Return results of `eval lm`; files that are named alike have a number in front."""
    from megatron_sov.publish.card.content import ScoreFile

    found: list[ScoreFile] = []
    for path in files:
        from megatron_sov.bench.lm.results import read_results

        name = path.name if path.name not in {one.name for one in found} else f"{len(found) + 1}-{path.name}"
        found.append(ScoreFile(str(path), name, sha256_file(path) if path.is_file() else "",
                               dataclasses.asdict(read_results(path))))
    return found
