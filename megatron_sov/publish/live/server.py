"""The live page over HTTP: an address with a secret in it, a page, and a stream of the panels that changed.

It only reads.  Viewers share one look at the disk, which is taken while somebody looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import Panel, render, render_panel
from megatron_sov.publish.live.panels import run_panels, work_panels
from megatron_sov.publish.live.watched import DAMAGE, StateReader, WatchedRun, WatchedWork, is_work

EVERY_S, SPENT_TIMES = 1.0, 5
"""How often the disk is looked at; never more than one part in so many of the time."""
SENDS_S, BEAT_S, TAKES_S = 0.3, 10.0, 30.0
"""How often a viewer's stream looks for news, says that it lives, and how long a viewer may take a piece."""
MAX_VIEWERS = 32
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
           "X-Frame-Options": "DENY"}
"""The address is a secret: it goes into no other site's log, and no other site shows the page in a frame."""


class LiveBoard:
    """The panels as they are now; each has a digest, so that only those that changed are sent.

    Args:
        paths: folders of runs, which are shown side by side, and outputs of work on rows; they need not be
            there yet.
        state_reader: makes what says how a run stands.
    """

    def __init__(self, paths: Sequence[Path], state_reader: Callable[[Path], StateReader]) -> None:
        self._state_reader = state_reader
        self._watched: dict[Path, WatchedRun | WatchedWork | None] = dict.fromkeys(paths)
        self.panels: dict[str, tuple[str, str]] = {}
        """Title -> digest and HTML, in the order of the page."""
        self.lead = "looks for the first time"
        self.version = 0

    def names(self) -> str:
        """Return what is watched, for the page's title."""
        return ", ".join(path.name for path in self._watched)

    def look(self) -> None:
        """Look at the disk, and make the panels that there are then."""
        for path, before in self._watched.items():
            # what a folder is may come to light later than its name
            now = before
            if now is None or is_work(path) != isinstance(now, WatchedWork):
                now = WatchedWork(path) if is_work(path) else WatchedRun(path, self._state_reader)
                self._watched[path] = now
            now.look()
        try:
            panels = self._panels()
        except DAMAGE as e:
            self.lead, self.version = f"what is recorded cannot be shown ({e!r:.200})", self.version + 1
            return
        made = {}
        for panel in panels:
            html = render_panel(panel)
            made[panel.title] = (hashlib.blake2b(html.encode(), digest_size=16).hexdigest(), html)
        # replaced as a whole: viewers read it from another thread
        self.panels, self.version = made, self.version + 1
        self.lead = f"live, renewed {time.strftime('%H:%M:%S UTC', time.gmtime())}"

    def _panels(self) -> list[Panel]:
        runs = [one for one in self._watched.values() if isinstance(one, WatchedRun)]
        return [*(run_panels(runs) if runs else []), *(
            panel for one in self._watched.values() if isinstance(one, WatchedWork)
            for panel in work_panels(one))]

    def page(self) -> str:
        """Return the page that the stream fills."""
        return render("Live", self.names(), self.lead, [], live="events",
                      opening=[Panel("", 12, text="The first look at the disk is under way.")])

    def news(self, seen: dict[str, str]) -> bytes:
        """Return the panels that a viewer has not seen as they are, and note them as seen."""
        panels = self.panels
        changed = {title: html for title, (digest, html) in panels.items() if seen.get(title) != digest}
        seen.clear()
        seen.update({title: digest for title, (digest, _) in panels.items()})
        told = json.dumps({"lead": self.lead, "order": list(panels), "panels": changed})
        return f"data: {told}\n\n".encode()


class LivePage:
    """Serves a board until it is cancelled.

    Args:
        board: what is shown.
        host: address to listen on.
        port: 0: any that is free.

    Raises:
        UserError: the address cannot be listened on.
    """

    def __init__(self, board: LiveBoard, host: str, port: int) -> None:
        self._board, self._host = board, host
        self._token = secrets.token_urlsafe(24)
        self._viewers = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as e:
            raise UserError(f"--http {host}:{port}: cannot be listened on ({e.strerror or e}); take another "
                            "port, or 0 for any that is free") from None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def path(self) -> str:
        """Return the secret part of the address."""
        return f"/{self._token}/"

    @property
    def url(self) -> str:
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}{self.path}"

    def serve(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal ends it."""
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(self._serve(on_ready))

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        app = web.Application(client_max_size=1 << 10)
        app.router.add_get("/{token}/", self._page)
        app.router.add_get("/{token}/events", self._events)
        # what strangers send that is no HTTP would fill the terminal
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        on_ready()
        try:
            await self._keep_looking()
        finally:
            await runner.cleanup()

    async def _keep_looking(self) -> None:
        while True:
            began_s = time.monotonic()
            if self._viewers or not self._board.version:
                await asyncio.to_thread(self._board.look)
            await asyncio.sleep(max(EVERY_S, SPENT_TIMES * (time.monotonic() - began_s)))

    def _check(self, request: web.Request) -> None:
        sent = request.match_info["token"].encode(errors="replace")
        # in constant time: how long a comparison takes would tell how much of it is right
        if not hmac.compare_digest(sent, self._token.encode()):
            raise web.HTTPNotFound(headers=HEADERS)

    async def _page(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.Response(text=self._board.page(), content_type="text/html", headers=HEADERS)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self._check(request)
        if self._viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(headers=HEADERS)
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        self._viewers += 1
        try:
            await response.prepare(request)
            await self._stream(response)
        except (ConnectionError, TimeoutError):  # the viewer has left, or takes nothing
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._viewers -= 1
        return response

    async def _stream(self, response: web.StreamResponse) -> None:
        seen: dict[str, str] = {}
        version, sent_s = 0, time.monotonic()
        while True:
            if self._board.version != version:
                version, data = self._board.version, self._board.news(seen)
            elif time.monotonic() - sent_s > BEAT_S:
                data = b": lives\n\n"
            else:
                await asyncio.sleep(SENDS_S)
                continue
            sent_s = time.monotonic()
            async with asyncio.timeout(TAKES_S):
                await response.write(data)

