"""Tiers of the tests. `make test` runs tier 1; `make deep` runs tier 2, the tests marked `deep`.

A test belongs to tier 2 if it needs a real Slurm, a Ray cluster or a browser, or takes more than
`LIMIT_S` of processor time: then a tier-1 test fails, and is to be made cheaper or marked `deep`.
`tier1_cases(N)` keeps at most N cases of a parametrized test in tier 1, spread evenly over its list.
`--part N/COUNT` chooses the files of one of COUNT parts of tier 2.
"""

import contextlib
import functools
import importlib.machinery
import json
import resource
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LIMIT_S = 3.0
"""Most processor time of a tier-1 test, with its children's and workers', without imports, at the speed of a
core on which `LOOP_ROUNDS` take `LOOP_S`."""
NOISE = 2.0
"""Largest ratio of a test's processor times between runs beside other work (caches, sibling threads): a test
fails above the limit times this, so that a busy machine alone fails none."""
ESSENTIAL_LIMIT_S = 30.0
"""The same for tests marked `essential`: the surface, the pages, exactness against transformers."""
LOOP_ROUNDS, LOOP_S = 1_000_000, 0.1
SERVICES = ("cluster", "browser")
"""Fixtures of tests that need daemons or programs which `make setup` does not install."""
_imports = {"depth": 0, "seconds": 0.0}
_workers = {"seconds": 0.0}
_files_of_workers: dict[Path, tuple[int, float]] = {}
"""File of workers' processor seconds -> bytes that were read, and their sum."""


@dataclass(frozen=True)
class Phase:
    """Times of setup, call or teardown of a test."""

    processor_s: float
    """Processor seconds of this process, its children and the
    shared workers that it used; without imports."""
    imports_s: float
    wall_s: float


USED = pytest.StashKey[dict[str, Phase]]()
"""Phase -> times of a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", type=_part, metavar="N/COUNT",
                     help="only the test files of part N, from 0, of COUNT parts")
    parser.addoption("--processor-times", type=Path, metavar="FILE.jsonl",
                     help="write each test's processor seconds into this file, and fail none for them")


def pytest_configure(config: pytest.Config) -> None:
    """Exclude imports and numba compilation from processor times: they fall on whichever test comes first."""
    loader = importlib.machinery.SourceFileLoader
    execute = loader.exec_module

    def execute_module(self: Any, module: ModuleType) -> None:
        execute(self, module)
        if module.__name__ == "numba.core.dispatcher":
            module.Dispatcher.compile = left_out(module.Dispatcher.compile)

    if numba := sys.modules.get("numba.core.dispatcher"):  # imported by a plugin or a conftest
        numba.Dispatcher.compile = left_out(numba.Dispatcher.compile)
    loader.exec_module = left_out(execute_module)  # type: ignore[method-assign]
    config.add_cleanup(lambda: setattr(loader, "exec_module", execute))


def left_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its processor time counts as import time."""

    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        begin_s = _processor_s()
        _imports["depth"] += 1
        try:
            return function(*arguments, **named)
        finally:
            _imports["depth"] -= 1
            if not _imports["depth"]:
                _imports["seconds"] += _processor_s() - begin_s

    return timed


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of tier 2 as deep, and keep one part of the files if `--part` asks for it."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if set(SERVICES) & set(getattr(item, "fixturenames", ())):
            item.add_marker("deep")
        if item.get_closest_marker("tier1_cases") and not item.get_closest_marker("deep"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        mark = same[0].get_closest_marker("tier1_cases")
        assert mark is not None
        stride = -(-len(same) // mark.args[0])
        for number, item in enumerate(same):
            if number % stride:
                item.add_marker("deep")
    if config.option.part is not None:
        part, count = config.option.part
        selected = [item for item in items if part_of(item.path, count) == part]
        config.hook.pytest_deselected(items=[item for item in items if part_of(item.path, count) != part])
        items[:] = selected


def _part(text: str) -> tuple[int, int]:
    """Parse N/COUNT."""
    part, count = map(int, text.split("/"))
    if not 0 <= part < count:
        raise ValueError(text)
    return part, count


def part_of(file: Path, count: int) -> int:
    """Return which of `count` parts of tier 2 a test file belongs to, by its path below tests/."""
    below = file.as_posix().rpartition("/tests/")[2]
    return zlib.crc32(below.encode()) % count


def charge(seconds: float) -> None:
    """Charge the running test with processor seconds of a worker that serves several tests."""
    _workers["seconds"] += seconds


def charge_lines_of(file: Path) -> None:
    """Charge each test with the lines that workers append to `file` while it runs: processor seconds."""
    _files_of_workers[file] = (0, 0.0)


@contextlib.contextmanager
def _measured(item: pytest.Item, phase: str) -> Iterator[None]:
    """Measure the processor seconds and the wall seconds of one phase of a test."""
    begin_s, imported_s, began = _processor_s(), _imports["seconds"], time.monotonic()
    try:
        yield
    finally:
        imported_s = _imports["seconds"] - imported_s
        item.stash.setdefault(USED, {})[phase] = Phase(
            _processor_s() - begin_s - imported_s, imported_s, time.monotonic() - began)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _measured(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _measured(item, "call"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with _measured(item, "teardown"):
        return (yield)


def write_times(item: pytest.Item, file: Path) -> None:
    """Append a line of JSON: processor and wall seconds of a test, of its fixtures, and of imports."""
    phases = item.stash[USED]
    call = phases.get("call", Phase(0.0, 0.0, 0.0))
    around = [phase for name, phase in phases.items() if name != "call"]
    row = {"seconds": call.processor_s, "wall": call.wall_s,
           "fixtures": sum(phase.processor_s for phase in around),
           "fixtures_wall": sum(phase.wall_s for phase in around),
           "imports": sum(phase.imports_s for phase in phases.values())}
    row = {name: round(value, 3) for name, value in row.items()}
    # a test that drops its privileges may not write here
    with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps({"test": item.nodeid, **row,
                                "deep": bool(item.get_closest_marker("deep"))}) + "\n")


def judge_processor_time(item: pytest.Item, report: pytest.TestReport) -> None:
    """Fail a tier-1 test whose call took more than `LIMIT_S`; with `--processor-times` write its times."""
    if file := item.config.option.processor_times:
        if report.when == "teardown":
            write_times(item, file)
        return
    if report.when != "call" or not report.passed or "call" not in item.stash.get(USED, {}):
        return
    is_free = item.get_closest_marker("deep") or item.get_closest_marker("gpu")
    limit_s = ESSENTIAL_LIMIT_S if item.get_closest_marker("essential") else LIMIT_S
    used_s = item.stash[USED]["call"].processor_s
    if is_free or used_s <= limit_s:
        return
    allowed_s = limit_s * NOISE * measure_slowness()
    if used_s > allowed_s:
        report.outcome = "failed"
        report.longrepr = (f"took {used_s:.1f} s of processor time, and a test of `make test` has at most "
                           f"{allowed_s:.1f} s on this machine: make it cheaper, or mark it deep")


def measure_slowness() -> float:
    """Return how much longer this core takes for a loop now than the
    core for which `LIMIT_S` holds; at least 1."""
    begin_s = time.process_time()
    total = 0
    for number in range(LOOP_ROUNDS):
        total += number * number
    return max(1.0, (time.process_time() - begin_s) / LOOP_S)


def _processor_s() -> float:
    """Return the processor seconds of this process, its children that have ended, and the work that shared
    workers have done for it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own_s = sum(one.ru_utime + one.ru_stime for one in used)
    for file in _files_of_workers:
        with contextlib.suppress(OSError):  # not there yet, or the test has given up its rights
            _read_new_lines(file)
    return own_s + _workers["seconds"] + sum(seconds for _, seconds in _files_of_workers.values())


def _read_new_lines(file: Path) -> None:
    """Add processor seconds that workers have appended to a file since the last read."""
    place, seconds = _files_of_workers[file]
    with file.open("rb") as lines:
        lines.seek(place)
        text = lines.read()
    complete = text[:text.rfind(b"\n") + 1]
    _files_of_workers[file] = (place + len(complete), seconds + sum(map(float, complete.split())))
