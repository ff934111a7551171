"""Options of `sov-data scorer train` and `sov-data scorer check`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.libraries import find_library_problems
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import ActionGroup, DeclaredCommand, Flag


@dataclass(frozen=True, kw_only=True)
class ScorerTrainOptions:
    """Train a linear model over hashed n-grams, and print its metrics on held-out labels."""

    labels: Annotated[Path, Flag(value="FILE")]
    """JSONL file with {"text": ..., "label": 0 or 1, or 0 to 5, "language": "ko"}; the language may be left
    out."""
    kind: Literal["classifier", "regressor"]
    """classifier: labels 0 and 1, scores are probabilities; regressor: 0 to 5."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the scorer."""
    overwrite: bool = False
    """Replace an existing scorer."""


@dataclass(frozen=True, kw_only=True)
class ScorerCheckOptions:
    """Measure a scorer on labels that it was not trained on."""

    model: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data scorer train` wrote."""
    labels: Annotated[Path, Flag(value="FILE")]
    """JSONL file with {"text": ..., "label": 0 or 1, or 0 to 5, "language": "ko"}; the language may be left
    out."""
    json: bool = False
    """Print the figures as JSON."""


def _check_libraries(options: Any) -> Any:
    if problems := find_library_problems("sov-data scorer", "sklearn", "threadpoolctl"):
        raise UserError(problems[0])
    return options


SCORER = ActionGroup({
    "train": DeclaredCommand(ScorerTrainOptions, _check_libraries, "data_prep.curate.scorer_run:run_train"),
    "check": DeclaredCommand(ScorerCheckOptions, _check_libraries, "data_prep.curate.scorer_run:run_check")},
    "Train a model that scores texts, or evaluate a model on other labels.")
