"""The chat page of `megatron-sov serve` in a browser: answers of two models, keyboard, layout, and keys."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_sov.base.pages.page import render_chat
from tests.base.pages.driven_browser import DrivenPage, drive_browser

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from synthesis.endpoint import completion, stream_of

HOSTILE = '</p><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">\n' \
          '```html\n<b>bold</b>\n```'
KEY = "secret-key"


class ScriptedHandler(BaseHTTPRequestHandler):
    """Serves the page, and answers as the models "a" and "b" to requests with the access key."""

    server: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgement of its header

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, render_chat().encode(), "text/html; charset=utf-8")
        elif self._check_key():
            cards = [{"id": name, "max_model_len": 4096, "has_chat_template": True} for name in ("a", "b")]
            self._send(200, json.dumps({"data": cards}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._check_key():
            return
        self.server.bodies.append(body)
        text = body["messages"][-1]["content"]
        if len(body["messages"]) > 5:
            self._send(400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}')
            return
        if text == "slow":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "begun"}}]}\n\n')
            self.wfile.flush()
            self.server.released.wait(300)
            self.close_connection = True
            return
        content = HOSTILE if text == "hostile" else f"{body['model']}: {text}"
        answer = completion({"content": content, "reasoning_content": "I think."})
        self._send(200, stream_of(answer), "text/event-stream")

    def _check_key(self) -> bool:
        """Return whether the request has the access key; answer with status 401 otherwise."""
        if self.headers.get("authorization") == f"Bearer {KEY}":
            return True
        self._send(401, b'{"error": {"message": "no key"}}')
        return False

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Print no log."""


@pytest.fixture
def scripted() -> Iterator[Any]:
    """A running server with the attributes `url`, `bodies` (requests) and `released` (ends slow answers)."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedHandler)
    server.bodies, server.released = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser: str, tmp_path: Path) -> Iterator[DrivenPage]:
    """An empty page of a browser."""
    with drive_browser(browser, tmp_path) as page:
        yield page


def send_question(page: DrivenPage, text: str, number: int, key: str = "Enter") -> None:
    """Type a question and send it with `key`; wait until the page shows `number` turns."""
    page.value("document.getElementById('message').focus()")
    page.type(text)
    page.press(key)
    page.wait(f"document.querySelectorAll('.turn').length === {number}")


IS_QUIET = "document.getElementById('stop').hidden && document.querySelectorAll('.is-writing').length === 0"


def read_texts(page: DrivenPage, selector: str) -> list[str]:
    return page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")


def test_model_output_is_shown_as_text_and_saved(page: DrivenPage, scripted: Any) -> None:
    page.open(f"{scripted.url}#token={KEY}")
    page.wait("document.getElementById('title').textContent === 'a, b'")
    assert page.value("location.hash") == "", "the key is removed from the address"
    page.value("document.getElementById('system').value = 'Be brief.'")
    page.value("document.querySelectorAll('#choice input')[1].click()")
    send_question(page, "hostile", 1)
    page.wait(IS_QUIET)
    assert page.value("window.hacked") is None and page.console == []
    assert page.value("document.querySelectorAll('#log script, #log img, #log b').length") == 0
    assert read_texts(page, ".said p") == [HOSTILE.partition("\n")[0]]
    assert read_texts(page, ".said code") == ["<b>bold</b>"]
    assert read_texts(page, ".thoughts > div") == ["I think."]
    assert page.value("document.querySelector('.thoughts').open") is False
    # the file that the page saves, intercepted
    page.value("URL.createObjectURL = (blob) => { window.saved = blob; return 'blob:none'; }")
    page.value("document.getElementById('save').click()")
    (row,) = [json.loads(line) for line in page.value("window.saved.text()").splitlines()]
    assert row == {"messages": [{"role": "system", "content": "Be brief."},
                                {"role": "user", "content": "hostile"},
                                {"role": "assistant", "content": HOSTILE, "reasoning_content": "I think."}],
                   "model": "a"}


def test_keys_send_break_lines_and_stop_and_retry_replaces_the_answer(page: DrivenPage,
                                                                      scripted: Any) -> None:
    page.open(f"{scripted.url}#token={KEY}", 390, 844, "dark")
    page.wait("document.getElementById('title').textContent === 'a, b'")
    page.value("document.getElementById('message').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    send_question(page, "two", 1)
    page.wait(IS_QUIET)
    assert read_texts(page, ".said") == ["a: one\ntwo", "b: one\ntwo"], "both answer"
    assert scripted.bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert (scripted.bodies[0]["temperature"], scripted.bodies[0]["max_tokens"]) == (0.7, 2048)
    send_question(page, "slow", 2)
    page.wait("[...document.querySelectorAll('.said')].slice(2).every((one) => one.textContent === 'begun')")
    page.press("Escape")
    page.wait(IS_QUIET)
    assert read_texts(page, ".turn:last-child .below span") == ["stopped", "stopped"]
    before = len(scripted.bodies)
    page.value("[...document.querySelectorAll('.turn:last-child button')].find("
               "(one) => one.textContent === 'Regenerate').click()")
    page.wait("document.querySelectorAll('.said')[2].textContent === 'begun'")
    page.value("document.getElementById('stop').click()")
    page.wait(IS_QUIET)
    assert [body["model"] for body in scripted.bodies[before:]] == ["a"]
    # the oldest turn is left out where the context ends, and the page says so
    send_question(page, "three", 3)
    page.wait(IS_QUIET)
    send_question(page, "four", 4)
    page.wait(IS_QUIET)
    assert "oldest turns are left out" in page.value("document.getElementById('note').textContent")
    assert read_texts(page, ".turn:last-child .said") == ["a: four", "b: four"]


def test_the_page_fits_its_screens_and_every_field_has_a_name(page: DrivenPage, scripted: Any) -> None:
    papers = set()
    for width, height, scheme in ((390, 844, "light"), (820, 1180, "dark"), (1440, 900, "light")):
        page.open(f"{scripted.url}#token={KEY}", width, height, scheme)
        page.wait("document.getElementById('title').textContent === 'a, b'")
        send_question(page, "w" * 400, 1)
        page.wait(IS_QUIET)
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.value("(({scrollWidth, clientWidth}) => scrollWidth <= clientWidth)"
                          "(document.getElementById('log'))")
        bottom = page.value("document.getElementById('composer').getBoundingClientRect().bottom")
        assert bottom <= height + 1
        papers.add(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2, "light and dark"
    assert page.value("[...document.querySelectorAll('input, textarea')].every((one) => one.labels.length)")
    assert page.console == []


def test_the_page_prompts_for_a_missing_key(page: DrivenPage, scripted: Any) -> None:
    page.open(scripted.url)
    page.wait("document.getElementById('door').open")
    page.value("document.getElementById('key').focus()")
    page.type(KEY)
    page.press("Enter")
    page.wait("document.getElementById('title').textContent === 'a, b'")
    assert page.value("document.getElementById('door').open") is False


def test_the_page_needs_no_key_and_the_model_does(serving: Any, imported: dict[str, Path],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_KEY", KEY)
    with serving(imported["solar_open"], "--name", "sft", "--api-key-env", "SERVE_KEY", "--max-batch", "2",
                 "--set", "train.num_threads=1") as served, \
            httpx.Client(base_url=served.url, timeout=600,
                         headers={"Authorization": f"Bearer {KEY}"}) as http:
        home = httpx.get(served.url.removesuffix("v1"))
        assert home.text == render_chat()
        assert "frame-ancestors 'none'" in home.headers["content-security-policy"]
        assert httpx.get(f"{served.url}/models").status_code == 401
        (card,) = http.get("/models").json()["data"]
        assert (card["id"], card["has_chat_template"]) == ("sft", True)
        missing = http.post("/chat/completions", json={"messages": [{"role": "user", "content": "?"}],
                                                       "model": "x"})
        assert missing.status_code == 404 and "'sft'" in missing.json()["error"]["message"]
