"""`megatron-sov eval lm` and `eval suites`: benchmarks, those that come along, and what a run refuses of them
before it begins."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.errors import ExitCode, UserError, visible
from megatron_sov.base.settings import Flag, command_of, read_options
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.commands.shared_options import AnyTarget

if TYPE_CHECKING:
    from megatron_sov.bench.suites.catalogue import DataCheck, TaskFile
    from megatron_sov.bench.suites.protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class EvalLmOptions:
    """Score a model on tasks of lm-eval's form, by its own prompts and metrics, offline."""

    target: AnyTarget
    tasks: Annotated[str, Flag(value="A,B")]
    """Names of tasks and groups."""
    settings: Settings
    json: bool = False
    """Print the figures as JSON."""


def run_lm(args: EvalLmOptions) -> int:
    """Measure, write, and print the table.

    Raises:
        UserError: the model, a task or a setting cannot be used.
        StopRequested: a signal asked for it.
    """
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.bench.lm.results import table
    from megatron_sov.bench.lm.run import evaluate

    found = evaluate(args.target, [name for name in args.tasks.split(",") if name], args.settings)
    if found is not None:
        print(to_json(found).rstrip() if args.json else table(found))
    return ExitCode.OK


@dataclass(frozen=True, kw_only=True)
class EvalSuitesOptions:
    """The benchmarks that come along: list them, check their data."""

    what: Annotated[Literal["list", "check", "bring"], Flag("WHAT")] = "list"
    """list: the tasks, their data and protocol (default); check: what of them is in a folder; bring: bring
    a publisher's file there."""
    json: bool = False
    """Print what is told as JSON."""
    data_dir: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder of your copies of the data."""
    tasks: Annotated[str, Flag(value="A,B")] = ""
    """Names or tags (default: all)."""
    source: Annotated[Path | None, Flag("--input", "FILE")] = None
    """File to bring: .parquet, .csv or .jsonl."""
    name: Annotated[str | None, Flag("--as", "NAME")] = None
    """Which file of the task it is, e.g. mmlu/dev.jsonl (default: the only one)."""
    where: Annotated[tuple[str, ...], Flag(value="FIELD=FROM..TO")] = ()
    """Bring only rows whose field lies from FROM up to, not including, TO; may be repeated."""
    overwrite: bool = False
    """Replace a file that is there."""


def run_suites(args: EvalSuitesOptions) -> int:
    """List, check or bring; returns the exit code.

    Raises:
        UserError: there is no such task, folder or file, or data are wrong.
    """
    from megatron_sov.bench.suites.catalogue import chosen

    tasks = chosen([name.strip() for name in args.tasks.split(",") if name.strip()])
    # options of `bring` that would else be silently without effect
    given = {"--input": args.source, "--as": args.name, "--where": args.where, "--overwrite": args.overwrite}
    if args.what != "bring" and (unused := [option for option, value in given.items() if value]):
        raise UserError(f"{', '.join(unused)}: is for `eval suites bring`; add bring, or leave this out")
    if args.what == "list":
        _list(tasks, args.json)
        return ExitCode.OK
    if args.data_dir is None:
        raise UserError(f"eval suites {args.what} needs --data-dir, the folder of your copies of the data")
    return (_check if args.what == "check" else _bring)(tasks, args, args.data_dir)


def _list(tasks: list[TaskFile], as_json: bool) -> None:
    if as_json:
        print(json.dumps([_told(task) for task in tasks], indent=1, ensure_ascii=False))
        return
    from megatron_sov.bench.lm.results import aligned

    rows = [[task.name, _items(task), protocol_line(task.protocol), str(task.sov.get("suite", ""))]
            for task in tasks]
    print(aligned([("task", "items", "protocol", "suite"), *rows], range(4)))
    print("\n--json tells each task's data, prompt and source; `check --data-dir DIR` what of them is there")


def _told(task: TaskFile) -> dict[str, Any]:
    protocol = task.protocol
    return {"task": task.name, "tags": list(task.tags),
            **{name: task.sov.get(name) for name in ("suite", "source", "licence", "release", "items",
                                                     "prompt_source", "remarks", "fields", "published_as")},
            "files": [name for names in task.told_files.values() for name in names],
            "output_type": task.config.get("output_type"), "num_fewshot": task.config.get("num_fewshot"),
            "metrics": protocol.metric_names if protocol else [
                metric["metric"] for metric in task.config.get("metric_list", [])],
            "protocol": protocol.as_json() if protocol else None}


def _items(task: TaskFile) -> str:
    items = task.sov.get("items")
    if items is not None:
        return f"{items:,}"
    return "yours" if task.sov.get("kind") == "like" else "-"


def protocol_line(protocol: Protocol | None) -> str:
    if protocol is None:
        return "log-likelihood of the choices"
    how = "greedy" if not protocol.temperature else f"T {protocol.temperature:g}, top_p {protocol.top_p:g}"
    judge = protocol.reward or protocol.environment
    played = f"{protocol.environment} in {protocol.episode_limits.max_turns} turn(s), " if (
        protocol.environment) else ""
    return (f"{played}{protocol.samples} x {protocol.max_tokens:,} tokens, {how}; {judge}: "
            f"{', '.join(protocol.metric_names)}")


def _check(tasks: list[TaskFile], args: EvalSuitesOptions, folder: Path) -> int:
    from megatron_sov.bench.lm.results import aligned
    from megatron_sov.bench.suites.catalogue import check_data

    if not folder.is_dir():
        raise UserError(f"--data-dir {folder}: is no folder")
    found = [check_data(task, folder) for task in tasks]
    if args.json:
        print(json.dumps([{**asdict(check), "state": check.state, "note": check.note} for check in found],
                         indent=1, ensure_ascii=False))
    else:
        print(aligned([("task", "data", "items", ""), *(
            (check.task, check.state, f"{check.num_items:,}", _remark(check)) for check in found)], range(4)))
        for check in found:
            for problem in check.problems:
                print(visible(problem))
    # asked for by name, data that are not there are a mistake as well
    bad = [check for check in found if check.problems or (args.tasks and check.missing)]
    return ExitCode.USER_ERROR if bad else ExitCode.OK


def _remark(check: DataCheck) -> str:
    missing = f"no {', '.join(check.missing[:3])}" + (" ..." if check.missing[3:] else "")
    return missing if check.missing else check.note


def _bring(tasks: list[TaskFile], args: EvalSuitesOptions, folder: Path) -> int:
    from megatron_sov.bench.suites.catalogue import SuiteSpan, bring

    # one file belongs to one task
    if not args.tasks or len(tasks) != 1:
        raise UserError("eval suites bring needs --tasks with one task, e.g. --tasks aime24")
    if args.source is None:
        raise UserError("eval suites bring needs --input, the file to bring")
    task = tasks[0]
    names = [name for files in task.told_files.values() for name in files]
    name = args.name or (names[0] if len(names) == 1 else "")
    if name not in names:
        given = f"--as {args.name}" if args.name else f"--tasks {task.name} has several files: --as"
        raise UserError(f"{given} must be one of {', '.join(names)}")
    target = folder / name
    if target.exists() and not args.overwrite:
        raise UserError(f"{target}: is there already; pass --overwrite to replace it")
    path, num_kept, num_rows = bring(task, args.source, name, folder, [SuiteSpan.of(s) for s in args.where])
    if args.json:
        print(json.dumps({"file": str(path), "rows": num_kept, "rows_of_source": num_rows}))
    else:
        print(f"{path}: {num_kept:,} of {num_rows:,} rows")
    return ExitCode.OK


LM = command_of(EvalLmOptions, lambda typed: run_lm(read_options(EvalLmOptions, typed)))
SUITES = command_of(EvalSuitesOptions, lambda typed: run_suites(read_options(EvalSuitesOptions, typed)))
