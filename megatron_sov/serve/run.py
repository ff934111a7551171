"""A model that is loaded on its processes and answers over HTTP until it is asked to stop.

aiohttp reads and writes HTTP; here is what it leaves to its users: how long a client may take to send its
body and to take its answer, and who may ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence

import psutil
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import render_chat
from megatron_sov.infer.engines.live_generation import generate_live
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.engines.transformers_engine import check_cache_support, load_configured_hf
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.serve.bodies import (
    BodyReader, RefusedRequest, ServedQuestion, chat_question, completion_question)
from megatron_sov.serve.replies import DONE, ServedReply, event
from megatron_sov.serve.scheduler import RETRY_S, Begun, Clerk, RequestQueue, Ticket, Wrote
from megatron_sov.serve.settings import DEFAULT_LENGTH_TOKENS, ServeSettings
from megatron_sov.serve.transformers_batching import continue_transformers
from megatron_sov.work.processes.stop_signals import StopFlag
from megatron_sov.work.progress.locks import has_ended, process_identity

MAX_BODY_BYTES = 8 << 20
BODY_S, TAKES_S, IDLE_S = 60.0, 60.0, 75.0
"""How long a client may take to send a body, to take a piece of its answer, and to say nothing between two
requests."""
LINGERS_S, CLOSING_S = 2.0, 10.0
"""For which a body that nobody wants is still taken, so that its sender reads the answer; and for which the
end waits for clients to take their last answers."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
PAGE_HEADERS = {"Content-Security-Policy": "frame-ancestors 'none'",  # the page has the rest itself
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """Serves a desk from a thread of its own.

    Args:
        settings: address, key, name.
        desk: takes the requests.
        reader: gives texts.
        created_s: Unix time since which the model is there.
        max_length_tokens: longest prompt with its answer.
    """

    def __init__(self, settings: ServeSettings, desk: RequestQueue, reader: BodyReader, created_s: float,
                 max_length_tokens: int) -> None:
        self._settings, self._desk, self._reader = settings, desk, reader
        self._card = {"id": settings.name, "object": "model", "created": int(created_s),
                      "owned_by": "megatron-sov", "max_model_len": max_length_tokens,
                      "has_chat_template": reader.has_chat}
        self._page = render_chat()
        self._socket = _listen(settings)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def start(self) -> None:
        self._desk.open(self._loop)
        self._thread.start()

    def stop(self) -> None:
        """Send what is being sent to its end, and serve no more."""
        # The event belongs to the server's loop.
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2 * CLOSING_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/", self._chat_page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._handler_of(chat_question))
        app.router.add_post("/v1/completions", self._handler_of(completion_question))
        logging.getLogger("aiohttp.server").addFilter(_is_ours)
        # a client that goes away ends the handler, and so its answer; bodies are taken as they are sent
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=IDLE_S,
                               auto_decompress=False, lingering_time=LINGERS_S,
                               shutdown_timeout=CLOSING_S)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        await self._stop.wait()
        # First nobody new, then the end of those that are being answered.
        await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in who may ask, and say what goes wrong as OpenAI says it."""
        try:
            self._check(request)
            return await handler(request)
        except RefusedRequest as e:
            return _refusal(e)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(RefusedRequest(413,
                                           f"the body has more than {MAX_BODY_BYTES >> 20} MiB; send less"))
        except web.HTTPException as e:
            return _refusal(RefusedRequest(e.status,
                                           f"{request.method} {request.path[:200]}: {e.reason}; there are "
                                                     "GET /, GET /health, GET /v1/models, "
                                                     "POST /v1/chat/completions and POST /v1/completions"))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return _refusal(RefusedRequest(500, "the server has met a defect; its own output says which"))

    def _check(self, request: web.Request) -> None:
        key = self._settings.api_key
        if not key:
            # a page in a browser on this machine could ask by a name that it has made to mean 127.0.0.1
            name = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() \
                else request.host
            if name not in {*LOCAL_NAMES, self._settings.host}:
                raise RefusedRequest(403,
                                     f"the request is for host {request.host[:100]!r}, and without a key "
                                          "only this machine's own names are answered")
        elif request.path not in ("/", "/health"):  # the page holds no secret, and asks for the key
            sent = request.headers.get("Authorization", "")
            # In constant time: how long a comparison takes would tell how much of a key is right.
            if not hmac.compare_digest(sent.encode(errors="replace"), f"Bearer {key}".encode()):
                raise RefusedRequest(401,
                                     "the key is missing or wrong; send it as `Authorization: Bearer KEY`",
                                     None, "invalid_api_key")

    async def _health(self, request: web.Request) -> web.Response:
        if self._desk.closed is not None:
            return web.json_response({"status": "closing"}, status=503)
        return web.json_response({"status": "ok", "waiting": self._desk.num_waiting})

    async def _chat_page(self, request: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", charset="utf-8", headers=PAGE_HEADERS)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card]})

    def _handler_of(self, read: Callable[[bytes, str], ServedQuestion]) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            # what is sent as another type a page of any site may send without asking
            if request.content_type != "application/json":
                raise RefusedRequest(415, f"the body is of type {request.content_type[:100]!r}; send "
                                          "Content-Type: application/json")
            if "Content-Encoding" in request.headers:
                raise RefusedRequest(415, "the body is compressed; send it as it is")
            if (request.content_length or 0) > MAX_BODY_BYTES:  # before it is waited for
                raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, request.content_length or 0)
            try:
                async with asyncio.timeout(BODY_S):
                    raw = await request.read()
            except TimeoutError:
                raise RefusedRequest(408, f"the body did not come within {BODY_S:g} s") from None
            ticket = self._desk.submit(read(raw, self._settings.name))
            try:
                return await self._answer(request, ticket)
            finally:
                # Also where the client is gone: the model must not write on for nobody.
                self._desk.leave(ticket)

        return answer

    async def _answer(self, request: web.Request, ticket: Ticket) -> web.StreamResponse:
        # The status must be known before a stream begins, so the first event is waited for.
        begun = await ticket.events.get()
        if isinstance(begun, RefusedRequest):
            raise begun
        assert isinstance(begun, Begun)
        reply = ServedReply(ticket.question, begun, self._reader, self._settings.name)
        if ticket.question.is_stream:
            return await self._stream(request, ticket, reply)
        while not reply.is_whole:
            self._take(ticket, reply, await ticket.events.get())
        return web.json_response(reply.whole())

    async def _stream(self, request: web.Request, ticket: Ticket, reply: ServedReply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8",
                                               "Cache-Control": "no-cache"})
        await response.prepare(request)
        try:
            await _send(response, b"".join(map(event, reply.opening())))
            while not reply.is_whole:
                index = self._take(ticket, reply, await ticket.events.get())
                await _send(response, b"".join(map(event, reply.news(index))))
            await _send(response, b"".join(map(event, reply.closing())) + DONE)
        except RefusedRequest as e:  # its status has been sent
            await _send(response, b"data: " + e.body().encode() + b"\n\n")
        except (ConnectionError, TimeoutError):  # the client has left, or takes nothing
            if request.transport is not None:
                request.transport.abort()
        return response

    def _take(self, ticket: Ticket, reply: ServedReply, told: object) -> int:
        if isinstance(told, RefusedRequest):
            raise told
        assert isinstance(told, Wrote)
        writing = reply.writings[told.sequence]
        writing.add(told.token, told.reason)
        # by a string, of which the model knows nothing
        if writing.reason is not None and told.reason is None:
            self._desk.leave(ticket, told.sequence)
        return told.sequence


def _is_ours(record: logging.LogRecord) -> bool:
    """Return whether something to log is no request that is no HTTP: its sender is told, and anybody could
    fill the log with such."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _refusal(refused: RefusedRequest) -> web.Response:
    headers = {"Retry-After": str(RETRY_S)} if refused.status in (429, 503) else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(text=refused.body(), status=refused.status, content_type="application/json",
                        headers=headers)


async def _send(response: web.StreamResponse, data: bytes) -> None:
    """Send a piece of a stream; raises TimeoutError where the client does not take it."""
    if data:
        async with asyncio.timeout(TAKES_S):
            await response.write(data)


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as e:
        raise UserError(f"--host {settings.host} --port {settings.port}: cannot be listened on "
                        f"({e.strerror or e}); take another port, or 0 for any that is free") from None


LOOKS_S = 1.0
"""How often it is looked whether the parent lives."""


def serve(target: Target, settings: ServeSettings, layout: Sequence[str], nproc: int | None) -> None:
    """Serve a model until a signal asks for the end, or its parent has ended.

    Args:
        target: the model.
        settings: where and for whom.
        layout: `key=value` changes of layout and precision.
        nproc: local processes.

    Raises:
        UserError: the model, its tokenizer or the address cannot be used.
        SystemExit: a process failed, after it has said why.
    """
    parent = Parent(settings.parent_pid)
    longest = _longest(target, settings)
    reader = BodyReader(target, longest)
    flag = StopFlag()
    if settings.address_file is not None and is_first_rank():
        settings.address_file.unlink(missing_ok=True)  # of a server that was killed

    def on_ranks(loaded: LoadedModel) -> None:
        if not loaded.world.is_main:
            generate_live(loaded.policy, settings.batching, longest, None)
            return
        # One process takes requests; the others follow its orders.
        with office() as clerk:
            generate_live(loaded.policy, settings.batching, longest, clerk)

    @contextlib.contextmanager
    def office() -> Iterator[Clerk]:
        desk = RequestQueue(settings.max_waiting)
        with _door(HttpServer(settings, desk, reader, time.time(), longest), settings):
            yield Clerk(desk, reader, lambda: flag.reason, parent.has_ended)

    if not target.is_hf:
        run_forward_model(target, layout, nproc, on_ranks)
        return
    model = load_configured_hf(target.path, layout)
    check_cache_support(model.config, "serve a checkpoint that `megatron-sov convert from-hf` makes of it")
    with office() as clerk:
        continue_transformers(model, settings.batching, longest, clerk)


@contextlib.contextmanager
def _door(server: HttpServer, settings: ServeSettings) -> Iterator[None]:
    """Keep the server open, with its address in the file that is wanted."""
    server.start()
    try:
        file = settings.address_file
        if file is not None:
            write_output(file, json.dumps({"url": server.url, "model": settings.name,
                                           "pid": os.getpid()}) + "\n")
        print(f"{settings.name} answers at {server.url}; Ctrl-C or SIGTERM "
              f"ends it\n  chat page  {server.url.removesuffix('v1')}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            if file is not None:
                # Whoever reads the address must not find one that nobody answers at.
                file.unlink(missing_ok=True)
    finally:
        server.stop()


def _longest(target: Target, settings: ServeSettings) -> int:
    if settings.max_length_tokens is None:
        return int(min(target.max_tokens, DEFAULT_LENGTH_TOKENS))
    if settings.max_length_tokens > target.max_tokens:
        raise UserError(f"--max-length {settings.max_length_tokens}: the model ends at {target.max_tokens}; "
                        "choose less")
    return settings.max_length_tokens


class Parent:
    """The process with which this one ends."""

    def __init__(self, pid: int | None) -> None:
        """Take its number; None: there is none.

        Raises:
            UserError: there is no such process.
        """
        self._record: dict[str, object] | None = None
        self._next_s = 0.0
        if pid is None:
            return
        try:
            # With the time of its start: another process may get the number later.
            self._record = process_identity() | {"pid": pid, "started_s": psutil.Process(pid).create_time()}
        except psutil.Error:
            raise UserError(f"--parent-pid {pid}: there is no such process; start the server from one that "
                            "lives") from None

    def has_ended(self) -> bool:
        """Return whether it has ended, as was seen at most `LOOKS_S` ago."""
        # Asked before each row of the model, so the look itself is rare.
        if self._record is None or time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + LOOKS_S
        return has_ended(self._record) is True
