"""Damaged work files of a run are detected: one flipped bit or a truncation anywhere is an error."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.curate.dedup.work_files import read_array, read_bucket, write_array, write_buckets
from data_prep.curate.pipeline.step import StepOutcome
from data_prep.curate.pipeline.tasks import LayerFile, iter_row_batches
from data_prep.damaged_files import explain_deletion
from megatron_sov.base import sealed
from megatron_sov.base.errors import UserError
from tests.data_prep.curate.pipeline.test_running import read_first_words, run_pipeline
from tests.data_prep.curate.pipeline.test_tasks import write_base

RECORD = np.dtype([("key", "<u8"), ("doc", "<u8")])

# Each function writes a kind of work file, and returns it and a function that reads it.


def make_base(folder: Path) -> tuple[Path, Callable[[], Any]]:
    write_base(folder / "a.parquet", [3, 2])
    return folder / "a.parquet", lambda: list(iter_row_batches("s", [folder / "a.parquet"]))


def make_layer(folder: Path) -> tuple[Path, Callable[[], Any]]:
    write_base(folder / "a.parquet", [3])
    with LayerFile(folder / "b.parquet", {"score": "float32"}) as layer:
        layer.write_outcomes([StepOutcome(values={"score": 0.5}), StepOutcome("no"),
                              StepOutcome(text="other")])
    files = [folder / "a.parquet", folder / "b.parquet"]
    return files[1], lambda: list(iter_row_batches("s", files))


def make_array(folder: Path) -> tuple[Path, Callable[[], Any]]:
    write_array(folder / "a.npy", np.arange(40))
    return folder / "a.npy", lambda: read_array(folder / "a.npy").tolist()


def make_buckets(folder: Path) -> tuple[Path, Callable[[], Any]]:
    records = np.zeros(12, RECORD)
    records["key"], records["doc"] = np.arange(12), 7
    write_buckets(folder / "a", records, np.repeat([0, 1, 3], 4), 4)
    return folder / "a", lambda: [read_bucket(folder / "a", RECORD, bucket).tolist() for bucket in range(4)]


def make_json(folder: Path) -> tuple[Path, Callable[[], Any]]:
    sealed.write_sealed_json(folder / "a.json",
                             {"documents_in": 5, "dropped": {"a": {"bytes": 1}}, "cpu_s": 0.25})
    return folder / "a.json", lambda: sealed.read_sealed_json(folder / "a.json")


def make_lines(folder: Path) -> tuple[Path, Callable[[], Any]]:
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        {"document": "s:0:1", "item": "x"}, {sealed.SEAL: sealed.SEAL_PLACEHOLDER})))
    sealed.seal_file(folder / "a.jsonl")
    return folder / "a.jsonl", lambda: sealed.read_sealed_lines(folder / "a.jsonl")


KINDS = [make_base, make_layer, make_array, make_buckets, make_json, make_lines]


@pytest.mark.parametrize("make", KINDS)
def test_a_flipped_bit_or_a_cut_is_an_error_that_names_the_file(make: Any, tmp_path: Path) -> None:
    file, read = make(tmp_path)
    whole, expected, rng = file.read_bytes(), read(), random.Random(0)
    damaged = [whole[:rng.randrange(len(whole))] for _ in range(10)]
    for _ in range(60):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
    for content in damaged:
        file.write_bytes(content)
        try:
            assert read() == expected, "damage is reported, or changes nothing that is read"
        except (UserError, ValueError) as e:
            assert str(file) in str(e) or "damaged" in str(e)
    file.write_bytes(whole)
    assert read() == expected


def test_a_seal_is_found_after_a_long_footer_and_ignored_inside_rows(tmp_path: Path) -> None:
    rows = pa.table({"text": ["x sealed:blake3:" + "a" * 70, sealed.SEAL_PLACEHOLDER]})
    file = tmp_path / "a.parquet"
    for table in (rows, rows.replace_schema_metadata({"names": "x" * 200_000})):
        with pq.ParquetWriter(file, table.schema, compression="none") as writer:
            writer.write_table(table)
        # a file without a seal is not damaged
        assert sealed.open_sealed_parquet(file).read().num_rows == 2
        with pq.ParquetWriter(file, table.schema, compression="none") as writer:
            writer.write_table(table)
            sealed.seal_parquet(writer)
        sealed.seal_file(file)
        assert sealed.open_sealed_parquet(file, is_required=True).read() == rows
        _flip(file)
        with pytest.raises(UserError):
            sealed.open_sealed_parquet(file)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_damaged_output_of_a_complete_run_is_detected(small_run: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    output = run_pipeline(small_run)
    _flip(output / "text/web-long/00000.parquet")
    run_pipeline(small_run, code=2)
    assert "is damaged" in capsys.readouterr().err
    for folder in output.glob("shards/web/*-output-*/*/"):
        shutil.rmtree(folder)
    assert read_first_words(run_pipeline(small_run))


def test_a_missing_file_of_an_output_shard_is_detected(small_run: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    output = run_pipeline(small_run)
    (output / "manifest.json").unlink()
    next(output.glob("shards/web/*-output-*/*/web-long.parquet")).unlink()
    run_pipeline(small_run, code=2)
    assert "documents where" in capsys.readouterr().err


def test_a_message_never_proposes_to_delete_a_folder_above_the_run(tmp_path: Path) -> None:
    message = explain_deletion(tmp_path / "shared/mine/out/shards/web/01-shorten-aaaa/00000.parquet")
    assert "-samefile" in message and f"delete {tmp_path}" not in message
    assert explain_deletion(tmp_path / "shared/mine/out/shared/02-unique-a/x/y").startswith(
        f"delete {tmp_path}/shared/mine/out/shared/02-unique-a and")
