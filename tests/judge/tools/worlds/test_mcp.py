"""Tools of an MCP server, played against a scripted one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.tools.environment import EpisodeLimits, ToolFault
from megatron_sov.judge.tools.host import EnvironmentHost, EpisodeLost
from megatron_sov.judge.tools.registry import make, order
from megatron_sov.judge.tools.worlds.mcp import described_tool

SERVER = [sys.executable, "-S", str(Path(__file__).with_name("scripted_mcp_server.py"))]
TASK = {"question": "Count to two.", "answer": "2"}


def server(**more: Any) -> Any:
    made = make(order("mcp", {"command": SERVER, **more}))[0]
    made.reset(TASK)
    return made


def test_its_tools_are_shown_called_and_counted() -> None:
    with EnvironmentHost(order("mcp", {"command": SERVER, "repeat": True}), EpisodeLimits()) as host:
        opening = host.reset(TASK)
        assert [tool["function"]["name"] for tool in opening.tools] == ["count", "echo", "fail", "die"]
        found = [host.call(ToolCall(name, arguments)) for name, arguments in (
            ("count", {}), ("echo", {"text": "말"}), ("echo", {"text": 1}), ("fail", {}), ("list", {}))]
        assert [(f.text.split("\n")[0], f.fault) for f in found] == [
            ("1", ""), ("말", ""), ("error: text must be a string", "arguments"),
            ("error: fail: it failed", "refused"),
            ("error: there is no tool 'list'; the tools are count, echo, fail, die", "unknown_tool")]
        state = host.state
        assert host.call(ToolCall("die", {})).fault == "infrastructure"
        host.resume(TASK, state)  # the calls that gave a result are made again on a new server
        assert host.call(ToolCall("count", {})).text.startswith("2")
        assert host.score("The answer is 2").reward == 1
    with (EnvironmentHost(order("mcp", {"command": SERVER}), EpisodeLimits()) as host,
          pytest.raises(EpisodeLost, match="count was called, may have acted on the world")):
        host.resume(TASK, state)


def test_a_server_gets_no_key_that_it_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PLANTED_API_KEY", "SEARCH_KEY", "LD_PRELOADED", "PYTHONSTARTUP_KEY"):
        monkeypatch.setenv(name, f"{name} planted")
    monkeypatch.setenv("TERM", "() { echo planted; }")  # a function to an old shell
    for env in ((), ("SEARCH_KEY",)):
        made = server(env=list(env))
        told = made.call("echo", {"text": "environment"})
        given = dict(pair.partition("=")[::2] for pair in told.split("\0"))
        made._end()
        assert {name for name, value in given.items() if "planted" in value} == set(env)
        assert set(given) <= {"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", *env, "LC_CTYPE"}
        assert given["PATH"]
    with pytest.raises(UserError, match=r"env\.0 = \"NOT_SET\" is not set in this environment"):
        server(env=["NOT_SET"])


def test_a_server_may_end_by_itself_before_it_is_ended(tmp_path: Path) -> None:
    done = tmp_path / "done"
    program = f"import runpy, sys; runpy.run_path({SERVER[2]!r}); open({str(done)!r}, 'w')"
    server(command=[sys.executable, "-S", "-c", program])._end()
    assert done.exists()


def test_models_are_shown_a_part_of_it() -> None:
    made = server(only=["echo"])
    assert [tool["function"]["name"] for tool in made.tools()] == ["echo"]
    made._end()


def test_what_a_server_starts_ends_with_it_however_that_ends(tmp_path: Path) -> None:
    told = tmp_path / "started"

    def started() -> psutil.Process:
        deadline_s = time.monotonic() + 600
        while not told.exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process = psutil.Process(int(told.read_text()))
        told.unlink()
        return process

    with EnvironmentHost(order("mcp", {"command": [*SERVER, str(told)]}), EpisodeLimits()) as host:
        host.reset(TASK)
        daemons = [started()]
        host.reset(TASK)  # ends the server of the episode before
        daemons.append(started())
        assert not psutil.wait_procs(daemons[:1], timeout=600)[1] and daemons[1].is_running()
        host.call(ToolCall("die", {}))  # the server ends by itself
        assert not psutil.wait_procs(daemons, timeout=600)[1]
        host.reset(TASK)
        daemons.append(started())
        host._workers.end()
        assert not psutil.wait_procs(daemons, timeout=600)[1]


@pytest.mark.parametrize("settings, told", [
    ({"only": ["ech"]}, "has no tool 'ech'; it has count, echo, fail, die"),
    ({"command": ["no-such-program"]}, "names no program that is on PATH"),
    ({"command": ["true"]}, "has ended"),
    ({"command": ["echo", "<html>"]}, "where a message belongs")])
def test_a_server_that_is_none_is_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        server(**settings)


@pytest.mark.parametrize("tool", [
    None, "count", {}, {"name": ""}, {"name": 3}, {"name": "f", "description": [1]},
    {"name": "f", "inputSchema": 1}, {"name": "f", "inputSchema": {"properties": []}},
    {"name": "f", "inputSchema": {"required": 1}}])
def test_a_tool_that_is_none_is_named(tool: Any) -> None:
    with pytest.raises(ToolFault, match="which is no tool"):
        described_tool(tool)


def test_a_command_that_ends_before_it_is_watched_is_buried() -> None:
    program = """if True:
        import os
        from megatron_sov.sandbox.process_tree import _keep
        until, wanted = os.pipe()
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        _keep(pid, until)
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
