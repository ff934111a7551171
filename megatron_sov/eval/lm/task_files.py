"""Task folders as files: which tasks they define, and whether a foreign one can be read without running code.

A task is a YAML file in lm-eval's form.  `!function` in it names Python code, a metric or a data set may be
code as well; without --allow-task-code nothing of a folder is run, and nothing outside of it is read.  No
lm_eval here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sov.documents.bounded_yaml import BoundedLoader
from megatron_sov.errors import UserError

MAX_FILE_BYTES = 4 << 20
"""Largest YAML file that is read."""
MAX_VALUES = 50_000
"""Most values in a file, each as often as aliases name it."""
MAX_INCLUDES = 32
"""Deepest chain of includes."""
DATA = "${DATA}"
"""Stands for --data-dir in the paths of data files."""
LOADERS = {"json": (".json", ".jsonl"), "csv": (".csv", ".tsv"), "text": (".txt",), "parquet": (".parquet",)}
"""What may stand as `dataset_path` -> the files that it reads; others are fetched, or are code."""
DATASET_KWARGS = {"data_files", "field", "delimiter", "sep", "column_names", "columns", "encoding",
                  "sample_by", "quotechar", "trust_remote_code"}
"""Arguments of these loaders that a task may give."""
CODE_KEYS = ("process_docs", "process_results", "custom_dataset", "class", "doc_to_image", "doc_to_audio")
"""What a task can only give as code."""


@dataclass(frozen=True)
class TaskFolder:
    """A folder with tasks."""

    path: Path
    """Where."""
    trusted: bool
    """Whether its code may run: our own, or with --allow-task-code."""
    option: str = "--task-dir"
    """That named it, for messages."""


@dataclass(frozen=True)
class Definition:
    """One task, group or nothing of both, as it stands in a file."""

    file: Path
    """The YAML file."""
    folder: TaskFolder
    """That it lies in."""
    config: dict[str, Any]
    """Its content with its includes; functions as the words that name them."""


@dataclass
class Found:
    """What folders define."""

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


def find(folders: list[TaskFolder]) -> Found:
    """Return what folders define.

    Raises:
        UserError: a folder is not there, or two files of it define the same task.
    """
    found = Found()
    for folder in folders:
        if not folder.path.is_dir():
            raise UserError(f"{folder.option} {folder.path}: is no folder; pass one with lm-eval tasks, "
                            "a YAML file each")
        here: dict[str, Definition] = {}
        for file in sorted(folder.path.rglob("*.yaml")):
            try:
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
        merged |= {key: value for key, value in _read(included, root, depth + 1).items()
                   if key != "task_list"}
    return merged | config


def _texts(value: Any, said: str) -> list[str]:
    """Return a setting that is a text or a list of texts."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := [part for part in found if not isinstance(part, str)]:
        raise UserError(f"{said} is {wrong[0]!r:.80}; write a text, or a list of texts")
    return found


def _place(path: Path, said: str) -> Path:
    """Return where a path leads, links followed."""
    try:
        place = path.resolve()
        place.is_file()
        os.fsencode(place)
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"{said}: {str(path)!r:.120} is no path of this machine; mend it") from None
    return place


def prepared(definition: Definition, data_dir: Path | None, *, may_download: bool,
             metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """Return a task's settings with its data files as absolute paths, and these files.

    Args:
        definition: the task.
        data_dir: what `${DATA}` stands for.
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
    path = config.get("dataset_path")
    if path is None and definition.folder.trusted:  # its own code reads the data
        files: list[Path] = []
        given = dict(config.get("dataset_kwargs") or {})
        if "data_files" in given:
            given["data_files"] = _located(given["data_files"], definition, data_dir, said, files)
        return config | {"dataset_kwargs": given}, files
    if path is None or path not in LOADERS:
        if path is not None and not may_download:
            raise UserError(f"{said}: dataset_path {path!r} would be fetched; put its items into a JSON "
                            "Lines file and write `dataset_path: json` with data_files, or pass "
                            "--allow-download")
        if path in ("pandas", "pickle", "webdataset") or (path and Path(str(path)).exists()):
            raise UserError(f"{said}: dataset_path {path!r} could run code; use one of {', '.join(LOADERS)}")
        return config, []
    given = dict(config.get("dataset_kwargs") or {})
    if unknown := sorted(map(str, set(given) - DATASET_KWARGS)):
        raise UserError(f"{said}: dataset_kwargs has {', '.join(unknown)}, which is none of "
                        f"{', '.join(sorted(DATASET_KWARGS))}; leave it out")
    given.pop("trust_remote_code", None)
    files = []
    given["data_files"] = _located(given.get("data_files"), definition, data_dir, said, files)
    if wrong := [f for f in files if f.suffix not in LOADERS[path]]:
        raise UserError(f"{said}: {wrong[0]} is no file of {path}, which end in "
                        f"{' or '.join(LOADERS[path])}; name them so")
    config["dataset_kwargs"] = given
    return config, files


def _located(value: Any, definition: Definition, data_dir: Path | None, said: str, files: list[Path]) -> Any:
    """Return data files in the form they were given in, as absolute paths, which join `files`."""
    if isinstance(value, dict):
        return {split: _located(names, definition, data_dir, said, files) for split, names in value.items()}
    if isinstance(value, list):
        return [_located(name, definition, data_dir, said, files) for name in value]
    if not isinstance(value, str):
        raise UserError(f"{said}: dataset_kwargs.data_files is {value!r}; write a path for each split")
    if value.startswith(DATA) and data_dir is None:
        raise UserError(f"{said}: needs {value.removeprefix(DATA + '/')} below {DATA}; pass --data-dir DIR, "
                        "the folder that it lies in")
    given = Path(value.replace(DATA, str(data_dir))) if data_dir else Path(value)
    file = _place(definition.file.parent / given, said)
    roots = [definition.folder.path.resolve(), *([data_dir.resolve()] if data_dir else [])]
    if not definition.folder.trusted and not any(file.is_relative_to(root) for root in roots):
        raise UserError(f"{said}: data file {value} lies outside of its folder and of --data-dir; put it "
                        "into one of them")
    if not file.is_file():
        raise UserError(f"{said}: {file} does not exist; put the split's items there, or name another folder "
                        "with --data-dir")
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
