"""Load plug-ins from files named by the user: read once, hash, and execute exactly the hashed bytes."""

import ast
import contextlib
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from megatron_sov.base.errors import Fix, UserError, find_nearest_name
from megatron_sov.version import OUR_PACKAGES

Kind = Literal["recipe", "model family", "objective", "reward", "tool environment", "step"]


@dataclass(frozen=True)
class PluginCode:
    """Record for a loaded plug-in; reading the record from a file loads no code."""

    kind: Kind
    """Plug-in kind."""
    name: str
    """Name in settings."""
    reference: str
    """FILE.py:NAME with an absolute path, or MODULE:NAME, as in `--plugin`."""
    files: dict[str, str] = field(default_factory=dict)
    """File -> sha256: the executed file, then imports from the same folder or package."""


@dataclass(frozen=True)
class LoadedPlugin:
    """An object loaded from a user's file or module."""

    value: Any
    attribute: str
    """Object name in the file or module."""
    reference: str
    """FILE.py:NAME with an absolute path, or MODULE:NAME."""
    files: dict[str, str]
    """File -> sha256: the executed file, then imports from the same folder or package."""


def is_reference(text: str) -> bool:
    """Return whether a text refers to code (FILE.py:NAME, MODULE:NAME) instead of a registered name."""
    return ":" in text or "/" in text or text.endswith(".py")


def _list_names(file: Path) -> list[str]:
    """Return the public functions and classes that a file of Python defines, classes last."""
    try:
        nodes = ast.parse(file.read_text(encoding="utf-8")).body if file.suffix == ".py" else []
    except (OSError, ValueError, SyntaxError):
        return []
    return [node.name for kind in (ast.FunctionDef, ast.ClassDef) for node in nodes
            if isinstance(node, kind) and not node.name.startswith("_")]


def load_plugin(reference: str) -> LoadedPlugin:
    """Execute a reference's file or module, and return the named object.

    This executes code: pass only references from the command line, or from code named there. Raises
    `UserError`: the reference is malformed, the file or module is missing or fails, or the name is undefined.
    """
    # split at the last colon: paths may contain colons
    location, _, name = reference.rpartition(":")
    if not location or not name.isidentifier():
        names = _list_names(Path(reference))
        raise UserError(f"{reference}: must have the form FILE.py:NAME or MODULE:NAME"
                        + (f"; write {reference}:{names[-1]}" if names else ""),
                        Fix(words={reference: f"{reference}:{names[-1]}"}) if names else None)
    if location.endswith(".py") or "/" in location:
        path = Path(os.path.abspath(location))
        module, digest = _execute_file(path)
        absolute_reference, files = f"{path}:{name}", {path.name: digest, **_hash_sibling_modules(path)}
    else:
        module = _import_module(location)
        absolute_reference, files = reference, hash_module_files(module)
    if not hasattr(module, name):
        public_names = [n for n in vars(module) if not n.startswith("_")]
        own_names = _list_names(Path(location)) if location.endswith(".py") else []
        nearest = find_nearest_name(name, public_names)
        listed = f"; it has {', '.join(own_names[-5:])}" if own_names else ""
        advice = f"; did you mean '{nearest}'?" if nearest else listed
        proposed = nearest or "".join(own_names[-1:])
        raise UserError(f"{reference}: {location} has no {name!r}{advice}",
                        Fix(words={reference: f"{location}:{proposed}"}) if proposed else None)
    return LoadedPlugin(getattr(module, name), name, absolute_reference, files)


def call_plugin(reference: str, action: Callable[[], Any]) -> Any:
    """Call a user's function; imports from the function's folder are allowed. Raises `UserError`: the
    function fails; names the line."""
    file = _get_reference_file(reference)
    with report_plugin_errors(str(file or reference)), _allow_imports_from(file.parent if file else None):
        return action()


def hash_module_files(module: ModuleType) -> dict[str, str]:
    """Return file -> sha256 for an imported module and loaded modules in its package; {}: no files."""
    main = getattr(module, "__file__", None)
    if main is None:
        return {}
    top = module.__name__.partition(".")[0]
    root = Path(sys.modules[top].__file__ or main).parent
    files = [m.__file__ for name, m in sorted(sys.modules.items())
             if name.partition(".")[0] == top and _has_file(m)]
    return {os.path.relpath(file, root): _hash_source(Path(file))
            for file in dict.fromkeys([main, *files]) if file}


_executed: dict[Path, tuple[str, ModuleType]] = {}
"""Executed files: path -> (hash of the executed bytes, module)."""


def _execute_file(path: Path) -> tuple[ModuleType, str]:
    """Execute a file unless unchanged since the last execution; return module and file hash."""
    try:
        # read once: the hash belongs to the executed bytes even if the file changes meanwhile
        source = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); name a Python file, "
                        "as FILE.py:NAME") from None
    digest = hashlib.sha256(source).hexdigest()
    if path in _executed and _executed[path][0] == digest:
        return _executed[path][1], digest
    # a unique name: dataclasses and annotations look up modules by name
    module = ModuleType(f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}")
    module.__file__ = str(path)
    # registered before execution, as `import` does, because dataclasses look up the module
    sys.modules[module.__name__] = module
    try:
        # not `importlib`, which may use an outdated .pyc: the hash would belong to other code
        with report_plugin_errors(str(path)), _allow_imports_from(path.parent):
            exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    _executed[path] = digest, module
    return module, digest


def list_executed_files() -> dict[Path, str]:
    """Return file -> sha256 for the files executed by `load_plugin`, in order."""
    return {path: digest for path, (digest, _) in _executed.items()}


def execute_files(files: Mapping[Path, str]) -> None:
    """Execute the files that another process executed, so that objects of the files' classes can be
    unpickled. Raises `UserError`: a file fails or has changed."""
    for path, digest in files.items():
        if _execute_file(path)[1] != digest:
            raise UserError(f"{path}: has changed since this command began; run it again")


def _import_module(name: str) -> ModuleType:
    try:
        with report_plugin_errors(name):
            return importlib.import_module(name)
    except UserError as e:
        raise UserError(f"{e} (a file of your own is named FILE.py:NAME)") from None


@contextlib.contextmanager
def report_plugin_errors(where: str) -> Iterator[None]:
    """Turn an exception in a user's code into a `UserError` that names the line there, or `where`."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as e:
        raise UserError(f"{e.filename or where}{f':{e.lineno}' if e.lineno else ''}: {e.msg}; "
                        "correct the line") from None
    except (Exception, SystemExit) as e:
        # the last frame in the user's file; deeper frames are in libraries
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == where]
        raise UserError(f"{where}{f':{lines[-1]}' if lines else ''}: {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _allow_imports_from(folder: Path | None) -> Iterator[None]:
    """Temporarily append a folder to the import path.

    Only temporarily: later optional imports of the framework must not search a user's folder.
    """
    if folder is None:
        yield
        return
    # appended: a user's file cannot hide an installed module
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _get_reference_file(reference: str) -> Path | None:
    """Return the file in FILE.py:NAME; None for MODULE:NAME."""
    place = reference.rpartition(":")[0]
    return Path(os.path.abspath(place)) if place.endswith(".py") or "/" in place else None


def _hash_sibling_modules(path: Path) -> dict[str, str]:
    """Return file -> sha256 for loaded modules in the folder of `path`, except `OUR_PACKAGES`."""
    hashes = {}
    modules = dict(sys.modules)
    # check the few top-level packages before thousands of modules
    packages = {name.partition(".")[0] for name in modules}
    siblings = {name for name in packages if _is_in_folder(modules.get(name), str(path.parent))}
    for name in sorted(name for name in modules if name.partition(".")[0] in siblings):
        module = modules[name]
        if not _has_file(module):
            continue
        file = Path(str(module.__file__))
        if file != path and file not in _executed:
            hashes[os.path.relpath(file, path.parent)] = _hash_source(file)
    return hashes


def _is_in_folder(module: Any, folder: str) -> bool:
    """Return whether a module's file or package is directly in `folder`; False for `OUR_PACKAGES`."""
    if not _has_file(module) or module.__name__ in OUR_PACKAGES:
        return False
    place, last = os.path.split(os.path.normpath(module.__file__))
    return (os.path.dirname(place) if last == "__init__.py" else place) == folder


def _has_file(module: Any) -> bool:
    return isinstance(getattr(module, "__file__", None), str)


def _hash_source(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}), and the run keeps the "
                        "hash of its code") from None
