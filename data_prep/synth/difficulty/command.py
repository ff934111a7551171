"""`sov-data difficulty label|fit|check|grade`: how hard problems are, without asking models again."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.synth.options import PairWeight
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Actions, AtLeastOne, Flag, add_actions, run_action


@dataclass(frozen=True, kw_only=True)
class DifficultyOutputOptions:
    """Where it is written."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder that is written."""
    overwrite: bool = False
    """Replace what is already there."""


@dataclass(frozen=True, kw_only=True)
class DifficultyLabelOptions(DifficultyOutputOptions):
    """Put the outputs of `sov-data synth answers`, one for each configuration of models, and of
    `sov-data synth comparisons` together."""

    answers: Annotated[tuple[Path, ...], Flag(value="DIR", many=True)]
    """Output of `synth answers`, or its kept.jsonl; the folder's name is the configuration's."""
    comparisons: Annotated[tuple[Path, ...], Flag(value="DIR", many=True)] = ()
    """Output of `synth comparisons`, or its kept.jsonl."""


@dataclass(frozen=True, kw_only=True)
class DifficultyFitOptions(DifficultyOutputOptions):
    """Fit an estimator of pass rates that reads the problem's text alone."""

    labels: Annotated[Path, Flag(value="DIR")]
    """What `difficulty label` wrote."""
    pair_weight: Annotated[PairWeight, Flag(value="W")] = 0.25
    """What a pair of the judge's counts beside a problem."""
    buckets: AtLeastOne = 1 << 16
    """Buckets of n-grams, a power of two."""


@dataclass(frozen=True, kw_only=True)
class DifficultyCheckOptions:
    """Print what an estimator is worth on labels that it was not fitted to."""

    model: Annotated[Path, Flag("DIR")]
    """What `difficulty fit` wrote."""
    labels: Annotated[Path, Flag(value="DIR")]
    """What `difficulty label` wrote."""
    json: bool = False
    """Print the figures as JSON."""


@dataclass(frozen=True, kw_only=True)
class DifficultyGradeOptions(DifficultyOutputOptions):
    """Write `pass_rate`, `difficulty` (1 - pass_rate) and `bucket` (hard, middle, easy) into rows of
    problems, prompts or chats, and leave out those beyond a band."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE", many=True)]
    """A .jsonl file; several may follow, and it may be repeated."""
    model: Annotated[Path | None, Flag(value="DIR")] = None
    """What `difficulty fit` wrote."""
    labels: Annotated[Path | None, Flag(value="DIR")] = None
    """What `difficulty label` wrote: problems of these are graded as measured."""
    cuts: Annotated[str, Flag(value="LOW:HIGH")] = "0.2:0.8"
    """Pass rates below LOW are hard, from HIGH on easy."""
    keep: Annotated[str, Flag(value="LOW:HIGH")] = "0:1"
    """Write rows with pass rates from LOW to HIGH alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Learn how hard problems are from models that answered some, and grade others."
    add_actions(parser, ACTIONS)


def run(typed: argparse.Namespace) -> int:
    return run_action(ACTIONS, typed)


def _band(option: str, text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise UserError(f"{option} {text!r} must have the form LOW:HIGH, e.g. 0.2:0.8") from None


def _label(args: DifficultyLabelOptions) -> int:
    from data_prep.libraries import require
    from data_prep.synth.difficulty.labels import write_labels

    if problems := require("difficulty label", "scipy"):
        raise UserError(problems[0])
    content = write_labels(args.answers, args.comparisons, args.output, overwrite=args.overwrite)
    print(f"{content['num_problems']:,} problems, {content['num_pairs']:,} pairs")
    for name, row in content["configurations"].items():
        print(f"  {name}: {row['num_problems']:,} problems, {row['pass_rate']:.1%} of answers right, "
              f"{row['solves_none']:,} never, {row['solves_all']:,} always solved")
    for row in content["agreement"]:
        shown = "-" if row["spearman"] is None else f"{row['spearman']:.3f}"
        print(f"  {' and '.join(row['between'])}: Spearman {shown}")
    if (judge := content["judge"])["num_pairs"]:
        print(f"  the judge agrees with the pass rates on {judge['agrees_with_pass_rates']:.1%} of "
              f"{judge['num_pairs']:,} pairs")
    print(f"wrote {args.output}")
    return 0


def _fit(args: DifficultyFitOptions) -> int:
    from data_prep.synth.difficulty.estimator import FitSettings, figure_lines, fit

    settings = FitSettings(NgramSettings(num_buckets=args.buckets), args.pair_weight)
    content = fit(args.labels, args.output, settings, overwrite=args.overwrite)
    print("\n".join(["held out:", *figure_lines(content["heldout"]), f"wrote {args.output}"]))
    return 0


def _check(args: DifficultyCheckOptions) -> int:
    from data_prep.synth.difficulty.estimator import check, figure_lines

    content = check(args.model, args.labels)
    print(json.dumps(content) if args.json else "\n".join([f"{args.model}:", *figure_lines(content)]))
    return 0


def _grade(args: DifficultyGradeOptions) -> int:
    from data_prep.synth.difficulty.estimator import DifficultyGradeSettings, grade

    settings = DifficultyGradeSettings(_band("--cuts", args.cuts), _band("--keep", args.keep))
    content = grade(args.input, args.output, settings, args.model, args.labels, overwrite=args.overwrite)
    print(_told_band(content))
    print(f"wrote {args.output}")
    return 0


def _told_band(content: dict[str, Any]) -> str:
    counts = {name: (count.get("kept", 0), count.get("left_out", 0))
              for name, count in content["buckets"].items()}
    rows = [f"  {name}: {kept + left_out:,} rows, {kept:,} kept" for name, (kept, left_out) in counts.items()]
    low, high = content["keep"]
    return "\n".join([*rows, f"  kept band of pass rates: {low:g} to {high:g}, {content['num_kept']:,} rows"])


ACTIONS: Actions = {"label": (DifficultyLabelOptions, _label), "fit": (DifficultyFitOptions, _fit),
                    "check": (DifficultyCheckOptions, _check), "grade": (DifficultyGradeOptions, _grade)}
