"""Tools of a server that speaks the Model Context Protocol (modelcontextprotocol.io, version 2025-06-18:
JSON-RPC 2.0), over its standard input and output, a message per line, or over HTTP.

A server keeps its state to itself.  So each episode has a server of its own, or a session of one over HTTP.
An episode that is continued goes on in its session where that still is; a call that may have acted on the
world is made again only where `repeat` says so.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Bound, Breach, ProblemCode, SettingsProblem, as_problem, find_broken
from megatron_sov.judge.rewards.reward import short
from megatron_sov.judge.tools.environment import (
    InfrastructureFault, Observation, Task, ToolFault, ToolRefused)
from megatron_sov.judge.tools.worlds.goals import AnsweredWorld
from megatron_sov.judge.tools.worlds.served import no_address
from megatron_sov.sandbox.process_tree import ProcessTree
from megatron_sov.version import __version__
from megatron_sov.work.endpoints.transport import missing_libraries
from megatron_sov.work.processes.children import variables_for_foreign

PROTOCOL = "2025-06-18"
SPOKEN = ("2024-11-05", "2025-03-26", PROTOCOL, "2025-11-25")
"""Versions that a server may answer with: lists and calls of tools are the same in them."""
MAX_LINE_BYTES = 256 << 20
"""Of a server's message."""
TIMEOUT_S = 600.0
"""Of a request over HTTP; a call has the shorter limit of its episode."""
GRACE_S = 1.0
"""In which a server may end by itself, once its input has."""
SESSION, VERSION = "Mcp-Session-Id", "MCP-Protocol-Version"
MAX_FIRST_ID = 2 ** 50
"""Beyond 2^53 not every server has whole numbers."""
_WRONG_ARGUMENTS, _NO_METHOD = -32602, -32601
_HERE = ("localhost", "127.0.0.1", "::1")


def no_program(command: tuple[str, ...]) -> Breach | None:
    return None if not command or shutil.which(command[0]) else (
        ProblemCode.FILE, "names no program that is on PATH", 'write it as ["program", "argument"]')


def unset(name: str) -> Breach | None:
    return None if name in os.environ else (
        ProblemCode.RULE, "is not set in this environment", "set it, or leave it out")


class Connection(Protocol):
    """Messages to a server and from it."""

    session: str
    """Name of the session, where it outlives this connection; empty: it does not."""
    version: str
    """Of the protocol, once it is agreed on; empty: it is not yet."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        ...

    def receive(self) -> bytes:
        """Return the next message; empty: the server has ended."""
        ...

    def end(self) -> None:
        """End the server, or the session."""
        ...


class StdioConnection:
    """A server that a command starts."""

    session = version = ""

    def __init__(self, command: tuple[str, ...], env: tuple[str, ...]) -> None:
        # foreign code gets no keys of the environment unless they are named
        self._server = ProcessTree(command, variables_for_foreign(env))

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended; what it wrote before says more
            self._server.stdin.write(json.dumps(message).encode() + b"\n")
            self._server.stdin.flush()

    def receive(self) -> bytes:
        # bounded, for a server may write without an end of line
        return self._server.stdout.readline(MAX_LINE_BYTES)

    def end(self) -> None:
        self._server.end(grace_s=GRACE_S)


class HttpConnection:
    """A session of a server over HTTP: each message is posted, and its answer is JSON or a stream of events.

    Args:
        url: the server's one address.
        key: sent as a bearer token; empty: none is.
        session: of an episode that is continued; empty: a new one.
        version: of the protocol in that session.
    """

    def __init__(self, url: str, key: str, session: str = "", version: str = "") -> None:
        import httpx

        self.session, self.version, self._url = session, version, url
        # what the last request has opened
        self._stream = ExitStack()
        self._messages: Iterator[bytes] = iter(())
        # a proxy of the environment knows this machine as itself
        headers = {"Accept": "application/json, text/event-stream"}
        self._client = httpx.Client(
            timeout=TIMEOUT_S, trust_env=urlsplit(url).hostname not in _HERE,
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}))

    def _headers(self) -> dict[str, str]:
        """Return those of a session: it begins without any."""
        return {name: value for name, value in ((SESSION, self.session), (VERSION, self.version)) if value}

    def send(self, message: dict[str, Any]) -> None:
        """Post a message, and open what comes for a request.

        Raises:
            InfrastructureFault: the server does not answer, or refuses.
        """
        is_request = "id" in message and "method" in message
        if is_request:
            self._stream.close()
        with _refusals(), ExitStack() as stack:
            answer = stack.enter_context(
                self._client.stream("POST", self._url, json=message, headers=self._headers()))
            self.session = answer.headers.get(SESSION, self.session)
            if not answer.is_success:  # nor is a redirect followed
                said = next(_lines_of(answer), b"").decode("utf-8", "replace")
                if to := answer.headers.get("Location"):  # as many have it of /mcp, for /mcp/
                    said = f"it sends to {to}, which is not followed; if that is its address, name it in url"
                raise InfrastructureFault(f"HTTP {answer.status_code}: {short(said)}")
            # read as it comes: a server may ask something before it answers, and leave the stream open behind
            if is_request:
                self._messages, self._stream = _messages_of(answer), stack.pop_all()

    def receive(self) -> bytes:
        with _refusals():
            return next(self._messages, b"")

    def end(self) -> None:
        import httpx

        self._stream.close()
        # one that is gone already, or cannot be ended by a client, is as good as ended
        with contextlib.suppress(httpx.HTTPError):
            if self.session:
                self._client.delete(self._url, headers=self._headers())
        self._client.close()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Make one fault of what can go wrong on the way to a server."""
    import httpx

    try:
        yield
    except httpx.HTTPError as e:
        raise InfrastructureFault(f"the server does not answer ({type(e).__name__})") from None


def _messages_of(answer: Any) -> Iterator[bytes]:
    """Yield the messages of an answer; raises as `_lines_of`."""
    is_stream = answer.headers.get("Content-Type", "").lower().startswith("text/event-stream")
    data: list[bytes] = []
    for line in _lines_of(answer):
        if not is_stream:
            data.append(line)
        elif line.startswith(b"data:"):
            # events without data only number the stream
            data += [said] if (said := line.removeprefix(b"data:").strip()) else []
        elif not line and data:  # an event ends
            yield b"\n".join(data)
            data = []
    if data:
        yield b"\n".join(data)


def _lines_of(answer: Any) -> Iterator[bytes]:
    """Yield the lines of an answer, by line feeds alone: httpx ends lines at U+2028 too, which JSON has in
    texts.

    Raises:
        InfrastructureFault: it is longer than a message may be.
    """
    line, num_bytes = bytearray(), 0
    for piece in answer.iter_bytes():
        num_bytes += len(piece)
        # also of a line that does not end
        if num_bytes > MAX_LINE_BYTES:
            raise InfrastructureFault(f"the server sent more than {MAX_LINE_BYTES >> 20} MiB")
        *whole, rest = piece.split(b"\n")
        for part in whole:
            yield bytes(line + part).removesuffix(b"\r")
            line.clear()
        line += rest
    if line:
        yield bytes(line)


@dataclass
class Mcp(AnsweredWorld):
    """The tools of a server; the task says which answer is right."""

    MAX_MEMORY_BYTES = 0
    """Servers may ask for as much address space as they like."""

    command: Annotated[tuple[str, ...], Bound(no_program)] = ()
    """Program and arguments that start the server."""
    url: Annotated[str | None, Bound(no_address)] = None
    """In place of `command`: address of a server over HTTP, with its path."""
    key_env: Annotated[str | None, Bound(unset)] = None
    """Name of the variable with the key of `url`, which is sent as a bearer token."""
    repeat: bool = False
    """Whether a continued episode makes its calls again on a new server: for servers that keep their state in
    memory, never for those that act on the world.  Otherwise it gets no reward where any of them may have
    acted, and goes on where the server says of their tools that they only read (`readOnlyHint`)."""
    only: tuple[str, ...] = ()
    """Names of the tools that models are shown; all unless given."""
    env: tuple[Annotated[str, Bound(unset)], ...] = ()
    """Names of variables that the server is given of this command's environment, such as that of its key,
    besides HOME, LOGNAME, PATH, SHELL, TERM and USER."""
    system: str = ""
    """Rules for the model, where a task has none of its own."""

    def problems(self) -> list[SettingsProblem]:
        return [*find_broken(
            self, "", (bool(self.command or self.url), "command", "names no program",
                       "set it, or url for a server over HTTP"),
            (not (self.command and self.url), "command", "is given beside url", "leave one of them out"),
            (bool(self.url) or self.key_env is None, "key_env", "is of a server over HTTP",
             "name its address in url")), *(map(as_problem, missing_libraries()) if self.url else [])]

    def rules(self) -> str:
        return self.system

    def reset(self, task: Task) -> Observation:
        """Begin an episode with a new server."""
        self._begin()
        return super().reset(task)

    def first_state(self, task: Task) -> dict[str, Any]:
        return {"calls": [], "session": self._server.session}

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        text = self._call(name, arguments)
        # only calls that gave a result are made again: one that failed is taken to have changed nothing
        self.state["calls"].append([name, dict(arguments)])
        return text

    def restore(self, state: Any) -> None:
        """Go on in the session of a state; where that is gone, on a new server, unless calls may have acted.

        Raises:
            InfrastructureFault: they may have, and are not to be made again.
        """
        if state == self.state:
            return
        self.state = copy.deepcopy(state)
        if self._reattached(state["session"]):
            return
        acted = [name for name, _ in state["calls"] if name not in self._readers]
        if acted and not self.repeat:
            raise InfrastructureFault(f"{acted[0]} was called, may have acted on the world, and is not "
                                      "called again; set repeat=true if the server keeps all in its memory")
        self._begin()
        self.state["session"] = self._server.session
        for name, arguments in state["calls"] if self.repeat else []:
            self._call(name, arguments)

    def _reattached(self, session: str) -> bool:
        """Return whether a session still is there, with which all goes on."""
        if not session or self.url is None:
            return False
        version = self._server.version
        self._end()
        self._server: Connection = HttpConnection(self.url, self._key(), session, version)
        try:
            self._ask("ping", {})
        except ToolFault:  # it is gone, or the server began anew
            return False
        return True

    def _key(self) -> str:
        return os.environ.get(self.key_env, "") if self.key_env else ""

    def _begin(self) -> None:
        self._end()
        self._server = (StdioConnection(self.command, self.env) if self.url is None
                        else HttpConnection(self.url, self._key()))
        # no id may come twice in a session, in which another process may have asked
        self._number = secrets.randbelow(MAX_FIRST_ID)
        try:
            agreed = self._ask("initialize", {"protocolVersion": PROTOCOL, "capabilities": {},
                                              "clientInfo": {"name": "megatron-sov", "version": __version__}})
            if (version := agreed.get("protocolVersion")) not in SPOKEN:
                raise InfrastructureFault(f"it speaks version {short(repr(version))} of the protocol, and "
                                          f"this client {', '.join(SPOKEN)}")
            self._server.version = version
            self._send({"method": "notifications/initialized"})
            self._tools = self._listed()
        except UserError:
            self._end()
            raise
        except ToolFault as e:
            self._end()
            where = self.url or " ".join(self.command)
            raise UserError(f"the MCP server {where} cannot be used: {e.reason}") from None

    def _end(self) -> None:
        if (server := getattr(self, "_server", None)) is not None:
            server.end()
            del self._server

    def _listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        self._readers: set[str] = set()
        cursor: dict[str, Any] = {}
        while True:
            page = self._ask("tools/list", cursor)
            tools = page.get("tools", [])
            tools = tools if isinstance(tools, list) else [tools]
            found += map(described_tool, tools)
            self._readers |= {tool["name"] for tool in tools if _only_reads(tool)}
            if not page.get("nextCursor"):
                break
            if cursor == (cursor := {"cursor": page["nextCursor"]}):
                raise InfrastructureFault("it lists the same page of its tools for ever")
        names = [tool["function"]["name"] for tool in found]
        if missing := [name for name in self.only if name not in names]:
            raise UserError(f"only: the MCP server has no tool {missing[0]!r}; it has {', '.join(names)}")
        return [tool for tool in found if not self.only or tool["function"]["name"] in self.only]

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        found = self._ask("tools/call", {"name": name, "arguments": dict(arguments)})
        if not isinstance(content := found.get("content", []), list):
            raise InfrastructureFault(f"the content of its result is {short(repr(content))}, and no list")
        text = "\n".join(_text_of(part) for part in content if isinstance(part, dict))
        if not content and "structuredContent" in found:
            text = json.dumps(found["structuredContent"], ensure_ascii=False)
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
        self._server.send({"jsonrpc": "2.0", **message})

    def _received(self) -> dict[str, Any]:
        raw = self._server.receive()
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


def _text_of(part: dict[str, Any]) -> str:
    """Return what a model reads of a part of a result; of pictures and sound their kind."""
    kind, resource = part.get("type"), part.get("resource")
    if kind == "resource_link":
        return f"[{kind} {part.get('uri')}]"
    held = resource if kind == "resource" and isinstance(resource, dict) else part
    return str(held["text"]) if kind in ("text", "resource") and "text" in held else f"[{kind}]"


def _only_reads(tool: dict[str, Any]) -> bool:
    annotations = tool.get("annotations")
    return isinstance(annotations, dict) and annotations.get("readOnlyHint") is True


def described_tool(tool: Any) -> dict[str, Any]:
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
