"""The server with a scripted model that writes the user's message, one token a row: tool calls, thoughts,
limits, slow and lost clients, access keys, shutdown."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
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

SLOTS, LONGEST = 2, 400
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endofturn|>{% endfor %}"
            "{% if tools %}<|tool|>{{ tools | tojson }}{% endif %}"
            "{% if add_generation_prompt %}<|assistant|>{% if thinks %}<think>{% endif %}{% endif %}")
ADD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer whose tokens are bytes, and marks that are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from megatron_sov.base.documents.byte_bpe import byte_alphabet

    made = tmp_path_factory.mktemp("bytes")
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|endofturn|>",
                                  "<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endofturn|>",
        "chat_template": TEMPLATE}))
    return made


@dataclass
class Model:
    """A model that writes the answer contained in the prompt."""

    encoder: RequestEncoder
    scheduler: BatchScheduler
    rows: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(10**6))
    """Rows that it may read."""
    wants_stop: list[str] = field(default_factory=list)
    joined: list[NewSequence] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def run(self) -> None:
        places: dict[int, list[int]] = {}
        while not (orders := self.scheduler.choose_changes(SLOTS - len(places), not places)).ends:
            assert len(places) + len(orders.joining) <= SLOTS
            for number in orders.leaving:
                places.pop(number, None)
                self.left.append(number)
            for joining in orders.joining:
                places[joining.number] = self.answer(joining)
            self.joined += orders.joining
            if not places:
                continue
            self.rows.acquire()
            news = [TokenEvent(number, answer.pop(0), -0.5, None if answer else STOP)
                    for number, answer in places.items()]
            self.scheduler.report_tokens(news)
            places = {number: answer for number, answer in places.items() if answer}

    def answer(self, joining: NewSequence) -> list[int]:
        """Return the text between the user's mark and the end of the turn, and that end."""
        tokenizer = self.encoder._tokenizer
        said = tokenizer.decode(list(joining.prompt), skip_special_tokens=False)
        said = said.rpartition("<|user|>")[2].partition("<|endofturn|>")[0]
        return [*tokenizer.encode(said).ids, tokenizer.token_to_id("<|endofturn|>")]


@dataclass
class Open:
    """A server with its model."""

    url: str
    model: Model
    http: httpx.Client

    def chat(self, content: str, **more: Any) -> httpx.Response:
        return self.http.post("/chat/completions", json={"messages": [{"role": "user", "content": content}],
                                                         **more})

    def message(self, content: str, **more: Any) -> dict[str, Any]:
        return self.chat(content, **more).json()["choices"][0]


@pytest.fixture
def opened(folder: Path) -> Callable[..., AbstractContextManager[Open]]:
    """Return `opened(**settings)`, within which a server answers."""

    @contextlib.contextmanager
    def within(vocab: int = 300, **given: Any) -> Iterator[Open]:
        settings = ServeSettings("scripted", port=0, **given)
        target: Any = SimpleNamespace(tokenizer_folder=folder, path=folder, is_hf=True, vocab_size=vocab)
        encoder = RequestEncoder(target, LONGEST)
        queue = RequestQueue(settings.max_waiting)
        stop: list[str] = []
        scheduler = BatchScheduler(queue, encoder, lambda: stop[0] if stop else None, lambda: False)
        model = Model(encoder, scheduler, wants_stop=stop)
        server = HttpServer(settings, queue, encoder, 0.0, LONGEST)
        server.start()
        runs = threading.Thread(target=model.run)
        runs.start()
        key = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        try:
            with httpx.Client(base_url=server.url, headers=key, timeout=600) as http:
                yield Open(server.url, model, http)
        finally:
            stop.append("the test is over")
            model.rows.release(10**6)
            runs.join(600)
            server.stop()
            assert not runs.is_alive() and not server._thread.is_alive()

    return within


def streamed(found: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream that came to its end."""
    *events, last, rest = found.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_thoughts_and_calls_are_separated_from_content(opened: Any) -> None:
    with opened() as server:
        def both(content: str, **more: Any) -> dict[str, Any]:
            whole = server.message(content, **more)
            said: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
            for event in streamed(server.chat(content, stream=True, **more)):
                (choice,) = event["choices"]
                for name in set(choice["delta"]) & {"content", "reasoning_content"}:
                    said[name] = said.get(name, "") + choice["delta"][name]
                if calls := choice["delta"].get("tool_calls"):
                    said["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
            for call in [*said.get("tool_calls", ()), *whole["message"].get("tool_calls", ())]:
                assert call.pop("id").startswith("call_")
            assert said == whole["message"] | {"content": whole["message"]["content"] or ""}
            assert choice["finish_reason"] == whole["finish_reason"]
            return whole["message"] | {"ended": whole["finish_reason"]}

        plain = both(several := "2 곰 안녕 สวัสดี 🐻‍❄️ é ﷽ 𝒳\n\t\ufffd? </b>")  # characters of several tokens
        assert (plain["content"], plain["ended"], "tool_calls" in plain) == (several, "stop", False)
        # the user's special tokens are text: the model here is one that repeats them as text
        result = both("<think> 1+1 </think> 2")
        assert (result["reasoning_content"], result["content"]) == (" 1+1 ", " 2"), "line feeds alone go"
        result = both(" 1+1 </think> 2", chat_template_kwargs={"thinks": True})
        assert (result["reasoning_content"], result["content"]) == (" 1+1 ", " 2"), "line feeds alone go"
        result = both(f"I add. {ADD}", tools=TOOLS)
        assert result["tool_calls"] == [{"type": "function",
                                         "function": {"name": "add", "arguments": '{"a": 1}'}}]
        assert (result["content"], result["ended"]) == ("I add.", "tool_calls")
        assert both(ADD, tools=TOOLS)["content"] is None
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            assert both(ADD, **more)["content"] == ADD
        assert both("<tool_call>{add}", tools=TOOLS)["content"] == "<tool_call>{add}"
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
                "messages": [{"role": "user", "content": "long " * 70}], "stream": True}) as gone:
            next(gone.iter_bytes())  # the start of a stream, before the first row

        def left() -> bool:
            server.model.rows.release()
            return 1 in server.model.left

        until(left)  # the client has left, and so does its answer


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline_s = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def health(server: Open) -> httpx.Response:
    return httpx.get(server.url.removesuffix("/v1") + "/health")


def num_waiting(server: Open) -> int:
    found: int = health(server).json()["waiting"]
    return found


def test_excess_requests_are_refused_and_waiting_ones_answered_in_order(opened: Any) -> None:
    with opened(max_waiting=3) as server, ThreadPoolExecutor(4) as pool:
        server.model.rows = threading.Semaphore(0)
        asked = []
        for number in range(4):  # the model pauses after the first one
            asked.append(pool.submit(server.chat, f"{number}"))
            until(lambda n=number: bool(server.model.joined) and num_waiting(server) == n)
        refused = server.chat("4")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert server.chat("5", n=4).status_code == 400  # never: they are more than may wait
        server.model.rows.release(10**6)
        said = [answer.result().json()["choices"][0]["message"]["content"] for answer in asked]
        assert said == list("0123") and len(server.model.joined) == 4
        assert server.chat("6").status_code == 200


def test_shutdown_finishes_running_requests_and_refuses_new_ones(opened: Any) -> None:
    with opened() as server, ThreadPoolExecutor(3) as pool:
        server.model.rows = threading.Semaphore(0)
        asked = [pool.submit(server.chat, "answer 0")]
        until(lambda: bool(server.model.joined))
        asked += [pool.submit(server.chat, f"answer {number}", stream=number == 1) for number in (1, 2)]
        until(lambda: num_waiting(server) == 2)
        server.model.wants_stop.append("SIGTERM")
        server.model.rows.release()
        until(lambda: health(server).status_code == 503)
        late = server.chat("late")
        assert (late.status_code, late.json()["error"]["type"]) == (503, "server_error")
        server.model.rows.release(10**6)
        said = [answer.result() for answer in asked]
        assert said[0].json()["choices"][0]["message"]["content"] == "answer 0"
        assert streamed(said[1])[-1]["choices"][0]["finish_reason"] == "stop"


def test_requests_beyond_the_shutdown_limit_are_aborted_with_a_message(
        opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.serve.scheduler.DRAIN_S", 0.0)
    with opened() as server, ThreadPoolExecutor(2) as pool:
        server.model.rows = threading.Semaphore(0)
        asked = [pool.submit(server.chat, "long " * 70, stream=True)]
        until(lambda: bool(server.model.joined))
        asked.append(pool.submit(server.chat, "never begun"))
        until(lambda: num_waiting(server) == 1)
        server.model.wants_stop.append("SIGTERM")
        server.model.rows.release(3)
        stream, whole = (answer.result() for answer in asked)
        assert (stream.status_code, whole.status_code) == (200, 503)
        assert "about to end" in whole.text and "about to end" in stream.text
        assert "[DONE]" not in stream.text


def test_a_defect_costs_its_request_alone(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as server:
        encode_request = server.model.encoder.encode_request
        monkeypatch.setattr(server.model.encoder, "encode_request", lambda request: 1 // 0)
        answer = server.chat("a")
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        monkeypatch.setattr(server.model.encoder, "encode_request", encode_request)
        assert server.message("b")["message"]["content"] == "b" and num_waiting(server) == 0


def test_requests_without_key_are_refused(opened: Any) -> None:
    with opened(api_key="sesame") as server:
        assert server.message("open")["message"]["content"] == "open"
        for sent in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"},
                     {"Authorization": "Bearer sésame".encode()}):
            for ask in (lambda h: httpx.get(f"{server.url}/models", headers=h),
                        lambda h: httpx.post(f"{server.url}/chat/completions", headers=h, json={})):
                answer = ask(sent)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert "sesame" not in answer.text
        assert health(server).status_code == 200
        assert "sesame" not in repr(ServeSettings("m", api_key="sesame"))


def talk(server: Open, said: bytes) -> bytes:
    """Send bytes over a plain connection, and return the reply until the server closes it."""
    host, port = server.url.removesuffix("/v1").removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=600) as connection:
        connection.sendall(said)
        heard = b""
        while piece := connection.recv(1 << 16):
            heard += piece
        return heard


def test_slow_clients_are_disconnected(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BODY_S", "LINGERS_S"):
        monkeypatch.setattr(http_server, name, 0.2)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with opened() as server:
        assert b" 408 " in talk(server, f"{head}Content-Length: 99\r\nConnection: close\r\n\r\n{{".encode())
        assert b" 400 " in talk(server, b"NO HTTP AT ALL\r\n\r\n")
        assert b" 413 " in talk(server, f"{head}Content-Length: 999999999\r\nConnection: close\r\n\r\n"
                                f"{'x' * 100}".encode())


def test_an_unread_stream_is_ended(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "TAKES_S", 0.2)

    async def never(*args: Any) -> None:
        await asyncio.sleep(600)

    with opened() as server:
        monkeypatch.setattr("aiohttp.web.StreamResponse.write", never)
        with contextlib.suppress(httpx.HTTPError):
            server.chat("hello", stream=True)
        until(lambda: not server.model.scheduler._active)


def test_an_address_that_is_taken_is_a_mistake(opened: Any) -> None:
    with opened() as server:
        port = int(server.url.removesuffix("/v1").rpartition(":")[2])
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on"):
            HttpServer(ServeSettings("m", port=port), RequestQueue(1), server.model.encoder, 0.0, LONGEST)


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
def test_completions_end_where_the_folder_says(folder: Path, tmp_path: Path, files: dict[str, str],
                                               ends: set[int]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    target: Any = SimpleNamespace(tokenizer_folder=tmp_path, path=tmp_path, is_hf=True, vocab_size=300)
    asker = PromptEncoder(target, chat=False)
    eos = asker._tokenizer.eos_token_id
    assert set(asker.end_ids) - {eos} == ends and eos in asker.end_ids
