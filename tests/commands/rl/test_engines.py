"""`megatron-sov rl engines`: start engine servers for a run, and restart those that end."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.commands.rl.engines_run import keep_server


class ScriptedServer:
    """A server with scripted starts: it "ends" at once, "fails" to start, or "stays" until `end`."""

    log = Path("engine-0.log")

    def __init__(self, *starts: str, is_over: threading.Event) -> None:
        self.starts, self.is_over, self.done = list(starts), is_over, list[str]()

    def start(self, should_stop: Callable[[], bool]) -> Any:
        self.done.append(self.starts.pop(0))
        if self.done[-1] == "fails":
            raise UserError("--engine vllm: server 0 ended")
        return self

    def is_alive(self) -> bool:
        if self.done[-1] == "stays":
            self.is_over.set()
        return self.done[-1] == "stays"

    def end(self) -> None:
        self.done.append("end")


@pytest.mark.parametrize(("starts", "message"), [
    (("ends", "fails", "fails", "ends", "fails", "stays"), ""),
    (("ends", "fails", "fails", "fails"), "--engine vllm: server 0 ended")])
def test_an_ended_server_restarts_and_a_failed_restart_is_reported(
        starts: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    is_over = threading.Event()
    server = ScriptedServer(*starts, is_over=is_over)
    assert keep_server(server, "n2:8000", 2, is_over, poll_s=0, restart_s=0) == message
    assert server.done == [*starts, "end"]
    captured = capsys.readouterr()
    assert "n2:8000: its server has ended (see engine-0.log); restarting" in captured.err
    assert captured.out.count("n2:8000 answers") == len([s for s in starts if s != "fails"])


def test_a_run_without_servers_is_refused(tmp_path: Path, get_refusal: Any) -> None:
    assert "--engine megatron: has no servers; add --engine vllm" in get_refusal(
        "rl", "engines", "tiny-solar-open", "--prompts", "p.jsonl", "--reward", "math", "--store",
        str(tmp_path / "s"), "--from", str(tmp_path), "--run", str(tmp_path / "r"))
