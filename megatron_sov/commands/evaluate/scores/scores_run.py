"""Runs `megatron-sov eval difference` and `eval contamination` on result files from `eval lm`."""

import json
from dataclasses import asdict
from pathlib import Path

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.documents import RecordReading
from megatron_sov.bench.contamination import ContaminationCheck, search_training_data
from megatron_sov.bench.score_differences import (
    compute_differences, format_differences, format_metric_name, read_scored_results)
from megatron_sov.commands.evaluate.scores.contamination import EvalContaminationOptions
from megatron_sov.commands.evaluate.scores.difference import EvalDifferenceOptions
from megatron_sov.commands.shared_options import parse_task_names
from megatron_sov.runs.folder import RunEvents

EVENT = "eval_contamination"


def compare_scores(options: EvalDifferenceOptions) -> None:
    """Print the differences per metric with confidence intervals. Raises `UserError`: a damaged file, or
    results with different settings."""
    rows = compute_differences(read_scored_results(options.first), read_scored_results(options.second),
                               parse_task_names(options.tasks))
    values = {"first": str(options.first), "second": str(options.second),
              "differences": [row.to_dict() for row in rows]}
    if options.out is not None:
        write_output(options.out, format_json(values))
    print(json.dumps(values, indent=1, ensure_ascii=False) if options.json else format_differences(rows))


def find_contamination(options: EvalContaminationOptions) -> None:
    """Add the contamination per task to OUT.json, and write the positions to OUT.hits.json. Raises
    `UserError`: unreadable results or data."""
    events = RunEvents(options.run)
    scored = read_scored_results(options.results)
    reading = RecordReading(text_field=options.text_field)
    checked = search_training_data(scored, options.data, reading, options.workers)
    results = checked.results
    # positions first, so that results with contamination always have a file of hits
    hits_file = options.results.with_name(f"{options.results.name.removesuffix('.json')}.hits.json")
    write_output(hits_file, format_json(checked.hits))
    write_output(options.results, format_json(results))
    figures = {}
    for name, task in results.tasks.items():
        figures[name] = task.contamination and asdict(task.contamination)
        if task.contamination is not None:
            events.add(EVENT, step=results.model.step, model_hash=results.model.hash, task=name,
                       task_hash=task.task_hash, metric=_get_first_metric(checked, name),
                       **asdict(task.contamination))
    print(json.dumps(figures, indent=1, ensure_ascii=False) if options.json
          else _format_contamination(checked, hits_file))


def _get_first_metric(checked: ContaminationCheck, task: str) -> str | None:
    metrics = checked.results.tasks[task].metrics
    return format_metric_name(metrics[0]) if metrics else None


def _format_contamination(checked: ContaminationCheck, hits_file: Path) -> str:
    lines = []
    for name, task in checked.results.tasks.items():
        contamination = task.contamination
        if contamination is None:
            continue
        metric = task.metrics[0] if task.metrics else None
        value = "not known" if metric is None or metric.value is None else f"{metric.value:.4f}"
        without = contamination.value_without
        value_without = "not known" if without is None else f"{without:.4f}"
        line = (f"{name}: {contamination.items_hit:,} of {task.items:,} items found; "
                f"{_get_first_metric(checked, name)} {value}, {value_without} without them")
        if too_short := checked.too_short.get(name, 0):
            line += f"; {too_short:,} items are too short for the search"
        lines.append(line)
    return "\n".join([*lines, f"{checked.num_documents:,} documents searched; positions in {hits_file}"])
