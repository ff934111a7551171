"""Runs `megatron-sov eval lm`."""

from megatron_sov.base.artifacts import format_json
from megatron_sov.bench.lm.evaluation import evaluate
from megatron_sov.bench.lm.results import format_scores
from megatron_sov.commands.evaluate.eval_lm import EvalLmOptions


def evaluate_tasks(options: EvalLmOptions) -> None:
    tasks = [name for name in options.tasks.split(",") if name]
    results = evaluate(options.target, tasks, options.settings)
    if results is not None:
        print(format_json(results).rstrip() if options.json else format_scores(results))
