"""Run `sov-data scorer train` and `sov-data scorer check`."""

import json

from data_prep.curate.scorer import ScorerCheckOptions, ScorerTrainOptions
from data_prep.curate.scoring.metrics import format_metrics
from data_prep.curate.scoring.training import TrainSettings, evaluate_scorer, train_scorer


def run_train(options: ScorerTrainOptions) -> None:
    content = train_scorer(TrainSettings(options.labels, options.kind), options.output,
                           overwrite=options.overwrite)
    num_repeated = content["num_repeated"]
    repeated = f" ({num_repeated:,} lines with a repeated text left out)" if num_repeated else ""
    print(f"{options.labels}: {content['num_labels']:,} texts{repeated}")
    print("\n".join(["held out:", *format_metrics(options.kind, content["heldout"])]))
    print(f"wrote {options.output}")


def run_check(options: ScorerCheckOptions) -> None:
    kind, metrics = evaluate_scorer(options.model, options.labels)
    if options.json:
        print(json.dumps(metrics))
    else:
        print("\n".join([f"{options.model}, a {kind}", *format_metrics(kind, metrics)]))
