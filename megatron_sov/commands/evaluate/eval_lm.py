"""`megatron-sov eval lm`."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.commands.shared_options import TARGET_HELP


@dataclass(frozen=True, kw_only=True)
class EvalLmOptions:
    """Score a model on tasks of lm-eval's form, by its own prompts and metrics, offline."""

    target: Annotated[str, Flag("TARGET", help=TARGET_HELP)]
    tasks: Annotated[str, Flag(value="A,B")]
    """Names of tasks and groups."""
    settings: Settings
    json: bool = False
    """Print the figures as JSON."""


LM = DeclaredCommand(EvalLmOptions, lambda options: options,
                     "megatron_sov.commands.evaluate.eval_lm_run:evaluate_tasks")
