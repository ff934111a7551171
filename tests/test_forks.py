"""The fork runner of `forks.py`: two files at a time, separate output, and a crashed process fails only its
own test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep  # each starts another pytest
TESTS = Path(__file__).parent
ONE = """
import os, signal, time, warnings
def test_is_beside_another_file(pytestconfig):
    while not (pytestconfig.rootpath / "other").exists():
        time.sleep(0.01)
def test_says_what_is_wrong():
    os.write(1, b"said by the first\\n")
    assert [1, 2] == [1, 3]
def test_ends_its_process():
    if not os.fork():
        os.closerange(0, 3)
        time.sleep(9)  # what it has started goes on
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
def test_behind_it():
    warnings.warn("take care")
"""
SETTINGS = """
import pytest
@pytest.fixture(scope="session")
def cluster(pytestconfig):
    (pytestconfig.rootpath / "cluster").mkdir()  # a second one would fail
"""
THREE = """
def test_needs_the_cluster_too(cluster): pass
"""
TWO = """
import os, pytest
@pytest.fixture(scope="session")
def made(tmp_path_factory):
    yield tmp_path_factory.mktemp("made")
    print("nobody reads this")
def test_is_beside_another_file(pytestconfig, made):
    assert made.parent.name.startswith("fork-")
    (pytestconfig.rootpath / "other").touch()
@pytest.mark.xfail(reason="known")
def test_known(): assert False
def test_lacks(): pytest.skip("there is no disk")
def test_needs_the_cluster(cluster): pass
"""


def run(folder: Path) -> str:
    """Run pytest on these files in two forks, and return the result."""
    (folder / "test_one.py").write_text(ONE)
    (folder / "test_two.py").write_text(TWO)
    (folder / "test_three.py").write_text(THREE)
    (folder / "conftest.py").write_text(SETTINGS)
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.forks", "--forks", "2", "-c", "/dev/null", "-ra",
         "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)],
        capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert completed.returncode == 1, completed.stdout + completed.stderr
    assert not completed.stderr
    return completed.stdout


def test_forks_run_all_tests_and_a_killed_test_fails_alone(tmp_path: Path) -> None:
    output = run(tmp_path)
    assert re.search("= 2 failed, 5 passed, 1 skipped, 1 xfailed, 1 warning in ", output), output
    assert "the process has ended with exit code -9" in output.partition("_ test_ends_its_process _")[2]
    failure = output.partition("test_says_what_is_wrong")[2]
    assert "At index 1 diff: 2 != 3" in failure
    assert "said by the first" in failure
    assert "UserWarning: take care" in output
    assert re.search(r"SKIPPED \[1\] .*test_two.py:12: there is no disk", output)
    assert "nobody reads this" not in output
    assert re.search(r"largest memory of each fork: \d+, \d+ MB", output)


SKIPS = """
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
LEAVES = """
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


def test_skips_fail_if_all_programs_are_required(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(SKIPS)
    (tmp_path / "test_two.py").write_text(LEAVES)
    (tmp_path / "test_whole.py").write_text(WHOLE)
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(TESTS.parent / "pyproject.toml"),
         "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "--continue-on-collection-errors",
         str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "SOV_NEEDS_ALL": "1",
             "NVTE_FLASH_ATTN": "1"})
    assert "= 1 failed, 3 passed, 1 skipped, 1 xfailed, 2 errors in " in completed.stdout, completed.stdout
    assert completed.returncode == 1
    for reason in ("there is no Chromium", "there is no disk", "no_such_package"):
        lines = [line for line in completed.stdout.splitlines() if reason in line]
        assert any("SOV_NEEDS_ALL is set" in line for line in lines), completed.stdout
