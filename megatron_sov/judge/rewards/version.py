"""Compute the version of a reward or tool environment: a hash over judging code and settings.

The code is parsed, not executed: the module and its imports from its own package, from the rewards, the
sandbox, `work` and `chat`, without comments, docstrings and layout. The version changes with the code, but
not with its texts.
"""

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
"""Packages whose modules always count."""
DIGITS = 16
"""Hash digits; 64 bits distinguish versions."""


def compute_version(reward: Any, settings: Mapping[str, Any], files: Mapping[str, str] | None = None) -> str:
    """Return the version of a reward.

    Args:
        reward: reward, whose class may name distributions in `LIBRARIES`.
        settings: settings including defaults.
        files: file -> hash for rewards from files; None: built-in.
    """
    reward_class = type(reward)
    libraries = {name: get_installed_version(name) for name in getattr(reward_class, "LIBRARIES", ())}
    identity = {"class": reward_class.__qualname__,
                "code": dict(files) if files is not None else hash_code(reward_class.__module__),
                # Python's character tables classify letters, and change with the Python version.
                "libraries": libraries, "unicode": unicodedata.unidata_version,
                "inputs": reward.inputs() if hasattr(reward, "inputs") else {},
                "settings": {name: value for name, value in settings.items()
                             if name not in find_operational_settings(reward_class)}}
    # Sorted keys, because the order of settings does not matter.
    text = json.dumps(identity, sort_keys=True, default=_to_json)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def find_operational_settings(reward_class: type) -> set[str]:
    """Return the names of operational settings, which do not enter the version."""
    fields = dataclasses.fields(reward_class) if dataclasses.is_dataclass(reward_class) else ()
    return {f.name for f in fields if f.metadata.get("operation") == OPERATION["operation"]}


@lru_cache
def hash_code(module: str) -> dict[str, str]:
    """Return module -> code hash for a module and its imports from its package and `HASHED_PACKAGES`."""
    # Transitive imports, because a changed helper changes the judgement.
    hashes: dict[str, str] = {}
    to_read = [module]
    while to_read:
        name = to_read.pop()
        if name in hashes:
            continue
        tree = ast.parse(read_source(name))
        hashes[name] = hashlib.sha256(_strip_docstrings(tree).encode()).hexdigest()
        to_read += [imported for imported in _find_imports(tree, {_get_package(name), *HASHED_PACKAGES})
                    if imported not in hashes]
    return hashes


def read_source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(f"{module}: has no source file; install the package with its sources")
    return Path(spec.origin).read_text(encoding="utf-8")


def _get_package(module: str) -> str:
    """Return a module's package below its hall, e.g. `megatron_sov.judge.tools`."""
    return ".".join(module.split(".")[:3])


def _find_imports(tree: ast.AST, rooms: set[str]) -> list[str]:
    """Return the modules from `rooms` that a module imports, including local imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from a import b` may import a module or a name inside a module.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    # Names from the sandbox package itself come from its __init__.py.
    ours = [name for name in names if name == SANDBOX or name.startswith(tuple(f"{room}." for room in rooms))]
    return [name for name in ours if importlib.util.find_spec(name.rpartition(".")[0]) is not None
            and _is_module(name)]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a name inside a module
        return False


def _strip_docstrings(tree: ast.Module) -> str:
    """Return a module's code without comments, layout and docstrings, including field docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body  # type: ignore[attr-defined]
                         if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                                 and isinstance(statement.value.value, str))]
    return ast.unparse(tree)


def collect_settings(reward: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward's settings including defaults."""
    if dataclasses.is_dataclass(reward) and not isinstance(reward, type):
        return {f.name: getattr(reward, f.name) for f in dataclasses.fields(reward)}
    bound = inspect.signature(type(reward)).bind(**arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def get_installed_version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import; `--help` must be fast

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return repr(value)
