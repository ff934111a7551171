"""Tasks by name: from folders of the user's, from our own suites, and with --allow-download from lm-eval;
which tasks a folder defines, and whether a foreign one can be read without running code.

A task is a YAML file in lm-eval's form.  `!function` in it names Python code, a metric or a data set may be
code as well; without --allow-task-code nothing of a folder is run, and nothing outside of it is read.
Data files next to a task are read by `task_rows`; data of the Hub by `datasets`, only with --allow-download,
with caches in a folder of our own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.documents.bounded_yaml import BoundedLoader
from megatron_sov.base.errors import Fix, UserError, find_nearest_name, format_error
from megatron_sov.base.settings import parse_nested
from megatron_sov.bench.lm.harness import cage_templates, quiet
from megatron_sov.bench.lm.settings import Settings, TaskSources
from megatron_sov.bench.lm.task_rows import LOADERS, TaskFileReader, group_files

if TYPE_CHECKING:
    from megatron_sov.bench.suites.judging import AnswerJudge

MAX_FILE_BYTES = 4 << 20
"""Largest YAML file that is read."""
MAX_VALUES = 50_000
"""Most values in a file, each as often as aliases name it."""
MAX_INCLUDES = 32
"""Deepest chain of includes."""
DATA = "${DATA}"
"""Stands for --data-dir in the paths of data files."""
SUITES = Path(__file__).parents[1] / "suites" / "tasks"
"""Our own tasks."""
CODE_KEYS = ("process_docs", "process_results", "custom_dataset", "class", "doc_to_image", "doc_to_audio")
"""What a task can only give as code."""


@dataclass(frozen=True)
class TaskFolder:
    path: Path
    trusted: bool
    """Whether its code may run: our own, or with --allow-task-code."""


@dataclass(frozen=True)
class Definition:
    """One task, group or nothing of both, as it stands in a file."""

    file: Path
    folder: TaskFolder
    config: dict[str, Any]
    """Its content with its includes; functions as the words that name them."""


@dataclass
class FoundTasks:
    definitions: dict[str, Definition] = field(default_factory=dict)
    """Name of each task and group -> where it stands; of several the first folder's."""
    tags: dict[str, list[str]] = field(default_factory=dict)
    """Tag -> names of the tasks that have it."""
    problems: dict[str, str] = field(default_factory=dict)
    """File -> why it cannot be read."""


class _Loader(BoundedLoader):
    """Reads plain values, and `!function` as the words behind it."""


class Function(str):
    """The words behind `!function`."""

    folder = Path()
    """Where the file lies that they stand in."""


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


def find(folders: list[TaskFolder]) -> FoundTasks:
    """Return what folders define.

    Raises:
        UserError: a folder is not there, or two files of it define the same task.
    """
    found = FoundTasks()
    for folder in folders:
        if not folder.path.is_dir():
            raise UserError(f"--task-dir {folder.path}: is no folder; pass one with lm-eval tasks, "
                            "a YAML file each")
        here: dict[str, Definition] = {}
        for file in sorted(folder.path.rglob("*.yaml")):
            try:
                # A link could show any file of this machine as a task.
                if not folder.trusted and not file.resolve().is_relative_to(folder.path.resolve()):
                    raise UserError(f"{file}: is a link to outside of {folder.path}; put the file inside")
                definition = Definition(file, folder, _read(file, folder.path, 0))
            except UserError as e:
                found.problems[str(file)] = str(e)
                continue
            name = definition.config.get("group") or definition.config.get("task")
            if not isinstance(name, str):
                continue  # what other files include
            if name in here:
                raise UserError(f"{file}: defines {name!r}, and so does {here[name].file}; "
                                "rename one of them")
            here[name] = definition
        # Earlier folders win over later ones.
        found.definitions = here | found.definitions
    for name, definition in found.definitions.items():
        for tag in _texts(definition.config.get("tag"), f"{definition.file}: tag"):
            found.tags.setdefault(tag, []).append(name)
    return found


def _read(file: Path, root: Path, depth: int) -> dict[str, Any]:
    """Return a file's content with that of its includes, over which its own goes."""
    if depth > MAX_INCLUDES:
        raise UserError(f"{file}: its includes go round in a circle; break it")
    if not file.is_file():  # a pipe, a device or a link to nothing; some have no end
        raise UserError(f"{file}: is no file that can be read; the task folder is incomplete")
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{file}: is larger than {MAX_FILE_BYTES >> 20} MiB, so it is no task; remove it")
        config = yaml.load(file.read_bytes(), Loader=_Loader)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); the task folder is incomplete") from None
    except Exception as e:  # PyYAML's tags fall over values that they do not know, each in its own way
        said = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{file}: is no YAML of a task ({said:.200}); mend it") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds no settings of a task; write `task: NAME` and what belongs to it")
    try:
        # Aliases make a small file huge, so values are counted as they unfold.
        for number, (_, value) in enumerate(_walk(config, "")):
            if number == MAX_VALUES:
                raise UserError(f"{file}: holds more than {MAX_VALUES:,} values, aliases counted, so it is "
                                "no task; remove it")
            if isinstance(value, Function):
                value.folder = file.parent
    except RecursionError:
        raise UserError(f"{file}: is nested too deeply, or holds itself, so it is no task; "
                        "remove it") from None
    merged: dict[str, Any] = {}
    for name in _texts(config.pop("include", None), f"{file}: include"):
        included = _place(file.parent / name, str(file))
        if not included.is_relative_to(root.resolve()):
            raise UserError(f"{file}: include {name!r} lies outside of {root}; put it inside")
        if not included.is_file():
            raise UserError(f"{file}: include {name!r} does not exist, so the task folder is incomplete; put "
                            f"{included.name} there")
        # Later includes win over earlier ones, the file itself over all.
        merged |= {key: value for key, value in _read(included, root, depth + 1).items()
                   if key != "task_list"}
    return merged | config


def _texts(value: Any, said: str) -> list[str]:
    if value is None:
        return []
    found = value if isinstance(value, list) else [value]
    if wrong := [part for part in found if not isinstance(part, str)]:
        raise UserError(f"{said} is {wrong[0]!r:.80}; write a text, or a list of texts")
    return found


def _place(path: Path, said: str) -> Path:
    try:
        place = path.resolve()
        # Looked at once here: a path with a NUL or too long a name raises in many other places.
        place.is_file()
        os.fsencode(place)
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"{said}: {str(path)!r:.120} is no path of this machine; mend it") from None
    return place


def prepare_task(definition: Definition, data_dir: Path | None, *, may_download: bool,
                 metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """Return a task's settings with its data files as absolute paths, and these files.

    Args:
        definition: the task.
        data_dir: the folder that `${DATA}` stands for.
        may_download: whether data may be fetched.
        metrics: names that lm-eval knows.

    Raises:
        UserError: the task would run code or fetch something that it may not, or a file is missing.
    """
    config = dict(definition.config)
    said = f"task {config.get('task')!r} ({definition.file})"
    for key, kind, what in (("dataset_path", str, "a text"), ("dataset_kwargs", dict, "names and values"),
                            ("metric_list", list, "a list")):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise UserError(f"{said}: {key} is {config[key]!r:.80}; write {what}")
    if not definition.folder.trusted:
        _refuse_code(config, said, metrics)
    path, kwargs = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    is_own = config.get("custom_dataset") is not None or (path is None and definition.folder.trusted)
    if not is_own and path not in LOADERS:
        _refuse_fetched(path, said, may_download)
        return config, []
    files: list[Path] = []
    if path in LOADERS or "data_files" in kwargs:
        kwargs["data_files"] = _locate(kwargs.get("data_files"), definition, data_dir, said, files)
    config["dataset_kwargs"] = kwargs
    if not is_own:  # code of its own reads the data, as in our suites
        _check_data(config, said, files)
        config["custom_dataset"] = TaskFileReader(str(path), group_files(kwargs["data_files"]),
                                                  to_dataset=config.get("process_docs") is not None)
    return config, files


def _refuse_fetched(path: str | None, said: str, may_download: bool) -> None:
    if path is not None and not may_download:
        raise UserError(f"{said}: dataset_path {path!r} would be fetched; put its items into a JSON "
                        "Lines file and write `dataset_path: json` with data_files, or pass "
                        "--allow-download")
    if path in ("pandas", "pickle", "webdataset") or (path and Path(path).exists()):
        raise UserError(f"{said}: dataset_path {path!r} could run code; use one of {', '.join(LOADERS)}")


def _check_data(config: Mapping[str, Any], said: str, files: Sequence[Path]) -> None:
    """Raise `UserError` where data files have another format, or would be read otherwise than meant."""
    loader = config["dataset_path"]
    if unknown := sorted(map(str, set(config["dataset_kwargs"]) - {"data_files", "trust_remote_code"})):
        raise UserError(f"{said}: dataset_kwargs has {', '.join(unknown)}, which `dataset_path: {loader}` "
                        "does not read; leave it out, and write the items it stands for as JSON Lines")
    if wrong := [file for file in files if file.suffix not in LOADERS[loader]]:
        raise UserError(f"{said}: {wrong[0]} is no file of {loader}, which end in "
                        f"{' or '.join(LOADERS[loader])}; name them so")
    target = config.get("doc_to_target")
    # lm-eval takes a text "0" for no choice at all, and every answer would be wrong.
    if loader == "csv" and config.get("output_type") == "multiple_choice" and isinstance(
            target, str) and "{" not in target:
        raise UserError(f"{said}: doc_to_target {target!r:.80} names a column of text; write "
                        f"'{{{{{target:.80}}}}}', which lm-eval reads as an index where it is a number")


def _locate(value: Any, definition: Definition, data_dir: Path | None, said: str, files: list[Path]) -> Any:
    """Return data files in the form they were given in, as absolute paths, which join `files`."""
    if isinstance(value, dict):
        return {split: _locate(names, definition, data_dir, said, files) for split, names in value.items()}
    if isinstance(value, list):
        return [_locate(name, definition, data_dir, said, files) for name in value]
    if not isinstance(value, str):
        raise UserError(f"{said}: dataset_kwargs.data_files is {value!r}; write a path for each split")
    if value.startswith(DATA) and data_dir is None:
        raise UserError(f"{said}: needs {value.removeprefix(DATA + '/')} below {DATA}; pass --data-dir DIR, "
                        "the folder that it lies in", Fix(options=("--data-dir", "DIR")))
    given = Path(value.replace(DATA, str(data_dir))) if data_dir else Path(value)
    file = _place(definition.file.parent / given, said)
    roots = [definition.folder.path.resolve(), *([data_dir.resolve()] if data_dir else [])]
    if not definition.folder.trusted and not any(file.is_relative_to(root) for root in roots):
        raise UserError(f"{said}: data file {value} lies outside of its folder and of --data-dir; put it "
                        "into one of them")
    items = "the split's items there"
    if definition.folder.path == SUITES:  # a publisher's file may have another format
        file = next((f for f in map(file.with_suffix, (".jsonl", ".parquet", ".csv")) if f.is_file()), file)
        items = f"{definition.config['metadata']['sov']['source']} there, in JSON Lines, Parquet or CSV"
    if not file.is_file():
        raise UserError(f"{said}: {file} does not exist; put {items}, or name another folder with --data-dir")
    files.append(file)
    return str(file)


def _refuse_code(config: Mapping[str, Any], said: str, metrics: Mapping[str, Any]) -> None:
    """Raise `UserError` where a task would run code of its own."""
    way_out = "look at the folder, and pass --allow-task-code if you trust it"
    for where, value in _walk(config, ""):
        if isinstance(value, Function):
            raise UserError(f"{said}: {where} is !function {value}, which runs code of the folder; {way_out}")
    for key in CODE_KEYS:
        if config.get(key) is not None:
            raise UserError(f"{said}: {key} is code; {way_out}")
    if config.get("unsafe_code") or config.get("use_prompt"):
        raise UserError(f"{said}: unsafe_code and use_prompt run or read what the task names; {way_out}")
    for metric in config.get("metric_list") or []:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if not isinstance(name, str) or not isinstance(metric, dict) or name not in metrics or metric.get(
                "hf_evaluate"):
            raise UserError(f"{said}: metric {name!r} is none that lm-eval has built in, and others are code "
                            f"that is fetched; {way_out}")


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield all values in a task's settings with the names that lead to them."""
    yield where, value
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _walk(child, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _walk(child, f"{where}[{number}]")


GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
"""What a group may say; more would change its members, which are checked one by one."""


@dataclass(frozen=True)
class LoadedTasks:
    tasks: dict[str, Any]
    """Name -> lm-eval's task."""
    groups: dict[str, Any]
    """Name -> lm-eval's group of those that were asked for by its name."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name of a task -> name of each of its data files -> its SHA-256."""
    judges: dict[str, AnswerJudge] = field(default_factory=dict)
    """Name of a task that a reward judges -> what judges it."""


def load_tasks(names: Sequence[str], sources: TaskSources, asked: Settings | None = None
               ) -> LoadedTasks:
    """Return tasks by name.

    Args:
        names: of tasks and groups.
        sources: where they come from.
        asked: how answers are judged, where it differs from the tasks' own settings.

    Raises:
        UserError: one does not exist, is incomplete, or would do what it may not.
    """
    found, names = _find_named(names, sources)
    with quiet():
        from lm_eval.tasks import TaskManager

        if not sources.allow_code:
            cage_templates()
        manager = TaskManager(include_defaults=sources.allow_download)
        built_in = dict(manager.task_index)
    wanted = _closure(names, found, built_in)
    files: dict[str, list[Path]] = {}
    judges: dict[str, AnswerJudge] = {}
    for name in wanted:
        if name in found.definitions:
            entry, files[name] = _entry(found.definitions[name], sources)
            if (judge := _judge(entry.cfg, found.definitions[name].folder, asked)) is not None:
                judges[name] = judge
                entry.cfg |= judge.config
            manager.task_index[name] = entry
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        loaded = _load(manager, name)
        # A task and its group would be asked and counted twice.
        if twice := sorted(set(loaded["tasks"]) & set(tasks)):
            raise UserError(f"--tasks {','.join(names)}: {twice[0]} is asked for twice; name it once")
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    hashes = {name: _hashes(files.get(name, [])) for name in tasks}
    return LoadedTasks(tasks, groups, hashes, judges)


def _judge(config: Mapping[str, Any], folder: TaskFolder, asked: Settings | None) -> AnswerJudge | None:
    from megatron_sov.bench.suites.judging import AnswerJudge, judging_of

    judging = judging_of(config, allow_code=folder.trusted, samples=asked.samples if asked else None,
                         changes=parse_nested(asked.judge, "--judge") if asked else None)
    if judging is None:
        return None
    if asked is not None and asked.mode is not None:
        judging = replace(judging, mode=asked.mode)
    return AnswerJudge(judging, asked.workers if asked else 0)


def refuse_unknown(names: Sequence[str], sources: TaskSources) -> None:
    """Raise `UserError` where a task is in no folder; imports no lm-eval, whose own tasks, with
    `allow_download`, it does not know."""
    found, names = _find_named(names, sources)
    if not sources.allow_download:
        _closure(names, found, {})


def _find_named(names: Sequence[str], sources: TaskSources) -> tuple[FoundTasks, list[str]]:
    folders = [TaskFolder(path, sources.allow_code) for path in sources.folders]
    if SUITES.is_dir():
        folders.append(TaskFolder(SUITES, True))
    found = find(folders)
    return found, [name for given in names for name in ([given] if given in found.definitions
                                                        else found.tags.get(given, [given]))]


def check_names(names: Sequence[str], sources: TaskSources) -> None:
    """Raise `UserError` for a task that is neither in folders of ours nor to be downloaded."""
    found, named = _find_named(names, sources)
    if not sources.allow_download:
        _closure(named, found, {})


def _load(manager: Any, name: str) -> Any:
    """Return lm-eval's tasks and groups of a name."""
    try:
        with quiet():
            loaded = manager.load([name])
            unknown = [(task, metric) for task, made in loaded["tasks"].items()
                       for metric, aggregate in dict(made.aggregation()).items() if not callable(aggregate)]
    except UserError:
        raise
    except Exception as e:  # whatever a definition, its templates and its data make lm-eval do
        raise UserError(f"task {name!r}: cannot be loaded ({format_error(e):.300}); look at its definition "
                        "and its data") from e
    if unknown:
        raise UserError(f"task {unknown[0][0]!r}: the aggregation of its metric {unknown[0][1]!r} is none "
                        "that lm-eval has; name one, such as mean")
    return loaded


def _closure(names: Sequence[str], found: FoundTasks, built_in: Mapping[str, Any]) -> list[str]:
    needed: dict[str, None] = {}
    left = list(names)
    while left:
        name = left.pop(0)
        if name in needed:
            continue
        if name not in found.definitions and name not in built_in:
            raise _unknown(name, found)
        needed[name] = None
        if name in found.definitions:
            left += _members(found.definitions[name])
    return list(needed)


def _members(definition: Definition) -> list[str]:
    """Return the names of a group's members; inside, tasks of its own must not hide."""
    members = definition.config.get("task")
    if "group" not in definition.config or not isinstance(members, list):
        return []
    if wrong := [m for m in members if not isinstance(m, str)]:
        raise UserError(f"{definition.file}: group {definition.config['group']!r} has the member "
                        f"{wrong[0]!r:.80}; write each member into a file of its own, and its name here")
    return [str(member) for member in members]


def _unknown(name: str, found: FoundTasks) -> UserError:
    broken = next((said for file, said in found.problems.items() if Path(file).stem == name), None)
    broken = broken or next(iter(found.problems.values()), None)
    more = f"; {len(found.problems)} files cannot be read, such as {broken}" if broken else ""
    if name.endswith((".yaml", ".yml")):
        folder = Path(name).parent
        return UserError(f"task {name!r}: is a file, and tasks are named; write --task-dir {folder} "
                         "--tasks NAME, with the name that stands after `task:` in it")
    package = importlib.util.find_spec("lm_eval")
    folders = [entry.parent.name for place in (package and package.submodule_search_locations) or ()
               for entry in Path(place).glob("tasks/[a-z]*/*.yaml")]
    # a folder of lm-eval has the name of its main task or group
    nearest = "" if name in folders else find_nearest_name(name, [*found.definitions, *folders])
    meant = f"; did you mean {nearest!r}?" if nearest else ""
    return UserError(f"task {name!r}: does not exist in --task-dir and among our suites{meant}; lm-eval's "
                     "own tasks fetch their data, and "
                     f"are there with --allow-download{more}", Fix(words={name: nearest}) if nearest else
                     Fix(options=("--allow-download",)))


def _entry(definition: Definition, sources: TaskSources) -> tuple[Any, list[Path]]:
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks._index import Entry, Kind

    config = dict(definition.config)
    files: list[Path] = []
    if "group" in config:
        extra = sorted(set(config) - GROUP_KEYS)
        if extra and not definition.folder.trusted:
            raise UserError(f"{definition.file}: group {config['group']!r} sets {extra[0]!r} of its members; "
                            "write it into each of them")
        return Entry(name=config["group"], kind=Kind.GROUP, yaml_path=None, cfg=config), []
    data_dir = sources.data_dir and sources.data_dir.absolute()  # paths of a file begin at its folder
    config, files = prepare_task(definition, data_dir, may_download=sources.allow_download,
                                 metrics=metric_registry)
    if definition.folder.trusted:
        config = _resolve(config)
    return Entry(name=config["task"], kind=Kind.PY_TASK if "class" in config else Kind.TASK, yaml_path=None,
                 cfg=config), files


def _resolve(value: Any) -> Any:
    """Return settings with the functions that their words name; of trusted folders only."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    if isinstance(value, Function):
        try:
            return _import_func_in_yml(str(value), value.folder)
        except Exception as e:  # whatever code does when it is imported
            raise UserError(f"{value.folder}: !function {value} cannot be imported "
                            f"({format_error(e):.200}); mend it") from e
    if isinstance(value, dict):
        return {key: _resolve(child) for key, child in value.items()}
    return [_resolve(child) for child in value] if isinstance(value, list) else value


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    return {f"{file.parent.name}/{file.name}": sha256_file(file) for file in sorted(set(files))}


def sov_of(task: Any) -> dict[str, Any]:
    """Return our keys of a task's metadata."""
    metadata = task.get_config("metadata")
    given = metadata.get("sov") if isinstance(metadata, dict) else None
    return given if isinstance(given, dict) else {}


def hash_of(task: Any, files: Mapping[str, str]) -> str:
    """Return the hash of what decides a task's figures beside the model: its settings, its data, lm-eval."""
    import lm_eval

    config = dict(task.dump_config())
    config.pop("task_alias", None)
    if isinstance(config.get("dataset_kwargs"), dict):
        config["dataset_kwargs"] = {name: value for name, value in config["dataset_kwargs"].items()
                                    if name != "data_files"}  # paths of this machine
    if isinstance(config.get("metadata"), dict):
        config["metadata"] = {k: v for k, v in config["metadata"].items() if k != "config_source"}
    told = json.dumps([config, lm_eval.__version__, dict(files)], sort_keys=True, default=_describe)
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", told).encode())  # of partial functions, each time
    if not files:  # of the hub: by its items
        for doc in task.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _describe(value: Any) -> str:
    """Return what stands for a value that JSON knows nothing of, without addresses in memory."""
    return getattr(value, "__qualname__", None) or type(value).__qualname__
