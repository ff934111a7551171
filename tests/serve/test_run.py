"""The HTTP server with a scripted model that repeats the user's message: tool calls, reasoning, limits, slow
and lost clients, access keys, shutdown."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines.live_generation import NewSequence, TokenEvent
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.infer.request import STOP
from megatron_sov.serve import http_server
from megatron_sov.serve.bodies import RequestEncoder
from megatron_sov.serve.http_server import HttpServer
from megatron_sov.serve.scheduler import BatchScheduler, RequestQueue
from megatron_sov.serve.settings import ServeSettings
from tests.waiting import wait_until

NUM_SLOTS, MAX_LENGTH = 2, 400
"""Sequences that the model generates at the same time, and tokens of the longest one."""
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endofturn|>{% endfor %}"
            "{% if tools %}<|tool|>{{ tools | tojson }}{% endif %}"
            "{% if add_generation_prompt %}<|assistant|>{% if thinks %}<think>{% endif %}{% endif %}")
ADD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes with special tokens for turns, thoughts and calls."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from megatron_sov.base.documents.byte_bpe import byte_alphabet

    path = tmp_path_factory.mktemp("bytes")
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|endofturn|>",
                                  "<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endofturn|>",
        "chat_template": TEMPLATE}))
    return path


@dataclass
class ScriptedModel:
    """A model that repeats the last user message of the prompt, one token per step."""

    encoder: RequestEncoder
    scheduler: BatchScheduler
    rows: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(10**6))
    """Number of steps that the model may still make."""
    wants_stop: list[str] = field(default_factory=list)
    """The reason of a shutdown, once there is one."""
    joined: list[NewSequence] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def run(self) -> None:
        remaining: dict[int, list[int]] = {}
        while not (changes := self.scheduler.choose_changes(NUM_SLOTS - len(remaining), not remaining)).ends:
            assert len(remaining) + len(changes.joining) <= NUM_SLOTS
            for number in changes.leaving:
                remaining.pop(number, None)
                self.left.append(number)
            for joining in changes.joining:
                remaining[joining.number] = self.answer(joining)
            self.joined += changes.joining
            if not remaining:
                continue
            self.rows.acquire()
            events = [TokenEvent(number, answer.pop(0), -0.5, None if answer else STOP)
                      for number, answer in remaining.items()]
            self.scheduler.report_tokens(events)
            remaining = {number: answer for number, answer in remaining.items() if answer}

    def answer(self, joining: NewSequence) -> list[int]:
        """Return the token ids of the last user message and of the end of a turn."""
        tokenizer = self.encoder._tokenizer
        content = tokenizer.decode(list(joining.prompt), skip_special_tokens=False)
        content = content.rpartition("<|user|>")[2].partition("<|endofturn|>")[0]
        return [*tokenizer.encode(content).ids, tokenizer.token_to_id("<|endofturn|>")]


@dataclass
class RunningServer:
    """A running server, its model and an HTTP client."""

    url: str
    model: ScriptedModel
    http: httpx.Client

    def chat(self, content: str, **fields: Any) -> httpx.Response:
        return self.http.post("/chat/completions", json={"messages": [{"role": "user", "content": content}],
                                                         **fields})

    def message(self, content: str, **fields: Any) -> dict[str, Any]:
        return self.chat(content, **fields).json()["choices"][0]


@pytest.fixture
def opened(folder: Path) -> Callable[..., AbstractContextManager[RunningServer]]:
    """A function `(vocab=300, **settings)` that returns a context with a `RunningServer`."""

    @contextlib.contextmanager
    def open_server(vocab: int = 300, **options: Any) -> Iterator[RunningServer]:
        settings = ServeSettings("scripted", port=0, **options)
        target: Any = SimpleNamespace(tokenizer_folder=folder, path=folder, is_hf=True, vocab_size=vocab)
        encoder = RequestEncoder(target, MAX_LENGTH)
        queue = RequestQueue(settings.max_waiting)
        stop: list[str] = []
        scheduler = BatchScheduler(queue, encoder, lambda: stop[0] if stop else None, lambda: False)
        model = ScriptedModel(encoder, scheduler, wants_stop=stop)
        server = HttpServer(settings, queue, encoder, 0.0, MAX_LENGTH)
        server.start()
        runs = threading.Thread(target=model.run)
        runs.start()
        key = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        try:
            with httpx.Client(base_url=server.url, headers=key, timeout=600) as http:
                yield RunningServer(server.url, model, http)
        finally:
            stop.append("the test is over")
            model.rows.release(10**6)
            runs.join(600)
            server.stop()
            assert not runs.is_alive() and not server._thread.is_alive()

    return open_server


def parse_stream(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a complete stream."""
    *events, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_thoughts_and_calls_are_separated_from_content(opened: Any) -> None:
    with opened() as server:
        def request_both(content: str, **fields: Any) -> dict[str, Any]:
            """Request an answer whole and as a stream, and return it after checking that both are equal."""
            complete = server.message(content, **fields)
            streamed: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
            for event in parse_stream(server.chat(content, stream=True, **fields)):
                (choice,) = event["choices"]
                for name in set(choice["delta"]) & {"content", "reasoning_content"}:
                    streamed[name] = streamed.get(name, "") + choice["delta"][name]
                if calls := choice["delta"].get("tool_calls"):
                    streamed["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
            for call in [*streamed.get("tool_calls", ()), *complete["message"].get("tool_calls", ())]:
                assert call.pop("id").startswith("call_")
            assert streamed == complete["message"] | {"content": complete["message"]["content"] or ""}
            assert choice["finish_reason"] == complete["finish_reason"]
            return complete["message"] | {"ended": complete["finish_reason"]}

        text = "2 곰 안녕 สวัสดี 🐻‍❄️ é ﷽ 𝒳\n\t\ufffd? </b>"  # characters of several tokens
        plain = request_both(text)
        assert (plain["content"], plain["ended"], "tool_calls" in plain) == (text, "stop", False)
        # special tokens of the user are encoded as text, and this model repeats them as text
        result = request_both("<think> 1+1 </think> 2")
        # spaces stay, only line feeds are stripped
        assert (result["reasoning_content"], result["content"]) == (" 1+1 ", " 2")
        result = request_both(" 1+1 </think> 2", chat_template_kwargs={"thinks": True})
        assert (result["reasoning_content"], result["content"]) == (" 1+1 ", " 2")
        result = request_both(f"I add. {ADD}", tools=TOOLS)
        assert result["tool_calls"] == [{"type": "function",
                                         "function": {"name": "add", "arguments": '{"a": 1}'}}]
        assert (result["content"], result["ended"]) == ("I add.", "tool_calls")
        assert request_both(ADD, tools=TOOLS)["content"] is None
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            assert request_both(ADD, **fields)["content"] == ADD
        assert request_both("<tool_call>{add}", tools=TOOLS)["content"] == "<tool_call>{add}"
        history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "3"}]
        answer = server.http.post("/chat/completions", json={"messages": history, "tools": TOOLS})
        assert answer.json()["choices"][0]["message"]["content"] == "q"


def test_a_finished_answer_frees_its_slot(opened: Any) -> None:
    with opened() as server:
        result = server.message("to be or not to be", stop=["not", "<|endofturn|>"])
        assert (result["message"]["content"], result["finish_reason"]) == ("to be or ", "stop")
        server.model.rows = threading.Semaphore(0)
        with server.http.stream("POST", "/chat/completions", json={
                "messages": [{"role": "user", "content": "long " * 70}], "stream": True}) as stream:
            next(stream.iter_bytes())  # the start of a stream, before the first row

        def has_left() -> bool:
            server.model.rows.release()
            return 1 in server.model.left

        wait_until(has_left)  # the answer ends after its client has disconnected


def get_health(server: RunningServer) -> httpx.Response:
    return httpx.get(server.url.removesuffix("/v1") + "/health")


def count_waiting(server: RunningServer) -> int:
    num_requests: int = get_health(server).json()["waiting"]
    return num_requests


def test_excess_requests_are_refused_and_waiting_ones_answered_in_order(opened: Any) -> None:
    with opened(max_waiting=3) as server, ThreadPoolExecutor(4) as pool:
        server.model.rows = threading.Semaphore(0)
        answers = []
        for number in range(4):  # the model pauses after the first one
            answers.append(pool.submit(server.chat, f"{number}"))
            wait_until(lambda n=number: bool(server.model.joined) and count_waiting(server) == n)
        refusal = server.chat("4")
        assert (refusal.status_code, refusal.headers["Retry-After"]) == (429, "5")
        assert refusal.json()["error"]["type"] == "rate_limit_error"
        assert server.chat("5", n=4).status_code == 400  # more answers than may ever wait
        server.model.rows.release(10**6)
        contents = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
        assert contents == list("0123") and len(server.model.joined) == 4
        assert server.chat("6").status_code == 200


def test_shutdown_finishes_running_requests_and_refuses_new_ones(opened: Any) -> None:
    with opened() as server, ThreadPoolExecutor(3) as pool:
        server.model.rows = threading.Semaphore(0)
        answers = [pool.submit(server.chat, "answer 0")]
        wait_until(lambda: bool(server.model.joined))
        answers += [pool.submit(server.chat, f"answer {number}", stream=number == 1) for number in (1, 2)]
        wait_until(lambda: count_waiting(server) == 2)
        server.model.wants_stop.append("SIGTERM")
        server.model.rows.release()
        wait_until(lambda: get_health(server).status_code == 503)
        late = server.chat("late")
        assert (late.status_code, late.json()["error"]["type"]) == (503, "server_error")
        server.model.rows.release(10**6)
        responses = [answer.result() for answer in answers]
        assert responses[0].json()["choices"][0]["message"]["content"] == "answer 0"
        assert parse_stream(responses[1])[-1]["choices"][0]["finish_reason"] == "stop"


def test_requests_beyond_the_shutdown_limit_are_aborted_with_a_message(
        opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.serve.scheduler.DRAIN_TIMEOUT_S", 0.0)
    with opened() as server, ThreadPoolExecutor(2) as pool:
        server.model.rows = threading.Semaphore(0)
        answers = [pool.submit(server.chat, "long " * 70, stream=True)]
        wait_until(lambda: bool(server.model.joined))
        answers.append(pool.submit(server.chat, "never begun"))
        wait_until(lambda: count_waiting(server) == 1)
        server.model.wants_stop.append("SIGTERM")
        server.model.rows.release(3)
        stream, unstarted = (answer.result() for answer in answers)
        assert (stream.status_code, unstarted.status_code) == (200, 503)
        assert "shutting down" in unstarted.text and "shutting down" in stream.text
        assert "[DONE]" not in stream.text


def test_an_internal_error_fails_only_its_request(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as server:
        encode_request = server.model.encoder.encode_request
        monkeypatch.setattr(server.model.encoder, "encode_request", lambda request: 1 // 0)
        answer = server.chat("a")
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        monkeypatch.setattr(server.model.encoder, "encode_request", encode_request)
        assert server.message("b")["message"]["content"] == "b" and count_waiting(server) == 0


def test_requests_without_key_are_refused(opened: Any) -> None:
    with opened(api_key="sesame") as server:
        assert server.message("open")["message"]["content"] == "open"
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"},
                        {"Authorization": "Bearer sésame".encode()}):
            for ask in (lambda h: httpx.get(f"{server.url}/models", headers=h),
                        lambda h: httpx.post(f"{server.url}/chat/completions", headers=h, json={})):
                answer = ask(headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert "sesame" not in answer.text
        assert get_health(server).status_code == 200
        assert "sesame" not in repr(ServeSettings("m", api_key="sesame"))


def send_bytes(server: RunningServer, content: bytes) -> bytes:
    """Send bytes over a plain connection, and return the reply until the server closes it."""
    host, port = server.url.removesuffix("/v1").removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=600) as connection:
        connection.sendall(content)
        reply = b""
        while piece := connection.recv(1 << 16):
            reply += piece
        return reply


def test_slow_clients_are_disconnected(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BODY_TIMEOUT_S", "LINGER_TIMEOUT_S"):
        monkeypatch.setattr(http_server, name, 0.2)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with opened() as server:
        assert b" 408 " in send_bytes(server,
                                      f"{head}Content-Length: 99\r\nConnection: close\r\n\r\n{{".encode())
        assert b" 400 " in send_bytes(server, b"NO HTTP AT ALL\r\n\r\n")
        assert b" 413 " in send_bytes(server, f"{head}Content-Length: 999999999\r\nConnection: close\r\n\r\n"
                                      f"{'x' * 100}".encode())


def test_an_unread_stream_is_ended(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SEND_TIMEOUT_S", 0.2)

    async def block_forever(*args: Any) -> None:
        await asyncio.sleep(600)

    with opened() as server:
        monkeypatch.setattr("aiohttp.web.StreamResponse.write", block_forever)
        with contextlib.suppress(httpx.HTTPError):
            server.chat("hello", stream=True)
        wait_until(lambda: not server.model.scheduler._active)


def test_an_address_in_use_is_refused(opened: Any) -> None:
    with opened() as server:
        port = int(server.url.removesuffix("/v1").rpartition(":")[2])
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on"):
            HttpServer(ServeSettings("m", port=port), RequestQueue(1), server.model.encoder, 0.0, MAX_LENGTH)


@pytest.mark.tier1_cases(4)
@pytest.mark.parametrize("sent", [
    b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n", b"\x16\x03\x01\x02\x00\x01",
    b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n"])
def test_invalid_http_is_refused_without_traceback(opened: Any, sent: bytes,
                                                   logged: list[logging.LogRecord]) -> None:
    with opened() as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port), timeout=600) as client:
            client.sendall(sent)
            assert client.recv(100).startswith(b"HTTP/1.0 400")
        assert server.http.get("/models").status_code == 200
    assert not logged


def test_responses_contain_no_server_paths(opened: Any, folder: Path) -> None:
    with opened(vocab=5) as server:
        result = server.http.post("/completions", json={"prompt": "a"})
        assert result.status_code == 400 and "with token id" in result.text and str(folder) not in result.text


@pytest.mark.each(("files", "ends"), [
    ({}, set()), ({"generation_config.json": '{"eos_token_id": [3, 5, 7]}'}, {3, 5, 7}),
    ({"generation_config.json": '{"eos_token_id": 7}', "config.json": '{"eos_token_id": 9}'}, {7}),
    ({"config.json": '{"eos_token_id": 9}'}, {9}),
    ({"generation_config.json": "{}", "config.json": '{"text_config": {"eos_token_id": 9}}'}, {9}),
    ({"generation_config.json": '{"eos_token_id": [true, -1, "x", 8]}'}, {8})])
def test_completions_end_at_the_eos_ids_of_the_folder(folder: Path, tmp_path: Path, files: dict[str, str],
                                                      ends: set[int]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    target: Any = SimpleNamespace(tokenizer_folder=tmp_path, path=tmp_path, is_hf=True, vocab_size=300)
    encoder = PromptEncoder(target, chat=False)
    eos = encoder._tokenizer.eos_token_id
    assert set(encoder.end_ids) - {eos} == ends and eos in encoder.end_ids
