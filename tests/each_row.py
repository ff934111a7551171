"""`@pytest.mark.each(names, rows)`: `parametrize` inside a single test, which lists every row that fails.

pytest spends 13 ms of processor time on every case of `parametrize`, more than most rows take.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Test = Callable[..., None]


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: Any) -> list[Any] | None:
    """Collect a test with marks `each` as one test."""
    marks = [mark for mark in getattr(obj, "pytestmark", ()) if mark.name == "each"]
    if not marks or not collector.istestfunction(obj, name):
        return None
    joined = join_rows(obj, [mark.args for mark in marks])
    setattr(collector.obj, name, joined)  # from where an item takes its function
    return list(collector._genfunctions(name, joined))


def join_rows(test: Test, tables: Sequence[tuple[str | Sequence[str], Any]]) -> Test:
    """Return a test that goes over all combinations of rows of tables.

    Each row has its own folder `tmp_path`, its own patches of `monkeypatch`, and an empty `capsys`.

    Raises:
        ValueError: a table has no rows, or a row has marks, which one test for all rows cannot have.
    """
    names = [names.replace(",", " ").split() if isinstance(names, str) else names for names, _ in tables]
    rows = [[_get_arguments(of, row) for row in table] for of, (_, table) in zip(names, tables, strict=True)]
    combinations = [{name: value for part in parts for name, value in part.items()}
                    for parts in itertools.product(*reversed(rows))]

    if not combinations:
        raise ValueError(f"{test.__qualname__}: a table of `each` has no rows")

    @functools.wraps(test)
    def go_over_rows(**fixtures: Any) -> None:
        failed: list[BaseException] = []
        for number, arguments in enumerate(combinations):
            try:
                _run_row(test, number, fixtures, arguments)
            except (Exception, SystemExit, pytest.fail.Exception, pytest.skip.Exception) as error:
                error.add_note(f"in the row {arguments}")
                failed.append(error)
        if len(failed) == len(combinations) and all(isinstance(e, pytest.skip.Exception) for e in failed):
            raise failed[0]
        if failed:  # a row that skips fails: the other rows would hide it
            raise BaseExceptionGroup(f"{len(failed)} of {len(combinations)} rows fail", failed)

    kept = [parameter for name, parameter in inspect.signature(test).parameters.items()
            if not any(name in of for of in names)]
    go_over_rows.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    return go_over_rows


def _get_arguments(names: Sequence[str], row: Any) -> dict[str, Any]:
    values = row if len(names) > 1 else (row,)
    if isinstance(row, type(pytest.param())):
        values = row.values
        if row.marks:
            raise ValueError(f"the row {values} of `each` has marks, which are not applied; mark the test")
    return dict(zip(names, values, strict=True))


def _run_row(test: Test, number: int, fixtures: dict[str, Any], arguments: dict[str, Any]) -> None:
    own = dict(fixtures)
    if "tmp_path" in own:
        own["tmp_path"] = fixtures["tmp_path"] / str(number)
        own["tmp_path"].mkdir()
    if "capsys" in own:
        own["capsys"].readouterr()
    if "monkeypatch" not in own:
        test(**own, **arguments)
        return
    with fixtures["monkeypatch"].context() as own["monkeypatch"]:
        test(**own, **arguments)
