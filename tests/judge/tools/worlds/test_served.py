"""Worlds of other people's servers, played against small ones that speak their protocols."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.tools.environment import EpisodeLimits, InfrastructureFault, Observation, ToolFault
from megatron_sov.judge.tools.host import EnvironmentHost, EpisodeLost
from megatron_sov.judge.tools.registry import make, order

Serve = Callable[[web.Application], str]
GUESS = {"type": "object", "properties": {"guess": {"type": "integer"}, "metadata": {"type": "object"}},
         "required": ["guess"]}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Returns a function that serves an application in a thread, and gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runners: list[web.AppRunner] = []

    async def begin(app: web.Application) -> int:
        runners.append(web.AppRunner(app, shutdown_timeout=0.1))
        await runners[-1].setup()
        site = web.TCPSite(runners[-1], "127.0.0.1", 0)
        await site.start()
        return int(runners[-1].addresses[0][1])

    yield lambda app: f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(begin(app), loop).result()}"
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Guessing:
    """OpenEnv's messages around a number to be guessed; with tools, `guess` is one."""

    def __init__(self, has_tools: bool = False) -> None:
        self.has_tools, self.sessions, self.lies = has_tools, 0, False
        self.again = ""
        """A type of messages that are answered twice."""
        self.late: list[dict[str, Any]] = []
        """Answers that go before the next one."""
        self.tools: Any = [{"name": "guess", "description": "Say a number.", "inputSchema": GUESS}]

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/ws", self.session), web.get("/schema", self.schema)])
        return app

    async def schema(self, request: web.Request) -> web.Response:
        return web.json_response({"action": GUESS, "observation": {}, "state": {}})

    async def session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sessions += 1
        number = 0
        async for message in socket:
            asked = json.loads(message.data)
            kind, data = asked["type"], asked["data"]
            if kind == "reset":
                number = data.get("seed", 7)
                answer = observed({"hint": "Guess."}, None)
            elif kind == "mcp":
                answer = {"type": "mcp", "data": {"result": {"tools": self.tools}} if self.has_tools else {
                    "error": {"code": -32601, "message": "no tools"}}}
            else:
                answer = self.step(number, data)
            late, self.late = self.late, []  # before whoever gets the answer can give the next ones
            for one in (*late, answer, *([answer] if kind == self.again else ())):
                await socket.send_json(one)
        return socket

    def step(self, number: int, data: dict[str, Any]) -> dict[str, Any]:
        guess = (data["arguments"] if self.has_tools else data).get("guess")
        if not isinstance(guess, int):
            return {"type": "error", "data": {"message": "Invalid message", "code": "VALIDATION_ERROR",
                                              "errors": [{"loc": ["guess"], "msg": "must be a number"}]}}
        if guess < 0:
            return {"type": "error", "data": {"message": "negative", "code": "EXECUTION_ERROR"}}
        hint = {True: "right", False: "higher" if guess < number else "lower"}[guess == number]
        hint = "wrong" if self.lies else hint
        if not self.has_tools:
            return observed({"hint": hint}, float(guess == number), guess == number)
        return observed({"tool_name": "guess", "result": {"data": hint, "structured_content": None},
                         "error": None}, -0.5, False)


def observed(observation: dict[str, Any], reward: float | None, done: bool = False) -> dict[str, Any]:
    return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}


def test_an_openenv_world_is_a_step_with_the_schema_of_its_action(serve: Serve) -> None:
    world = Guessing()
    asked = order("openenv", {"url": serve(world.app()), "system": "Be quick."})
    with EnvironmentHost(asked, EpisodeLimits()) as host:
        opening = host.reset({"reset": {"seed": 3}})
        assert opening.observation == Observation('{"hint": "Guess."}', "Be quick.")
        [tool] = opening.tools
        assert tool["function"]["name"] == "step"
        assert tool["function"]["parameters"] == GUESS | {"properties": {"guess": {"type": "integer"}}}
        found = [host.call(ToolCall("step", {"guess": guess})) for guess in (5, "5", -1)]
        assert [(one.text, one.fault) for one in found] == [
            ('{"hint": "lower"}', ""), ("error: Invalid message; guess: must be a number", "arguments"),
            ("error: step: negative", "refused")]
        state = host.state
        # another process goes on from the state: the actions are taken again, and only those
        host.resume({"reset": {"seed": 3}}, state)
        assert host.call(ToolCall("step", {"guess": 3})).text == '{"hint": "right"}'
        assert host.call(ToolCall("step", {"guess": 3})).fault == "refused"  # it is over
        result = host.score("3")
        assert (result.reward, result.components) == (1.0, {"actions": 2, "done": True})


def test_tools_of_an_openenv_world_are_shown_as_they_are(serve: Serve) -> None:
    made, _ = make(order("openenv", {"url": serve(Guessing(has_tools=True).app())}))
    assert made.reset({"question": "Which number?"}).user == "Which number?"
    assert [tool["function"]["name"] for tool in made.tools()] == ["guess"]
    assert [made.call("guess", {"guess": guess}) for guess in (9, 7)] == ["lower", "right"]
    assert made.score("7").reward == -1.0  # type: ignore[union-attr]
    with pytest.raises(ToolFault, match="there is no tool 'step'; the tools are guess"):
        made.call("step", {"guess": 1})


def test_a_world_that_does_not_repeat_itself_gives_no_reward(serve: Serve) -> None:
    world = Guessing()
    url = serve(world.app())
    first, second = (make(order("openenv", {"url": url}))[0] for _ in range(2))
    for made in (first, second):
        made.reset({})
    first.call("step", {"guess": 1})
    second.restore(first.snapshot())
    assert world.sessions == 3
    world.lies = True
    third, _ = make(order("openenv", {"url": url}))
    third.reset({})
    with pytest.raises(InfrastructureFault, match="does not repeat itself"):
        third.restore(first.snapshot())


@pytest.mark.parametrize(("again", "told"), [
    ("reset", "answered twice|answers mcp by 'observation'"), ("mcp", "twice"), ("step", "twice")])
def test_answers_that_nobody_asked_for_are_told(serve: Serve, again: str, told: str) -> None:
    world = Guessing()
    world.again = again
    made, _ = make(order("openenv", {"url": serve(world.app())}))
    with pytest.raises((InfrastructureFault, UserError), match=told):
        made.reset({})
        made.call("step", {"guess": 1})
        time.sleep(0.05)
        made.call("step", {"guess": 2})


def test_no_episode_whose_answers_have_moved_is_paid(serve: Serve) -> None:
    world = Guessing()
    made, _ = make(order("openenv", {"url": serve(world.app())}))
    made.reset({})
    made.call("step", {"guess": 1})
    # a second answer comes while the next step is under way, and is taken for its own
    world.late = [observed({"hint": "higher"}, 0.0)]
    assert made.call("step", {"guess": 7}) == '{"hint": "higher"}'
    with pytest.raises(InfrastructureFault, match=r"answers mcp by 'observation'|answered twice"):
        made.score("7")


@pytest.mark.parametrize(("tools", "told"), [
    (5, "and not tools alone"), *((tools, "which is no tool") for tools in (
        [5], [{}], [{"name": 5}], [{"name": "a", "inputSchema": 5}]))])
def test_an_openenv_server_that_lists_no_tools_is_told(serve: Serve, tools: Any, told: str) -> None:
    world = Guessing(has_tools=True)
    world.tools = tools
    made, _ = make(order("openenv", {"url": serve(world.app())}))
    with pytest.raises(UserError, match=f"cannot be used: it lists .*, {told}"):
        made.reset({})


@pytest.mark.parametrize("schema", ["[1]", '{"action": [1]}', '{"action": {"properties": [1]}}', "", None])
def test_an_openenv_server_without_a_schema_is_told(serve: Serve, schema: str | None) -> None:
    async def answer(request: web.Request) -> web.Response:
        if schema is None:  # it hangs up
            request.transport.abort()  # type: ignore[union-attr]
        return web.Response(text=schema)

    world = Guessing()
    world.schema = answer  # type: ignore[method-assign]
    made, _ = make(order("openenv", {"url": serve(world.app())}))
    with pytest.raises(UserError, match="/schema does not describe its action"):
        made.reset({})


@pytest.mark.parametrize("reward", [float("nan"), 10 ** 400])
def test_a_reward_that_is_no_number_is_the_servers_fault(serve: Serve, reward: float) -> None:
    world = Guessing()
    world.step = lambda number, data: observed({}, reward)  # type: ignore[method-assign]
    made, _ = make(order("openenv", {"url": serve(world.app())}))
    made.reset({})
    with pytest.raises(InfrastructureFault, match="its reward no finite number"):
        made.call("step", {"guess": 1})


@pytest.mark.parametrize("name", ["openenv", "nemo_gym"])
def test_a_server_that_is_not_there_is_a_sentence(name: str) -> None:
    made, _ = make(order(name, {"url": "http://127.0.0.1:9"}))
    with pytest.raises(UserError, match=r"server at http://127\.0\.0\.1:9 cannot be used"):
        made.reset(ROW)
    with pytest.raises(UserError, match="must be the address of a server"):
        make(order(name, {"url": "localhost:9"}))


# NeMo Gym: a counter for each session, as its `example_session_state_mgmt` has it.

TOOLS = [{"type": "function", "name": "add", "description": "", "strict": True, "parameters": {
    "type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}}]
ROW = {"responses_create_params": {"input": [{"role": "developer", "content": "Count."},
                                             {"role": "user", "content": "Add 1, then 2."}], "tools": TOOLS},
       "initial_count": 3, "expected_count": 6}


class Counting:
    """A resources server; `seen` is what its verifier was given last."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.seen: dict[str, Any] = {}
        self.most = 99
        self.more: dict[str, Any] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/seed_session", self.seed), web.post("/add", self.add),
                        web.post("/verify", self.verify)])
        return app

    async def seed(self, request: web.Request) -> web.Response:
        session = str(len(self.counts))
        self.counts[session] = (await request.json())["initial_count"]
        answer = web.json_response({})
        answer.set_cookie("session", session)
        return answer

    async def add(self, request: web.Request) -> web.Response:
        count = (await request.json()).get("count")
        if not isinstance(count, int):
            return web.json_response({"detail": "count must be a number"}, status=422)
        if count > self.most:
            return web.json_response({"error": "too much"}, status=500)
        self.counts[request.cookies["session"]] += count
        return web.json_response({"count": self.counts[request.cookies["session"]]})

    async def verify(self, request: web.Request) -> web.Response:
        self.seen = await request.json()
        right = self.counts[request.cookies["session"]] == self.seen["expected_count"]
        return web.json_response({**self.seen, "reward": float(right), "reward_components": {"count": right},
                                  **self.more})


def test_a_row_of_nemo_gym_is_a_task(serve: Serve) -> None:
    server = Counting()
    with EnvironmentHost(order("nemo_gym", {"url": serve(server.app())}), EpisodeLimits()) as host:
        opening = host.reset(ROW)
        assert opening.observation == Observation("Add 1, then 2.", "Count.")
        assert [tool["function"]["name"] for tool in opening.tools] == ["add"]
        found = [host.call(ToolCall("add", {"count": count})) for count in (1, "1", 100)]
        # as NeMo Gym's own agent does it: what came is shown, whatever its status, and the verifier sees it
        assert [(one.text, one.fault) for one in found] == [
            ('{"count": 4}', ""), ('{"detail": "count must be a number"}', ""), ('{"error": "too much"}', "")]
        host.resume(ROW, host.state)
        host.call(ToolCall("add", {"count": 2}))
        result = host.score("It is 6.")
    assert (result.reward, result.components) == (1.0, {"count": True})
    output = server.seen["response"]["output"]
    assert [(item["type"], item.get("output")) for item in output] == [
        ("function_call", None), ("function_call_output", '{"count": 4}'),
        ("function_call", None), ("function_call_output", '{"detail": "count must be a number"}'),
        ("function_call", None), ("function_call_output", '{"error": "too much"}'),
        ("function_call", None), ("function_call_output", '{"count": 6}'), ("message", None)]
    assert output[0]["name"] == "add" and output[-1]["content"][0]["text"] == "It is 6."


def test_a_masked_episode_of_nemo_gym_has_no_reward(serve: Serve) -> None:
    server = Counting()
    server.more = {"mask_sample": True, "failure_reason": "the judge is not there"}
    with EnvironmentHost(order("nemo_gym", {"url": serve(server.app())}), EpisodeLimits()) as host:
        host.reset(ROW)
        result = host.score("It is 6.")
    assert (result.reward, result.status, result.reason) == (None, "failed", "the judge is not there")


def test_instructions_of_nemo_gym_are_rules_and_a_tool_may_take_nothing(serve: Serve) -> None:
    made, _ = make(order("nemo_gym", {"url": serve(Counting().app())}))
    row = {"input": [{"role": "developer", "content": "Count."}, {"role": "user", "content": "Add 1."}],
           "instructions": "Be brief.", "tools": [{"type": "function", "name": "add", "parameters": None}]}
    assert made.reset(ROW | {"responses_create_params": row}).system == "Be brief.\n\nCount."
    assert made.tools()[0]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_what_sends_elsewhere_is_no_result_of_a_tool(serve: Serve) -> None:
    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("http://127.0.0.1:9/")

    server = Counting()
    server.add = elsewhere  # type: ignore[method-assign]
    made, _ = make(order("nemo_gym", {"url": serve(server.app())}))
    made.reset(ROW)
    with pytest.raises(InfrastructureFault, match=r"/add sends elsewhere \(HTTP 307\)"):
        made.call("add", {"count": 1})


def test_a_call_that_is_refused_when_it_is_made_again_loses_the_episode(serve: Serve) -> None:
    server = Counting()
    with EnvironmentHost(order("nemo_gym", {"url": serve(server.app())}), EpisodeLimits()) as host:
        host.reset(ROW)
        host.call(ToolCall("add", {"count": 1}))
        server.most = 0
        with pytest.raises(EpisodeLost, match="too much"):
            host.resume(ROW, host.state)


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "input must be a text"),
    ({"input": 3}, "input must be a text"), ({"input": "a", "tools": [{"name": 1}]}, "which is no function")])
def test_rows_that_are_no_beginning_are_refused(serve: Serve, changed: dict[str, Any], sentence: str) -> None:
    made, _ = make(order("nemo_gym", {"url": serve(Counting().app())}))
    with pytest.raises(UserError, match=sentence):
        made.reset(ROW | {"responses_create_params": changed})
    with pytest.raises(UserError, match="has no 'responses_create_params'"):
        made.reset({"question": "a"})


# MCP over HTTP: answers as JSON and as streams of events, sessions that outlive a connection.


class HttpTools:
    """A server with one tool that counts and one that only reads; `calls` is what was made of it."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.calls: list[str] = []
        self.keys: set[str | None] = set()

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/mcp", self.message), web.delete("/mcp", self.end)])
        return app

    async def end(self, request: web.Request) -> web.Response:
        del self.counts[request.headers["Mcp-Session-Id"]]
        return web.Response()

    async def message(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        session = request.headers.get("Mcp-Session-Id")
        self.keys.add(request.headers.get("Authorization"))
        if asked["method"] == "initialize":
            session = f"s{len(self.counts)}"
            self.counts[session] = 0
            result = {"protocolVersion": "2025-06-18", "capabilities": {}}
            return web.json_response(answered(asked, result), headers={"Mcp-Session-Id": session})
        if session not in self.counts:
            return web.json_response({"error": "no session"}, status=404)
        if asked["method"] == "notifications/initialized":
            return web.Response(status=202)
        if asked["method"] == "ping":
            return web.json_response(answered(asked, {}))
        if asked["method"] == "tools/list":
            return web.json_response(answered(asked, {"tools": [
                {"name": "count", "inputSchema": {"type": "object"}},
                {"name": "look", "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}]}))
        self.calls.append(asked["params"]["name"])
        self.counts[session] += asked["params"]["name"] == "count"
        said = answered(asked, {"content": [{"type": "text", "text": str(self.counts[session])}]})
        told = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "counting"}}
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b": a comment\n\n" + b"".join(
            b"event: message\ndata: " + json.dumps(part).encode() + b"\n\n" for part in (told, said)))
        return stream


def answered(asked: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": asked["id"], "result": result}


def test_an_episode_of_an_mcp_server_over_http_goes_on_in_its_session(serve: Serve) -> None:
    server, task = HttpTools(), {"question": "Count to 2.", "answer": "2"}
    asked = order("mcp", {"url": f"{serve(server.app())}/mcp"})
    with EnvironmentHost(asked, EpisodeLimits()) as first:
        assert [tool["function"]["name"] for tool in first.reset(task).tools] == ["count", "look"]
        assert first.call(ToolCall("count", {})).text == "1"
        state = first.state
    with EnvironmentHost(asked, EpisodeLimits()) as second:
        second.resume(task, state)
        assert second.call(ToolCall("count", {})).text == "2" and server.calls == ["count", "count"]
        assert second.score("The answer is 2").reward == 1
        # the server begins anew: no call that may have acted is made again
        state = second.state
        server.counts.clear()
        with pytest.raises(EpisodeLost, match="count was called, may have acted on the world"):
            second.resume(task, state)
        assert server.calls == ["count", "count"]


def test_a_server_over_http_is_sent_the_key_that_was_named(
        serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLS_KEY", "secret")
    server = HttpTools()
    made, _ = make(order("mcp", {"url": f"{serve(server.app())}/mcp", "key_env": "TOOLS_KEY"}))
    made.reset({"question": "Count.", "answer": "1"})
    assert server.keys == {"Bearer secret"}
    with pytest.raises(UserError, match="key_env = \"NO_KEY\" is not set"):
        make(order("mcp", {"url": "http://localhost:1", "key_env": "NO_KEY"}))


def test_calls_that_only_read_do_not_keep_an_episode_from_going_on(serve: Serve) -> None:
    server, task = HttpTools(), {"question": "Look.", "answer": "0"}
    url = f"{serve(server.app())}/mcp"
    for repeat, calls in ((False, ["look"]), (True, ["look", "look", "look"])):
        made, again = (make(order("mcp", {"url": url, "repeat": repeat}))[0] for _ in range(2))
        made.reset(task)
        made.call("look", {})
        state = made.snapshot()
        server.counts.clear()
        again.reset(task)
        again.restore(state)
        assert server.calls == calls


class BrokenTools(HttpTools):
    """A server with results of its own."""

    def __init__(self, **results: Any) -> None:
        super().__init__()
        self.results = results

    async def message(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        found = self.results.get(asked["method"].partition("/")[2])
        status = self.results.get("status", 200)
        return web.json_response(answered(asked, found), status=status) if found else (
            await super().message(request))


def test_what_a_server_breaks_is_its_own_fault(serve: Serve) -> None:
    endless, broken = BrokenTools(list={"tools": [], "nextCursor": "a"}), BrokenTools(call={"content": 5})
    made, _ = make(order("mcp", {"url": f"{serve(endless.app())}/mcp"}))
    with pytest.raises(UserError, match="lists the same page of its tools for ever"):
        made.reset({"question": "Count.", "answer": "1"})
    made, _ = make(order("mcp", {"url": f"{serve(broken.app())}/mcp"}))
    made.reset({"question": "Count.", "answer": "1"})
    with pytest.raises(InfrastructureFault, match="is 5, and no list"):
        made.call("count", {})
    elsewhere = BrokenTools(call={"content": [{"type": "text", "text": "1"}]}, status=302)
    made, _ = make(order("mcp", {"url": f"{serve(elsewhere.app())}/mcp"}))
    made.reset({"question": "Count.", "answer": "1"})
    with pytest.raises(InfrastructureFault, match="HTTP 302"):
        made.call("count", {})


class OlderTools(HttpTools):
    """A server of an earlier version, which hears what the protocol asks of its client; /old is its address
    of before."""

    def __init__(self, version: str = "2025-03-26") -> None:
        super().__init__()
        self.version = version
        self.ids: list[int] = []
        self.versions: list[str | None] = []

    def app(self) -> web.Application:
        app = super().app()
        app.add_routes([web.post("/old", self.moved)])
        return app

    async def moved(self, request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "/mcp"})

    async def message(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.versions.append(request.headers.get("MCP-Protocol-Version"))
        self.ids += [asked["id"]] if "id" in asked else []
        if asked["method"] == "initialize":
            session = f"s{len(self.ids)}"
            self.counts[session] = 0
            return web.json_response(answered(asked, {"protocolVersion": self.version, "capabilities": {}}),
                                     headers={"Mcp-Session-Id": session})
        if asked["method"] == "tools/call":
            said = answered(asked, RESULTS[asked["params"]["name"]])
            # a stream that is numbered first, as servers of 2025-11-25 do
            return web.Response(body=b"id: 1\ndata: \n\nid: 2\ndata: " + json.dumps(said).encode() + b"\n\n",
                                headers={"Content-Type": "Text/Event-Stream; charset=utf-8"})
        return await super().message(request)


RESULTS: dict[str, dict[str, Any]] = {
    "count": {"content": [], "structuredContent": {"count": 1}},
    "look": {"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}},
                         {"type": "resource_link", "uri": "file:///b", "name": "b"},
                         {"type": "image", "data": "", "mimeType": "image/png"}]}}


def test_a_session_is_spoken_in_the_version_that_its_server_answered(serve: Serve) -> None:
    server, task = OlderTools(), {"question": "Count.", "answer": "1"}
    made, again = (make(order("mcp", {"url": f"{serve(server.app())}/mcp"}))[0] for _ in range(2))
    made.reset(task)
    assert made.call("count", {}) == '{"count": 1}'
    assert made.call("look", {}) == "inside\n[resource_link file:///b]\n[image]"
    again.reset(task)
    again.restore(made.snapshot())  # in the session of the first
    assert again.call("count", {}) == '{"count": 1}'
    # `initialize` is before any version; no id comes twice, whichever process asks
    assert set(server.versions) == {None, "2025-03-26"} and server.versions.count(None) == 2
    assert len(set(server.ids)) == len(server.ids) and max(server.ids) < 2 ** 53


def test_a_server_that_has_moved_is_told_with_where_it_is(serve: Serve) -> None:
    made, _ = make(order("mcp", {"url": f"{serve(OlderTools().app())}/old"}))
    with pytest.raises(UserError, match="HTTP 307: it sends to /mcp, which is not followed; if that is"):
        made.reset({"question": "Count.", "answer": "1"})


def test_a_server_of_a_version_that_is_not_known_is_left(serve: Serve) -> None:
    made, _ = make(order("mcp", {"url": f"{serve(OlderTools('2031-01-01').app())}/mcp"}))
    with pytest.raises(UserError, match="cannot be used: it speaks version '2031-01-01' of the protocol, and "
                                        "this client 2024-11-05, 2025-03-26"):
        made.reset({"question": "Count.", "answer": "1"})


class AskingTools(HttpTools):
    """A server that asks its client before it answers, and ends no stream; texts are JSON's, not escaped."""

    SAID = "a\u2028b\x85c\r\nd"

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()

    async def message(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if asked.get("result") == {}:
            self.answers.set()
            return web.Response(status=202)
        if asked["method"] != "tools/call":
            return await super().message(request)
        said = json.dumps(answered(asked, {"content": [{"type": "text", "text": self.SAID}]}),
                          ensure_ascii=False)
        if asked["params"]["name"] == "look":
            return web.Response(text=said, content_type="application/json")
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b'data: {"jsonrpc": "2.0", "id": "q", "method": "ping"}\r\n\r\n')
        await self.answers.wait()
        await stream.write(f"data: {said}\r\n\r\n".encode())
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        return stream


def test_an_answer_over_http_is_read_as_it_comes(serve: Serve) -> None:
    asked = order("mcp", {"url": f"{serve(AskingTools().app())}/mcp"})
    with EnvironmentHost(asked, EpisodeLimits(call_timeout_s=5)) as host:
        host.reset({"question": "Count.", "answer": "1"})
        assert [host.call(ToolCall(name, {})).text for name in ("look", "count", "look")] == (
            [AskingTools.SAID] * 3)


@pytest.mark.parametrize("settings, said", [
    ({}, "names no program; set it, or url"),
    ({"url": "http://localhost:1/mcp", "command": ["true"]}, "is given beside url; leave one of them out")])
def test_a_command_or_an_address_is_needed(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(order("mcp", settings))


def test_settings_that_a_world_inherits_are_held_to_their_types() -> None:
    with pytest.raises(UserError, match=r"system = 3 must be text"):
        make(order("nemo_gym", {"url": "http://localhost:9", "system": 3}))
