"""The options of `sov-data synth` that say how samples are checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.synth.checks.settings import CheckSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--checks", type=Path, metavar="FILE.yaml",
                        help="steps that samples go through when all are made, as pipeline files have them "
                             "(default: the generator's)")
    parser.add_argument("--benchmarks", nargs="+", action="extend", type=Path, default=[], metavar="PATH",
                        help="benchmarks that no sample may hold: .jsonl files, or folders of them")
    parser.add_argument("--languages", nargs="+", action="extend", default=[], metavar="CODE",
                        help="languages that answers, or texts, may be in, e.g. ko th")
    parser.add_argument("--labels", type=Path, metavar="FILE.jsonl",
                        help="what people say of some samples (`id` or `text`, and `good`): the page tells "
                             "how far checks and judge agree with them")
    parser.add_argument("--min-kappa", type=float, metavar="K",
                        help="end with 3 where Cohen's kappa against --labels is below this")


def settings_of(args: argparse.Namespace) -> CheckSettings:
    """Return what was asked; its `problems` are the caller's to tell."""
    from data_prep.synth.checks.settings import CheckSettings  # steps take long to import

    return CheckSettings(args.checks, tuple(args.benchmarks), tuple(args.languages), args.labels,
                         args.min_kappa)
