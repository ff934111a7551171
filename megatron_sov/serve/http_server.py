"""The HTTP front of a served model: OpenAI's routes, the chat page, access checks and time limits for
clients.

aiohttp parses HTTP. Its event loop runs in a thread next to the model's. """

import asyncio
import hmac
import logging
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import render_chat
from megatron_sov.serve.bodies import (
    CompletionRequest, RefusedRequest, RequestEncoder, parse_chat_body, parse_completion_body)
from megatron_sov.serve.replies import DONE, CompletionReply, format_event
from megatron_sov.serve.scheduler import (
    RETRY_AFTER_S, Event, QueuedRequest, RequestQueue, RequestStarted, TokenWritten)
from megatron_sov.serve.settings import ServeSettings

MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT_S, SEND_TIMEOUT_S, IDLE_TIMEOUT_S = 60.0, 60.0, 75.0
"""Time limits for a client: to send a body, to receive a chunk, and between two requests."""
LINGER_TIMEOUT_S, CLOSE_TIMEOUT_S = 2.0, 10.0
"""Time limits of the server: to read the body of a refused request, because its sender reads the response
only afterwards; and to send the last answers at the end."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
PAGE_HEADERS = {"Content-Security-Policy": "frame-ancestors 'none'",  # the page sets further policies
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store"}
ROUTES = "GET /, GET /health, GET /v1/models, POST /v1/chat/completions and POST /v1/completions"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """Serves a `RequestQueue` from a thread.

    Args:
        settings: address, key and name.
        queue: receives the requests.
        encoder: decodes answers.
        created_s: Unix time for the model's card.
        max_length_tokens: longest prompt with its answer.
    """

    def __init__(self, settings: ServeSettings, queue: RequestQueue, encoder: RequestEncoder,
                 created_s: float, max_length_tokens: int) -> None:
        self._settings, self._queue, self._encoder = settings, queue, encoder
        self._card = {"id": settings.name, "object": "model", "created": int(created_s),
                      "owned_by": "megatron-sov", "max_model_len": max_length_tokens,
                      "has_chat_template": encoder.has_chat}
        self._page = render_chat()
        self._socket = _open_socket(settings)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run_loop, name="http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def start(self) -> None:
        self._queue.bind_loop(self._loop)
        self._thread.start()

    def stop(self) -> None:
        """Finish the responses in progress, and end the thread."""
        # the event belongs to the server's loop
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2 * CLOSE_TIMEOUT_S)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve_routes())
        finally:
            self._loop.close()

    async def _serve_routes(self) -> None:
        app = web.Application(middlewares=[self._handle_errors], client_max_size=MAX_BODY_BYTES)
        app.router.add_get("/", self._get_page)
        app.router.add_get("/health", self._get_health)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/v1/chat/completions", self._build_handler(parse_chat_body))
        app.router.add_post("/v1/completions", self._build_handler(parse_completion_body))
        logging.getLogger("aiohttp.server").addFilter(_should_log)
        # a disconnect cancels the handler and with it the answer; bodies are read without decompression
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, keepalive_timeout=IDLE_TIMEOUT_S,
            auto_decompress=False, lingering_time=LINGER_TIMEOUT_S, shutdown_timeout=CLOSE_TIMEOUT_S)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        await self._stop.wait()
        # closes the socket, then waits for the responses in progress
        await runner.cleanup()

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check access, and turn exceptions into OpenAI's error objects."""
        try:
            self._check_access(request)
            return await handler(request)
        except RefusedRequest as e:
            return _build_error_response(e)
        except web.HTTPRequestEntityTooLarge:
            return _build_error_response(RefusedRequest(
                413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB; send less"))
        except web.HTTPException as e:
            return _build_error_response(RefusedRequest(
                e.status, f"{request.method} {request.path[:200]}: {e.reason}; there are {ROUTES}"))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return _build_error_response(RefusedRequest(
                500, "the server has met a defect; its own output shows it"))

    def _check_access(self, request: web.Request) -> None:
        key = self._settings.api_key
        if not key:
            # DNS rebinding: a page in a local browser can point its own name at 127.0.0.1
            name, _, port = request.host.rpartition(":")
            name = name if port.isdigit() else request.host
            if name not in {*LOCAL_NAMES, self._settings.host}:
                raise RefusedRequest(403, f"the request is for host {request.host[:100]!r}, and without a "
                                          "key only this machine's own names are answered")
        elif request.path not in ("/", "/health"):  # the page contains no secret, and asks for the key
            header = request.headers.get("Authorization", "")
            # constant time, or the duration would reveal the key's beginning
            if not hmac.compare_digest(header.encode(errors="replace"), f"Bearer {key}".encode()):
                raise RefusedRequest(401, "the key is missing or wrong; send it as `Authorization: Bearer "
                                          "KEY`", None, "invalid_api_key")

    async def _get_health(self, request: web.Request) -> web.Response:
        if self._queue.close_reason is not None:
            return web.json_response({"status": "closing"}, status=503)
        return web.json_response({"status": "ok", "waiting": self._queue.num_waiting})

    async def _get_page(self, request: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", charset="utf-8", headers=PAGE_HEADERS)

    async def _list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card]})

    def _build_handler(self, parse_body: Callable[[bytes, str], CompletionRequest]) -> Handler:
        async def handle_request(request: web.Request) -> web.StreamResponse:
            # browsers send other content types across sites without a preflight request
            if request.content_type != "application/json":
                raise RefusedRequest(415, f"the body is of type {request.content_type[:100]!r}; send "
                                          "Content-Type: application/json")
            if "Content-Encoding" in request.headers:
                raise RefusedRequest(415, "the body is compressed; send it as it is")
            if (request.content_length or 0) > MAX_BODY_BYTES:  # refuse before reading
                raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, request.content_length or 0)
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    raw = await request.read()
            except TimeoutError:
                raise RefusedRequest(408, f"the body did not come within {BODY_TIMEOUT_S:g} s") from None
            queued = self._queue.submit(parse_body(raw, self._settings.name))
            try:
                return await self._send_reply(request, queued)
            finally:
                # also after a disconnect, so that the model stops generating
                self._queue.abandon_request(queued)

        return handle_request

    async def _send_reply(self, request: web.Request, queued: QueuedRequest) -> web.StreamResponse:
        # wait for the first event: a stream begins with its HTTP status
        started = await queued.events.get()
        if isinstance(started, RefusedRequest):
            raise started
        assert isinstance(started, RequestStarted)
        reply = CompletionReply(queued.request, started, self._encoder, self._settings.name)
        if queued.request.is_stream:
            return await self._stream_reply(request, queued, reply)
        while not reply.is_complete:
            self._apply_event(queued, reply, await queued.events.get())
        return web.json_response(reply.build_response())

    async def _stream_reply(self, request: web.Request, queued: QueuedRequest, reply: CompletionReply
                            ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8",
                                               "Cache-Control": "no-cache"})
        await response.prepare(request)
        try:
            await _send_bytes(response, b"".join(map(format_event, reply.build_first_chunks())))
            while not reply.is_complete:
                index = self._apply_event(queued, reply, await queued.events.get())
                await _send_bytes(response, b"".join(map(format_event, reply.build_new_chunks(index))))
            await _send_bytes(response, b"".join(map(format_event, reply.build_last_chunks())) + DONE)
        except RefusedRequest as e:  # the HTTP status is out already
            await _send_bytes(response, b"data: " + e.format_body().encode() + b"\n\n")
        except (ConnectionError, TimeoutError):  # the client disconnected or stopped reading
            if request.transport is not None:
                request.transport.abort()
        return response

    def _apply_event(self, queued: QueuedRequest, reply: CompletionReply, event: Event) -> int:
        """Append a token to its answer, and return the answer's index."""
        if isinstance(event, RefusedRequest):
            raise event
        assert isinstance(event, TokenWritten)
        answer = reply.answers[event.sequence]
        answer.add_token(event.token, event.reason)
        # a stop string, which the model does not see
        if answer.finish_reason is not None and event.reason is None:
            self._queue.abandon_request(queued, event.sequence)
        return event.sequence


def _should_log(record: logging.LogRecord) -> bool:
    """Drop malformed requests: the sender gets a response, and anybody could fill the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _build_error_response(error: RefusedRequest) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(text=error.format_body(), status=error.status, content_type="application/json",
                        headers=headers)


async def _send_bytes(response: web.StreamResponse, data: bytes) -> None:
    """Send part of a stream; raise TimeoutError if the client does not read."""
    if data:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await response.write(data)


def _open_socket(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as e:
        raise UserError(f"--host {settings.host} --port {settings.port}: cannot be listened on "
                        f"({e.strerror or e}); use another port, or 0 for a free port") from None
