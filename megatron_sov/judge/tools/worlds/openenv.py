"""Environments that a server of OpenEnv plays (openenv-core 0.3, `core/env_server/http_server.py`): a session
on its WebSocket, `reset` and `step` in JSON, a reward with each observation.

An environment whose actions are calls of tools shows its own tools; any other one is a single tool, `step`,
with the schema of its action.  The server keeps the world to itself: the state of an episode is the actions
that were taken, and one that is continued takes them again in a new session, where all must come as it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.judge.rewards.reward import Score, short
from megatron_sov.judge.tools.environment import (
    InfrastructureFault, Observation, Task, ToolFault, ToolRefused)
from megatron_sov.judge.tools.worlds.mcp import described_tool
from megatron_sov.judge.tools.worlds.served import ServedWorld

STEP = "step"
"""Tool of an environment that has none of its own."""
MAX_MESSAGE_BYTES = 64 << 20
"""Of a server."""
_BASE = ("metadata",)
"""Of an action, for programs: models are not shown it."""
_ANSWERS = {"reset": "observation", "step": "observation", "mcp": "mcp"}
"""Type of a message -> of its answer."""
_UNASKED_S = 0.001
"""For a message that lies there already to be read."""
_ARGUMENTS = ("VALIDATION_ERROR", "INVALID_JSON")
"""A server's codes for an action that is none."""


@dataclass
class OpenEnv(ServedWorld):
    """One session of a server for each episode; a task has `question`, or `reset` with what the server's
    reset takes, such as a seed, or both."""

    EXAMPLES = ({},)

    def reset(self, task: Task) -> Observation:
        """Begin an episode in a session of its own."""
        if importlib.util.find_spec("aiohttp") is None:
            raise UserError(f"aiohttp is not installed; {how_to_install('serve')}")
        if not isinstance(task.get("reset", {}), dict):
            raise UserError("the task's reset must be an object: what the server's reset takes")
        self.task, self.state = task, {"actions": [], "observations": [], "reward": 0.0, "done": False}
        try:
            shown = self._begin()
        except ToolFault as e:
            self._end()
            raise UserError(f"the OpenEnv server at {self.url} cannot be used: {e.reason}") from None
        question, system = task.get("question", shown), task.get("system", self.rules())
        if not isinstance(question, str) or not isinstance(system, str):
            raise UserError("the task's question and system must be texts")
        return Observation(question, system)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        self.refuse_unknown(name)
        if self.state["done"]:
            raise ToolRefused("the episode is over; answer")
        action = dict(arguments) if not self._has_tools else {
            "type": "call_tool", "tool_name": name, "arguments": dict(arguments)}
        text = self._act(action)
        self.state["actions"].append(action)
        self.state["observations"].append(text)
        return text

    def score(self, answer: str) -> Score:
        """Return the sum of the rewards of all actions.

        Raises:
            InfrastructureFault: some answers were another action's.
        """
        if not self._socket.closed:
            self._listed()  # of another type than a step's: behind it nothing is left to come
        return Score(self.state["reward"],
                     {"actions": len(self.state["actions"]), "done": self.state["done"]})

    def restore(self, state: Any) -> None:
        """Take the actions of a state in a new session, unless this one has taken just them.

        Raises:
            InfrastructureFault: the world did not go as it went before.
        """
        if state == self.state:
            return
        self.state = {"actions": [], "observations": [], "reward": 0.0, "done": False}
        self._begin()
        for action, before in zip(state["actions"], state["observations"], strict=True):
            if (now := self._act(action)) != before:
                raise InfrastructureFault(f"the world does not repeat itself: {short(now)} in place of "
                                          f"{short(before)}; give tasks a seed in `reset`")
        self.state = copy.deepcopy(state)

    # The session.

    def _begin(self) -> str:
        """Open a session, and return what its reset shows."""
        self._end()
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect())
        shown = self._observed(self._ask("reset", dict(self.task.get("reset", {}))))
        result = self._listed().get("result")
        found = result.get("tools", []) if isinstance(result, dict) else []
        if not isinstance(found, list):
            raise InfrastructureFault(f"it lists {short(repr(found))}, and not tools alone")
        self._has_tools = bool(found)
        self._tools = [described_tool(_as_mcp(tool)) for tool in found] or [described_tool(
            {"name": STEP, "description": "Take an action in the environment.",
             "inputSchema": {key: value for key, value in self._action_schema().items()
                             if key in ("properties", "required", "$defs")}})]
        return shown

    def _listed(self) -> dict[str, Any]:
        return self._ask("mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}})

    def _end(self) -> None:
        if (loop := getattr(self, "_loop", None)) is None:
            return
        loop.run_until_complete(self._http.close())
        loop.close()
        del self._loop

    async def _connect(self) -> None:
        import aiohttp

        # without the proxies of the environment: servers of worlds are beside the run
        self._http = aiohttp.ClientSession()
        try:
            self._socket = await self._http.ws_connect(
                f"ws{self.url.rstrip('/').removeprefix('http')}/ws", max_msg_size=MAX_MESSAGE_BYTES)
        except (aiohttp.ClientError, OSError) as e:
            await self._http.close()
            self._loop.stop()
            del self._loop
            raise InfrastructureFault(f"no session on its WebSocket ({type(e).__name__})") from None

    def _action_schema(self) -> dict[str, Any]:
        import aiohttp

        async def get() -> Any:
            async with self._http.get(f"{self.url.rstrip('/')}/schema", allow_redirects=False) as answer:
                return json.loads(await answer.text())

        try:
            schema = dict(self._loop.run_until_complete(get())["action"])
            properties = dict(schema.get("properties", {}))
        except (ValueError, KeyError, TypeError, RecursionError, OSError, aiohttp.ClientError):
            raise InfrastructureFault("/schema does not describe its action") from None
        return {**schema, "properties": {name: properties[name] for name in properties if name not in _BASE}}

    def _act(self, action: dict[str, Any]) -> str:
        """Take an action; returns what the model is shown, and counts the reward."""
        return self._observed(self._ask("step", action))

    def _observed(self, data: dict[str, Any]) -> str:
        observation = data.get("observation")
        reward = data.get("reward")
        reward = 0 if reward is None else reward
        if not isinstance(observation, dict) or not isinstance(reward, (int, float)) or not (
                abs(reward) <= sys.float_info.max):
            raise InfrastructureFault("the server's observation is none, or its reward no finite number")
        self.state["reward"] += float(reward)
        self.state["done"] = bool(data.get("done"))
        if isinstance(error := observation.get("error"), dict):
            raise ToolRefused(str(error.get("message", "the tool says that it failed")))
        # of a call of a tool its result alone; of anything else all that there is to see
        shown = observation["result"] if {"tool_name", "result"} <= set(observation) else observation
        if isinstance(shown, dict) and set(shown) >= {"data", "structured_content"}:  # FastMCP's
            shown = shown["data"]
        return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)

    def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a message.

        The protocol numbers neither: an answer is told from another one's by its type and by its turn.

        Raises:
            ToolFault: the server says so.
            InfrastructureFault: it has not answered, or more than once.
        """
        import aiohttp

        async def ask() -> Any:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_UNASKED_S):
                    left = await self._socket.receive_json()
                    raise InfrastructureFault(f"the server has answered twice: {short(repr(left))} was not "
                                              "asked for, and answers no longer belong to actions")
            await self._socket.send_json({"type": kind, "data": data})
            return await self._socket.receive_json()

        try:
            answer = self._loop.run_until_complete(ask())
        except (TypeError, ValueError, RecursionError, OSError, aiohttp.ClientError):
            raise InfrastructureFault("the server has ended the session") from None
        content = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(content, dict):
            raise InfrastructureFault("the server's answer is no message of OpenEnv")
        if answer.get("type") not in ("error", _ANSWERS[kind]):
            raise InfrastructureFault(f"the server answers {kind} by {short(repr(answer.get('type')))}, an "
                                      "answer to something else")
        if answer.get("type") == "error":
            said, code = short(str(content.get("message", "an error"))), content.get("code")
            wrong = [".".join(map(str, one.get("loc", ()))) + f": {one.get('msg')}"
                     for one in content.get("errors", []) if isinstance(one, dict)]
            if code in _ARGUMENTS:
                raise ToolFault("arguments", "; ".join([said, *wrong[:5]]))
            if code == "EXECUTION_ERROR":
                raise ToolRefused(said)
            raise InfrastructureFault(f"{said} ({code})")
        return content


def _as_mcp(tool: Any) -> Any:
    """Return a tool as MCP lists it: some servers call its schema as Python does."""
    if not isinstance(tool, dict) or tool.get("inputSchema"):
        return tool
    return {**tool, "inputSchema": tool.get("input_schema") or {}}
