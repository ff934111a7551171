"""Options and checks of `megatron-sov eval lm`; `eval_lm_run` runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.bench.lm.harness import require_harness
from megatron_sov.bench.lm.settings import LmEvalSettings
from megatron_sov.bench.lm.task_files import check_task_names
from megatron_sov.commands.shared_options import TARGET_HELP
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.work.endpoints.transport import is_url


@dataclass(frozen=True, kw_only=True)
class EvalLmOptions:
    """Score a model on lm-eval tasks with their own prompts and metrics, offline."""

    target: Annotated[str, Flag("TARGET", help=TARGET_HELP)]
    tasks: Annotated[str, Flag(value="A,B")]
    """Names of tasks and task groups."""
    settings: LmEvalSettings
    json: bool = False
    """Print JSON."""


def check_lm(options: EvalLmOptions) -> EvalLmOptions:
    if is_url(options.target):
        raise UserError(f"{options.target}: `eval lm` runs checkpoints and Hugging Face folders; evaluate an "
                        "endpoint with lm-eval's own command: lm_eval --model local-chat-completions "
                        "--model_args base_url=URL,model=NAME")
    check_model(Path(options.target), options.settings.settings, options.settings.nproc)
    require_harness()
    check_task_names([name for name in options.tasks.split(",") if name], options.settings.sources)
    return options


LM = DeclaredCommand(EvalLmOptions, check_lm, "megatron_sov.commands.evaluate.eval_lm_run:evaluate_tasks")
