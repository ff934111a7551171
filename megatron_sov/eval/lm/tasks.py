"""Tasks by name: from folders of the user's, from our own suites, and with --allow-download from lm-eval.

lm-eval reads data through `datasets`, offline unless asked, with caches in a folder of our own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.artifacts import sha256_file
from megatron_sov.errors import UserError, how_to_install, nearest, told_in_a_line
from megatron_sov.eval.lm import task_files
from megatron_sov.eval.lm.task_files import Definition, Found, Function, TaskFolder
from megatron_sov.settings import Flag

SUITES = Path(__file__).parents[1] / "suites" / "tasks"
"""Our own tasks."""
GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
"""What a group may say; more would change its members, which are checked one by one."""


@dataclass(frozen=True)
class TaskSources:
    """Where tasks and their data come from."""

    folders: Annotated[tuple[Path, ...], Flag("--task-dir", "DIR")] = ()
    """Folder with tasks of your own, in lm-eval's form, the first one first; may be repeated."""
    data_dir: Annotated[Path | None, Flag(value="DIR")] = None
    """What ${DATA} in a task's data files means."""
    allow_code: Annotated[bool, Flag("--allow-task-code")] = False
    """Let --task-dir run code: !function, metrics of its own."""
    allow_download: bool = False
    """Fetch data of tasks that want it; lm-eval's own tasks do."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data."""

    tasks: dict[str, Any]
    """Name -> lm-eval's task."""
    groups: dict[str, Any]
    """Name -> lm-eval's group of those that were asked for by its name."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name of a task -> name of each of its data files -> its SHA-256."""


def require_harness() -> None:
    """Raise `UserError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval lm: lm-eval is not installed; run `{how_to_install('eval')}`")


def offline(allow_download: bool, cache: Path) -> Path:
    """Have the libraries fetch nothing unless allowed, and keep their caches in a folder that nobody else
    writes to, which is returned; before they are imported."""
    if not allow_download:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[name] = "1"
    private = cache / "datasets"
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["HF_DATASETS_CACHE"] = str(private)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not allow_download:  # of libraries that have read it already
        for module in ("datasets.config", "huggingface_hub.constants"):
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
                if hasattr(sys.modules.get(module), name):
                    setattr(sys.modules[module], name, True)
    return private


def load_tasks(names: Sequence[str], sources: TaskSources, cache: Path) -> LoadedTasks:
    """Return tasks by name.

    Args:
        names: of tasks and groups.
        sources: where they come from.
        cache: private folder for what `datasets` makes of the data.

    Raises:
        UserError: one does not exist, is incomplete, or would do what it may not.
    """
    found, names = _named(names, sources)
    with quiet():
        from lm_eval.tasks import TaskManager

        if not sources.allow_code:
            _cage_templates()
        manager = TaskManager(include_defaults=sources.allow_download)
        built_in = dict(manager.task_index)
    wanted = _closure(names, found, built_in)
    files: dict[str, list[Path]] = {}
    for name in wanted:
        if name in found.definitions:
            entry, files[name] = _entry(found.definitions[name], sources, cache)
            manager.task_index[name] = entry
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        loaded = _load(manager, name)
        if twice := sorted(set(loaded["tasks"]) & set(tasks)):
            raise UserError(f"--tasks {','.join(names)}: {twice[0]} is asked for twice; name it once")
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    return LoadedTasks(tasks, groups, {name: _hashes(files.get(name, [])) for name in tasks})


def refuse_unknown(names: Sequence[str], sources: TaskSources) -> None:
    """Raise `UserError` where a task is in no folder; imports no lm-eval, whose own tasks, with
    `allow_download`, it does not know."""
    found, names = _named(names, sources)
    if not sources.allow_download:
        _closure(names, found, {})


def _named(names: Sequence[str], sources: TaskSources) -> tuple[Found, list[str]]:
    """Return what the folders define, and the names, with a tag's tasks in its place."""
    folders = [TaskFolder(path, sources.allow_code) for path in sources.folders]
    if SUITES.is_dir():
        folders.append(TaskFolder(SUITES, True))
    found = task_files.find(folders)
    return found, [name for given in names for name in ([given] if given in found.definitions
                                                        else found.tags.get(given, [given]))]


def _load(manager: Any, name: str) -> Any:
    try:
        with quiet():
            loaded = manager.load([name])
            unknown = [(task, metric) for task, made in loaded["tasks"].items()
                       for metric, aggregate in dict(made.aggregation()).items() if not callable(aggregate)]
    except UserError:
        raise
    except Exception as e:  # whatever a definition, its templates and its data make lm-eval do
        raise UserError(f"task {name!r}: cannot be loaded ({told_in_a_line(e):.300}); look at its definition "
                        "and its data") from e
    if unknown:
        raise UserError(f"task {unknown[0][0]!r}: the aggregation of its metric {unknown[0][1]!r} is none "
                        "that lm-eval has; name one, such as mean")
    return loaded


def _closure(names: Sequence[str], found: Found, built_in: Mapping[str, Any]) -> list[str]:
    """Return the names that are needed, those of groups' members too."""
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


def _unknown(name: str, found: Found) -> UserError:
    broken = next((said for file, said in found.problems.items() if Path(file).stem == name), None)
    broken = broken or next(iter(found.problems.values()), None)
    more = f"; {len(found.problems)} files cannot be read, such as {broken}" if broken else ""
    return UserError(f"task {name!r}: does not exist in --task-dir and among our suites"
                     f"{nearest(name, found.definitions)}; lm-eval's own tasks fetch their data, and are "
                     f"there with --allow-download{more}")


def _entry(definition: Definition, sources: TaskSources, cache: Path) -> tuple[Any, list[Path]]:
    """Return a definition as lm-eval keeps it, and its data files."""
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
    config, files = task_files.prepared(definition, data_dir, may_download=sources.allow_download,
                                        metrics=metric_registry)
    if config.get("dataset_path") in task_files.LOADERS:
        # `datasets` knows a file by its path and time, which an archive may set alike for two versions
        content = hashlib.sha256(json.dumps(_hashes(files)).encode()).hexdigest()[:16]
        config["dataset_kwargs"]["cache_dir"] = str(cache / "datasets" / content)
    if definition.folder.trusted:
        config = _resolved(config)
    return Entry(name=config["task"], kind=Kind.PY_TASK if "class" in config else Kind.TASK, yaml_path=None,
                 cfg=config), files


def _resolved(value: Any) -> Any:
    """Return settings with the functions that their words name; of trusted folders only."""
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    if isinstance(value, Function):
        try:
            return _import_func_in_yml(str(value), value.folder)
        except Exception as e:  # whatever code does when it is imported
            raise UserError(f"{value.folder}: !function {value} cannot be imported "
                            f"({told_in_a_line(e):.200}); mend it") from e
    if isinstance(value, dict):
        return {key: _resolved(child) for key, child in value.items()}
    return [_resolved(child) for child in value] if isinstance(value, list) else value


def _cage_templates() -> None:
    """Have lm-eval render the templates of tasks where they cannot reach Python."""
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    caged = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined,
                                          keep_trailing_newline=True)
    caged.filters |= lm_eval.utils.env.filters
    lm_eval.utils.env = caged


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    return {f"{file.parent.name}/{file.name}": sha256_file(file) for file in sorted(set(files))}


def hash_of(task: Any, files: Mapping[str, str]) -> str:
    """Return the hash of what decides a task's figures beside the model: its settings, its data, lm-eval."""
    import lm_eval

    config = dict(task.dump_config())
    config.pop("task_alias", None)
    if isinstance(config.get("dataset_kwargs"), dict):
        config["dataset_kwargs"] = {name: value for name, value in config["dataset_kwargs"].items()
                                    if name not in ("data_files", "cache_dir")}  # paths of this machine
    if isinstance(config.get("metadata"), dict):
        config["metadata"] = {k: v for k, v in config["metadata"].items() if k != "config_source"}
    digest = hashlib.sha256(json.dumps([config, lm_eval.__version__, dict(files)], sort_keys=True,
                                       default=_described).encode())
    if not files:  # of the hub: by its items
        for doc in task.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _described(value: Any) -> str:
    """Return what stands for a value that JSON knows nothing of, without addresses in memory."""
    return getattr(value, "__qualname__", None) or type(value).__qualname__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's own bars and remarks off the terminal; what goes wrong is an exception."""
    for name in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
