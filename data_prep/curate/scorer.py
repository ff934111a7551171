"""`sov-data scorer train|check`: a model that gives texts a score, from labels of one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from data_prep.curate.scoring.labels import format_metrics
from megatron_sov.base.settings import ActionGroup, DeclaredCommand, Flag


@dataclass(frozen=True, kw_only=True)
class ScorerTrainOptions:
    """Train a linear model over hashed n-grams, and print its figures on labels that were held out."""

    labels: Annotated[Path, Flag(value="FILE")]
    """JSONL file of {"text": ..., "label": 0 or 1, or 0 to 5, "language": "ko"}; the language may be left
    out."""
    kind: Literal["classifier", "regressor"]
    """classifier: labels 0 and 1, scores are probabilities; regressor: 0 to 5."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the scorer."""
    overwrite: bool = False
    """Replace a scorer that is already there."""


@dataclass(frozen=True, kw_only=True)
class ScorerCheckOptions:
    """Print what a scorer is worth on labels that it was not trained on."""

    model: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data scorer train` wrote."""
    labels: Annotated[Path, Flag(value="FILE")]
    """JSONL file of {"text": ..., "label": 0 or 1, or 0 to 5, "language": "ko"}; the language may be left
    out."""
    json: bool = False
    """Print the figures as JSON."""


def _check(args: ScorerCheckOptions) -> int:
    from data_prep.curate.scoring.scorer import evaluate_scorer

    kind, figures = evaluate_scorer(args.model, args.labels)
    lines = [f"{args.model}, a {kind}", *format_metrics(kind, figures)]
    if args.json:
        lines = [json.dumps(figures)]
    print("\n".join(lines))
    return 0


def _train(args: ScorerTrainOptions) -> int:
    from data_prep.curate.scoring.scorer import TrainSettings, train_scorer

    content = train_scorer(TrainSettings(args.labels, args.kind), args.output, overwrite=args.overwrite)
    again = content["num_repeated"]
    print(f"{args.labels}: {content['num_labels']:,} texts"
          + (f" ({again:,} lines left out, whose text stood there before)" if again else ""))
    print("\n".join(["held out:", *format_metrics(args.kind, content["heldout"])]))
    print(f"wrote {args.output}")
    return 0


SCORER = ActionGroup({"train": DeclaredCommand(ScorerTrainOptions, _train),
                      "check": DeclaredCommand(ScorerCheckOptions, _check)},
                     "Train a model that scores texts, or evaluate a model on other labels.")
