"""Compressed files: the same bytes as the library's, and memory in bounds whatever they stand for."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from megatron_sov.base.documents.zstd import ZstdFile


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


# Small files that stand for very much: reading them takes the memory of the record limit, not of their
# content.


ZEROS_BYTES = 400_000_000
MAX_GROWTH_MB = 120
READ = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from megatron_sov.base.documents import RecordReading, list_files
from megatron_sov.base.documents.files import spans_of
from megatron_sov.base.documents.reading import read_span
def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024
before, codes = peak_mb(), set()
for span in spans_of(Path(sys.argv[1])):
    codes |= {item.code for item in read_span(span, RecordReading(max_document_bytes=1_000_000))}
print(peak_mb() - before, *codes)
"""


def zeros_gz(file: Path) -> None:
    with gzip.open(file, "wb", compresslevel=1) as f:
        for _ in range(ZEROS_BYTES // 4_000_000):
            f.write(bytes(4_000_000))


def zeros_zst(file: Path) -> None:
    with zstandard.open(file, "wb") as f:
        for _ in range(ZEROS_BYTES // 4_000_000):
            f.write(bytes(4_000_000))


def one_string_in_many_rows(file: Path) -> None:
    # all rows share one string, so that it is not this process that needs 2 GB
    rows = pyarrow.chunked_array([pyarrow.array(["x" * 4_000_000])] * 200)
    parquet.write_table(pyarrow.table({"text": rows}), file, compression="zstd", store_schema=False)


@pytest.mark.deep
@pytest.mark.parametrize(("name", "write"), [
    ("a.jsonl.gz", zeros_gz), pytest.param("a.jsonl.zst", zeros_zst, marks=pytest.mark.deep),
    ("a.parquet", one_string_in_many_rows)])
def test_memory_is_that_of_the_record_limit(name: str, write, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 2_000_000
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / name)], capture_output=True, text=True,
                          check=True)
    growth_mb, *codes = done.stdout.split()
    assert codes == ["too_long"] and int(growth_mb) < MAX_GROWTH_MB, done.stdout
