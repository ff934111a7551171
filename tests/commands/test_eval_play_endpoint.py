"""`megatron-sov eval play` with the address of an endpoint: scores, a wish to stop, answers that are kept."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.endpoints.recognition import CHAT_PROBES
from megatron_sov.eval.lm import endpoint
from megatron_sov.eval.lm.results import read_items, read_results

TASK = """
task: sums
custom_dataset: !function megatron_sov.eval.suites.task_data.load
dataset_path: json
dataset_kwargs: {data_files: {test: "${DATA}/sums.jsonl"}}
output_type: generate_until
metadata:
  sov:
    fields: {question: text, answer: text}
    environment: calculator
    samples: 2
    temperature: 1.0
    metrics: [avg, pass]
"""


class Script(ThreadingHTTPServer):
    """Calls the calculator, then says what it told; a question may be one that it fails at."""

    asked: list[dict[str, Any]]
    failing = "no such words"
    stops_at = 0
    """Request at which the process is asked to stop; 0: none."""

    def answer(self, payload: dict[str, Any]) -> dict[str, Any]:
        *_, last = payload["messages"]
        if last["role"] == "tool":
            message: dict[str, Any] = {"content": last["content"], "reasoning_content": "It says so."}
        else:
            expression = last["content"].removeprefix("What is ").rstrip("?")
            arguments = json.dumps({"expression": expression})
            message = {"content": None, "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "calculate", "arguments": arguments}}]}
        return {"choices": [{"message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 50 * len(payload["messages"]), "completion_tokens": 9}}


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if payload["messages"] not in [probe["messages"] for probe in CHAT_PROBES]:
            self.server.asked.append(payload)
            if 0 < self.server.stops_at <= len(self.server.asked):  # two threads may count at once
                self.server.stops_at = 0
                os.kill(os.getpid(), signal.SIGTERM)
        fails = self.server.failing in json.dumps(payload)
        body = b"{}" if fails else json.dumps(self.server.answer(payload)).encode()
        self.send_response(500 if fails else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr(endpoint, "LIMITS", replace(endpoint.LIMITS, backoff_s=0.001))
    server = Script(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.yaml").write_text(TASK)
    (tmp_path / "data").mkdir()
    rows = [{"question": f"What is {i} + 2?", "answer": str(i + 2 + i // 2)} for i in range(3)]
    (tmp_path / "data/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["eval", "play", f"http://127.0.0.1:{script.server_address[1]}/v1", "--model", "m", "--tasks",
            "sums.yaml", "--data-dir", "data", "--output", "out.json", "--parallel", "2"]


def test_episodes_are_scored_and_failed_ones_asked_for_again(
    command: list[str], script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.failing = "What is 1 + 2?"
    assert main([*command, "--mode", "thinking"]) == 0
    results = read_results(Path("out.json"))
    assert (results.model.kind, results.model.step) == ("endpoint", None)
    scores = results.tasks["sums"]
    assert (scores.items, scores.failed, scores.mode) == (3, 1, "thinking")
    assert scores.metrics[0].value == 0.5  # the third answer is none
    items = list(read_items(Path("out.json"), results))
    assert [len(item.samples) for item in items] == [2, 2, 2]
    assert items[0].samples[0].response.endswith("<think>It says so.</think>2")
    assert "HTTP 500" in str(capsys.readouterr()) + str(items[1].failed)
    assert all(payload["chat_template_kwargs"] == {"enable_thinking": True} for payload in script.asked)
    assert len({payload["seed"] for payload in script.asked}) == 2 * 3 * 2 - 2  # of each turn its own

    before, script.failing = len(script.asked), "no such words"
    assert main([*command, "--mode", "thinking"]) == 0
    assert len(script.asked) - before == 2 * 2  # what was answered is kept
    assert read_results(Path("out.json")).tasks["sums"].failed == 0


def test_a_wish_to_stop_keeps_what_was_played(
    command: list[str], script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.stops_at = 5
    handler = signal.getsignal(signal.SIGTERM)
    assert main(command) == 75
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "of 6 episodes have ended, and all turns are kept; run the same" in capsys.readouterr().err
    assert not Path("out.json").exists()
    assert len(script.asked) <= 7
    Path("out.cache/endpoint.sqlite").unlink()  # the journal alone knows
    assert main(command) == 0
    assert len(script.asked) == 12  # each turn once
    assert read_results(Path("out.json")).tasks["sums"].failed == 0


@pytest.mark.parametrize(("words", "said"), [
    (["--model", ""], "--model: is missing"),
    (["--nproc", "2"], "--nproc 2: an endpoint runs its model itself"),
    (["--engine", "vllm"], "--engine vllm: an endpoint runs its model itself"),
    (["--parallel", "0"], "--parallel 0"),
])
def test_mistakes_are_one_sentence(
    command: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out.json").exists()


def test_options_of_endpoints_and_an_unsafe_address_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command[2] = str(tmp_path)
    assert main(command) == 2
    assert "--model m: for an endpoint" in capsys.readouterr().err
    command[2] = "http://me:secret@localhost:1/v1"
    assert main(command) == 2
    assert "secret" not in capsys.readouterr().err
