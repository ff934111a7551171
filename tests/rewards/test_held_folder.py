"""One process at a time holds a folder, and one that is gone by then is held by nobody."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.rewards import held_folder
from megatron_sov.rewards.held_folder import held


def test_a_folder_is_held_until_the_end(tmp_path: Path) -> None:
    folder, output = tmp_path / "deep/.out", tmp_path / "out"
    with held(folder, output), pytest.raises(UserError) as raised, held(folder, output):
        raise AssertionError("two hold it")
    assert str(raised.value) == (f"--output {output}: is being written by another process ({folder} is "
                                 "held); wait for it, or name another output")
    with held(folder, output):
        assert folder.is_dir()


@pytest.mark.parametrize("another_one", [False, True])
def test_one_that_its_holder_removes_before_it_is_held_is_not_held(
        another_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".out"

    def holds(fd: int) -> bool:
        folder.rename(tmp_path / "removed")
        if another_one:
            folder.mkdir()
        return True

    monkeypatch.setattr(held_folder, "holds", holds)
    with pytest.raises(UserError, match="being written by another process"), held(folder, tmp_path / "out"):
        raise AssertionError("two hold the output")


def test_one_that_its_holder_removes_before_it_is_opened_is_not_held(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, flags: int) -> int:
        path.rmdir()
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(UserError, match="being written by another process"), \
            held(tmp_path / ".out", tmp_path / "out"):
        raise AssertionError("nobody holds what is gone")
