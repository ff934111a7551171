"""Tools of a server that speaks the Model Context Protocol over its standard input and output
(modelcontextprotocol.io, version 2025-06-18: JSON-RPC 2.0, a message per line).

A server keeps its state to itself.  So each episode has a server of its own, and the state of an episode is
the calls that it made: one that is continued makes them again on a new server.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Bound, Breach, ProblemCode
from megatron_sov.judge.rewards.reward import short
from megatron_sov.judge.tools.environment import (
    InfrastructureFault, Observation, Task, ToolFault, ToolRefused)
from megatron_sov.judge.tools.worlds.goals import AnsweredWorld
from megatron_sov.sandbox.process_tree import ProcessTree
from megatron_sov.version import __version__
from megatron_sov.work.processes.children import variables_for_foreign

PROTOCOL = "2025-06-18"
MAX_LINE_BYTES = 256 << 20
"""Of a server's message."""
_WRONG_ARGUMENTS, _NO_METHOD = -32602, -32601


def _no_program(command: tuple[str, ...]) -> Breach | None:
    return None if shutil.which(command[0]) else (
        ProblemCode.FILE, "names no program that is on PATH", 'write it as ["program", "argument"]')


def _unset(name: str) -> Breach | None:
    return None if name in os.environ else (
        ProblemCode.RULE, "is not set in this environment", "set it, or leave it out")


@dataclass
class Mcp(AnsweredWorld):
    """The tools of a server; the task says which answer is right."""

    MAX_MEMORY_BYTES = 0
    """Servers may ask for as much address space as they like."""

    command: Annotated[tuple[str, ...], MinLen(1), Bound(_no_program)]
    """Program and arguments that start the server."""
    only: tuple[str, ...] = ()
    """Names of the tools that models are shown; all unless given."""
    env: tuple[Annotated[str, Bound(_unset)], ...] = ()
    """Names of variables that the server is given of this command's environment, such as that of its key,
    besides HOME, LOGNAME, PATH, SHELL, TERM and USER."""
    system: str = ""
    """Rules for the model, where a task has none of its own."""

    def rules(self) -> str:
        return self.system

    def reset(self, task: Task) -> Observation:
        """Begin an episode with a new server."""
        self._begin()
        return super().reset(task)

    def first_state(self, task: Task) -> dict[str, Any]:
        return {"calls": []}

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        text = self._call(name, arguments)
        # only calls that gave a result are made again: one that failed is taken to have changed nothing
        self.state["calls"].append([name, dict(arguments)])
        return text

    def restore(self, state: Any) -> None:
        """Make the calls of a state on a new server, unless this one has made just them."""
        if state == self.state:
            return
        self._begin()
        for name, arguments in state["calls"]:
            self._call(name, arguments)
        self.state = copy.deepcopy(state)

    def _begin(self) -> None:
        self._end()
        # foreign code gets no keys of the environment unless they are named
        self._server = ProcessTree(self.command, variables_for_foreign(self.env))
        self._number = 0
        try:
            self._ask("initialize", {"protocolVersion": PROTOCOL, "capabilities": {},
                                     "clientInfo": {"name": "megatron-sov", "version": __version__}})
            self._send({"method": "notifications/initialized"})
            self._tools = self._listed()
        except UserError:
            self._end()
            raise
        except ToolFault as e:
            self._end()
            raise UserError(f"the MCP server {' '.join(self.command)} cannot be used: {e.reason}") from None

    def _end(self) -> None:
        if (server := getattr(self, "_server", None)) is not None:
            server.end()
            del self._server

    def _listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: dict[str, Any] = {}
        while True:
            page = self._ask("tools/list", cursor)
            tools = page.get("tools", [])
            found += [_described(tool) for tool in (tools if isinstance(tools, list) else [tools])]
            if not page.get("nextCursor"):
                break
            cursor = {"cursor": page["nextCursor"]}
        names = [tool["function"]["name"] for tool in found]
        if missing := [name for name in self.only if name not in names]:
            raise UserError(f"only: the MCP server has no tool {missing[0]!r}; it has {', '.join(names)}")
        return [tool for tool in found if not self.only or tool["function"]["name"] in self.only]

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        found = self._ask("tools/call", {"name": name, "arguments": dict(arguments)})
        parts = [part.get("text", "") if part.get("type") == "text" else f"[{part.get('type')}]"
                 for part in found.get("content", []) if isinstance(part, dict)]
        text = "\n".join(map(str, parts))
        if found.get("isError"):
            raise ToolRefused(text or "the tool says that it failed")
        return text

    def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a request; what the server sends on its own is passed over."""
        self._number += 1
        self._send({"id": self._number, "method": method, "params": params})
        while True:
            message = self._received()
            if "method" in message:
                if "id" in message:
                    # a server may ask the client for things; without an answer it would wait for ever
                    known: dict[str, Any] = {"result": {}} if message["method"] == "ping" else {
                        "error": {"code": _NO_METHOD, "message": "this client offers nothing"}}
                    self._send({"id": message["id"], **known})
            # answers to requests that were given up are passed over
            elif message.get("id") == self._number:
                break
        if "error" in message:
            error = message["error"] if isinstance(message["error"], dict) else {}
            said = str(error.get("message", "the server says no more"))
            raise ToolFault("arguments" if error.get("code") == _WRONG_ARGUMENTS else "refused", said)
        result = message.get("result")
        if not isinstance(result, dict):
            raise InfrastructureFault("the server's answer has no result")
        return result

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended; what it wrote before says more
            self._server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            self._server.stdin.flush()

    def _received(self) -> dict[str, Any]:
        # bounded, for a server may write without an end of line
        raw = self._server.stdout.readline(MAX_LINE_BYTES)
        if not raw:
            raise InfrastructureFault("the server has ended")
        try:
            message = json.loads(raw)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise InfrastructureFault(f"the server wrote {raw[:60]!r} where a message belongs; servers write "
                                      "logs to standard error")
        return message


def _described(tool: Any) -> dict[str, Any]:
    """Return a tool as OpenAI describes functions.

    Raises:
        InfrastructureFault: what the server lists is none.
    """
    told = tool if isinstance(tool, dict) else {}
    name, description, schema = told.get("name"), told.get("description") or "", told.get("inputSchema", {})
    right = [isinstance(name, str) and name, isinstance(description, str), isinstance(schema, dict)
             and isinstance(schema.get("properties", {}), dict)
             and isinstance(schema.get("required", []), list)]
    if not all(right):
        raise InfrastructureFault(f"it lists {short(repr(tool))}, which is no tool: its name and description "
                                  "must be texts, and its inputSchema a schema of an object")
    return {"type": "function", "function": {"name": name, "description": description,
                                             "parameters": {"type": "object", **schema}}}
