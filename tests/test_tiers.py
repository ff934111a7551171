"""The tests that `make test` runs, and their time limit."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiers
from tests.each_row import join_rows

ROOT = Path(__file__).parents[1]


def judge_time(used_s: float, tmp_path: Path, *, deep: bool = False, outcome: str = "passed",
               when: str = "call", times: Path | None = None) -> Any:
    """Return the report of a test that took so much processor time."""
    phases = {"setup": tiers.Phase(2.0, 1.0, 4.0), "call": tiers.Phase(used_s, 0.5, 70.0)}
    item: Any = SimpleNamespace(
        nodeid="tests/test_a.py::test_b", stash={tiers.USED: phases},
        config=SimpleNamespace(option=SimpleNamespace(processor_times=times)),
        get_closest_marker=lambda name: deep and name == "deep")
    report: Any = SimpleNamespace(when=when, outcome=outcome, passed=outcome == "passed", longrepr="")
    tiers.judge_processor_time(item, report)
    return report


def test_a_slow_test_fails_and_a_deep_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "measure_slowness", lambda: 1.0)
    assert judge_time(5.9, tmp_path).outcome == "passed"
    assert judge_time(6.1, tmp_path).outcome == "failed"
    assert "at most 6.0 s on this machine" in judge_time(6.1, tmp_path).longrepr
    assert judge_time(60, tmp_path, deep=True).outcome == "passed"
    assert judge_time(60, tmp_path, outcome="failed").longrepr == ""


@pytest.mark.tier1_cases(2)
@pytest.mark.parametrize("number", range(5))
def test_cases_beyond_the_count_are_deep(number: int, request: pytest.FixtureRequest) -> None:
    assert (request.node.get_closest_marker("deep") is None) == (number in (0, 3))


def test_a_slow_machine_allows_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "measure_slowness", lambda: 2.0)
    assert judge_time(11.9, tmp_path).outcome == "passed"
    assert judge_time(12.1, tmp_path).outcome == "failed"
    assert tiers.measure_slowness() >= 1


def test_each_row_that_fails_is_named(tmp_path: Path) -> None:
    def check(tmp_path: Path, left: int, right: int) -> None:
        (tmp_path / "of this row").mkdir()
        if left:
            assert left != right
        else:
            pytest.fail("0")

    joined = join_rows(check, [("left", [0, 1, 2]), (("right",), [pytest.param(1), 3])])
    with pytest.raises(BaseExceptionGroup, match="3 of 6 rows fail") as failed:
        joined(tmp_path=tmp_path)
    assert [error.__notes__ for error in failed.value.exceptions] == [
        [f"in the row {{'right': {right}, 'left': {left}}}"] for right, left in ((1, 0), (1, 1), (3, 0))]


def end_row(end: str) -> None:
    if end == "exit":
        raise SystemExit(2)
    if end == "skip":
        pytest.skip("no disk")


@pytest.mark.parametrize(("ends", "num_failed"), [
    (["exit", "pass"], 1), (["pass", "skip", "exit"], 2), (["pass", "pass"], 0)])
def test_a_row_that_exits_or_skips_fails(ends: list[str], num_failed: int) -> None:
    with contextlib.suppress(BaseExceptionGroup) if not num_failed else pytest.raises(
            BaseExceptionGroup, match=f"{num_failed} of {len(ends)} rows fail"):
        join_rows(end_row, [("end", ends)])()


def test_a_test_whose_rows_all_skip_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception, match="no disk"):
        join_rows(end_row, [("end", ["skip", "skip"])])()


def test_a_table_without_rows_or_with_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="end_row: a table of `each` has no rows"):
        join_rows(end_row, [("end", [])])
    with pytest.raises(ValueError, match="has marks, which are not applied"):
        join_rows(end_row, [("end", [pytest.param("pass", marks=pytest.mark.deep)])])


def burn(seconds: float) -> None:
    """Use a processor for so many seconds."""
    until_s = time.process_time() + seconds
    while time.process_time() < until_s:
        pass


def test_a_worker_charges_the_test_that_used_it(ranks: Any, job: Any, run_command: Any, tmp_path: Path
                                                ) -> None:
    before_s = tiers._processor_s()
    ranks(job(__file__, "burn", 2, {"seconds": 0.5}))
    after_s = tiers._processor_s()
    assert 1.0 <= after_s - before_s < 5
    (tmp_path / "burn.py").write_text(
        "import time\nuntil_s = time.process_time() + 0.5\nwhile time.process_time() < until_s:\n    pass\n")
    run_command(str(tmp_path / "burn.py"), program="python")
    assert tiers._processor_s() - after_s >= 0.5


@pytest.mark.parametrize("count", [5, 20])
def test_the_parts_share_all_files_and_depend_on_no_folder_above(count: int) -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    parts = [tiers.part_of(file, count) for file in files]
    assert set(parts) == set(range(count))
    assert max(map(parts.count, parts)) < 2 * len(files) / count
    assert parts == [tiers.part_of(Path("/elsewhere") / file.relative_to(ROOT), count) for file in files]
