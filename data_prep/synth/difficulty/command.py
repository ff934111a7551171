"""`sov-data difficulty label|fit|check|grade`: how hard problems are, without asking models again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from data_prep.scoring.ngram_settings import NgramSettings
from megatron_sov.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Learn how hard problems are from models that answered some, and grade others."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    label = actions.add_parser("label", help="put the pass rates of several configurations together")
    label.description = ("Put the outputs of `sov-data synth answers`, one for each configuration of models, "
                         "and of `sov-data synth comparisons` together.")
    label.add_argument("--answers", required=True, nargs="+", action="extend", type=Path, metavar="DIR",
                       help="output of `synth answers`, or its kept.jsonl; the folder's name is the "
                            "configuration's")
    label.add_argument("--comparisons", nargs="+", action="extend", type=Path, default=[], metavar="DIR",
                       help="output of `synth comparisons`, or its kept.jsonl")
    _add_output(label, "labels")
    fitted = actions.add_parser("fit", help="fit an estimator to labels; a part of them judges it")
    fitted.description = "Fit an estimator of pass rates that reads the problem's text alone."
    fitted.add_argument("--labels", required=True, type=Path, metavar="DIR",
                        help="what `difficulty label` wrote")
    fitted.add_argument("--pair-weight", type=float, default=0.25, metavar="W",
                        help="what a pair of the judge's counts beside a problem (default %(default)s)")
    fitted.add_argument("--buckets", type=int, default=1 << 16, metavar="N",
                        help="buckets of n-grams, a power of two (default %(default)s)")
    _add_output(fitted, "the estimator")
    checked = actions.add_parser("check", help="judge an estimator on other labels")
    checked.description = "Print what an estimator is worth on labels that it was not fitted to."
    checked.add_argument("model", type=Path, metavar="DIR", help="what `difficulty fit` wrote")
    checked.add_argument("--labels", required=True, type=Path, metavar="DIR",
                         help="what `difficulty label` wrote")
    checked.add_argument("--json", action="store_true", help="print the figures as JSON")
    graded = actions.add_parser("grade", help="write pass_rate, difficulty and bucket into rows")
    graded.description = ("Write `pass_rate`, `difficulty` (1 - pass_rate) and `bucket` (hard, middle, easy) "
                          "into rows of problems, prompts or chats, and leave out those beyond a band.")
    graded.add_argument("--input", required=True, nargs="+", action="extend", type=Path, metavar="FILE",
                        help="a .jsonl file; several may follow, and it may be repeated")
    graded.add_argument("--model", type=Path, metavar="DIR", help="what `difficulty fit` wrote")
    graded.add_argument("--labels", type=Path, metavar="DIR",
                        help="what `difficulty label` wrote: problems of these are graded as measured")
    graded.add_argument("--cuts", type=_band, default=(0.2, 0.8), metavar="LOW:HIGH",
                        help="pass rates below LOW are hard, from HIGH on easy (default 0.2:0.8)")
    graded.add_argument("--keep", type=_band, default=(0.0, 1.0), metavar="LOW:HIGH",
                        help="write rows with pass rates from LOW to HIGH alone (default: all)")
    _add_output(graded, "the graded rows, a file for each input")


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help=f"folder for {what}")
    parser.add_argument("--overwrite", action="store_true", help="replace what is already there")


def _band(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form LOW:HIGH, e.g. 0.2:0.8") from None


def run(args: argparse.Namespace) -> int:
    """Run `sov-data difficulty`; returns 0."""
    return {"label": _label, "fit": _fit, "check": _check, "grade": _grade}[args.action](args)


def _label(args: argparse.Namespace) -> int:
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


def _fit(args: argparse.Namespace) -> int:
    from data_prep.synth.difficulty.fitting import FitSettings, fit
    from data_prep.synth.difficulty.judgement import told

    settings = FitSettings(NgramSettings(num_buckets=args.buckets), args.pair_weight)
    content = fit(args.labels, args.output, settings, overwrite=args.overwrite)
    print("\n".join(["held out:", *told(content["heldout"]), f"wrote {args.output}"]))
    return 0


def _check(args: argparse.Namespace) -> int:
    from data_prep.synth.difficulty.fitting import check
    from data_prep.synth.difficulty.judgement import told

    content = check(args.model, args.labels)
    print(json.dumps(content) if args.json else "\n".join([f"{args.model}:", *told(content)]))
    return 0


def _grade(args: argparse.Namespace) -> int:
    from data_prep.synth.difficulty.grading import GradeSettings, grade

    content = grade(args.input, args.output, GradeSettings(args.cuts, args.keep), args.model, args.labels,
                    overwrite=args.overwrite)
    print(_told_band(content))
    print(f"wrote {args.output}")
    return 0


def _told_band(content: dict[str, Any]) -> str:
    counts = {name: (count.get("kept", 0), count.get("left_out", 0))
              for name, count in content["buckets"].items()}
    rows = [f"  {name}: {kept + left_out:,} rows, {kept:,} kept" for name, (kept, left_out) in counts.items()]
    low, high = content["keep"]
    return "\n".join([*rows, f"  kept band of pass rates: {low:g} to {high:g}, {content['num_kept']:,} rows"])
