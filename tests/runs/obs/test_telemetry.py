"""A run's events as metrics: a collector and Prometheus's own parser read what is sent, whoever fails is told
once, and training computes the same bits with everything on as with everything off."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from megatron_sov.model.config import ObsConfig
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.obs import exporters, telemetry
from megatron_sov.runs.obs.exporters import METRICS, Board, Otlp, Webhook
from megatron_sov.runs.obs.telemetry import Port, Telemetry
from tests.tiny import tiny_trainer

RESOURCE = {"service.name": "megatron-sov", "service.instance.id": "run", "sov.recipe": "tiny"}
EVENTS: list[dict[str, Any]] = [
    {"event": "run_start", "time_s": 1.0, "num_ranks": 2, "num_steps": 40, "resumed_from": 0,
     "machine": {"gpu_uuid": "GPU-1"}},
    *({"event": "step", "time_s": 2.0 + step, "step": step, "loss": 3.0 / step, "grad_norm": 1.5, "lr": 1e-3,
       "tokens": 64 * step, "step_time_s": 0.5, "tokens_per_s": 128.0, "tflops_per_process": 0.25,
       "mfu": 0.4, "peak_memory_bytes": 2e9, "gpu_power_w": 400.0, "gpu_utilization": 0.9,
       "gpu_temperature_c": 61.0, "energy_j": 200.0} for step in (1, 2)),
    {"event": "eval", "time_s": 5.0, "step": 2, "heldout": {"web": {"loss": "nan", "bits_per_byte": 1.5}}},
    {"event": "skip", "time_s": 6.0, "step": 3, "reason": "the loss is nan", "ranks": [1]},
    {"event": "checkpoint", "time_s": 7.0, "step": 2, "save_s": 0.75},
    {"event": "energy", "time_s": 7.5, "step": 2, "energy_j": 800.0, "num_gpus": 2},
    {"event": "odd", "time_s": 8.0}]
EXPECTED = {
    ("sov_train_running", ()): 0.0, ("sov_train_processes", ()): 2.0,
    ("sov_train_steps_planned", ()): 40.0, ("sov_train_steps_done", ()): 2.0,
    ("sov_train_last_event_time_seconds", ()): 8.0, ("sov_train_loss", ()): 1.5,
    ("sov_train_gradient_norm", ()): 1.5, ("sov_train_learning_rate", ()): 1e-3,
    ("sov_train_step_duration_seconds", ()): 0.5, ("sov_train_throughput_per_second", ()): 128.0,
    ("sov_train_model_flops_per_second", ()): 2.5e11, ("sov_train_mfu_ratio", ()): 0.4,
    ("sov_train_memory_peak_bytes", ()): 2e9, ("sov_train_tokens_total", ()): 128.0,
    ("sov_train_checkpoints_total", ()): 1.0, ("sov_train_checkpoint_duration_seconds", ()): 0.75,
    ("sov_train_incidents_total", ("skip",)): 1.0, ("sov_train_heldout_bits_per_byte", ("web",)): 1.5,
    ("sov_train_energy_joules_total", ()): 800.0, ("hw_energy_joules_total", ("GPU-1", "gpu")): 400.0,
    ("hw_power_watts", ("GPU-1", "gpu")): 400.0, ("hw_temperature_celsius", ("GPU-1", "gpu")): 61.0,
    ("hw_gpu_utilization_ratio", ("GPU-1", "gpu")): 0.9}


def told(config: ObsConfig, run: Path) -> None:
    """Tell all events to telemetry of these settings, and end it."""
    watched = Telemetry(config, run, "tiny")
    for event in EVENTS:
        watched.observe(event)
    watched.close()


def parsed(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return what Prometheus reads: (name, labels besides the run) -> value."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name != "target_info":
                labels = dict(sample.labels)
                assert labels.pop("sov_run") == "run"
                found[sample.name, tuple(labels.values())] = sample.value
    return found


def test_prometheus_reads_the_text_file(tmp_path: Path) -> None:
    file = tmp_path / "sov.prom"
    told(ObsConfig(prometheus_textfile=str(file)), tmp_path / "run")
    found = parsed(file.read_text())
    assert str(found.pop(("sov_train_heldout_loss", ("web",)))) == "nan"
    assert found == EXPECTED
    assert len({name for name, _ in found}) + 1 == len(METRICS), "every metric is told by some event"
    assert 'target_info{host_name=' in file.read_text() and 'sov_recipe="tiny"' in file.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["sov.prom"]


def test_prometheus_reads_the_port_of_this_machine_alone() -> None:
    board = Board()
    board.set("sov.train.loss", 2.5)
    port = Port("127.0.0.1", 0, board, RESOURCE)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port.port}/metrics", timeout=600).read().decode()
    assert parsed(text) == {("sov_train_loss", ()): 2.5}
    assert port._server.server_address[0] == "127.0.0.1"
    port.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port.port}/metrics", timeout=600)


def test_a_collector_reads_what_is_sent(receiver: Any, tmp_path: Path) -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    told(ObsConfig(otlp_endpoint=receiver.url + "/"), tmp_path / "run")
    request = receiver.requests[-1]
    assert request.path == "/v1/metrics" and request.headers["content-type"] == "application/x-protobuf"
    (resource,) = ExportMetricsServiceRequest.FromString(request.body).resource_metrics
    about = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("megatron-sov", "run")
    (scope,) = resource.scope_metrics
    found = {}
    for metric in scope.metrics:
        declared = METRICS[metric.name]
        assert (metric.unit, metric.description) == (declared.unit, declared.description)
        points = (metric.sum if declared.kind == "counter" else metric.gauge).data_points
        assert declared.kind == "gauge" or metric.sum.is_monotonic
        for point in points:
            labels = {a.key: a.value.string_value for a in point.attributes}
            assert labels.pop("sov.run") == "run"
            found[declared.prometheus_name, tuple(labels[name] for name in declared.labels)] = point.as_double
    assert found == EXPECTED, "OpenTelemetry has no values that are no numbers"


def test_opentelemetrys_own_reader_sees_the_same() -> None:
    from opentelemetry.sdk.metrics.export import MetricExportResult

    kept: list[Any] = []

    class Exporter:
        def export(self, data: Any) -> Any:
            kept.append(data)
            return MetricExportResult.SUCCESS

        def shutdown(self) -> None:
            kept.append("shut down")

    board = Board()
    board.add("sov.train.incidents", 2.0, "hang")
    metrics = Otlp("", board, RESOURCE, Exporter())
    metrics.send()
    metrics.close()
    (metric,) = kept[0].resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert (metric.name, point.value, dict(point.attributes)) == (
        "sov.train.incidents", 2.0, {"sov.run": "run", "sov.kind": "hang"})
    assert kept[1:] == ["shut down"]


def test_a_collector_that_refuses_is_told_of_once(receiver: Any, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("opentelemetry")
    receiver.answers = [400, 400, 400]
    watched = Telemetry(ObsConfig(otlp_endpoint=receiver.url), tmp_path, "tiny")
    watched.observe(EVENTS[0])
    for _ in range(2):
        watched._send()
    watched.close()
    said = capsys.readouterr().err
    assert len(receiver.requests) == 3 and said == (
        "warning: OpenTelemetry failed (ConnectionError: the collector did not take them); the run goes on, "
        "and tries again\n")


def test_a_collector_that_hangs_is_waited_for_a_little(receiver: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry")
    monkeypatch.setattr(telemetry, "CLOSE_S", 0.1)
    monkeypatch.setattr(exporters, "TIMEOUT_S", 600.0)
    receiver.hangs.set()
    told(ObsConfig(otlp_endpoint=receiver.url), tmp_path)
    assert len(receiver.requests) <= 1, "nobody has waited for its answer"


def test_a_taken_port_and_a_missing_folder_end_nothing(tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        told(ObsConfig(prometheus_port=other.getsockname()[1],
                       prometheus_textfile=str(tmp_path / "nowhere/sov.prom")), tmp_path)
    said = capsys.readouterr().err
    assert "warning: obs.prometheus_port failed (OSError:" in said
    assert "warning: Prometheus' text file failed (FileNotFoundError:" in said


@pytest.mark.parametrize(("setting", "package"), [("otlp_endpoint", "opentelemetry.sdk.metrics"),
                                                  ("prometheus_textfile", "prometheus_client")])
def test_a_missing_package_is_told_before_the_first_step(
        setting: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"obs\.{setting} needs a package .*\[telemetry\]' -c "):
        Telemetry(ObsConfig(**{setting: "http://127.0.0.1:9"}), tmp_path, "tiny")


def test_alerts_follow_events_of_the_run_and_those_added_to_it(
        receiver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOV_ALERT_URL", receiver.url)
    config = ObsConfig(alert_webhook="SOV_ALERT_URL")
    watched = Telemetry(config, tmp_path, "tiny")
    for event in ({"event": "step", "step": 1}, {"event": "rollback", "step": 4, "text": "back to step 2"},
                  {"event": "gate_failed", "step": 5, "text": "accuracy 0.1 is below 0.9"}):
        watched.observe(event)
    watched.close()
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "tiny", "obs": {
        "alert_webhook": "SOV_ALERT_URL", "alert_on": ["restart"]}}))
    (tmp_path / "events.jsonl").write_text("")
    RunEvents(tmp_path).add("restart", step=3, text="rank 0 was ended by SIGKILL")
    RunEvents(tmp_path).add("failure", step=3, text="not asked for")
    texts = [json.loads(r.body)["text"].partition(": ")[2].partition(": ")[2] for r in receiver.requests]
    assert texts == ["weights taken back at step 4: back to step 2",
                     "a gate did not pass at step 5: accuracy 0.1 is below 0.9",
                     "started again at step 3: rank 0 was ended by SIGKILL"]


def test_a_hang_is_sent_before_the_process_ends_itself(receiver: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOV_ALERT_URL", receiver.url)
    Telemetry(ObsConfig(alert_webhook="SOV_ALERT_URL"), tmp_path, "tiny").observe(
        {"event": "hang", "step": 5, "places": {"loop.py, train": [0]}})
    assert len(receiver.requests) == 1, "though nobody has closed anything"


def test_an_event_of_an_odd_form_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client")
    watched = Telemetry(ObsConfig(prometheus_textfile=str(tmp_path / "a.prom")), tmp_path, "tiny")
    watched.observe({"event": "eval", "heldout": {"web": 3}})
    watched.observe({"event": "step", "loss": "much"})
    watched.close()
    assert capsys.readouterr().err.count("warning: telemetry failed (AttributeError") == 1


def test_off_imports_and_starts_nothing() -> None:
    code = ("import sys, threading, pathlib\n"
            "from megatron_sov.model.config import ObsConfig\n"
            "from megatron_sov.runs.obs.telemetry import Telemetry\n"
            "t = Telemetry(ObsConfig(), pathlib.Path('run'), 'tiny')\n"
            "t.observe({'event': 'stop', 'step': 1}); t.close()\n"
            "found = [m for m in sys.modules if m.split('.')[0] in "
            "('opentelemetry', 'prometheus_client', 'pynvml', 'requests')]\n"
            "assert not found and threading.active_count() == 1, found")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize(("name", "value"), [
    ("otlp_endpoint", "localhost:4318"), ("otlp_endpoint", "http://me:secret@host:1"),
    ("otlp_endpoint", "https://host/?key=secret"), ("otlp_endpoint", "http://[secret@"),
    ("alert_webhook", "https://hooks.example/secret")])
def test_settings_are_refused_without_their_secrets(name: str, value: str) -> None:
    settings: Any = {name: value}
    (problem,) = problems_of(ObsConfig(**settings))
    assert problem.key == name and value not in str(problem) and "secret" not in str(problem)


def bits(data: str, root: str, endpoint: str) -> list[list[str]]:
    """Runs inside a rank: losses and weights after three steps with everything off, and everything on."""
    import os

    from megatron_sov.engine.parallel import world

    os.environ["SOV_ALERT_URL"] = endpoint
    everything = [f"obs.otlp_endpoint={endpoint}", f"obs.prometheus_textfile={root}/sov.prom",
                  f"obs.prometheus_port={_free_port()}", "obs.telemetry_every_s=1",
                  "obs.alert_webhook=SOV_ALERT_URL", "obs.tensorboard=true"]
    found, place = [], None
    for name, settings in (("off", ["obs.nvml=false"]), ("on", everything)):
        trainer = tiny_trainer(data, "model.num_layers=1", "train.global_batch_size=2",
                               "train.micro_batch_size=2", "train.steps=3", *settings,
                               run=Path(root) / name, place=place)
        place = trainer.world
        trainer.folder.create()
        trainer.folder.declare(trainer.config)
        trainer.open_records()
        said = []
        for _ in range(3):
            result = trainer.update()
            assert result is not None
            trainer.recorder.step(trainer.state, result, trainer.observe())
            said.append(result.loss.hex())
        trainer.recorder.stopped(3, "SIGTERM")
        trainer.close()
        found.append([*said, *(str(float(p.double().sum())) for p in trainer.model.parameters())])
    world.leave()
    return found


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_training_gives_the_same_bits_with_everything_on(ranks: Any, job: Any, packed_data: Any,
                                                         receiver: Any, tmp_path: Path) -> None:
    ((found,),) = ranks(job(__file__, "bits", 1, {
        "data": str(packed_data.text), "root": str(tmp_path), "endpoint": receiver.url}))
    assert found[0] == found[1] and len(found[0]) > 5
    assert {r.path for r in receiver.requests} == {"/", "/v1/metrics"}
    assert parsed((tmp_path / "sov.prom").read_text().replace('sov_run="on"', 'sov_run="run"'))[
        "sov_train_steps_done", ()] == 3


def test_what_leaves_a_webhook_is_json(receiver: Any) -> None:
    hook = Webhook(receiver.url, "X")
    hook.send({"text": "한국"})
    hook.close()
    assert json.loads(receiver.requests[0].body) == {"text": "한국"}
