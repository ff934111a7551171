"""Running a file that a person named: read once, hashed, and run from the very bytes that were hashed."""

from __future__ import annotations

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

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.version import OUR_PACKAGES

Kind = Literal["recipe", "model family", "objective", "reward",
               "tool environment", "step"]


@dataclass(frozen=True)
class PluginCode:
    """One piece of code that is not built in, noted by the command that loads it; in a file it is a record,
    and loads nothing."""

    kind: Kind
    """What it is."""
    name: str
    """What the settings call it."""
    reference: str
    """FILE.py:NAME with the file's whole path, or MODULE:NAME, as `--plugin` takes it."""
    files: dict[str, str] = field(default_factory=dict)
    """File -> sha256 of what ran: the file itself, then what it imports from its own folder or package."""


@dataclass(frozen=True)
class LoadedPlugin:
    """Something that stands in a user's file or module."""

    value: Any
    attribute: str
    """Its name there."""
    reference: str
    """FILE.py:NAME with the file's whole path, or MODULE:NAME."""
    files: dict[str, str]
    """File -> sha256: what ran, then what it imports from its own folder or package."""


def is_reference(text: str) -> bool:
    """Return whether a text names code (FILE.py:NAME, MODULE:NAME) and not something that has
    a name of its own."""
    return ":" in text or "/" in text or text.endswith(".py")


def load(reference: str) -> LoadedPlugin:
    """Run the file or module of a reference and return what the reference names.

    It runs code: pass only what a person wrote on this command's line, or what code that they named says.

    Raises:
        UserError: the reference has another form, there is no such file or module, it fails,
            or has no such name.
    """
    # the last colon: a path may hold others
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(f"{reference}: must have the form FILE.py:NAME or MODULE:NAME")
    if place.endswith(".py") or "/" in place:
        path = Path(os.path.abspath(place))
        module, digest = _run(path)
        found = LoadedPlugin(None, name, f"{path}:{name}",
                             {path.name: digest, **_beside(path)})
    else:
        module = _imported(place)
        found = LoadedPlugin(None, name, reference, files_of(module))
    if not hasattr(module, name):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{reference}: {place} has no {name!r}{nearest(name, known)}")
    return LoadedPlugin(getattr(module, name), name, found.reference, found.files)


def calling(reference: str, action: Callable[[], Any]) -> Any:
    """Return what a user's function returns, called with its own folder to import from.

    Raises:
        UserError: it fails; the message names the line.
    """
    file = _file_of(reference)
    with telling(str(file or reference)), _importing_from(file.parent if file else None):
        return action()


def files_of(module: ModuleType) -> dict[str, str]:
    """Return file -> sha256 of an imported module and of what is loaded of its package;
    empty for modules without a file."""
    main = getattr(module, "__file__", None)
    if main is None:
        return {}
    top = module.__name__.partition(".")[0]
    root = Path(sys.modules[top].__file__ or main).parent
    files = [m.__file__ for name, m in sorted(sys.modules.items())
             if name.partition(".")[0] == top and _has_file(m)]
    return {os.path.relpath(file, root): _sha256(Path(file))
            for file in dict.fromkeys([main, *files]) if file}


_ran: dict[Path, tuple[str, ModuleType]] = {}
"""Files that this process has run: path -> hash of the bytes that ran, and the module they made."""


def _run(path: Path) -> tuple[ModuleType, str]:
    """Return the module that a file makes, and the hash of its bytes; a file that has not
    changed is run once."""
    try:
        # read once; hash and code are of these bytes, also when the file changes meanwhile
        source = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); name a Python file, "
                        "as FILE.py:NAME") from None
    digest = hashlib.sha256(source).hexdigest()
    if path in _ran and _ran[path][0] == digest:
        return _ran[path][1], digest
    # dataclasses and annotations look their module up by its name, so it needs one that nothing else has
    module = ModuleType(f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}")
    module.__file__ = str(path)
    # before the code runs, as import does: dataclasses look their module up there
    sys.modules[module.__name__] = module
    try:
        # not through importlib: it may take a .pyc of a second ago for the file,
        # and the hash would be of other code
        with telling(str(path)), _importing_from(path.parent):
            exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    _ran[path] = digest, module
    return module, digest


def files_that_ran() -> dict[Path, str]:
    """Return file -> sha256 of the bytes of all that this process has run by `load`, in their order."""
    return {path: digest for path, (digest, _) in _ran.items()}


def run_files(files: Mapping[Path, str]) -> None:
    """Run what another process has run, so that the objects of its classes can be read here.

    Raises:
        UserError: a file fails, or is not what it was.
    """
    for path, digest in files.items():
        if _run(path)[1] != digest:
            raise UserError(f"{path}: has changed since this command began; run it again")


def _imported(name: str) -> ModuleType:
    try:
        with telling(name):
            return importlib.import_module(name)
    except UserError as e:
        raise UserError(f"{e} (a file of your own is named FILE.py:NAME)") from None


@contextlib.contextmanager
def telling(where: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one `UserError`, with the line of theirs that it comes from.

    Args:
        where: the file, or what else to name.
    """
    try:
        yield
    except UserError:
        raise
    except SyntaxError as e:
        raise UserError(f"{e.filename or where}{f':{e.lineno}' if e.lineno else ''}: {e.msg}; "
                        "mend the line") from None
    except (Exception, SystemExit) as e:
        # the last line in the user's file: deeper frames are of libraries that it called
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == where]
        raise UserError(f"{where}{f':{lines[-1]}' if lines else ''}: {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _importing_from(folder: Path | None) -> Iterator[None]:
    """Let imports find the files of a folder, after everything that is installed, and only for this moment.

    Not for good: what the framework imports later, if it is there, must not be looked for in a user's folder.
    """
    if folder is None:
        yield
        return
    # at the end: a file of the user's never hides an installed module
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _file_of(reference: str) -> Path | None:
    """Return the file of FILE.py:NAME; None for MODULE:NAME."""
    place = reference.rpartition(":")[0]
    return Path(os.path.abspath(place)) if place.endswith(".py") or "/" in place else None


def _beside(path: Path) -> dict[str, str]:
    """Return file -> sha256 of the loaded modules that lie in a file's folder, packages in it included.

    Our own packages are no part of a user's code, even where that lies in a checkout of them.
    """
    found = {}
    modules = dict(sys.modules)
    # thousands of modules of few packages: texts, where paths would take a tenth of a second
    tops = {name for name in {name.partition(".")[0] for name in modules}
            if _lies_in(modules.get(name), str(path.parent))}
    for name in sorted(name for name in modules if name.partition(".")[0] in tops):
        module = modules[name]
        if not _has_file(module):
            continue
        file = Path(str(module.__file__))
        if file != path and file not in _ran:
            found[os.path.relpath(file, path.parent)] = _sha256(file)
    return found


def _lies_in(module: Any, folder: str) -> bool:
    """Return whether a module's file, or its package, is one of a folder's."""
    if not _has_file(module) or module.__name__ in OUR_PACKAGES:
        return False
    place, last = os.path.split(os.path.normpath(module.__file__))
    return (os.path.dirname(place) if last == "__init__.py" else place) == folder


def _has_file(module: Any) -> bool:
    return isinstance(getattr(module, "__file__", None), str)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}), and the run keeps the "
                        "hash of its code") from None
