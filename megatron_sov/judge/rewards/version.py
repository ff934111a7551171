"""The version of a reward, or of a tool environment: a hash of the code that judges and of the settings that
it judges by.

Code is read, not run: the module of the reward and what it imports from its own room, from this one, from
that of the sandbox and from that which reads what models write, without comments, docstrings and layout, so
that a version changes when the judgement may and stays when words do.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.reward import OPERATION

SANDBOX = "megatron_sov.sandbox"
HASHED_PACKAGES = {__name__.rpartition(".")[0], SANDBOX, "megatron_sov.work", "megatron_sov.chat"}
"""Their code counts wherever it is imported."""
DIGITS = 16
"""Of the hash; 64 bits tell versions apart."""


def compute_version(reward: Any, settings: Mapping[str, Any], files: Mapping[str, str] | None = None) -> str:
    """Return the version of a reward.

    Args:
        reward: the reward, whose class says with `LIBRARIES` which distributions judge along.
        settings: all its settings, defaults among them.
        files: file -> hash of a reward that is not built in; None: it is.
    """
    reward_class = type(reward)
    libraries = {name: _get_installed_version(name) for name in getattr(reward_class, "LIBRARIES", ())}
    identity = {"class": reward_class.__qualname__,
            "code": dict(files) if files is not None else hash_code(reward_class.__module__),
            # Python's tables of characters decide what a letter is, and change with its version
            "libraries": libraries, "unicode": unicodedata.unidata_version,
            "inputs": reward.inputs() if hasattr(reward, "inputs") else {},
            "settings": {name: value for name, value in settings.items()
                         if name not in find_operational_settings(reward_class)}}
    # sorted keys: the order in which settings were given is no difference
    text = json.dumps(identity, sort_keys=True, default=_to_json)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def find_operational_settings(reward_class: type) -> set[str]:
    """Return the settings of a reward that say how it is run, not what it gives."""
    fields = dataclasses.fields(reward_class) if dataclasses.is_dataclass(reward_class) else ()
    return {f.name for f in fields if f.metadata.get("operation") == OPERATION["operation"]}


@lru_cache
def hash_code(module: str) -> dict[str, str]:
    """Return module -> hash of its code for a module and all that it imports of its room and of `ROOMS`."""
    # the closure over imports: a changed helper is a changed judgement
    hashes: dict[str, str] = {}
    to_read = [module]
    while to_read:
        name = to_read.pop()
        if name in hashes:
            continue
        tree = ast.parse(_read_source(name))
        hashes[name] = hashlib.sha256(_strip_docstrings(tree).encode()).hexdigest()
        to_read += [other for other in _find_imports(tree, {_get_package(name), *HASHED_PACKAGES})
                    if other not in hashes]
    return hashes


def _read_source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"{module}: has no source file, so no version of its reward can be told; "
                        "install the package with its sources")
    return Path(spec.origin).read_text(encoding="utf-8")


def _get_package(module: str) -> str:
    """Return the folder of its hall that a module is in: `megatron_sov.judge.tools` of all of its worlds."""
    return ".".join(module.split(".")[:3])


def _find_imports(tree: ast.AST, rooms: set[str]) -> list[str]:
    """Return the modules of some rooms that a module imports, wherever it does."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from a import b` may name a module or something inside of one: both are tried
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    # a name of the sandbox's package is taken from its __init__.py
    ours = [name for name in names if name == SANDBOX or name.startswith(tuple(f"{room}." for room in rooms))]
    return [name for name in ours if importlib.util.find_spec(name.rpartition(".")[0]) is not None
            and _is_module(name)]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # something inside a module
        return False


def _strip_docstrings(tree: ast.Module) -> str:
    """Return a module's code without comments, layout and strings that stand alone: docstrings, and those
    under a field."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body  # type: ignore[attr-defined]
                         if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                                 and isinstance(statement.value.value, str))]
    return ast.unparse(tree)


def collect_settings(reward: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings that a reward was made with, defaults among them."""
    if dataclasses.is_dataclass(reward) and not isinstance(reward, type):
        return {f.name: getattr(reward, f.name) for f in dataclasses.fields(reward)}
    bound = inspect.signature(type(reward)).bind(**arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def _get_installed_version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes as long as all else of a help

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return repr(value)
