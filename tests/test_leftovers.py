"""What a test leaves behind in its process is no part of the next one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
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


def test_what_one_leaves_the_next_does_not_find(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(TESTS.parent / "pyproject.toml"),
         "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "NVTE_FLASH_ATTN": "1"})
    assert "= 2 passed in " in done.stdout, done.stdout
