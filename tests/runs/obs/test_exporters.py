"""Names by OpenTelemetry's rules, and a board that no run can fill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.runs.obs import exporters
from megatron_sov.runs.obs.exporters import (
    MAX_LABEL_SETS, MAX_WAITING, METRICS, OTHER, PAUSES_S, Board, Webhook, body_of, webhook_of)

# Alerts arrive, are tried again, and hold nothing up, whatever the other side does.

RUN = Path("runs/pretrain")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may answer late."""
    monkeypatch.setattr(exporters, "TIMEOUT_S", 600.0)
    monkeypatch.setattr(Webhook.close, "__defaults__", (600.0,))


ROLLBACK = {"event": "rollback", "step": 12, "time_s": 1000.5, "text": "weights of step 8 again"}


def webhook(receiver: Any, pauses: list[float] | None = None, path: str = "/hook/secret") -> Webhook:
    return Webhook(receiver.url + path, "SOV_ALERT_URL",
                   (pauses if pauses is not None else []).append)


def test_an_alert_says_what_where_and_when() -> None:
    body = body_of(ROLLBACK, RUN, "tiny-solar-open")
    assert body["text"].startswith("megatron-sov: pretrain (tiny-solar-open) on ")
    assert body["text"].endswith(": weights taken back at step 12: weights of step 8 again")
    assert (body["event"], body["run"], body["step"], body["time_s"]) == ("rollback", "pretrain", 12, 1000.5)
    stop = body_of({"event": "stop", "step": 3, "reason": "SIGTERM"}, RUN, "r")["text"]
    assert "stopped early, with everything saved at step 3: SIGTERM" in stop
    hang = body_of({"event": "hang", "step": 5, "places": {"loop.py, train": [0, 1]}}, RUN, "r")["text"]
    assert "hang at step 5: no progress" in hang and "rank 0, 1 in loop.py, train" in hang


def test_texts_cannot_command_a_chat() -> None:
    text = body_of(ROLLBACK | {"text": "<!channel> & " + "x" * 9000}, RUN, "r")["text"]
    assert "&lt;!channel&gt; &amp; xx" in text and len(text) < 2100 and text.endswith("…")


def test_an_alert_arrives_as_json(receiver: Any) -> None:
    hook = webhook(receiver)
    hook.send(body_of(ROLLBACK, RUN, "r"))
    hook.close()
    (request,) = receiver.requests
    assert request.path == "/hook/secret" and request.headers["content-type"] == "application/json"
    assert json.loads(request.body) == body_of(ROLLBACK, RUN, "r")


def test_a_busy_address_is_tried_again_and_a_wrong_one_is_not(receiver: Any,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    pauses: list[float] = []
    receiver.answers = [503, 429, 200, 404]
    hook = webhook(receiver, pauses)
    hook.send({"text": "one"})
    hook.send({"text": "two"})
    hook.close()
    assert [json.loads(r.body)["text"] for r in receiver.requests] == ["one", "one", "one", "two"]
    assert pauses == [*PAUSES_S[:2]]
    said = capsys.readouterr().err
    assert said == ("warning: the webhook of SOV_ALERT_URL: an alert could not be sent (the answer was 404); "
                    "the run goes on\n")


def test_nobody_there_is_told_once_without_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    hook = Webhook("http://127.0.0.1:9/hook/secret", "SOV_ALERT_URL", lambda _: None)
    for _ in range(3):
        hook.send({"text": "x"})
    hook.close()
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and "ConnectionRefusedError" in said and "secret" not in said


def test_an_address_that_sends_on_gets_nothing_sent_there(receiver: Any) -> None:
    receiver.answers, receiver.headers = [307], {"Location": receiver.url + "/elsewhere"}
    hook = webhook(receiver)
    hook.send({"text": "x"})
    hook.close()
    assert [r.path for r in receiver.requests] == ["/hook/secret"]


def test_an_address_that_never_answers_holds_nothing_up(receiver: Any,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    receiver.hangs.set()
    hook = webhook(receiver)
    for _ in range(MAX_WAITING + 9):
        hook.send({"text": "x"})
    hook.close(timeout_s=0.1)
    assert len(receiver.requests) <= 1, "nobody has waited for its answer"
    assert f"more than {MAX_WAITING} alerts wait" in capsys.readouterr().err


def test_an_answer_without_end_is_not_read(receiver: Any) -> None:
    receiver.body = b"x" * 65536
    hook = webhook(receiver)
    hook.send({"text": "x"})
    assert hook.flush(600.0)
    hook.close()


@pytest.mark.parametrize(("value", "why"), [
    (None, "is not set"), ("ftp://secret", "holds no http:// or https:// address"),
    ("file:///etc/secret", "holds no"), ("http://a b/secret", "holds no")])
def test_a_variable_without_an_address_is_named_and_not_shown(
        value: str | None, why: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SOV_ALERT_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("SOV_ALERT_URL", value)
    assert webhook_of("SOV_ALERT_URL") is None
    said = capsys.readouterr().err
    assert f"obs.alert_webhook = SOV_ALERT_URL: this environment variable {why}" in said
    assert "secret" not in said


DASHBOARD = Path(exporters.__file__).with_name("grafana.json")


@pytest.mark.parametrize(("name", "expected"), [
    ("sov.train.step.duration", "sov_train_step_duration_seconds"),
    ("sov.train.throughput", "sov_train_throughput_per_second"),
    ("sov.train.tokens", "sov_train_tokens_total"),
    ("sov.train.mfu", "sov_train_mfu_ratio"),
    ("sov.train.loss", "sov_train_loss"),
    ("hw.energy", "hw_energy_joules_total"),
    ("hw.temperature", "hw_temperature_celsius"),
])
def test_prometheus_names_are_those_of_the_specification(name: str, expected: str) -> None:
    assert METRICS[name].prometheus_name == expected


def test_names_keep_the_conventions() -> None:
    for metric in METRICS.values():
        assert re.fullmatch(r"(sov\.train|hw)(\.[a-z][a-z_]*)+", metric.name), metric.name
        assert metric.description.endswith(".") and "_total" not in metric.name
    assert len({m.prometheus_name for m in METRICS.values()}) == len(METRICS)


def test_a_board_keeps_the_newest_values_and_sums() -> None:
    board = Board()
    board.set("sov.train.loss", 3.0)
    board.set("sov.train.loss", 2.0)
    for amount in (1.0, 2.0, -5.0, float("nan")):
        board.add("sov.train.incidents", amount, "hang")
    assert [(s.metric.name, s.labels, s.value) for s in board.samples()] == [
        ("sov.train.loss", (), 2.0), ("sov.train.incidents", ("hang",), 3.0)]


def test_labels_are_bounded_in_number_and_length() -> None:
    board = Board()
    for i in range(3 * MAX_LABEL_SETS):
        board.set("sov.train.heldout.loss", 1.0, f"{i}-" + "x" * 10_000)
    names = [s.labels[0] for s in board.samples()]
    assert len(names) == MAX_LABEL_SETS + 1 and OTHER in names and max(map(len, names)) == 64


def test_every_expression_of_the_dashboard_names_a_metric_that_is_told() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    expressions += [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    labels = {"sov_run", *(name.replace(".", "_") for m in METRICS.values() for name in m.labels)}
    used = {word for text in expressions for word in re.findall(r"\b(?:sov|hw)_[a-z_]+", text)} - labels
    assert used == {m.prometheus_name for m in METRICS.values()}
    legends = [t["legendFormat"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert {word for text in legends for word in re.findall(r"\{\{(\w+)\}\}", text)} <= labels
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places) and len({p["id"] for p in dashboard["panels"]}) == len(places)
