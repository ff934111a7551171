"""Folders that programs leave: counted and removed, however deep and whatever may not be entered."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sov.work.sandbox.folders import MAX_ENTRIES, remove, size_bytes

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a user who is not root, whom no folder is closed to."""
    made = Path(tempfile.mkdtemp(prefix="folders-", dir="/tmp"))
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(made, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield made
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(made, ignore_errors=True)


def test_what_lies_deeper_than_any_path_is_counted(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("n" * 255, dir_fd=fd)
        inner = os.open("n" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    with open(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "wb") as f:
        f.write(bytes(1 << 16))
    os.close(fd)
    (folder / "link").symlink_to("/usr")
    num_bytes, num_entries = size_bytes(str(folder))
    assert num_bytes >= 1 << 16 and num_entries == 32
    remove(str(folder))
    assert not folder.exists()


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500])
def test_what_its_owner_may_not_enter_is_full_and_goes(folder: Path, mode: int) -> None:
    (folder / "outer" / "closed").mkdir(parents=True)
    (folder / "outer" / "closed" / "file").write_text("x")
    (folder / "outer" / "closed").chmod(mode)
    assert (size_bytes(str(folder))[1] == MAX_ENTRIES) == (mode != 0o500)
    remove(str(folder))
    assert not folder.exists()
