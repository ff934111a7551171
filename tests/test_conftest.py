"""What this folder's settings do to tests: where nothing may be lacking, a skipped one is a failed one, and a
test for GPUs stays skipped; what one leaves behind in its process is no part of the next one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep  # each starts pytest anew
TESTS = Path(__file__).parent
ONE = """
import pytest
def test_passes(): pass
def test_lacks(): pytest.skip("there is no Chromium")
@pytest.mark.skipif(True, reason="there is no disk")
def test_lacks_too(): pass
@pytest.mark.gpu
def test_gpu(): pytest.skip("there is no GPU")
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""
TWO = """
import os, signal, sys
def test_leaves(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("NAME = 1")
    monkeypatch.syspath_prepend(tmp_path)
    import mine
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.update(NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="1")
def test_finds_nothing():
    assert "mine" not in sys.modules
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert {k: v for k, v in os.environ.items() if k.startswith("NVTE_")} == {"NVTE_FLASH_ATTN": "1"}
"""
WHOLE = 'import pytest\npytest.importorskip("no_such_package")\n'


@pytest.mark.parametrize(("needs_all", "outcome"), [
    pytest.param("", "3 passed, 4 skipped, 1 xfailed", marks=pytest.mark.deep),
    ("1", "1 failed, 3 passed, 1 skipped, 1 xfailed, 2 errors")])
def test_skips_count_as_failures_where_all_is_needed_and_nothing_is_left_behind(
        needs_all: str, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(ONE)
    (tmp_path / "test_two.py").write_text(TWO)
    (tmp_path / "test_whole.py").write_text(WHOLE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(TESTS.parent / "pyproject.toml"),
         "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "--continue-on-collection-errors",
         str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "SOV_NEEDS_ALL": needs_all,
             "NVTE_FLASH_ATTN": "1"})
    assert f"= {outcome} in " in done.stdout, done.stdout
    assert done.returncode == (1 if needs_all else 0)
    for reason in ("there is no Chromium", "there is no disk", "no_such_package"):
        told = any(reason in line and "SOV_NEEDS_ALL is set" in line for line in done.stdout.splitlines())
        assert told == bool(needs_all), done.stdout
