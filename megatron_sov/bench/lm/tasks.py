"""Build lm-eval's tasks from task files, and refuse task files that would run code or fetch data.

Without `--allow-task-code`, nothing in a task folder runs: functions, data sets and metrics that are code are
refused, and templates are rendered in a sandbox. Data files are read by `task_rows`. Data from the Hub need
`--allow-download`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.utils
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import _import_func_in_yml

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.errors import Fix, UserError, format_error
from megatron_sov.base.settings import parse_nested
from megatron_sov.bench.lm.harness import can_reach_hub, forbid_downloads, suppress_output
from megatron_sov.bench.lm.settings import LmEvalSettings, TaskSources
from megatron_sov.bench.lm.task_files import (
    DATA, SUITES, FunctionReference, TaskDefinition, find_source_tasks, iter_values, resolve_path)
from megatron_sov.bench.lm.task_rows import LOADERS, TaskFileReader
from megatron_sov.bench.suites.judging import AnswerJudge, parse_judging

CODE_KEYS = ("process_docs", "process_results", "custom_dataset", "class", "doc_to_image", "doc_to_audio")
"""Settings whose values are code."""
GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
"""Settings of a group; further settings would change members, which are checked separately."""
CODE_FIX = "look at the folder, and pass --allow-task-code if you trust it"


@dataclass(frozen=True)
class LoadedTasks:
    tasks: dict[str, Any]
    """Name -> lm-eval's task."""
    groups: dict[str, Any]
    """Name -> lm-eval's group, for groups named in `--tasks`."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Task -> data file -> SHA-256."""
    judges: dict[str, AnswerJudge] = field(default_factory=dict)
    """Task -> its reward, for tasks with `metadata.sov.reward`."""


def load_tasks(names: Sequence[str], sources: TaskSources, settings: LmEvalSettings | None = None
               ) -> LoadedTasks:
    """Load tasks, groups and tags; `samples`, `judge`, `mode` and `workers` override the tasks' own values.
    Raises `UserError`: an unknown, incomplete or forbidden task."""
    catalog = find_source_tasks(sources)
    names = catalog.expand_tags(names)
    with suppress_output():
        if not sources.allow_code:
            sandbox_templates()
        manager = TaskManager(include_defaults=sources.allow_download)
        built_in = dict(manager.task_index)
    files: dict[str, list[Path]] = {}
    judges: dict[str, AnswerJudge] = {}
    required = catalog.list_required(names, built_in)
    needs_hub = sources.allow_download and any(name not in catalog.definitions for name in required)
    is_offline = needs_hub and not can_reach_hub()
    if is_offline:  # else the libraries would try again for minutes
        forbid_downloads()
    for name in required:
        if name not in catalog.definitions:
            continue
        definition = catalog.definitions[name]
        entry, files[name] = _build_entry(definition, sources)
        judge = _build_judge(entry.cfg or {}, definition, settings)
        if judge is not None and entry.cfg is not None:
            judges[name] = judge
            entry.cfg |= judge.config
        manager.task_index[name] = entry
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        loaded = _load_task(manager, name, is_offline)
        # a task and its group would run the task twice
        if repeated := sorted(set(loaded["tasks"]) & set(tasks)):
            raise UserError(f"--tasks {','.join(names)}: {repeated[0]} is named twice; name it once")
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    hashes: dict[str, dict[str, str]] = {name: {} for name in tasks}
    for name, task_hashes in hashes.items():
        for file in sorted(set(files.get(name, []))):
            task_hashes[f"{file.parent.name}/{file.name}"] = sha256_file(file)
    return LoadedTasks(tasks, groups, hashes, judges)


def sandbox_templates() -> None:
    """Replace lm-eval's template environment by a sandbox without access to Python."""
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined,
                                            keep_trailing_newline=True)
    sandbox.filters |= lm_eval.utils.env.filters
    lm_eval.utils.env = sandbox


def _build_judge(config: Mapping[str, Any], definition: TaskDefinition, settings: LmEvalSettings | None
                 ) -> AnswerJudge | None:
    changes = parse_nested(settings.judge, "--judge") if settings else None
    judging = parse_judging(config, allow_code=definition.folder.trusted,
                            samples=settings.samples if settings else None, changes=changes)
    if judging is None:
        return None
    if settings is None:
        return AnswerJudge(judging)
    return AnswerJudge(replace(judging, mode=settings.mode or judging.mode), settings.workers)


def _load_task(manager: Any, name: str, is_offline: bool) -> Any:
    """Return lm-eval's tasks and groups for a name; `is_offline`: the Hugging Face hub does not answer."""
    try:
        with suppress_output():
            loaded = manager.load([name])
            unknown = [(task_name, metric) for task_name, task in loaded["tasks"].items()
                       for metric, aggregate in dict(task.aggregation()).items() if not callable(aggregate)]
    except UserError:
        raise
    except Exception as e:  # various errors from definition, templates and data
        if is_offline:
            raise UserError(f"task {name!r}: its data are on the Hugging Face hub, which does not answer; it "
                            "needs a network; without one pass a task with local data by --task-dir") from e
        raise UserError(f"task {name!r}: cannot be loaded ({format_error(e):.300}); check its definition and "
                        "its data") from e
    if unknown:
        raise UserError(f"task {unknown[0][0]!r}: the aggregation for its metric {unknown[0][1]!r} is "
                        "unknown to lm-eval; name a known aggregation, such as mean")
    return loaded


def _build_entry(definition: TaskDefinition, sources: TaskSources) -> tuple[Entry, list[Path]]:
    """Build lm-eval's entry for a task file, and return the data files."""
    config = definition.config
    if "group" in config:
        extra = sorted(set(config) - GROUP_KEYS)
        if extra and not definition.folder.trusted:
            raise UserError(f"{definition.file}: group {config['group']!r} sets {extra[0]!r} for its "
                            "members; write it into each member's file")
        return Entry(name=config["group"], kind=Kind.GROUP, yaml_path=None, cfg=dict(config)), []
    data_dir = sources.data_dir and sources.data_dir.absolute()  # relative paths start at the task's folder
    config, files = prepare_task(definition, data_dir, may_download=sources.allow_download)
    if definition.folder.trusted:
        config = _import_functions(config)
    kind = Kind.PY_TASK if "class" in config else Kind.TASK
    return Entry(name=config["task"], kind=kind, yaml_path=None, cfg=config), files


def prepare_task(definition: TaskDefinition, data_dir: Path | None, *, may_download: bool
                 ) -> tuple[dict[str, Any], list[Path]]:
    """Return a task's checked settings, and the absolute paths of its data files. Raises `UserError`:
    forbidden code or downloads, or a missing file."""
    config = dict(definition.config)
    task = f"task {config.get('task')!r} ({definition.file})"
    for key, kind, form in (("dataset_path", str, "a text"), ("dataset_kwargs", dict, "names and values"),
                            ("metric_list", list, "a list")):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise UserError(f"{task}: {key} is {config[key]!r:.80}; write {form}")
    if not definition.folder.trusted:
        _check_no_code(config, task)
    path, kwargs = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    # our suites and trusted tasks may read data with code of their own
    has_own_reader = config.get("custom_dataset") is not None or (path is None and definition.folder.trusted)
    if not has_own_reader and path not in LOADERS:
        _check_fetched_data(path, task, may_download)
        return config, []
    files: list[Path] = []
    if path in LOADERS or "data_files" in kwargs:
        kwargs["data_files"] = _locate_files(kwargs.get("data_files"), definition, data_dir, task, files)
    config["dataset_kwargs"] = kwargs
    if not has_own_reader:
        _check_data_files(config, task, files)
        splits = kwargs["data_files"]
        if not isinstance(splits, dict):
            splits = {"train": splits}
        splits = {split: names if isinstance(names, list) else [names] for split, names in splits.items()}
        config["custom_dataset"] = TaskFileReader(splits, to_dataset=config.get("process_docs") is not None)
    return config, files


def _check_fetched_data(path: str | None, task: str, may_download: bool) -> None:
    if path is not None and not may_download:
        raise UserError(f"{task}: dataset_path {path!r} would be fetched; put its items into a JSON Lines "
                        "file and write `dataset_path: json` with data_files, or pass --allow-download")
    if path in ("pandas", "pickle", "webdataset") or (path and Path(path).exists()):
        raise UserError(f"{task}: dataset_path {path!r} could run code; use one of {', '.join(LOADERS)}")


def _check_data_files(config: Mapping[str, Any], task: str, files: Sequence[Path]) -> None:
    """Check that data files have their loader's format and that lm-eval reads `doc_to_target` as meant."""
    loader = config["dataset_path"]
    if unknown := sorted(map(str, set(config["dataset_kwargs"]) - {"data_files", "trust_remote_code"})):
        raise UserError(f"{task}: dataset_kwargs has {', '.join(unknown)}, which `dataset_path: {loader}` "
                        "does not read; leave it out, and write the resulting items as JSON Lines")
    for file in files:
        if file.suffix not in LOADERS[loader]:
            raise UserError(f"{task}: the name of {file} must end in {' or '.join(LOADERS[loader])} for "
                            f"`dataset_path: {loader}`; rename the file")
    target = config.get("doc_to_target")
    # lm-eval takes the text "0" for no choice, which makes every answer wrong
    if (loader == "csv" and config.get("output_type") == "multiple_choice" and isinstance(target, str)
            and "{" not in target):
        raise UserError(f"{task}: doc_to_target {target!r:.80} names a column of text; write "
                        f"'{{{{{target:.80}}}}}', which lm-eval reads as an index if it is a number")


def _locate_files(value: Any, definition: TaskDefinition, data_dir: Path | None, task: str, files: list[Path]
                  ) -> Any:
    """Return `data_files` with absolute paths, and append the paths to `files`."""
    if isinstance(value, dict):
        return {split: _locate_files(names, definition, data_dir, task, files)
                for split, names in value.items()}
    if isinstance(value, list):
        return [_locate_files(name, definition, data_dir, task, files) for name in value]
    if not isinstance(value, str):
        raise UserError(f"{task}: dataset_kwargs.data_files is {value!r}; write a path for each split")
    if value.startswith(DATA) and data_dir is None:
        raise UserError(f"{task}: needs {value.removeprefix(DATA + '/')} in {DATA}; pass --data-dir DIR "
                        "with its folder", Fix(options=("--data-dir", "DIR")))
    folder = definition.folder
    name = value.replace(DATA, str(data_dir)) if data_dir else value
    file = resolve_path(definition.file.parent / name, task)
    roots = [folder.path.resolve()]
    if data_dir:
        roots.append(data_dir.resolve())
    if not folder.trusted and not any(file.is_relative_to(root) for root in roots):
        raise UserError(f"{task}: data file {value} lies outside of its folder and of --data-dir; copy it "
                        "into one of them")
    items = "the split's items there"
    if folder.path == SUITES:  # publishers use several formats
        candidates = [file.with_suffix(suffix) for suffix in (".jsonl", ".parquet", ".csv")]
        file = next((candidate for candidate in candidates if candidate.is_file()), file)
        items = f"{definition.config['metadata']['sov']['source']} there, in JSON Lines, Parquet or CSV"
    if not file.is_file():
        raise UserError(f"{task}: {file} does not exist; put {items}, or name another folder with --data-dir")
    files.append(file)
    return str(file)


def _check_no_code(config: Mapping[str, Any], task: str) -> None:
    """Raise `UserError` if a task would run code."""
    for path, value in iter_values(config):
        if isinstance(value, FunctionReference):
            raise UserError(f"{task}: {path} is !function {value}, which runs code from the folder; "
                            f"{CODE_FIX}")
    for key in CODE_KEYS:
        if config.get(key) is not None:
            raise UserError(f"{task}: {key} is code; {CODE_FIX}")
    if config.get("unsafe_code") or config.get("use_prompt"):
        raise UserError(f"{task}: unsafe_code and use_prompt run or read files named by the task; {CODE_FIX}")
    for metric in config.get("metric_list") or []:
        settings = metric if isinstance(metric, dict) else {"metric": metric, "hf_evaluate": True}
        name = settings.get("metric")
        if not isinstance(name, str) or name not in metric_registry or settings.get("hf_evaluate"):
            raise UserError(f"{task}: metric {name!r} is not built into lm-eval, and would be fetched as "
                            f"code; {CODE_FIX}")


def _import_functions(value: Any) -> Any:
    """Replace each `FunctionReference` in the settings of a trusted task by its function."""
    if isinstance(value, FunctionReference):
        try:
            return _import_func_in_yml(str(value), value.folder)
        except Exception as e:  # various errors from foreign code
            raise UserError(f"{value.folder}: !function {value} cannot be imported ({format_error(e):.200}); "
                            "correct it") from e
    if isinstance(value, dict):
        return {key: _import_functions(child) for key, child in value.items()}
    return [_import_functions(child) for child in value] if isinstance(value, list) else value


def hash_task(task: Any, files: Mapping[str, str]) -> str:
    """Hash a task's settings, data and lm-eval's version."""
    config = dict(task.dump_config())
    config.pop("task_alias", None)
    for name, ignored in (("dataset_kwargs", "data_files"), ("metadata", "config_source")):  # paths
        if isinstance(config.get(name), dict):
            config[name] = {key: value for key, value in config[name].items() if key != ignored}
    text = json.dumps([config, lm_eval.__version__, dict(files)], sort_keys=True, default=_get_type_name)
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode())  # addresses of partial functions
    if not files:  # data from the Hub: hash the items
        for doc in task.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _get_type_name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__
