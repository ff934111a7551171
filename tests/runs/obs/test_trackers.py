"""Trackers write readable files and never stop a run."""

import json
import math
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError, format_install_command
from megatron_sov.model.config import ObsConfig
from megatron_sov.runs.obs.trackers import Trackers


def test_tensorboard_reads_back_logged_values(tmp_path: Path) -> None:
    trackers = Trackers(ObsConfig(tensorboard=True), tmp_path, {})
    for step in range(1, 4):
        trackers.log_step(step, {"loss": 1.0 / step, "learning_rate": 1e-3 * step})
    trackers.log_step(4, {"loss": float("nan")})
    trackers.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, TensorEvent

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["tensors"]) == ["learning_rate", "loss"]

    def read_scalar(event: TensorEvent) -> float:
        return float(event.tensor_proto.float_val[0])

    rates = [(event.step, read_scalar(event)) for event in events.Tensors("learning_rate")]
    assert rates == [(step, pytest.approx(1e-3 * step)) for step in (1, 2, 3)]
    loss = events.Tensors("loss")
    assert [read_scalar(e) for e in loss[:3]] == pytest.approx([1, 0.5, 1 / 3])
    assert math.isnan(read_scalar(loss[3])) and loss[3].step == 4


RESPONSES_EVENT = {"event": "responses", "step": 2, "of": "round", "rows": [
    {"prompt": "2 + 2?", "response": "a | b\n\n4 \u0635", "reward": None, "components": {}, "tokens": 3,
     "ended": "stop"},
    {"prompt": "3?", "response": "3", "reward": 0.5, "components": {"math": 1.0}, "tokens": 1,
     "ended": "length"}]}
VALIDATION_EVENT = {
    "event": "validation", "step": 2, "reward": 0.25, "truncated": 0.0, "response_tokens": 4.5,
    "pass_at_k": [{"k": 1, "value": 0.25}, {"k": 2, "value": 0.5}],
    "domains": {"a,b:c": {"reward": None, "pass_at_k": []}, "d": {"reward": 1.0}},
    "components": {"math": 0.5}}
CURVES = {"reward": 0.25, "truncated": 0.0, "response_tokens": 4.5, "pass_at_1": 0.25, "pass_at_2": 0.5,
          "component/math": 0.5, "domain/d/reward": 1.0}
"""Curve validation/KEY -> value that trackers show for `VALIDATION_EVENT`."""


def send_events(trackers: Trackers) -> None:
    for event in (RESPONSES_EVENT, VALIDATION_EVENT, {"event": "step", "step": 3}):
        trackers.observe(event)
    trackers.close()


def test_tensorboard_shows_responses_and_validations(tmp_path: Path) -> None:
    send_events(Trackers(ObsConfig(tensorboard=True), tmp_path, {}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {name: pytest.approx(float(events.Tensors(name)[0].tensor_proto.float_val[0]))
            for name in events.Tags()["tensors"]} == {f"validation/{k}": v for k, v in CURVES.items()}
    texts = EventAccumulator(str(tmp_path / "tensorboard/samples")).Reload()
    (event,) = texts.Tensors("samples/round")
    cells = make_ndarray(event.tensor_proto)
    assert event.step == 2 and cells.shape == (3, 6) and cells[0, 2] == b"reward"
    assert cells[1, 1].decode() == "    a | b\n    \n    4 \u0635"
    assert cells[1:, 2].tolist() == [b"    ", b"    0.5"]
    assert texts.SummaryMetadata("samples/round").plugin_data.plugin_name == "text"


def iter_wandb_records(file: Path) -> Iterator[bytes]:
    """Yield the records of an offline run in LevelDB's log format: a header of 7 bytes, then blocks of 32 KB.

    A chunk is crc32 (4 bytes), length (2), type (1: whole record, 2: first part, 3: middle,
    4: last), payload.
    """
    data, offset, parts = file.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        if (block_rest := 32768 - offset % 32768) < 7:
            offset += block_rest  # too short for a header: padding
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        parts.append(data[offset + 7:offset + 7 + length])
        offset += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_wandb(file: Path) -> tuple[str, list[dict[str, float]]]:
    """Return run id and history of an offline run, decoded by wandb's own protocol."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, history = "", []
    for data in iter_wandb_records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json)
                     for item in record.history.item}
            history.append({key: value for key, value in items.items() if not key.startswith("_")})
    return run_id, history


@pytest.mark.deep
def test_wandb_offline_continues_run_with_repeated_steps(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    attempts = []
    for steps in ((1, 2, 3), (2, 3, 4)):  # the second attempt goes back to a checkpoint after step 1
        trackers = Trackers(ObsConfig(wandb=True, wandb_project="test"), tmp_path,
                            {"recipe": "tiny-solar-open"})
        for step in steps:
            trackers.log_step(step, {"loss": 1.0 / step})
        send_events(trackers)
        (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        deadline_s = time.monotonic() + 600
        while not (decoded := read_wandb(file))[1] and time.monotonic() < deadline_s:
            time.sleep(0.1)  # a process of wandb's writes it
        attempts.append(decoded)
        (table,) = (tmp_path / "wandb").rglob("*.table.json")
        assert json.loads(table.read_text())["data"][1] == ["3?", "3", "0.5", '{"math": 1.0}', "1", "length"]
        shutil.rmtree(tmp_path / "wandb")  # an attempt's folder is named by the second in which it began
    run_id = (tmp_path / "wandb-id").read_text()
    for (attempt_id, history), steps in zip(attempts, ((1, 2, 3), (2, 3, 4)), strict=True):
        assert attempt_id == run_id
        assert history[:3] == [{"step": s, "loss": 1.0 / s} for s in steps]
        samples, validated = history[3:]
        assert samples.keys() == {"step", "samples/round"} and samples["step"] == 2
        assert validated == {"step": 2, **{f"validation/{name}": value for name, value in CURVES.items()}}


def test_failing_tracker_is_reported_once_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    trackers = Trackers(ObsConfig(tensorboard=True), tmp_path, {})
    calls = []

    def fail(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise OSError("no space left on the device")

    monkeypatch.setattr("tensorboard.summary.Writer.add_scalar", fail)
    trackers.log_step(1, {"loss": 1.0})
    trackers.log_step(2, {"loss": 1.0})
    trackers.close()
    assert len(calls) == 1
    assert capsys.readouterr().err == (
        "warning: TensorBoard failed (OSError: no space left on the device); the run continues without it\n")


def test_wandb_start_failure_does_not_stop_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    def fail_to_connect(**kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("wandb.init", fail_to_connect)
    Trackers(ObsConfig(wandb=True), tmp_path, {}).log_step(1, {"loss": 1.0})
    assert "Weights & Biases failed (ConnectionError: no route to host)" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_package_error_names_install_command(package: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"obs\.{package} = true needs the package {package}.*"
                       + re.escape(format_install_command("trackers"))):
        Trackers(ObsConfig(**{package: True}), tmp_path, {})


def test_disabled_trackers_write_no_files(tmp_path: Path) -> None:
    trackers = Trackers(ObsConfig(), tmp_path, {})
    trackers.log_step(1, {"loss": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []
