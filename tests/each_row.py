"""Plugin for `@pytest.mark.each(names, rows)`: like `parametrize`, but one test runs all rows.

The test lists every row that fails. With `parametrize`, pytest spends 13 ms of processor time on each case,
more than most rows take.
"""

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Test = Callable[..., None]


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: Any) -> list[Any] | None:
    """Collect a function with marks `each` as one test that runs all rows."""
    marks = [mark for mark in getattr(obj, "pytestmark", ()) if mark.name == "each"]
    if not marks or not collector.istestfunction(obj, name):
        return None
    joined = join_rows(obj, [mark.args for mark in marks])
    setattr(collector.obj, name, joined)  # pytest looks the function up there
    return list(collector._genfunctions(name, joined))


def join_rows(test: Test, tables: Sequence[tuple[str | Sequence[str], Any]]) -> Test:
    """Return a test that runs all combinations of the tables' rows.

    Each combination has its own folder `tmp_path` or `cwd`, patches of `monkeypatch`, and empty `capsys`.

    Args:
        test: the test function.
        tables: (names, rows) of each mark, as for `parametrize`.

    Raises:
        ValueError: a table has no rows, or a row has marks, which cannot apply to one test for all rows.
    """
    all_names: set[str] = set()
    tables_of_arguments = []
    for names, table in tables:
        if isinstance(names, str):
            names = names.replace(",", " ").split()
        all_names.update(names)
        tables_of_arguments.append([_get_arguments(names, row) for row in table])
    combinations = [{name: value for arguments in rows for name, value in arguments.items()}
                    for rows in itertools.product(*reversed(tables_of_arguments))]
    if not combinations:
        raise ValueError(f"{test.__qualname__}: a table of `each` has no rows")

    @functools.wraps(test)
    def run_rows(**fixtures: Any) -> None:
        failures: list[BaseException] = []
        for number, arguments in enumerate(combinations):
            try:
                _run_row(test, number, fixtures, arguments)
            except (Exception, SystemExit, pytest.fail.Exception, pytest.skip.Exception) as error:
                error.add_note(f"in the row {arguments}")
                failures.append(error)
        num_skips = sum(isinstance(error, pytest.skip.Exception) for error in failures)
        if num_skips == len(combinations):
            raise failures[0]
        if failures:  # skips of only some rows are failures: passing rows would hide them
            raise BaseExceptionGroup(f"{len(failures)} of {len(combinations)} rows fail", failures)

    fixture_parameters = [parameter for name, parameter in inspect.signature(test).parameters.items()
                          if name not in all_names]
    run_rows.__signature__ = inspect.Signature(fixture_parameters)  # type: ignore[attr-defined]
    return run_rows


def _get_arguments(names: Sequence[str], row: Any) -> dict[str, Any]:
    """Return the arguments of a row, which may be a `pytest.param`."""
    values = row if len(names) > 1 else (row,)
    if isinstance(row, type(pytest.param())):
        values = row.values
        if row.marks:
            raise ValueError(f"the row {values} of `each` has marks, which are not applied; mark the test")
    return dict(zip(names, values, strict=True))


def _run_row(test: Test, number: int, fixtures: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Run the test for one row, with its own `tmp_path` or `cwd` and `monkeypatch`, and an empty `capsys`."""
    row_fixtures = dict(fixtures)
    if folders := {"tmp_path", "cwd"} & fixtures.keys():  # the same folder under two names
        folder = fixtures[min(folders)] / str(number)
        folder.mkdir()
        row_fixtures |= dict.fromkeys(folders, folder)
    if "cwd" in fixtures:
        os.chdir(row_fixtures["cwd"])
    if "capsys" in fixtures:
        fixtures["capsys"].readouterr()
    if "monkeypatch" not in fixtures:
        test(**row_fixtures, **arguments)
        return
    with fixtures["monkeypatch"].context() as row_fixtures["monkeypatch"]:
        test(**row_fixtures, **arguments)
