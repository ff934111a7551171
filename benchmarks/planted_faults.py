"""Plant faults in the source, and measure which of them `make test` and all tests of the same files find.

Usage: python benchmarks/planted_faults.py FOUND.jsonl [--sample N] [--seed S] [--hours H] [--area AREA]
       python benchmarks/planted_faults.py FOUND.jsonl --table

`benchmarks/data/planted_faults.yaml` names source files and the tests beside them.  Of each file a seeded
draw takes faults, spread over its functions: a comparison, an operator, a condition, a number or a call is
changed.  Each fault is planted in a copy of the repository, where the tests run without the `deep` mark and,
if these pass, with it.  A fault that neither finds may change nothing; the figure is what `make test` finds
of what all tests find.  A second start goes on where the first stopped.

`--sample N` draws N faults by `--seed`, in turns from each area.  Of the tests in the table only those files
run that import the faulted module, where there are any.  `python tests/made_once.py python
benchmarks/planted_faults.py ...` makes the data of `token_shards` and `packed_data` once.

`layout_proofs.py` plants faults of the same form in functions of its own process (`mutated`).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/data/planted_faults.yaml"
COPIED = ("megatron_sov", "data_prep", "tokenizer", "tests", "benchmarks", "docs", "slurm", "examples",
          "pyproject.toml", "setup.py", "Makefile", "README.md")
LONGER, LEAST_S, MOST_S = 5.0, 120.0, 3600.0
"""How many times longer than without a fault tests may take, at least and at most so many seconds: a fault
may have a process wait for ever."""
OPERATORS: dict[type[ast.AST], ast.AST] = {
    ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(), ast.In: ast.NotIn(), ast.NotIn: ast.In(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(),
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Add(), ast.FloorDiv: ast.Mult(),
    ast.Div: ast.Mult(), ast.Mod: ast.FloorDiv(), ast.And: ast.Or(), ast.Or: ast.And()}
LIBRARIES = ("hypothesis", "numpy", "psutil", "pyarrow.parquet", "torch", "transformers")
"""Imported once; the tests of each fault run in a fork."""
PASSED_OVER = (ast.Raise, ast.Assert, ast.JoinedStr, ast.FormattedValue, ast.arguments, ast.AnnAssign)
"""Messages, checks of types and defaults: a fault there is none of what a program does."""


@dataclass(frozen=True)
class Fault:
    """A text of the source in place of another one."""

    kind: str
    """Kind of fault, or area of the file."""
    place: str
    """module:qualified name of a function, or FILE:LINE."""
    right: str
    wrong: str
    start: int | None = None
    """Offset of `right` in the file, in characters; None: wherever it stands in the function."""

    def __str__(self) -> str:
        place = self.place.rpartition(":")[2] if self.start is None else self.place
        return f"{place}: {self.right!r} is {self.wrong!r}"

    def planted(self, source: str) -> str:
        """Return a source with the fault in it.

        Raises:
            ValueError: the source does not hold `right`.
        """
        if self.right not in source or (
                self.start is not None and not source.startswith(self.right, self.start)):
            raise ValueError(f"{self.place} holds no {self.right!r}")
        if self.start is None:
            return source.replace(self.right, self.wrong)
        return source[:self.start] + self.wrong + source[self.start + len(self.right):]


@contextlib.contextmanager
def mutated(fault: Fault) -> Iterator[None]:
    """Plant a fault in a function of this process, for all who hold it: the function's code is exchanged."""
    module_name, _, name = fault.place.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    function = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(function, FunctionType)
    source = fault.planted(textwrap.dedent(inspect.getsource(function)))
    # without decorators, and inside a function that has what it closes over
    source = "\n".join(("from __future__ import annotations",
                        f"def make({', '.join(function.__code__.co_freevars)}):",
                        textwrap.indent(source[source.index("def "):], "    "),
                        f"    return {function.__name__}"))
    names: dict[str, Any] = {}
    exec(compile(source, inspect.getsourcefile(function) or "", "exec"), function.__globals__, names)
    code = names["make"](*function.__code__.co_freevars).__code__
    right, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = right


@contextlib.contextmanager
def planted_in(folder: Path, fault: Fault) -> Iterator[None]:
    """Plant a fault in a file of a copy of the repository."""
    file = folder / fault.place.rpartition(":")[0]
    right = file.read_text(encoding="utf-8")
    file.write_text(fault.planted(right), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(right, encoding="utf-8")


def changed(node: ast.AST) -> ast.AST | None:
    """Return a node that does another thing, or None."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
        wrong = OPERATORS[type(node.ops[0])]
        return ast.Compare(node.left, [wrong], node.comparators)  # type: ignore[list-item]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return None
        return ast.BinOp(node.left, OPERATORS[type(node.op)], node.right)  # type: ignore[arg-type]
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(OPERATORS[type(node.op)], node.values)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.Constant(None)
    return None


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, PASSED_OVER):
            yield child
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _nodes(child)


def faults_of(area: str, file: str, count: int) -> list[Fault]:
    """Draw faults of a file: one of each function in turns."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    starts = [0]
    for text in lines:
        starts.append(starts[-1] + len(text))

    def offset(number: int, column: int) -> int:
        """Return the place in characters of a line and a column, which ast counts in bytes."""
        return starts[number - 1] + len(lines[number - 1].encode()[:column].decode())

    functions = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = []
            for node in (n for statement in function.body for n in (statement, *_nodes(statement))
                         if not isinstance(statement, PASSED_OVER)):
                wrong = changed(node)
                if wrong is not None:
                    assert isinstance(node, (ast.expr, ast.stmt)) and node.end_lineno is not None
                    start = offset(node.lineno, node.col_offset)
                    right = source[start:offset(node.end_lineno, node.end_col_offset or 0)]
                    text = ast.unparse(ast.fix_missing_locations(wrong))
                    found.append(Fault(area, f"{file}:{node.lineno}", right,
                                       text if isinstance(wrong, ast.Constant) else f"({text})", start))
            if found:
                functions.append(list(dict.fromkeys(found)))
    draw = random.Random(file)
    for found in functions:
        draw.shuffle(found)
    draw.shuffle(functions)
    turns = [found[i] for i in range(max(map(len, functions), default=0)) for found in functions
             if i < len(found)]
    return turns[:count]


def module_name(file: str) -> str:
    """Return the dotted name of a source file."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(file: Path) -> set[str]:
    """Return the modules that a file imports anywhere: `from a.b import c` counts as a.b and as a.b.c."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def focused_tests(fault: Fault, tests: list[str]) -> list[str]:
    """Return the test files below `tests` that import the faulted module; all of `tests` if none does."""
    faulted = module_name(fault.place.rpartition(":")[0])
    files = sorted({file for name in tests for file in (
        (ROOT / name).rglob("test_*.py") if (ROOT / name).is_dir() else [ROOT / name]) if file.is_file()})
    importing = [file.relative_to(ROOT).as_posix() for file in files if faulted in imported_modules(file)]
    return importing or tests


def sampled(count: int, seed: int) -> list[tuple[Fault, list[str]]]:
    """Draw `count` faults, in turns from each area, with their focused tests."""
    areas: dict[str, list[tuple[Fault, list[str]]]] = {}
    for fault, tests in drawn():
        areas.setdefault(fault.kind, []).append((fault, tests))
    draw = random.Random(seed)
    for faults in areas.values():
        draw.shuffle(faults)
    turns = [faults[turn] for turn in range(max(map(len, areas.values()))) for faults in areas.values()
             if turn < len(faults)]
    return [(fault, focused_tests(fault, tests)) for fault, tests in turns[:count]]


def drawn() -> list[tuple[Fault, list[str]]]:
    """Return all faults of the table with the tests beside them, in an order of which any beginning is a
    random sample."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    found = [(fault, tests.split()) for area, files in table["areas"].items() for file, tests in files.items()
             for fault in faults_of(area, file, table["faults_of_a_file"])]
    random.Random(0).shuffle(found)
    return found


def run_tests(folder: Path, tests: list[str], marks: str, timeout_s: float = MOST_S) -> str:
    """Run tests in a copy; return the first that failed, "stands still", or an empty text."""
    output = folder.with_name(f"{folder.name}.out")
    process = os.fork()
    if process == 0:
        _run_pytest(folder, output, ["-m", marks, *tests])
    deadline_s = time.monotonic() + timeout_s
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline_s:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "stands still"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # processes that the tests have started
        os.killpg(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(ended[1])
    if code in (0, 5):  # 5: no test has these marks
        return ""
    text = output.read_text(errors="replace")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:200] if failed else f"exit code {code}: {text[-200:]}"


def _run_pytest(folder: Path, output: Path, arguments: list[str]) -> NoReturn:
    """Run pytest in this fork, which has imported the libraries and none of our packages."""
    code = 1
    try:
        os.setsid()
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(folder)
        sys.path[0] = str(folder)
        os.environ.pop("SOV_TESTS_SERVERS", None)  # workers of made_once.py have imported the sound source
        os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        code = int(pytest.main(["-x", "-q", "--no-header", "--tb=no", "-p", "no:anyio", "-p",
                                "no:cacheprovider", *arguments]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def copied(folder: Path) -> None:
    """Copy what git lists of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in COPIED and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def measure(out: Path, faults: list[tuple[Fault, list[str]]], most: int, hours: float, area: str | None
            ) -> None:
    """Plant faults one by one; a line of JSON each."""
    for name in LIBRARIES:
        importlib.import_module(name)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["fault"] for row in rows}
    sound: dict[tuple[str, ...], tuple[str, float]] = {}
    """Marks and tests -> what fails without a fault, and the seconds that they take."""
    until = time.monotonic() + 3600 * hours
    with tempfile.TemporaryDirectory() as name, out.open("a", encoding="utf-8") as file:
        folder = Path(name)
        copied(folder)
        for fault, tests in faults:
            if len(done) >= most or time.monotonic() > until:
                break
            if str(fault) in done or area not in (None, fault.kind):
                continue
            began, found = time.monotonic(), {"not deep": "", "deep": ""}
            for marks in found:
                if (of := (marks, *tests)) not in sound:
                    started = time.monotonic()
                    sound[of] = run_tests(folder, tests, marks), time.monotonic() - started
                failed, seconds = sound[of]
                if failed:
                    print(f"passed over: {of} fail without a fault: {failed}", file=sys.stderr)
                    found = {}
                    break
                with planted_in(folder, fault):
                    found[marks] = run_tests(folder, tests, marks, max(LEAST_S, LONGER * seconds))
                if found[marks]:
                    break
            if not found:
                continue
            first, every = found["not deep"], found["not deep"] or found["deep"]
            row = {"area": fault.kind, "fault": str(fault), "make test": first, "all": every,
                   "seconds": round(time.monotonic() - began)}
            print(json.dumps(row), file=file, flush=True)
            done.add(str(fault))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines: an area, its faults, what is found by whom, and what only the deep tests find."""
    yield f"{'area':<12} faults  make test  all tests  share"
    for area in [*dict.fromkeys(row["area"] for row in rows), "all"]:
        of = [row for row in rows if area in (row["area"], "all")]
        first, every = (sum(bool(row[by]) for row in of) for by in ("make test", "all"))
        yield f"{area:<12} {len(of):6} {first:10} {every:10} {100 * first / max(every, 1):5.1f}%"
    for row in rows:
        if not row["make test"]:
            yield f"{'only deep' if row['all'] else 'nobody'}: {row['fault']}"


def main(argv: list[str]) -> int:
    """Measure, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("found", type=Path)
    parser.add_argument("--sample", type=int, help="faults to draw, in turns from each area; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=10**9, help="faults, those of an earlier start included")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--area")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    if not args.table:
        faults = sampled(args.sample, args.seed) if args.sample else drawn()
        measure(args.found, faults, args.most, args.hours, args.area)
    print("\n".join(table([json.loads(line) for line in args.found.read_text().splitlines()])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
