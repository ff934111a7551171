"""Compressed files: the same bytes as the library's, whatever the frames and the reads;
a cut-off one is noticed."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sov.documents.zstd import ZstdFile


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=3000), max_size=5), st.integers(1, 5000))
def test_frames_join_to_their_content(frames: list[bytes], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.zst"
        file.write_bytes(b"".join(map(zstandard.compress, frames)))
        with io.BufferedReader(ZstdFile(file)) as f:
            assert b"".join(iter(lambda: f.read(size), b"")) == b"".join(frames)


def test_a_large_ratio_is_read_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.zst").write_bytes(zstandard.compress(bytes(50_000_000)))
    with io.BufferedReader(ZstdFile(tmp_path / "a.zst")) as f:
        assert sum(map(len, iter(lambda: f.read(1 << 16), b""))) == 50_000_000


@pytest.mark.parametrize("cut", [1, 5, 500])
def test_a_cut_or_damaged_file_is_noticed(tmp_path: Path, cut: int) -> None:
    raw = zstandard.compress(b"first") + zstandard.compress(bytes(range(256)) * 40, 1)
    (tmp_path / "a.zst").write_bytes(raw[: len(raw) - min(cut, len(raw) // 3)])
    with (pytest.raises(EOFError, match="inside a frame"),
          io.BufferedReader(ZstdFile(tmp_path / "a.zst")) as f):
        f.read()
    (tmp_path / "b.zst").write_bytes(b"no zstd at all")
    with pytest.raises(EOFError), io.BufferedReader(ZstdFile(tmp_path / "b.zst")) as f:
        f.read()
