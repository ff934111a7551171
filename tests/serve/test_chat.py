"""`megatron-sov chat`, with the commands of docs/serve.md: prompts, output, and limits of the context."""

import io
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from megatron_sov.cli import main
from megatron_sov.serve.chat_session import ChatSession, find_chat_model
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused
from megatron_sov.work.endpoints.transport import Transport
from tests.pages_typed import page_section

PAGE = page_section("serve.md", "Chat in the terminal")


def reply(request: Any) -> dict[str, Any]:
    """Return an answer with reasoning that names the number of questions and the last one, for the scripted
    endpoint; the question "long" gets a truncated answer."""
    questions = [m["content"] for m in request["messages"] if m["role"] == "user"]
    return {"content": f"{len(questions)} asked, last {questions[-1]}", "reasoning_content": "I count them.",
            "finish_reason": "length" if questions[-1] == "long" else "stop"}


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    """A running endpoint that answers with `reply`."""
    with serving(ScriptedEndpoint(reply)) as server:
        yield server


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """A function `(lines, *words)` that runs `chat` with this input and these words; returns its output."""

    def run_chat(lines: str, *words: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main(["chat", *words]) == 0
        return capsys.readouterr()

    return run_chat


class RecordingScreen:
    """A screen of `ChatSession` that records what it is to show."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def think(self, piece: str) -> None:
        self.lines.append(f"thought {piece}")

    def say(self, piece: str) -> None:
        self.lines.append(piece)

    def note(self, text: str) -> None:
        self.lines.append(f"note {text}")


def test_each_piped_line_prints_exactly_one_answer(endpoint: ScriptedEndpoint, talk: Any ) -> None:
    result = talk("one\n\ntwo\n/think\n/clear\nthree\n/thnk\n/quit\nfour\n", endpoint.url, "--system",
                  "Be brief.", "--top-p", "0.9", "--seed", "5")
    assert result.out == "1 asked, last one\n2 asked, last two\n1 asked, last three\n"
    assert "I count them." in result.err and "/thnk: does not exist; did you mean 'think'?" in result.err
    first, second, third = endpoint.requests
    assert [m["content"] for m in second["messages"]] == ["Be brief.", "one", "1 asked, last one", "two"]
    assert (first["temperature"], first["top_p"]) == (0.7, 0.9)
    assert (first["seed"], first["max_tokens"]) == (5, 2048), "half of the context"
    assert [m["content"] for m in third["messages"]] == ["Be brief.", "three"]


def test_oldest_turns_are_dropped_at_the_context_limit(endpoint: ScriptedEndpoint) -> None:
    session, screen = ChatSession(find_chat_model(endpoint.url, ""), {}), RecordingScreen()
    for text in ("a", "b", "c"):
        session.ask(text, screen)
    endpoint.next = ["too long", "too long"]
    session.ask("d", screen)
    assert [m["content"] for m in endpoint.requests[-1]["messages"] if m["role"] == "user"] == ["c", "d"]
    assert "note the conversation is longer than the model's context: the 2 oldest turns are left out" in (
        screen.lines)
    endpoint.next = ["too long"] * 9
    with pytest.raises(RequestRefused, match="longer than the model's context"):
        session.ask("e", screen)
    assert [turn.user for turn in session.turns] == ["a", "b", "c", "d"]


@pytest.mark.deep
def test_control_characters_are_removed_and_ctrl_c_stops_only_the_answer() -> None:
    with serving(ScriptedEndpoint(lambda request: "red \x1b[31m" if request["messages"][-1]["content"] == "x"
                                  else "ok")) as server:
        master, slave = pty.openpty()
        process = subprocess.Popen([sys.executable, "-m", "megatron_sov", "chat", server.url], stdin=slave,
                                   stdout=slave, stderr=slave, start_new_session=True,
                                   # a shell's background processes ignore SIGINT
                                   preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
        os.close(slave)
        output = ""

        def wait_for(text: str, press: Callable[[], None] = lambda: None) -> None:
            """Press a key and wait until the terminal shows `text`; the output up to it is dropped."""
            nonlocal output
            deadline_s = time.monotonic() + 300
            press()
            while text not in output:
                assert time.monotonic() < deadline_s, output
                if select.select([master], [], [], 5)[0]:
                    output += os.read(master, 4096).decode(errors="replace")
                else:  # Python loses an interrupt that comes during a finalizer, so the key is pressed again
                    press()
            output = output.partition(text)[2]

        wait_for("you> ")
        os.write(master, b"x\n")
        wait_for("\\x1b[31m")
        wait_for("you> ")
        server.slow_s = 600.0
        os.write(master, b"wait\n")
        while len(server.requests) < 2:
            time.sleep(0.02)
        wait_for("stopped", press=partial(process.send_signal, signal.SIGINT))
        wait_for("you> ")
        server.slow_s = 0.0
        os.write(master, b"again\n")
        wait_for("ok")
        wait_for("you> ")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
        os.close(master)


def test_the_pages_commands_talk_to_a_checkpoint(talk: Any, cwd: Path, one_rank: None,
                                                 imported: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
                                                 warm_python: str, capsys: Any) -> None:
    monkeypatch.setattr(sys, "executable", warm_python)
    Path("my-checkpoint").symlink_to(imported["solar_open"])
    (piped,) = re.findall(r"^printf '(.*)' \| megatron-sov chat (.*) > answers.txt$", PAGE, re.MULTILINE)
    output = talk(piped[0].replace("\\n", "\n"), *shlex.split(piped[1]), "--max-new-tokens", "6", "--set",
                 "train.num_threads=1").out
    assert main(["generate", "my-checkpoint", "--chat", "--prompt", "1 + 2?", "--max-new-tokens", "6"]) == 0
    first_answer = output.partition("\n")[0]
    assert capsys.readouterr().out == f"user: 1 + 2?\nassistant: {first_answer}\n"


@pytest.mark.each(("words", "message"), [
    (["nowhere"], "nowhere: does not exist"), ([""], "TARGET: is empty; must name a model"),
    (["http://h:0/v1"], "must be an address"),
    (["http://127.0.0.1:9/v1"], "start a server there, in another terminal"),
    (["a", "--tools", "no"], "--tools: was removed in this version")])
def test_a_mistake_is_one_sentence(words: list[str], message: str, get_refusal: Any) -> None:
    errors = get_refusal("chat", *words)
    assert errors.startswith("error: ") and message in errors


def test_an_address_without_a_port_gets_port_80(monkeypatch: pytest.MonkeyPatch, get_refusal: Any) -> None:
    monkeypatch.setattr(Transport, "get", Mock(side_effect=BadAnswer("ConnectError: refused")))
    assert "megatron-sov serve MODEL --port 80" in get_refusal("chat", "http://localhost/v1")


def test_a_model_without_a_template_is_refused(endpoint: ScriptedEndpoint, capsys: Any) -> None:
    endpoint.has_template = False
    assert main(["chat", endpoint.url]) == 2
    assert "scripted: has no chat template, so it cannot hold a conversation" in capsys.readouterr().err
