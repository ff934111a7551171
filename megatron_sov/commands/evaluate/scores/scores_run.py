"""Runs `megatron-sov eval difference` and `eval contamination` on result files from `eval lm`."""

import json
from dataclasses import asdict

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.figures import align_columns
from megatron_sov.bench.contamination import ContaminationCheck, search_training_data
from megatron_sov.bench.score_differences import compute_differences, format_differences, read_scored_results
from megatron_sov.commands.evaluate.scores.contamination import EvalContaminationOptions
from megatron_sov.commands.evaluate.scores.difference import EvalDifferenceOptions
from megatron_sov.commands.shared_options import parse_task_names


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
    """Print the contamination per task, and write it with the positions to OUT.hits.json. Raises `UserError`:
    unreadable results or data."""
    reading = RecordReading(text_field=options.text_field)
    checked = search_training_data(read_scored_results(options.results), options.data, reading,
                                   options.workers)
    write_output(options.hits_path, format_json(checked))
    if options.json:
        figures = {name: asdict(task) for name, task in checked.tasks.items()}
        print(json.dumps(figures, indent=1, ensure_ascii=False))
    else:
        print(_format_contamination(checked))
        print(f"{checked.num_documents:,} documents searched; positions in {options.hits_path}")


def _format_contamination(checked: ContaminationCheck) -> str:
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "value", "without found items", "items", "found", "too short")]
    for name, task in checked.tasks.items():
        values = ["not known" if value is None else f"{value:.4f}"
                  for value in (task.value, task.value_without)]
        rows.append((name, task.metric or "", *values, f"{task.items:,}", f"{task.items_hit:,}",
                     f"{task.too_short:,}"))
    return align_columns(rows, left=(0, 1))
