"""Find tasks in folders of YAML files: `--task-dir` and our suites. Imports no lm-eval.

Task files have lm-eval's format, with `include` and `!function`. Reading a file runs no code and follows no
link out of its folder.
"""

import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_sov.base.documents.bounded_yaml import BoundedLoader
from megatron_sov.base.errors import Fix, UserError, find_nearest_name, find_spelling
from megatron_sov.bench.lm.settings import TaskSources

DATA = "${DATA}"
"""Stands for `--data-dir` in paths of data files."""
DOWNLOADS = "benchmarks"
"""Folder of downloaded data sets in proposed command lines."""
MAX_INCLUDES = 32
"""Deepest chain of includes."""
SUITES = Path(__file__).parents[1] / "suites" / "tasks"
"""Our own tasks."""


@dataclass(frozen=True)
class TaskFolder:
    path: Path
    trusted: bool
    """Whether its code may run: our suites, or `--allow-task-code`."""


@dataclass(frozen=True)
class TaskDefinition:
    """A task or group from a YAML file."""

    file: Path
    folder: TaskFolder
    config: dict[str, Any]
    """The file's content merged over its includes; functions as `FunctionReference`."""

    @property
    def members(self) -> list[str]:
        """Names of a group's tasks; [] for a task. An inline member raises `UserError`: no check reads it."""
        members = self.config.get("task")
        if "group" not in self.config or not isinstance(members, list):
            return []
        for member in members:
            if not isinstance(member, str):
                raise UserError(f"{self.file}: group {self.config['group']!r} has the member {member!r:.80}; "
                                "write each member into a file of its own, and its name here")
        return list(members)


@dataclass
class TaskCatalog:
    definitions: dict[str, TaskDefinition] = field(default_factory=dict)
    """Task or group -> definition, from the first folder that has the name."""
    tags: dict[str, list[str]] = field(default_factory=dict)
    """Tag -> names of its tasks."""
    problems: dict[str, str] = field(default_factory=dict)
    """Unreadable file -> reason."""

    def expand_tags(self, names: Sequence[str]) -> list[str]:
        """Replace each tag by the names of its tasks."""
        expanded: list[str] = []
        for name in names:
            expanded += [name] if name in self.definitions else self.tags.get(name, [name])
        return expanded

    def list_required(self, names: Sequence[str], built_in: Mapping[str, Any]) -> list[str]:
        """Return names with the members of groups; a name in neither the catalog nor lm-eval's `built_in`
        raises `UserError`."""
        required: dict[str, None] = {}
        remaining = list(names)
        while remaining:
            name = remaining.pop(0)
            if name in required:
                continue
            if name not in self.definitions and name not in built_in:
                raise self._build_unknown_error(name)
            required[name] = None
            if name in self.definitions:
                remaining += self.definitions[name].members
        return list(required)

    def _build_unknown_error(self, name: str) -> UserError:
        if name.endswith((".yaml", ".yml")):
            file = Path(name)
            task = _get_task_name(_load_yaml(file)) if file.is_file() else None
            return UserError(f"task {name!r}: is a file, and --tasks takes names (`task:` in the file)",
                             Fix(options=("--task-dir", str(file.parent), "--tasks", task or file.stem)))
        same_name = [problem for file, problem in self.problems.items() if Path(file).stem == name]
        problem = next(iter([*same_name, *self.problems.values()]), None)
        unreadable = f"; {len(self.problems)} files cannot be read, such as {problem}" if problem else ""
        published = list_published_tasks()
        nearest = "" if name in published else find_nearest_name(name, [*self.definitions, *published])
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        fix = Fix(words={name: nearest}) if nearest else Fix(options=("--allow-download",))
        return UserError(f"task {name!r}: does not exist in --task-dir and in our suites{hint}; lm-eval's "
                         f"own tasks fetch their data and need --allow-download{unreadable}", fix)


@cache
def list_published_tasks() -> set[str]:
    """Return names of lm-eval's tasks: a folder names its main task or group, and most files their task."""
    package = importlib.util.find_spec("lm_eval")
    places = (package.submodule_search_locations if package else None) or ()
    files = [file for place in places for file in Path(place).glob("tasks/[a-z]*/*.yaml")]
    return {name for file in files for name in (file.parent.name, file.stem) if len(name) > 2}


class FunctionReference(str):
    """The dotted name after `!function`."""

    folder = Path()
    """Folder of the YAML file."""


class _Loader(BoundedLoader):
    """Loads plain values, and `!function` as `FunctionReference`."""


_Loader.add_constructor("!function", lambda loader, node: FunctionReference(loader.construct_scalar(node)))


def find_source_tasks(sources: TaskSources) -> TaskCatalog:
    """Find the tasks in `--task-dir` and in our suites."""
    own_folders = [TaskFolder(path, sources.allow_code) for path in sources.folders]
    return find_tasks([*own_folders, TaskFolder(SUITES, True)])


def check_task_names(names: Sequence[str], sources: TaskSources) -> None:
    """Raise `UserError` for an unknown task, and for a task whose files need --data-dir; with
    `allow_download` lm-eval may have further tasks."""
    catalog = find_source_tasks(sources)
    required = catalog.expand_tags(names)
    if sources.allow_download:
        published = {*list_published_tasks(), *catalog.definitions, *catalog.tags}
        for name in names:
            if name not in published and (nearest := find_spelling(name, sorted(published))):
                raise UserError(f"task {name!r}: does not exist; did you mean {nearest!r}?",
                                Fix(words={name: nearest}))
        required = [name for name in required if name in catalog.definitions]
    problems, commands = list[str](), list[str]()
    for name in catalog.list_required(required, {}) if sources.data_dir is None else ():
        config = catalog.definitions[name].config
        files = re.findall(re.escape(DATA) + r"/([^'\"]+)", str(config.get("dataset_kwargs")))
        if files:
            publisher = get_sov_metadata(config.get("metadata")).get("source", "the data set")
            problems.append(f"task {name!r}: needs {', '.join(files)}; put {publisher} into a folder, and "
                            "pass it as --data-dir DIR")
            commands += _write_download(publisher, config["dataset_kwargs"]["data_files"])
    if problems:
        folder = DOWNLOADS if commands else "DIR"
        raise UserError("; ".join(problems), Fix(options=("--data-dir", folder), before=tuple(commands)))


def _write_download(publisher: str, files: Any) -> list[str]:
    """Return the command that writes the `files` of a task, split -> path, from a data set of the hub; []:
    the `publisher` in the task's metadata names no single data set."""
    match = re.fullmatch(r"the rows of ([\w.-]+/[\w.-]+)(?:, configuration (\w+))?(?: \(.*\))?", publisher)
    if match is None or not all(isinstance(file, str) for file in files.values()):
        return []
    paths = {split: file.replace(DATA, DOWNLOADS) for split, file in files.items()}
    # a data set whose only split has another name is taken whole
    arguments = ", ".join(json.dumps(name) for name in match.groups() if name)
    code = (f"import datasets; d = datasets.load_dataset({arguments}); "
            f"[d.get(s, [*d.values()][0]).to_json(f) for s, f in {json.dumps(paths)}.items()]")
    folders = " ".join(sorted({str(Path(path).parent) for path in paths.values()}))
    return [f"mkdir -p {folders} && {shlex.quote(sys.executable)} -c {shlex.quote(code)} {DOWNLOADS}"]


def find_tasks(folders: Sequence[TaskFolder]) -> TaskCatalog:
    """Find the tasks in folders; earlier folders win. Raises `UserError`: a missing folder, or two files with
    the same task."""
    catalog = TaskCatalog()
    for folder in folders:
        if not folder.path.is_dir():
            raise UserError(f"--task-dir {folder.path}: is no folder; pass a folder of lm-eval tasks, with a "
                            "YAML file each")
        definitions: dict[str, TaskDefinition] = {}
        for file in sorted(folder.path.rglob("*.yaml")):
            try:
                # a link could present a private file as a task
                if not folder.trusted and not file.resolve().is_relative_to(folder.path.resolve()):
                    raise UserError(f"{file}: is a link out of {folder.path}; copy the file into the folder")
                config = _read_task_file(file, folder.path, 0)
            except UserError as e:
                catalog.problems[str(file)] = str(e)
                continue
            name = _get_task_name(config)
            if name is None:
                continue  # a file for `include`
            if name in definitions:
                raise UserError(f"{file}: defines {name!r}, and so does {definitions[name].file}; rename "
                                "one of them")
            definitions[name] = TaskDefinition(file, folder, config)
        catalog.definitions = definitions | catalog.definitions
    for name, definition in catalog.definitions.items():
        for tag in _list_texts(definition.config.get("tag"), f"{definition.file}: tag"):
            catalog.tags.setdefault(tag, []).append(name)
    return catalog


def get_sov_metadata(metadata: Any) -> dict[str, Any]:
    """Return `sov` of a task's `metadata`, or {} if a file has other values there."""
    settings = metadata.get("sov") if isinstance(metadata, dict) else None
    return settings if isinstance(settings, dict) else {}


def _get_task_name(config: Mapping[str, Any]) -> str | None:
    """Return the name of the task or group in a file; None: a file for `include`."""
    name = config.get("group") or config.get("task")
    return name if isinstance(name, str) else None


def _read_task_file(file: Path, root: Path, depth: int) -> dict[str, Any]:
    """Read a file and its includes; later includes win over earlier ones, the file over its includes."""
    if depth > MAX_INCLUDES:
        raise UserError(f"{file}: its includes form a circle; remove one of them")
    config = _load_yaml(file)
    merged: dict[str, Any] = {}
    for name in _list_texts(config.pop("include", None), f"{file}: include"):
        included = resolve_path(file.parent / name, str(file))
        if not included.is_relative_to(root.resolve()):
            raise UserError(f"{file}: include {name!r} lies outside of {root}; copy it into the folder")
        if not included.is_file():
            raise UserError(f"{file}: include {name!r} does not exist, so the task folder is incomplete; put "
                            f"{included.name} there")
        merged |= _read_task_file(included, root, depth + 1)
        merged.pop("task_list", None)  # lm-eval ignores an included `task_list`
    return merged | config


def _load_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():  # a pipe or device may never end
        raise UserError(f"{file}: is no readable file; the task folder is incomplete")
    try:
        config = yaml.load(file.read_bytes(), Loader=_Loader)
        for _, value in iter_values(config):
            if isinstance(value, FunctionReference):
                value.folder = file.parent
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); the task folder is incomplete") from None
    except Exception as e:  # PyYAML's constructors raise various errors; a file may also contain itself
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{file}: is no YAML of a task ({reason:.200}); correct it") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: has no settings of a task; write `task: NAME` and its settings")
    return config


def iter_values(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for each value in a tree."""
    yield path, value
    if isinstance(value, dict):
        for key, child in value.items():
            yield from iter_values(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from iter_values(child, f"{path}[{number}]")


def _list_texts(value: Any, setting: str) -> list[str]:
    if value is None:
        return []
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{setting} is {text!r:.80}; write a text, or a list of texts")
    return texts


def resolve_path(path: Path, subject: str) -> Path:
    """Resolve a path from a task file; raise `UserError` if it holds a NUL, is too long or not encodable."""
    try:
        resolved = path.resolve()
        resolved.is_file()
        os.fsencode(resolved)
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"{subject}: {str(path)!r:.120} is no valid path; correct it") from None
    return resolved
