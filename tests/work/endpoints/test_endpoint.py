"""Hostile endpoints (compressed, endless, slow answers) and concurrent equal requests."""

import gzip
import importlib
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from megatron_sov.base.errors import UserError
from megatron_sov.work.endpoints import transport
from megatron_sov.work.endpoints.answers import (
    BadAnswer, EndpointUnavailable, RequestRefused, parse_json_answer, parse_retry_after)
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.endpoints.endpoint import Endpoint, EndpointLimits
from megatron_sov.work.endpoints.transport import Transport

LIMITS = EndpointLimits(600.0, 3, 0.001, 0.0, 0.0, 1.0, 2.0)
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


class HostileHandler(BaseHTTPRequestHandler):
    """Answers with a compressed body, an endless body or a byte at a time, by the server's `behaviour`."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        behaviour = self.server.way  # type: ignore[attr-defined]
        self.send_response(500 if behaviour.endswith("500") else 200)
        if behaviour == "packed":
            body = gzip.compress(b" " * 10_000_000)
            self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" " * (1 if behaviour.startswith("dripping") else 1 << 16))
                self.wfile.flush()
                time.sleep(0.05 if behaviour.startswith("dripping") else 0)
        except OSError:
            pass  # the client has gone

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hostile_server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HostileHandler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("behaviour", "message"), [
    ("packed", "packed answer, which was not asked for"), ("endless", "sent more than 1 MiB"),
    ("endless 500", "sent more than 1 MiB"), ("dripping", "longer than 0.3 s"),
    ("dripping 500", "longer than 0.3 s")])
def test_answers_are_limited_in_time_and_size(behaviour: str, message: str,
                                              hostile_server: ThreadingHTTPServer,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_BODY_BYTES", 1 << 20)
    hostile_server.way = behaviour  # type: ignore[attr-defined]
    importlib.import_module("openai")  # seconds on a busy machine
    client = Transport(f"http://127.0.0.1:{hostile_server.server_port}/v1/chat/completions", "",
                      0.3 if "dripping" in behaviour else 600.0)
    with pytest.raises((BadAnswer, TimeoutError), match=message):
        client.post({})


def test_concurrent_equal_requests_are_sent_once(tmp_path: Path) -> None:
    with serving(ScriptedEndpoint(lambda request: "yes", slow_s=0.1)) as server:
        endpoint = Endpoint(f"{server.url}/chat/completions", "", LIMITS, EndpointCache(tmp_path / "a"))
        answers: list[str] = []

        def ask() -> None:
            answers.append(endpoint.ask(REQUEST, lambda raw: raw["choices"][0]["message"]["content"]))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (answers, len(server.requests)) == (["yes"] * 4, 1)


def test_localhost_bypasses_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serving(ScriptedEndpoint(lambda request: "yes")) as server:
        Endpoint(f"{server.url}/chat/completions", "", LIMITS, EndpointCache(tmp_path / "a")).ask(
            REQUEST, lambda raw: None)
        assert len(server.requests) == 1


def test_answer_without_usage_is_billed_at_maximum(tmp_path: Path) -> None:
    cache = EndpointCache(tmp_path / "a")
    with serving(ScriptedEndpoint(lambda request: "yes")) as server:
        endpoint = Endpoint(f"{server.url}/chat/completions", "", LIMITS, cache)
        endpoint.ask(REQUEST, lambda raw: None)
        assert cache.usage() == Usage(8, 9, pytest.approx(26e-6))
        for usage in ({}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": 1}):
            assert endpoint._read_billing({"usage": usage}, Usage(100, 8, 1.0)) == Usage(100, 8, 1.0)


def test_unusable_answer_is_billed(tmp_path: Path) -> None:
    cache = EndpointCache(tmp_path / "a")
    with serving(ScriptedEndpoint(lambda request: "yes")) as server:
        server.next = ["garbage"]
        endpoint = Endpoint(f"{server.url}/chat/completions", "", LIMITS, cache)
        endpoint.ask(REQUEST, lambda raw: None)
        max_usage = endpoint._max_usage(REQUEST)
        assert cache.usage().input_tokens == 8 + max_usage.input_tokens
        assert cache.usage().output_tokens == 9 + max_usage.output_tokens


@pytest.mark.each(("body", "problem"), [
    *((b"[" * levels + b"]" * levels, "sent (JSON of more|no JSON)") for levels in (250, 900, 100_000)),
    (b"\n<html>busy</html>", "sent HTML"), (b'{"choices": [', "sent no JSON, or a part of it")])
def test_unreadable_answer_is_rejected(body: bytes, problem: str) -> None:
    with pytest.raises(BadAnswer, match=problem):
        parse_json_answer(body)
    assert parse_json_answer(b"[" * 150 + b"]" * 150)


def test_damaged_cached_answer_raises_user_error(tmp_path: Path) -> None:
    cache = EndpointCache(tmp_path / "a")
    cache.note("k", "200", Usage(0, 0, 0.0), 0.0, {"a": 1})
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("UPDATE answers SET answer = '{\"a\"'")
    with pytest.raises(UserError, match="answer k is damaged"):
        cache.get("k")


def test_answer_is_cached_together_with_its_bill(tmp_path: Path) -> None:
    cache = EndpointCache(tmp_path / "a")
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("DROP TABLE requests")
    with pytest.raises(UserError, match="cannot be used"):
        cache.note("k", "200", Usage(8, 9, 0.1), 0.0, {"a": 1})
    assert cache.get("k") is None


def test_overloaded_endpoint_is_retried_until_patience_ends(tmp_path: Path) -> None:
    with serving(ScriptedEndpoint(lambda request: "yes")) as server:
        patient_limits = EndpointLimits(600.0, 2, 0.001, 0.0, 0.0, 0.0, 0.0, patience_s=600.0)
        server.next = ["429"] * 6
        url = f"{server.url}/chat/completions"
        endpoint = Endpoint(url, "", patient_limits, EndpointCache(tmp_path / "a"))
        assert endpoint.ask(REQUEST, lambda raw: "read") == "read"
        server.next = ["503"] * 1000
        impatient_limits = EndpointLimits(600.0, 2, 0.001, 0.0, 0.0, 0.0, 0.0, patience_s=0.05)
        unavailable_endpoint = Endpoint(url, "", impatient_limits, EndpointCache(tmp_path / "b"))
        with pytest.raises(EndpointUnavailable, match="HTTP 503, for"):
            unavailable_endpoint.ask(REQUEST, lambda raw: "read")


REFUSALS = {  # as these servers word them
    "vLLM, long": ("This model's maximum context length is 4096 tokens.", RequestRefused, "is longer than"),
    "vLLM, longer": ("The decoder prompt (length 9000) is longer than the maximum model length of 8192.",
                     RequestRefused, "longer than the model's context"),
    "SGLang, long": ("The input (9000 tokens) is longer than the model's context length (8192 tokens).",
                     RequestRefused, "longer than the model's context"),
    "vLLM, tools": ('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
                    UserError, "not set up for calls of tools"),
    "llama.cpp, tools": ("tools param requires --jinja flag", UserError, "not set up for calls of tools"),
    "anything": ("top_k: no\x1b such\nfield, sk-1", BadAnswer, "HTTP 400: top_k: no such field, [.]{3}$"),
}


@pytest.mark.each("name", REFUSALS)
def test_permanent_refusal_is_reported_without_retry(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message, kind, sentence = REFUSALS[name]
    monkeypatch.setenv("A_KEY", "sk-1")
    endpoint = Endpoint("http://127.0.0.1:9/v1/chat/completions", "A_KEY", LIMITS,
                        EndpointCache(tmp_path / "a"))
    for body in ({"error": {"message": message}}, {"object": "error", "message": message}):
        with pytest.raises(kind, match=sentence):
            endpoint._check_status(400, None, json.dumps(body).encode())


def test_cache_name_replaces_address_in_keys(tmp_path: Path) -> None:
    cache = EndpointCache(tmp_path / "a")
    with serving(ScriptedEndpoint(lambda request: "yes")) as server:
        Endpoint(f"{server.url}/chat/completions", "", LIMITS, cache, cache_name="m").ask(REQUEST,
                                                                                          lambda raw: 1)
    moved_endpoint = Endpoint("http://127.0.0.1:9/v1/chat/completions", "", LIMITS, cache, cache_name="m")
    assert moved_endpoint.ask(REQUEST, lambda raw: raw["choices"][0]["message"]["content"]) == "yes"


def test_wait_for_unreachable_endpoint_is_reported_once(monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    from megatron_sov.work.endpoints import endpoint as asking

    monkeypatch.setattr(asking, "REPORT_AFTER_S", 0.0)
    messages: list[str] = []
    cache = EndpointCache(tmp_path / "answers.sqlite")
    with serving(ScriptedEndpoint(lambda request: "hi")) as server:
        server.next = ["503"] * 4
        limits = EndpointLimits(5.0, 3, 0.001, 0.0, 0.0, 1.0, 2.0, 60.0)
        endpoint = Endpoint(f"{server.url}/chat/completions", "", limits, cache, report=messages.append)
        assert endpoint.ask(REQUEST, lambda answer: answer)["choices"]
    cache.close()
    assert messages == [f"{server.url}/chat/completions: the endpoint answered HTTP 503; waiting up to 60 s "
                        "for it"]


def test_substitute_model_is_reported_once(tmp_path: Path) -> None:
    messages: list[str] = []
    endpoint = Endpoint("http://127.0.0.1:9/v1/completions", "", LIMITS, EndpointCache(tmp_path / "a"),
                        report=messages.append)
    for name in ("m", "other", "other", None, 3):
        endpoint._check_model(REQUEST, {"model": name})
    assert messages == ["http://127.0.0.1:9/v1/completions: was asked for model 'm', and 'other' answers; "
                        "the answers are recorded with that name"]
    strict = Endpoint("http://127.0.0.1:9/v1/completions", "", LIMITS, EndpointCache(tmp_path / "a"),
                      report=messages.append, accepted_models=("other",))
    for name in ("m", "", "other", None, 3):
        strict._check_model(REQUEST, {"model": name})
    with pytest.raises(UserError, match=r"'third' answered; its answer is not used.* --accept-model third"):
        strict._check_model(REQUEST, {"model": "third"})


@pytest.mark.each(("text", "low", "high"), [
    ("7", 7, 7), ("0.5", 0.5, 0.5), ("Thu, 01 Jan 2026 00:00:30 GMT", 30, 30),
    ("Thu, 01 Jan 2026 01:00:30 +0100", 30, 30), ("Fri, 09 Jan 2026 00:00:00 GMT", 60, 60),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("Thu Jan  1 00:00:30 2026", 30, 30),
    ("soon", 0, 0), ("", 0, 0), (None, 0, 0), ("nan", 0, 0), ("inf", 60, 60), ("-3", 0, 0),
    ("Wed, 99 Oct 2015 07:28:00 GMT", 0, 0)])
def test_retry_after_accepts_date(text: str | None, low: float, high: float,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.work.endpoints.answers.time.time", lambda: 1767225600.0)  # 2026 begins
    monkeypatch.setenv("TZ", "KST-9")
    time.tzset()
    try:
        assert low <= parse_retry_after(text) <= high
    finally:
        monkeypatch.undo()
        time.tzset()
