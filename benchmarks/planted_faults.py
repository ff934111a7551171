"""Plant faults in the source, and measure how many `make test` and `make deep` detect.

Usage: python benchmarks/planted_faults.py FOUND.jsonl [--area AREA] [--faults N] [--hours H] [--deep]
       python benchmarks/planted_faults.py FOUND.jsonl --table

`benchmarks/data/planted_faults.yaml` names source folders and test folders of each area. Faults are random,
at most one per function: a changed comparison, operator, condition, number or call. A copy of the repository
gets all faults of an area, each switched off: `(wrong if _planted(7) else right)`. The tests run once without
a fault and record the faults that each test reaches, also in its child processes. Then a fork of pytest
switches on one fault and runs the tests that reach it, cheapest file first, until a test fails that passes
without the fault. `--deep` runs the `deep` tests for the faults that `make test` misses. A second start
continues after the last measured fault.

`layout_proofs.py` plants faults of the same form in functions of its own process (`mutated`).
"""

import argparse
import ast
import atexit
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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
AREAS: dict[str, dict[str, str]] = yaml.safe_load(
    (ROOT / "benchmarks/data/planted_faults.yaml").read_text(encoding="utf-8"))
COPIED_ROOTS = ("megatron_sov", "data_prep", "tokenizer", "tests", "benchmarks", "docs", "slurm", "examples",
                "pyproject.toml", "setup.py", "Makefile", "README.md")
PLAN = "PLANTED_PLAN"
"""Environment variable with the path of a plan: the faults and the result file of a pytest session."""
FUTURE = "from __future__ import annotations\n"
SANDBOXED = ("check_program.py", "solution_frameworks.py", "solution_peer.py", "solution_tests.py")
"""Files that run as programs in the sandbox, which cannot import the switch."""
SWITCH = '''"""Switch of the planted faults: PYTHON_PLANTED_FAULT has the number of the fault that acts.

Workers of rewards delete most environment variables, but not variables whose names begin with PYTHON.
"""

import os

SEEN: set[int] = set()


def planted(number: int) -> bool:
    """Record in the file PYTHON_PLANTED_REACHED that a fault was reached; return whether the fault acts."""
    file = os.environ.get("PYTHON_PLANTED_REACHED")
    if file and number not in SEEN:
        SEEN.add(number)
        try:
            lines = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(lines, f"{number}\\n".encode())
            os.close(lines)
        except OSError:
            pass
    return os.environ.get("PYTHON_PLANTED_FAULT") == str(number)
'''
"""Source of megatron_sov/planted_switch.py in the copy."""
TIMEOUT_FACTOR, TIMEOUT_S = 5.0, 60.0
"""A run with a fault is killed after TIMEOUT_S + TIMEOUT_FACTOR times its duration without the fault."""
MAX_TESTS_S = 240.0
"""Longest duration, without the fault, of the tests for a fault; its row counts the omitted tests."""
OPERATORS: dict[type[ast.AST], ast.AST] = {
    ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(), ast.In: ast.NotIn(), ast.NotIn: ast.In(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(),
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Add(), ast.FloorDiv: ast.Mult(),
    ast.Div: ast.Mult(), ast.Mod: ast.FloorDiv(), ast.And: ast.Or(), ast.Or: ast.And()}
UNCHANGED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.FormattedValue, ast.arguments, ast.AnnAssign,
             ast.pattern)
"""Nodes without faults: messages, type annotations, defaults and assertions."""


@dataclass(frozen=True)
class Fault:
    """A part of the source that is replaced by a wrong one."""

    kind: str
    """Kind of fault, or area of the file."""
    place: str
    """module:qualified name of a function, or FILE:LINE."""
    right: str
    wrong: str
    start: int | None = None
    """Offset of `right` in the file, in characters; None: every occurrence in the function is replaced."""

    def __str__(self) -> str:
        place = self.place.rpartition(":")[2] if self.start is None else self.place
        return f"{place}: {self.right!r} is {self.wrong!r}"


@contextlib.contextmanager
def mutated(fault: Fault) -> Iterator[None]:
    """Replace the code object of a function, so that all references have the fault in the context."""
    module_name, _, name = fault.place.partition(":")
    member: Any = importlib.import_module(module_name)
    for part in name.split("."):
        member = inspect.getattr_static(member, part)
    function = inspect.unwrap(getattr(member, "__func__", member))
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    if fault.right not in source:
        raise ValueError(f"{fault.place} does not contain {fault.right!r}")
    source = source.replace(fault.right, fault.wrong)
    # without decorators, and inside a function that defines its closure variables
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


def mutate_node(node: ast.AST) -> ast.AST | None:
    """Return a mutated copy of a node, or None."""
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


def _iter_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, UNCHANGED):
            yield child
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _iter_nodes(child)


def draw_faults(area: str, file: str, draw: random.Random) -> Iterator[Fault]:
    """Draw a fault for each function of a file."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    starts = [0]
    for text in lines:
        starts.append(starts[-1] + len(text))

    def offset(number: int, column: int) -> int:
        """Return the offset in characters of a line (from 1) and a column, which ast counts in bytes."""
        return starts[number - 1] + len(lines[number - 1].encode()[:column].decode())

    # numba cannot compile the switch
    if FUTURE not in source or "jit" in source or Path(file).name in SANDBOXED:
        return
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        mutations = [(node, wrong) for statement in function.body if not isinstance(statement, UNCHANGED)
                     for node in (statement, *_iter_nodes(statement))
                     if (wrong := mutate_node(node)) is not None]
        if mutations:
            node, wrong = draw.choice(mutations)
            assert isinstance(node, (ast.expr, ast.stmt)) and node.end_lineno is not None
            start = offset(node.lineno, node.col_offset)
            right = source[start:offset(node.end_lineno, node.end_col_offset or 0)]
            text = ast.unparse(ast.fix_missing_locations(wrong))
            yield Fault(area, f"{file}:{node.lineno}", right,
                        text if isinstance(wrong, ast.Constant) else f"({text})", start)


def draw_area_faults(area: str, seed: int) -> list[Fault]:
    """Return the faults of an area in random order, so that any prefix is a random sample."""
    draw = random.Random(f"{area} {seed}")
    files = [file.relative_to(ROOT).as_posix() for name in AREAS[area]["source"].split()
             for file in sorted((ROOT / name).rglob("*.py"))]
    faults = [fault for file in files for fault in draw_faults(area, file, draw)]
    draw.shuffle(faults)
    return faults


def copy_tracked_files(folder: Path) -> None:
    """Copy the tracked files of COPIED_ROOTS into a folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in COPIED_ROOTS and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def plant_faults(folder: Path, faults: Sequence[Fault]) -> None:
    """Plant faults, each switched off by its number, in a copy of the repository."""
    (folder / "megatron_sov/planted_switch.py").write_text(SWITCH, encoding="utf-8")
    for number, fault in sorted(enumerate(faults), key=lambda numbered: -(numbered[1].start or 0)):
        file = folder / fault.place.rpartition(":")[0]
        source, start = file.read_text(encoding="utf-8"), fault.start or 0
        assert source.startswith(fault.right, start), fault
        file.write_text(f"{source[:start]}({fault.wrong} if _planted({number}) else ({fault.right}))"
                        f"{source[start + len(fault.right):]}", encoding="utf-8")
    imported = "from megatron_sov.planted_switch import planted as _planted\n"
    for name in {fault.place.rpartition(":")[0] for fault in faults}:
        source = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(source.replace(FUTURE, f"{FUTURE[:-1]}; {imported}", 1), encoding="utf-8")


class ReachRecorder:
    """Pytest plugin that writes the faults reached by each test to FOLDER/INDEX, and those reached by its
    fixtures to FOLDER/INDEX.setup."""

    def __init__(self, folder: Path, items: Sequence[pytest.Item]) -> None:
        self._folder, self._index = folder, {item: index for index, item in enumerate(items)}

    def _write_to(self, name: str) -> None:
        sys.modules["megatron_sov.planted_switch"].SEEN.clear()  # type: ignore[attr-defined]
        os.environ["PYTHON_PLANTED_REACHED"] = str(self._folder / name)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._write_to(f"{self._index[item]}.setup")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self._write_to(f"{self._index[item]}")


class Measurement:
    """Measures the faults of a plan with the tests of a pytest session."""

    def __init__(self, session: pytest.Session, folder: Path, plan: dict[str, Any]) -> None:
        self.session, self.items, self.folder, self.plan = session, session.items, folder, plan
        self.seconds: dict[int, float] = {}
        """Index of a test that passes without a fault -> its duration."""
        self.reaching: dict[int, set[int]] = defaultdict(set)
        """Number of a fault -> indices of the tests that reach it."""

    def run(self) -> None:
        """Measure each fault, and write a line of JSON for each to the result file."""
        self._record_reach()
        with open(self.plan["out"], "a", encoding="utf-8") as out:
            for number, row in self.plan["faults"]:
                if time.time() > self.plan["until"]:
                    break
                begin_s = time.monotonic()
                row[self.plan["tier"]], row["tests"], row["left out"] = self._find_failing_test(number)
                row["seconds"] = round(time.monotonic() - begin_s)
                print(json.dumps(row), file=out, flush=True)

    def _record_reach(self) -> None:
        """Run all tests without a fault, and record their durations and the faults that they reach."""
        reached = self.folder / "reached"
        reached.mkdir()
        begin_s = time.monotonic()
        rows = self._fork(range(len(self.items)), 1e9, ReachRecorder(reached, self.items))
        print(f"{len(rows)} of {len(self.items)} tests in {time.monotonic() - begin_s:.0f} s",
              file=sys.stderr)
        by_fixture: dict[Any, set[int]] = defaultdict(set)
        for index, failed, seconds in rows:
            if failed:
                print(f"fails without a fault: {failed}", file=sys.stderr)
                continue
            self.seconds[index] = seconds
            for name, definitions in self.items[index]._fixtureinfo.name2fixturedefs.items():  # type: ignore
                fixture = definitions[-1]  # the definition nearest to the test
                # fixtures of tests/conftest.py reach no fault, or create their data once without a fault
                is_from_root = fixture.baseid in ("", "tests") and name != "imported"
                if fixture.scope != "function" and not is_from_root:
                    by_fixture[fixture].add(index)
        for file in reached.iterdir():
            tests = {index := int(file.stem)}
            if file.suffix:  # tests that share a fixture with this test reach its faults, too
                tests.update(*(same for same in by_fixture.values() if index in same))
            for number in {int(line) for line in file.read_text().split()}:
                self.reaching[number] |= tests & self.seconds.keys()

    def _find_failing_test(self, number: int) -> tuple[str, int, int]:
        """Return the first test that fails with a fault (or ""), the number of tests that reach the fault,
        and the number of omitted tests."""
        files: dict[Path, list[int]] = defaultdict(list)
        for index in sorted(self.reaching[number]):
            files[self.items[index].path].append(index)
        chosen: list[int] = []
        seconds = 0.0
        for indices in sorted(files.values(), key=lambda file: sum(self.seconds[index] for index in file)):
            for index in indices:
                if seconds < MAX_TESTS_S:
                    chosen.append(index)
                    seconds += self.seconds[index]
        num_reaching = sum(map(len, files.values()))
        num_omitted = num_reaching - len(chosen)
        while chosen:
            os.environ["PYTHON_PLANTED_FAULT"] = str(number)
            rows = self._fork(chosen, TIMEOUT_S + TIMEOUT_FACTOR * seconds)
            del os.environ["PYTHON_PLANTED_FAULT"]
            has_failed = bool(rows and rows[-1][1])
            if len(rows) == len(chosen) and not has_failed:
                break
            # the failed test, or the test in which the process ended or hung
            place = len(rows) - 1 if has_failed else len(rows)
            suspect = chosen[place]
            nodeid = self.items[suspect].nodeid
            repeated = self._fork([suspect], TIMEOUT_S + TIMEOUT_FACTOR * self.seconds[suspect])
            if repeated and not repeated[0][1]:  # the test passes without the fault
                return nodeid if has_failed else f"ends or hangs: {nodeid}", num_reaching, num_omitted
            chosen = chosen[place + 1:]
        return "", num_reaching, num_omitted

    def _fork(self, indices: Sequence[int], timeout_s: float, recorder: ReachRecorder | None = None
              ) -> list[tuple[int, str, float]]:
        """Run tests in a fork, without `recorder` up to the first failure; return index, name if it failed,
        and seconds of each completed test."""
        notes = self.folder / "notes.jsonl"
        notes.write_text("")
        if not (pid := os.fork()):
            self._run_tests(indices, notes, recorder)
        until = time.monotonic() + timeout_s
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # processes that the tests have started
            os.killpg(pid, signal.SIGKILL)
        return [json.loads(line) for line in notes.read_text().splitlines()]

    def _run_tests(self, indices: Sequence[int], notes: Path, recorder: ReachRecorder | None) -> NoReturn:
        from tests import forks

        messages: list[Any] = []

        class Line:
            send = messages.append

        try:
            os.setsid()
            atexit._clear()
            # each fork gets its own folder of temporary files
            forks._begin_anew(self.session.config, Line, time.monotonic_ns())  # type: ignore[arg-type]
            if recorder:
                self.session.config.pluginmanager.register(recorder)
            with notes.open("a", encoding="utf-8", buffering=1) as lines:
                for index, following in zip(indices, [*indices[1:], None], strict=True):
                    messages.clear()
                    begin_s = time.monotonic()
                    self.session.config.hook.pytest_runtest_protocol(
                        item=self.items[index], nextitem=forks._AnyTest(self.session)
                        if following is None else self.items[following])
                    failed = any(kind == "report" and data["outcome"] == "failed" for kind, data in messages)
                    nodeid = self.items[index].nodeid if failed else ""
                    print(json.dumps((index, nodeid, round(time.monotonic() - begin_s, 3))), file=lines)
                    if failed and not recorder:
                        break
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Measure faults instead of running the tests, if the environment names a plan."""
    if PLAN not in os.environ:
        return None
    plan = json.loads(Path(os.environ[PLAN]).read_text())
    Measurement(session, Path(os.environ[PLAN]).parent, plan).run()
    return True


def measure_area(area: str, out: Path, faults: list[Fault], tier: str, until: float) -> None:
    """Plant the faults of an area in a copy of the repository, and start a pytest session there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        copy_tracked_files(folder)
        plant_faults(folder, faults)
        plan = Path(name) / "plan.json"
        rows = [(number, {"area": area, "fault": str(fault)}) for number, fault in enumerate(faults)]
        plan.write_text(json.dumps({"out": str(out.absolute()), "tier": tier, "until": until,
                                    "faults": rows}), encoding="utf-8")
        marks = "deep" if tier == "make deep" else "not deep"
        command = [sys.executable, "tests/made_once.py", sys.executable, "-m", "pytest", "-p",
                   "planted_faults", "-q", "--no-header", "--tb=no", "-p", "no:anyio", "-p",
                   "no:cacheprovider", "-m", marks, *AREAS[area]["tests"].split()]
        subprocess.run(command, cwd=folder, check=False, env={
            **os.environ, PLAN: str(plan), "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'benchmarks'}",
            "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""})


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Return fault -> its row; later lines of the file update earlier ones."""
    rows: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        rows[row["fault"]] = rows.get(row["fault"], {}) | row
    return rows


def iter_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each area (faults, and how many each tier finds), then a line for each fault that only
    `make deep` or no test finds."""
    yield f"{'area':<12} faults  make test  all tests  share"
    for area in [*dict.fromkeys(row["area"] for row in rows), "all"]:
        of_area = [row for row in rows if area in (row["area"], "all")]
        num_first = sum(bool(row["make test"]) for row in of_area)
        num_all = sum(bool(row["make test"] or row.get("make deep")) for row in of_area)
        share = 100 * num_first / max(num_all, 1)
        yield f"{area:<12} {len(of_area):6} {num_first:10} {num_all:10} {share:5.1f}%"
    for row in rows:
        if not row["make test"]:
            finder = row.get("make deep") or "no test"
            yield f"{finder if row['tests'] else 'reached by no test'}: {row['fault']}"


def main(argv: list[str]) -> None:
    """Measure faults, then print the table of all stored results; with --table only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("found", type=Path)
    parser.add_argument("--faults", type=int, default=50, help="faults of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    areas = [args.area] if args.area else list(AREAS)
    for area in [] if args.table else areas:
        rows = read_rows(args.found)
        faults = draw_area_faults(area, args.seed)[:args.faults]
        if args.deep:  # those that `make test` misses
            faults = [f for f in faults if str(f) in rows and not rows[str(f)]["make test"]
                      and "make deep" not in rows[str(f)]]
        else:
            faults = [f for f in faults if str(f) not in rows]
        if faults:
            measure_area(area, args.found, faults, "make deep" if args.deep else "make test",
                         time.time() + 3600 * args.hours)
    print("\n".join(iter_table(list(read_rows(args.found).values()))))


if __name__ == "__main__":
    main(sys.argv[1:])
