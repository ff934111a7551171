"""Measure which faults in the source `make test` finds, beside all tests of the same files.

Usage: python benchmarks/faults_by_tier.py FOUND.jsonl [--most N] [--hours H] [--area AREA]
       python benchmarks/faults_by_tier.py FOUND.jsonl --table

`benchmarks/data/faults_by_tier.yaml` names source files and the tests beside them.  Of each file a seeded
draw takes faults, spread over its functions: a comparison, an operator, a condition, a number or a call is
changed.  Each fault is planted in a copy of the repository, where the tests run without the `deep` mark and,
if these pass, with it.  A fault that neither finds may change nothing; the figure is what `make test` finds
of what all tests find.  A second start goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/data/faults_by_tier.yaml"
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
PASSED_OVER = (ast.Raise, ast.Assert, ast.JoinedStr, ast.FormattedValue, ast.arguments, ast.AnnAssign)
"""Messages, checks of types and defaults: a fault there is none of what a program does."""


@dataclass(frozen=True)
class Fault:
    """A text in place of another one."""

    area: str
    file: str
    line: int
    start: int
    """Offset in the file, in bytes."""
    right: str
    wrong: str

    @property
    def key(self) -> str:
        """Name the fault."""
        return f"{self.file}:{self.line}: {self.right!r} is {self.wrong!r}"

    def planted(self, source: bytes) -> bytes:
        """Return the file's bytes with the fault in them."""
        stop = self.start + len(self.right.encode())
        assert source[self.start:stop] == self.right.encode(), self.key
        return source[:self.start] + self.wrong.encode() + source[stop:]


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
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text.encode()))
    functions = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = []
            for node in (n for statement in function.body for n in (statement, *_nodes(statement))
                         if not isinstance(statement, PASSED_OVER)):
                wrong = changed(node)
                right = ast.get_source_segment(source, node) if wrong is not None else None
                if wrong is not None and right:
                    text = ast.unparse(ast.fix_missing_locations(wrong))
                    start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
                    found.append(Fault(area, file, node.lineno, start, right,  # type: ignore[attr-defined]
                                       text if isinstance(wrong, ast.Constant) else f"({text})"))
            if found:
                functions.append(list(dict.fromkeys(found)))
    draw = random.Random(file)
    for found in functions:
        draw.shuffle(found)
    draw.shuffle(functions)
    turns = [found[i] for i in range(max(map(len, functions), default=0)) for found in functions
             if i < len(found)]
    return turns[:count]


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
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:anyio",
               "-p", "no:cacheprovider", "-m", marks, *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            told = process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "stands still"
    if process.returncode in (0, 5):  # 5: no test has these marks
        return ""
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:200] if failed else f"exit code {process.returncode}: {told[-200:]}"


def copied(folder: Path) -> None:
    """Copy what git lists of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in COPIED and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def measure(out: Path, most: int, hours: float, area: str | None) -> None:
    """Plant faults one by one; a line of JSON each."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["fault"] for row in rows}
    sound: dict[tuple[str, ...], tuple[str, float]] = {}
    """Marks and tests -> what fails without a fault, and the seconds that they take."""
    until = time.monotonic() + 3600 * hours
    with tempfile.TemporaryDirectory() as name, out.open("a", encoding="utf-8") as file:
        folder = Path(name)
        copied(folder)
        for fault, tests in drawn():
            if len(done) >= most or time.monotonic() > until:
                break
            if fault.key in done or area not in (None, fault.area):
                continue
            path, began, found = folder / fault.file, time.monotonic(), {"not deep": "", "deep": ""}
            right = path.read_bytes()
            for marks in found:
                if (of := (marks, *tests)) not in sound:
                    started = time.monotonic()
                    sound[of] = run_tests(folder, tests, marks), time.monotonic() - started
                failed, seconds = sound[of]
                if failed:
                    print(f"passed over: {of} fail without a fault: {failed}", file=sys.stderr)
                    found = {}
                    break
                path.write_bytes(fault.planted(right))
                try:
                    found[marks] = run_tests(folder, tests, marks, max(LEAST_S, LONGER * seconds))
                finally:
                    path.write_bytes(right)
                if found[marks]:
                    break
            if not found:
                continue
            first, every = found["not deep"], found["not deep"] or found["deep"]
            row = {"area": fault.area, "fault": fault.key, "make test": first, "all": every,
                   "seconds": round(time.monotonic() - began)}
            print(json.dumps(row), file=file, flush=True)
            done.add(fault.key)


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
    parser.add_argument("--most", type=int, default=10**9, help="faults, those of an earlier start included")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--area")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    if not args.table:
        measure(args.found, args.most, args.hours, args.area)
    print("\n".join(table([json.loads(line) for line in args.found.read_text().splitlines()])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
