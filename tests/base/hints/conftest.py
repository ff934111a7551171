"""Every test of typed lines works in an empty folder of its own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def work_in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
