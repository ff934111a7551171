"""Checks of the benchmarks that a training command runs on its exports.

The optional part `bench` is imported only if the settings name a benchmark.
"""

from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.model.config import RunConfig


def check_benchmarks(config: RunConfig) -> None:
    """Check that the benchmarks for exports (`evaluate.background.tasks`) can be measured. Raises
    `UserError`: lm-eval is not installed, an option is wrong, or no folder has a task."""
    lm = config.evaluate.lm
    if "lm" not in config.evaluate.background.tasks:
        return
    # optional: `bench` and lm-eval
    from megatron_sov.bench.lm.harness import require_harness
    from megatron_sov.bench.lm.task_files import check_task_names
    from megatron_sov.commands.evaluate.eval_lm import EvalLmOptions

    require_harness()
    parser = Parser(prog="megatron-sov eval lm")
    add_options(parser, EvalLmOptions)
    try:
        options = read_options(EvalLmOptions, parser.parse_args(
            ["EXPORT", f"--tasks={','.join(lm.tasks)}", *lm.options, "--output=scores.json"]))
        if options.settings.run is not None:
            raise UserError("--run: the scores become events of this run anyway; leave it out")
        check_task_names(lm.tasks, options.settings.sources)
    except UserError as e:
        raise UserError(f"evaluate.lm.tasks = {list(lm.tasks)}, evaluate.lm.options = {list(lm.options)}: {e}"
                        ) from None
