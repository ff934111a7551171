"""Alerts arrive, are tried again, and hold nothing up, whatever the other side does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import problems_of
from megatron_sov.model.config import ObsConfig
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.obs import alerts
from megatron_sov.runs.obs.alerts import MAX_WAITING, PAUSES_S, Alerts, Webhook, body_of, webhook_of

RUN = Path("runs/pretrain")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may answer late."""
    monkeypatch.setattr(alerts, "TIMEOUT_S", 600.0)
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


def test_alerts_follow_events_of_the_run_and_those_added_to_it(
        receiver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOV_ALERT_URL", receiver.url)
    config = ObsConfig(alert_webhook="SOV_ALERT_URL")
    watched = Alerts(config, tmp_path, "tiny")
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
    Alerts(ObsConfig(alert_webhook="SOV_ALERT_URL"), tmp_path, "tiny").observe(
        {"event": "hang", "step": 5, "places": {"loop.py, train": [0]}})
    assert len(receiver.requests) == 1, "though nobody has closed anything"


def test_what_leaves_a_webhook_is_json(receiver: Any) -> None:
    hook = Webhook(receiver.url, "X")
    hook.send({"text": "한국"})
    hook.close()
    assert json.loads(receiver.requests[0].body) == {"text": "한국"}


def test_an_event_of_an_odd_form_ends_nothing(receiver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOV_ALERT_URL", receiver.url)
    watched = Alerts(ObsConfig(alert_webhook="SOV_ALERT_URL"), tmp_path, "tiny")
    for _ in range(2):
        watched.observe({"event": "restart", "text": {1, 2}, "step": object()})
        watched.observe({"event": "hang", "places": 7})
    watched.close()
    assert capsys.readouterr().err.count("warning: an alert failed") == 1, "told once"


def test_off_imports_and_starts_nothing() -> None:
    code = ("import sys, threading, pathlib\n"
            "from megatron_sov.model.config import ObsConfig\n"
            "from megatron_sov.runs.obs.alerts import Alerts\n"
            "t = Alerts(ObsConfig(), pathlib.Path('run'), 'tiny')\n"
            "t.observe({'event': 'stop', 'step': 1}); t.close()\n"
            "found = [m for m in sys.modules if m.split('.')[0] in ('pynvml', 'requests')]\n"
            "assert not found and threading.active_count() == 1, found")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_an_address_in_place_of_a_variable_is_refused_without_its_secret() -> None:
    (problem,) = problems_of(ObsConfig(alert_webhook="https://hooks.example/secret"))
    assert problem.key == "alert_webhook" and "secret" not in str(problem)
