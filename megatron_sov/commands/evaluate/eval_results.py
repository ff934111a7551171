"""`megatron-sov eval difference A.json B.json` and `eval contamination OUT.json --data ...`: what scores of
`eval lm` tell of two models, and which items a model may have learned by heart."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.outputs import check_output, refuse_input_as_output
from megatron_sov.base.settings import AtLeastOne, Flag, build_command, count_cores, read_options
from megatron_sov.commands.shared_options import RecordOptions, parse_task_names
from megatron_sov.runs.folder import RunEvents

if TYPE_CHECKING:
    from megatron_sov.bench.contamination import ContaminationCheck

EVENT = "eval_contamination"


@dataclass(frozen=True, kw_only=True)
class EvalContaminationOptions(RecordOptions):
    """Find items of a score that are in the training data, and the score without them."""

    results: Annotated[Path, Flag("OUT.json")]
    """Results of `megatron-sov eval lm`."""
    data: Annotated[tuple[Path, ...], Flag(many=True)]
    """What the model was trained on: folders of token shards (their training split), or files and folders
    of text; several may follow, and it may be repeated."""
    text_field: Annotated[str, Flag(value="NAME")] = "text"
    """Field that holds the text of JSONL and Parquet."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Processes that search (default: one for each core)."""

def run_contamination(typed: argparse.Namespace) -> int:
    """Write what was found into OUT.json, and the places into OUT.hits.json beside it.

    Raises:
        UserError: the results or the data cannot be read.
    """
    args = read_options(EvalContaminationOptions, typed)
    events = RunEvents(args.run)
    check_output("OUT.json", args.results)
    from megatron_sov.base.documents import RecordReading
    from megatron_sov.bench.contamination import check
    from megatron_sov.bench.score_differences import read_scored

    for path in args.data:
        if not path.exists():
            raise UserError(f"--data {path}: does not exist; pass token shards, or files of text")
    scored = read_scored(args.results)
    found = check(scored, args.data, RecordReading(text_field=args.text_field), args.workers)
    # first the places: results that name hits without them would be half a result
    hits_file = args.results.with_name(f"{args.results.name.removesuffix('.json')}.hits.json")
    write_output(hits_file, format_json(found.hits))
    write_output(args.results, format_json(found.results))
    model = found.results.model
    for name, task in found.results.tasks.items():
        if task.contamination is not None:
            events.add(EVENT, step=model.step, model_hash=model.hash, task=name, task_hash=task.task_hash,
                       metric=_first(found, name), **asdict(task.contamination))
    print(json.dumps({name: task.contamination and asdict(task.contamination)
                      for name, task in found.results.tasks.items()}, indent=1, ensure_ascii=False)
          if args.json else _table(found, hits_file))
    return ExitCode.OK


def _first(found: ContaminationCheck, task: str) -> str | None:
    from megatron_sov.bench.score_differences import said

    metrics = found.results.tasks[task].metrics
    return said(metrics[0]) if metrics else None


def _table(found: ContaminationCheck, hits_file: Path) -> str:
    lines = []
    for name, task in found.results.tasks.items():
        check = task.contamination
        if check is None:
            continue
        first = task.metrics[0] if task.metrics else None
        value = "not known" if first is None or first.value is None else f"{first.value:.4f}"
        without = "not known" if check.value_without is None else f"{check.value_without:.4f}"
        short = found.too_short.get(name, 0)
        lines.append(f"{name}: {check.items_hit:,} of {task.items:,} items found; {_first(found, name)} "
                     f"{value}, {without} without them"
                     + (f"; {short:,} items are too short to be looked for" if short else ""))
    return "\n".join([*lines, f"{found.num_documents:,} documents searched; places in {hits_file}"])


CONTAMINATION = build_command(EvalContaminationOptions, run_contamination)


@dataclass(frozen=True, kw_only=True)
class EvalDifferenceOptions:
    """Compare two models item by item, with confidence intervals."""

    first: Annotated[Path, Flag("A.json")]
    """Results of `megatron-sov eval lm`."""
    second: Annotated[Path, Flag("B.json")]
    """Those of the model to compare with it."""
    tasks: Annotated[str | None, Flag(value="A,B")] = None
    """These alone (default: all that both have)."""
    json: bool = False
    """Print the figures as JSON."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """Also write the figures into a JSON file, which appears whole."""

def run_difference(typed: argparse.Namespace) -> int:
    """Print the difference of each figure with its interval.

    Raises:
        UserError: a file is damaged, or the two were not measured in the same way.
    """
    args = read_options(EvalDifferenceOptions, typed)
    from megatron_sov.bench.score_differences import differences, read_scored, table

    if args.out is not None:
        check_output("--output", args.out)
        refuse_input_as_output("--output", args.out, args.first, args.second)
    tasks = parse_task_names(args.tasks)
    if args.tasks is not None and not tasks:
        raise UserError(f"--tasks {args.tasks!r}: names no task; name some, separated by commas")
    found = differences(read_scored(args.first), read_scored(args.second), tasks)
    values = {"first": str(args.first), "second": str(args.second),
              "differences": [d.fields() for d in found]}
    if args.out is not None:
        write_output(args.out, format_json(values))
    print(json.dumps(values, indent=1, ensure_ascii=False) if args.json else table(found))
    return ExitCode.OK


DIFFERENCE = build_command(EvalDifferenceOptions, run_difference)
