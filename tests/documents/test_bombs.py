"""Small files that stand for very much: reading them takes the memory of the record limit,
not of their content."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

ZEROS_BYTES = 400_000_000
MAX_GROWTH_MB = 120
READ = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from megatron_sov.documents import Reading, list_files
from megatron_sov.documents.files import spans_of
from megatron_sov.documents.reading import read_span
def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024
before, codes = peak_mb(), set()
for span in spans_of(Path(sys.argv[1])):
    codes |= {item.code for item in read_span(span, Reading(max_document_bytes=1_000_000))}
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


@pytest.mark.parametrize(("name", "write"), [
    ("a.jsonl.gz", zeros_gz), ("a.jsonl.zst", zeros_zst), ("a.parquet", one_string_in_many_rows)])
def test_memory_is_that_of_the_record_limit(name: str, write, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 2_000_000
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path / name)], capture_output=True, text=True,
                          check=True)
    growth_mb, *codes = done.stdout.split()
    assert codes == ["too_long"] and int(growth_mb) < MAX_GROWTH_MB, done.stdout
