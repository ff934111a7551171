"""Logs of inspect-ai: a real one (0.3.285, `inspect_logs/sums.py` against an endpoint that fails for one
item, and cuts another), and what is refused of strangers' logs."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_sov.base.errors import UserError
from megatron_sov.bench import inspect_logs
from megatron_sov.bench.inspect_logs import HEADER, ZSTANDARD, number_of, read_log

LOG = Path(__file__).parent / "inspect_logs" / "sums.eval"
THEIR_STDERR = 0.24494897427831783
"""That the library has computed, see the log's header."""


def members(log: Path = LOG) -> dict[str, Any]:
    """Return name -> content of a log's members."""
    with zipfile.ZipFile(log) as archive, open(log, "rb") as file:
        return {m.filename: json.loads(inspect_logs._read(m, archive, file)) for m in archive.infolist()}


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a log of these members, as the library's versions before zstandard did."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value if isinstance(value, bytes) else json.dumps(value))
    return path


def test_a_real_log_has_the_library_s_figure_and_error_and_the_items_behind_it() -> None:
    log = read_log(LOG)
    (accuracy,) = log.scores.metrics
    assert (log.task, log.version, log.model.path) == ("sums", "0.3.285", "openai-api/sov/m")
    assert (accuracy.name, accuracy.filter) == ("accuracy", "match")
    assert (accuracy.value, accuracy.clusters) == (0.6, 5)
    assert accuracy.stderr == pytest.approx(THEIR_STDERR, rel=1e-12)
    assert accuracy.interval is not None and accuracy.interval[0] < 0.6 < accuracy.interval[1]
    assert (log.scores.items, log.scores.failed, log.scores.at_limit) == (6, 1, 2)
    assert (log.scores.sampling.samples, log.scores.sampling.max_tokens) == (2, 8)
    assert [item.item for item in log.items] == [f"s{i}" for i in range(6)]
    assert [item.scores.get("accuracy,match") for item in log.items] == [1, 0, 1, None, 1, 0]
    assert [sample.finish_reason for sample in log.items[1].samples] == ["length", "length"]
    assert (log.items[2].question, log.items[2].answer, log.items[2].samples[0].response) == (
        "2 + 1 = ?", "3", "3")
    assert "Error code: 422" in str(log.items[3].failed)
    assert log.notes[0].startswith("sums: 1 of 6 items have no score; of the first: ModelGenerateError")


def test_older_compressions_the_json_form_and_logs_without_reductions_say_the_same(tmp_path: Path) -> None:
    content, expected = members(), read_log(LOG)
    samples = [value for name, value in content.items() if name.startswith("samples/")]
    (tmp_path / "log.json").write_text(json.dumps({**content[HEADER], "samples": samples}))
    deflated = write(tmp_path / "log.eval", content)
    for path in (deflated, tmp_path / "log.json"):
        found = read_log(path)
        assert (found.scores, found.items) == (expected.scores, expected.items), path.name


def test_items_that_belong_together_are_clusters_where_the_task_says_so(tmp_path: Path) -> None:
    content = members()
    content[HEADER]["results"]["scores"][0]["metrics"]["stderr"]["params"] = {"cluster": "half"}
    log = read_log(write(tmp_path / "log.eval", content))
    assert [item.cluster for item in log.items] == ["0", "0", "1", "1", "2", "2"]
    # s0 and s1, s2 alone (s3 failed), s4 and s5: sums from the mean of -0.2, 0.4, -0.2
    assert log.scores.metrics[0].clusters == 3
    assert log.scores.metrics[0].stderr == pytest.approx((1.5 * 0.24)**0.5 / 5)


def test_a_figure_that_is_no_mean_of_its_items_has_no_interval(tmp_path: Path) -> None:
    content = members()
    content[HEADER]["results"]["scores"][0]["metrics"]["accuracy"]["value"] = 0.9
    log = read_log(write(tmp_path / "log.eval", content))
    assert (log.scores.metrics[0].value, log.scores.metrics[0].interval) == (0.9, None)
    assert log.notes[0] == "sums: accuracy of match is no mean of its items' values; it has no interval"


@pytest.mark.parametrize("value, number", [
    ("C", 1.0), ("P", 0.5), ("I", 0.0), ("N", 0.0), ("Yes", 1.0), ("0.25", 0.25), (True, 1.0), (3, 3.0),
    ("c", None), ("perhaps", None), (float("nan"), None), ([1], None), (None, None)])
def test_scores_count_as_the_library_counts_them(value: Any, number: float | None) -> None:
    assert number_of(value) == number


def _status(status: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[HEADER] |= {"status": status, "error": {"message": "no disk"}}
    return change


@pytest.mark.parametrize("change, said", [
    (lambda c: c.pop(HEADER), r"has not ended well \(status started\)"),
    (_status("error"), r"has not ended well \(status error: no disk\); go on with it by `inspect"),
    (lambda c: (c.pop(HEADER), c.pop("_journal/start.json")), "is no log of inspect-ai, or is damaged"),
    (lambda c: c.update({HEADER: b"[" * 100_000}), "is damaged"),
    (lambda c: c[HEADER].pop("eval"), r"is damaged \(KeyError"),
    (lambda c: c.update({"samples/again.json": c["samples/s2_epoch_1.json"]}), "sample s2 is there twice"),
    (lambda c: c["samples/s2_epoch_1.json"].update(scores=7), "is damaged")])
def test_logs_that_have_not_ended_or_are_damaged_are_refused(
        change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path) -> None:
    content = members()
    change(content)
    with pytest.raises(UserError, match=said):
        read_log(write(tmp_path / "log.eval", content))


def test_a_member_that_would_grow_beyond_bounds_is_not_unpacked(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_logs, "MAX_MEMBER_BYTES", 1 << 20)
    content = members() | {HEADER: b" " * (1 << 21)}
    with pytest.raises(UserError, match="more than 1,048,576"):
        read_log(write(tmp_path / "log.eval", content))
    # one whose size in the archive is a lie
    packed = zstandard.compress(b" " * (1 << 21))
    raw = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, ZSTANDARD, 0, 0, 0, len(packed), 9, len(HEADER), 0)
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, ZSTANDARD, 0, 0, zlib.crc32(b" " * 9),
                        len(packed), 9, len(HEADER), 0, 0, 0, 0, 0, 0) + HEADER.encode()
    body = raw + HEADER.encode() + packed
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(body), 0)
    (tmp_path / "lie.eval").write_bytes(body + entry + end)
    with pytest.raises(UserError, match="differs from its size or checksum"):
        read_log(tmp_path / "lie.eval")


def test_members_with_other_names_are_not_looked_at(tmp_path: Path) -> None:
    content = members() | {"../../samples/evil.json": b"{", "samples/../evil.json": b"{",
                           "samples/x.pkl": b"\x80"}
    assert read_log(write(tmp_path / "log.eval", content)).items == read_log(LOG).items


def test_what_is_no_log_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.eval").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="is no log of inspect-ai"):
        read_log(tmp_path / "log.eval")
    with pytest.raises(UserError, match="No such file"):
        read_log(tmp_path / "missing.eval")
