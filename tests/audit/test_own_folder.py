"""Folders in which a run is done again: what a kill left is made anew, and what is a user's stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.audit.own_folder import make_once
from megatron_sov.base.errors import UserError


def make(folder: Path, identity: str = "a", *, fails: bool = False) -> None:
    def content() -> None:
        (folder / "run").mkdir()
        (folder / "run/half").touch()
        if fails:
            raise KeyboardInterrupt
        (folder / "run/all").touch()

    make_once(folder, {"run": identity}, ("run",), content, what="replay", other="the replay of another run")


def test_what_a_killed_command_left_is_made_anew_and_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(folder, fails=True)
    make(folder)
    (folder / "run/half").unlink()
    make(folder)
    assert [path.name for path in (folder / "run").iterdir()] == ["all"]


def test_what_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(mine)
    for folder in (mine, tmp_path / "link"):
        with pytest.raises(UserError, match="is a link, or holds something else than a replay"):
            make(folder)
    assert (mine / "thesis.txt").read_text() == "years of work"
    make(tmp_path / "out")
    with pytest.raises(UserError, match="holds the replay of another run; name another --output"):
        make(tmp_path / "out", "b")
