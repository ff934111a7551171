"""Tasks of several questions in one conversation: each is asked behind the answers before it, and judged with
them."""

from __future__ import annotations

import json
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


class Script(ThreadingHTTPServer):
    """A model that says how many messages it was given, and a judge that likes answers to the second turn."""

    asked: list[dict[str, Any]]
    judged: list[str]
    failing = "no such words"

    def answer(self, payload: dict[str, Any]) -> str:
        if payload["model"] == "judge":
            material = payload["messages"][1]["content"]
            self.judged.append(material)
            score = 10 if "I read 3" in material.partition("RESPONSE:")[2] else 1
            return json.dumps({"reason": "so", "score": score})
        if payload["messages"] not in [probe["messages"] for probe in CHAT_PROBES]:
            self.asked.append(payload)
        return f"<think>hm</think>I read {len(payload['messages'])}"


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fails = self.server.failing in json.dumps(payload["messages"])
        choice = {"message": {"content": self.server.answer(payload)}, "finish_reason": "stop"}
        body = json.dumps({} if fails else {"choices": [choice]}).encode()
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
    server.asked, server.judged = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rows = [{"turns": [f"Question {i}?", f"And {i}?"], "category": "math",
             **({"reference": ["first", "second"]} if i else {})} for i in range(2)]
    (tmp_path / "data/mt-bench-like").mkdir(parents=True)
    (tmp_path / "data/mt-bench-like/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = f"http://127.0.0.1:{script.server_address[1]}/v1"
    return ["eval", "lm", url, "--model", "m", "--tasks", "mt-bench-like", "--data-dir", "data", "--output",
            "out.json", "--judge", f"endpoint={url}", "--judge", "model=judge", "--judge", "backoff_s=0.001",
            "--workers", "1"]


def test_the_second_question_stands_behind_the_first_answer(command: list[str], script: Script) -> None:
    assert main([*command, "--apply-chat-template", "--mode", "no-thinking"]) == 0
    asked = sorted((payload["messages"] for payload in script.asked), key=lambda m: (len(m), str(m)))
    assert asked[:2] == [[{"role": "user", "content": f"Question {i}?"}] for i in range(2)]
    assert asked[2:] == [[{"role": "user", "content": f"Question {i}?"},
                          {"role": "assistant", "content": "I read 1"},  # without its thoughts
                          {"role": "user", "content": f"And {i}?"}] for i in range(2)]
    assert all(p["chat_template_kwargs"] == {"enable_thinking": False} for p in script.asked)
    results = read_results(Path("out.json"))
    scores = results.tasks["mt-bench-like"]
    [metric] = scores.metrics
    assert (scores.items, scores.failed, metric.value, metric.clusters) == (4, 0, 0.5, 2)
    items = {item.item: item for item in read_items(Path("out.json"), results)}
    assert {name: item.scores for name, item in items.items()} == {
        "0/1": {"avg@1": 0.0}, "0/2": {"avg@1": 1.0}, "1/1": {"avg@1": 0.0}, "1/2": {"avg@1": 1.0}}
    assert (items["1/2"].question, items["1/2"].answer, items["1/2"].cluster) == ("And 1?", "second", "1")
    [second] = [text for text in script.judged if "And 1?" in text]
    assert "[user]\nQuestion 1?\n\n[assistant]\nI read 1\n\n[user]\nAnd 1?" in second
    assert "second" in second.partition("KNOWN ANSWER:")[2]
    assert "judge " in str(scores.judge)


def test_a_turn_that_was_not_answered_has_failed_and_is_asked_for_again(command: list[str], script: Script
                                                                        ) -> None:
    script.failing = "And 0?"
    words = [*command, "--apply-chat-template"]
    assert main(words) == 0
    results = read_results(Path("out.json"))
    assert results.tasks["mt-bench-like"].failed == 1
    [failed] = [item for item in read_items(Path("out.json"), results) if item.failed]
    assert (failed.item, "HTTP 500" in str(failed.failed)) == ("0/2", True)
    before, script.failing = len(script.asked), "no such words"
    assert main(words) == 0
    assert len(script.asked) == before + 1
    assert read_results(Path("out.json")).tasks["mt-bench-like"].failed == 0


def test_a_conversation_needs_a_chat_template(command: list[str], capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(command) == 2
    assert "asks whole conversations; pass --apply-chat-template" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "--apply-chat-template"]) == 2
    assert "leave torchrun or srun out" in capsys.readouterr().err
