"""The tests of the core alone: which need no part and no library besides the core's, by what they import.

    python tests/core_alone.py FOLDER          make FOLDER/data, and FOLDER/room with a copy of the tests
    cd FOLDER/room && python -P -m pytest -p tests.core_alone tests      with the core alone installed

`make core` does both.  Nothing is listed by hand.  A file is left out where it, or a module of the tests
that it imports, imports a part or a library that is not here.  So is a test where its function, a fixture of
it, or what these use of the tests' own, imports such a thing, names a part's module or types a part's
command; and a file with the mark `checkout`, which reads sources and pages of the whole.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import megatron_sov
from megatron_sov.base.command_line import is_installed
from megatron_sov.version import OUR_PACKAGES, PARTS, part_of

ROOT = Path(__file__).parents[1]
COPIED = ("tests", "benchmarks", "docs", "pyproject.toml", "setup.py", "README.md", "constraints.txt")
"""What tests read besides our packages."""
SOURCES = Path(megatron_sov.__file__).parents[1]
DOTTED = re.compile(r"(megatron_sov|data_prep)(\.\w+)+(:\w+)?")
PROGRAM_IMPORTS = re.compile(r"\bimport ([\w., ]+)")
"""What a text imports that is a program."""
OTHER_PROGRAMS = ("sov-data", "sov-tokenizer")


def is_absent(name: str) -> bool:
    """Return whether a module is of a part, or of a library that is not here."""
    top = name.partition(".")[0]
    if top in OUR_PACKAGES:
        return part_of(name) != "" or _lacks_library(name)
    return top != "tests" and not _is_here(top)


@cache
def _is_here(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _lacks_library(name: str) -> bool:
    """Return whether a module of ours, or what it imports when it is loaded, imports a library that is not
    here: its extra is not installed."""
    path = SOURCES.joinpath(*name.split("."))
    file = next((file for file in (path.with_suffix(".py"), path / "__init__.py",
                                   path.parent.with_suffix(".py")) if file.is_file()), None)
    if file is None:
        return False
    if file not in _lacking:
        _lacking[file] = False  # while it is looked at
        _lacking[file] = any(is_absent(imported) for node in TestModule(file).top_level_imports()
                             for imported in _imported(node) if imported.partition(".")[0] != "megatron")
    return _lacking[file]


_lacking: dict[Path, bool] = {}


@cache
class TestModule:
    """One file of the tests, parsed."""

    __test__ = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.names: dict[str, ast.AST] = {}
        """Top-level name -> what defines it."""
        self.helpers: dict[str, tuple[Path, str]] = {}
        """Name -> file of the tests that it is imported from, and its name there; "": the module itself."""
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                self.names[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.names |= {name.id: node for target in targets for name in ast.walk(target)
                               if isinstance(name, ast.Name)}
        self.functions: dict[int, ast.AST] = {}
        """First line, decorators included -> function that begins there."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                decorators = getattr(node, "decorator_list", [])
                self.functions.setdefault(min([node.lineno, *(d.lineno for d in decorators)]), node)
            for bound, module, name in _helpers_of(node, path):
                self.helpers[bound] = (module, name)

    def top_level_imports(self) -> Iterator[ast.AST]:
        """Yield the imports that run when it is imported."""
        waiting: list[ast.AST] = [self.tree]
        while waiting:
            for node in ast.iter_child_nodes(waiting.pop()):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    yield node
                elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not (
                        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                    waiting.append(node)

    def absent(self) -> str:
        """Return what it imports, itself or by a module of the tests, that is not here; "": nothing."""
        for node in self.top_level_imports():
            if found := next(filter(is_absent, _imported(node)), ""):
                return found
            for _, module, _ in _helpers_of(node, self.path):
                if module != self.path and (found := TestModule(module).absent()):
                    return found
        return ""


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _helpers_of(node: ast.AST, path: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield (name that is bound, file of the tests, name in it) of an import of the tests' own modules: from
    `tests`, or from beside a file or from benchmarks, which some add to the path."""
    if not isinstance(node, (ast.Import, ast.ImportFrom)) or any(
            path.is_relative_to(SOURCES / name) for name in OUR_PACKAGES):
        return
    for alias in node.names:
        bound, name = alias.asname or alias.name, alias.name
        if (name if isinstance(node, ast.Import) else node.module or "").partition(".")[0] in OUR_PACKAGES:
            continue
        dotted = name if isinstance(node, ast.Import) else f"{getattr(node, 'module', '')}.{name}"
        for folder in (ROOT, ROOT / "benchmarks", path.parent, ROOT / "tests/layouts"):
            whole = folder.joinpath(*dotted.split(".")).with_suffix(".py")
            inside = whole.parent.with_suffix(".py")
            if isinstance(node, ast.ImportFrom) and inside.is_file() and inside.is_relative_to(ROOT):
                yield bound, inside, name
                break
            if whole.is_file():
                yield bound, whole, ""
                break


def needed_by(module: TestModule, start: ast.AST, seen: set[tuple[Path, int]]) -> str:
    """Return what a function, or what it uses of the tests' own, needs that is not here; "": nothing."""
    key = (module.path, start.lineno if hasattr(start, "lineno") else 0)
    if key in seen:
        return ""
    seen.add(key)
    for node in ast.walk(start):
        if found := next(filter(is_absent, _imported(node)), "") or typed_part(node):
            return found
        name = (node.id if isinstance(node, ast.Name) else
                node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "")
        # a function's name in a string is what ranks are asked to run
        if name in module.names and (found := needed_by(module, module.names[name], seen)):
            return found
        if isinstance(node, ast.Name) and name in module.helpers:
            file, there = module.helpers[name]
            other = TestModule(file)
            if there in other.names and (found := needed_by(other, other.names[there], seen)):
                return found
        if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                and module.helpers.get(node.value.id, (None, "-"))[1] == ""):
            other = TestModule(module.helpers[node.value.id][0])
            if node.attr in other.names and (found := needed_by(other, other.names[node.attr], seen)):
                return found
    return ""


@cache
def needed_by_function(path: Path, first_line: int) -> str:
    """Return what the function of the tests that begins at a line needs that is not here; "": nothing."""
    if not path.is_relative_to(ROOT / "tests"):  # pytest's own
        return ""
    module = TestModule(path)
    return needed_by(module, module.functions[first_line], set())


def typed_part(node: ast.AST) -> str:
    """Return the part's module that a text names, or whose command it types: `"rl run --store"`,
    `["rl", "run", ...]` and `call("rl", "run", ...)`; "": none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
        if DOTTED.fullmatch(text) and part_of(text):
            return text
        for name in (word for names in PROGRAM_IMPORTS.findall(text) for word in re.split(r"[, ]+", names)):
            if name.partition(".")[0] in OUR_PACKAGES and part_of(name):
                return str(name)
        return text.split()[0] if text.split()[:1] and text.split()[0] in OTHER_PROGRAMS else (
            _part_command(text) if " -" in text or "{" in text else "")
    items = (node.elts if isinstance(node, (ast.List, ast.Tuple)) else
             node.args if isinstance(node, ast.Call) else
             node.values if isinstance(node, ast.JoinedStr) else [])
    words = []
    for item in items:
        if not isinstance(item, ast.Constant) or not isinstance(item.value, str):
            break
        words.append(item.value)
    return _part_command(" ".join(words)) if words and len(items) > 1 else ""


@cache
def part_commands() -> dict[str, str]:
    """Return the commands that parts have -> their modules."""
    from megatron_sov.base.command_line import Command
    from megatron_sov.commands import COMMANDS
    from megatron_sov.commands.evaluate.eval import ACTIONS

    known = COMMANDS | {f"eval {name}": action for name, action in ACTIONS.items()
                        if isinstance(action, Command)}
    return {name: command.module for name, command in known.items() if part_of(command.module)}


def _part_command(line: str) -> str:
    """Return the module of the command that a line begins with, where that is a part's; "": none."""
    words = line.removeprefix("megatron-sov ").split(maxsplit=2)[:2]
    return part_commands().get(" ".join(words)) or part_commands().get(words[0] if words else "", "")


def needed_by_item(item: pytest.Function, made: set[str]) -> str:
    """Return what a test needs that is not here; "": nothing.

    Args:
        item: the test.
        made: fixtures whose folders have been made where everything is installed.
    """
    fixtures = [definitions[-1].func for name, definitions in item._fixtureinfo.name2fixturedefs.items()
                if name not in made]
    for function in (item.function, *fixtures):
        code = inspect.unwrap(function).__code__
        if found := needed_by_function(Path(code.co_filename), code.co_firstlineno):
            return found
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in values if isinstance(value, str) and (
        value in part_commands() or value in OTHER_PROGRAMS or (value in OUR_PACKAGES and part_of(value))
        or typed_part(ast.Constant(value)))), "")


LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run where more than the core is installed: the tests would prove nothing."""
    config.stash[LEFT_OUT] = {"files": 0, "tests": 0}
    for module in (names[0] for names in PARTS.values()):
        if is_installed(module):
            raise pytest.UsageError(f"{module} is installed, which is no part of the core; run `make core`")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that need more."""
    conftest = collection_path / "conftest.py"
    if conftest.is_file() and TestModule(conftest).absent():
        config.stash[LEFT_OUT]["files"] += len(list(collection_path.rglob("test_*.py")))
        return True
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    module = TestModule(collection_path)
    if not module.absent() and "checkout" not in ast.unparse(module.names.get("pytestmark", ast.Pass())):
        return None
    config.stash[LEFT_OUT]["files"] += 1
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Leave out tests that need more."""
    made = set(os.listdir(os.environ["SOV_TESTS_DATA"]))
    out = [item for item in items if item.get_closest_marker("checkout") or needed_by_item(item, made)]
    config.stash[LEFT_OUT]["tests"] += len(out)
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a worker say what it left out: each collects all."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take note of what a worker said."""
    node.config.stash[LEFT_OUT] |= getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tell how many were left out."""
    left = config.stash[LEFT_OUT]
    terminalreporter.write_line(f"the core alone: {left['files']} files, and {left['tests']} tests of "
                                "others, need more and were left out")


def make_room(folder: Path) -> None:
    """Copy what tests read, and make what fixtures read, where everything is installed.  Our packages in the
    room are those that FOLDER/env has."""
    from tests.packing import MAKERS

    room, data = folder / "room", folder / "data"
    for path in (room, data):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, room / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, room / name)

    (site,) = (folder / "env/lib").glob("python*/site-packages")
    for name in ("megatron_sov", "slurm"):
        (room / name).symlink_to(site / name)
    modules = {"sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}

    def run(*argv: str, program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", modules[program], *argv], cwd=ROOT, text=True,
                              capture_output=True, check=False)

    for name, make in MAKERS.items():
        (data / name).mkdir()
        make(data / name, run)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: what mirrors a package in it has the package's name
    make_room(Path(sys.argv[1]).absolute())
