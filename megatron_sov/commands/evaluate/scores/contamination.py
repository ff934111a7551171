"""`megatron-sov eval contamination OUT.json --data ...`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, count_cores


@dataclass(frozen=True, kw_only=True)
class EvalContaminationOptions:
    """Find evaluation items in the training data, and compute the score without them."""

    results: Annotated[Path, Flag("OUT.json")]
    """Results from `megatron-sov eval lm`."""
    data: Annotated[tuple[Path, ...], Flag(many=True)]
    """Training data: folders with token shards (their training split), or text files and folders; takes
    several values, and may be repeated."""
    text_field: Annotated[str, Flag(value="NAME")] = "text"
    """Text field in JSONL and Parquet."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Search processes (default: one per core)."""
    json: bool = False
    """Print JSON."""

    @property
    def hits_path(self) -> Path:
        """OUT.hits.json for OUT.json."""
        return self.results.with_name(f"{self.results.name.removesuffix('.json')}.hits.json")


def check_contamination(options: EvalContaminationOptions) -> EvalContaminationOptions:
    check_output("OUT.hits.json", options.hits_path)
    for path in options.data:
        if not path.exists():
            raise UserError(f"--data {path}: does not exist; pass token shards or text files")
    return options


CONTAMINATION = DeclaredCommand(EvalContaminationOptions, check_contamination,
                                "megatron_sov.commands.evaluate.scores.scores_run:find_contamination")
