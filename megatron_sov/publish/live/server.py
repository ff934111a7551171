"""The live page over HTTP: an address with a secret in it, a page, and a stream of the panels that changed;
and what the panels of runs and of work on rows show.

It only reads.  Viewers share one look at the disk, which is taken while somebody looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import Chart, Comparison, PageTable, Panel, render, render_panel, tables
from megatron_sov.publish.live.watched import (
    DAMAGE, ShownGroup, StateReader, WatchedRun, WatchedWork, is_work)
from megatron_sov.publish.report.charts import (
    LEARNING, PER_TOKEN, SPEED, StepLine, draw_lines, heldout_charts, lines_of, loss_in, loss_unit, named,
    step_charts)
from megatron_sov.publish.report.headline import caption_of, headline_charts, headlines
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.sections import phase_tables
from megatron_sov.publish.report.steps import last_value
from megatron_sov.publish.report.validations import live_validation_charts
from megatron_sov.work.clusters.units import GIB

MAX_CHARACTERS = 1200
"""Of a prompt or an answer."""
MAX_SAMPLES = 2
MAX_NEWS = 20
THROUGHPUT = tuple(line for line in SPEED if line.column == "tokens_per_s")
PHASE_COLUMNS = ("phase", "steps", "sample (tokens)", "tokens", "loss, mean of the last 5 %")
"""Of the report's table of phases, those that have room beside the events."""


def run_panels(watched: Sequence[WatchedRun]) -> list[Panel]:
    """Return the panels of runs: one in full, several side by side."""
    runs = [one.run for one in watched if one.run is not None]
    several = len(watched) > 1
    # rounds are phases too, and the charts tell of them
    phases = [_columns(table, PHASE_COLUMNS) for run in runs if not several and not run.curves["rounds"]
              for table in phase_tables(run)]
    panels = [
        _table_of(watched) if several else _cards_of(watched[0]),
        Panel("What it is after", 12, charts=headline_charts(runs, small=True, but_loss=True)),
        *(Panel(f"Rollouts{f' of {one.path.name}' if several else ''}", 12, text=_about(one.groups),
                comparisons=[_group(group) for group in one.groups]) for one in watched if one.groups),
        Panel("Validation", 12, charts=live_validation_charts(runs)),
        Panel("Learning", 12, charts=_learning_charts(runs), is_wide=True),
        Panel("Held-out", 12, charts=_heldout_charts(runs), is_wide=True),
        *(Panel(f"Samples{f' of {name}' if several else ''}", 12, comparisons=_samples(run))
          for run, name in named(runs)),
        Panel("What happened", 7 if phases else 12, tables=_news(watched, several)),
        Panel("Phases", 5, tables=phases)]
    return [panel for panel in panels if not panel.is_empty]


def _columns(table: PageTable, names: Sequence[str]) -> PageTable:
    """Return some columns of a table."""
    at = [i for i, name in enumerate(table.head) if name in names]
    return PageTable([table.head[i] for i in at], [[row[i] for i in at] for row in table.rows], table.fold)


def _cards_of(one: WatchedRun) -> Panel:
    """Return how one run stands, in large figures."""
    title, state, run = "Now", one.state, one.run
    if state is None:
        return Panel(title, 12, text=one.problem or "Nothing is there yet. The page shows the run as soon as "
                                                    "its folder appears.")
    cards = [("State", state.state, f"phase {state.phase}" if state.phase else state.why)]
    if state.num_steps:
        left = f"{format_duration(state.eta_s)} left" if math.isfinite(state.eta_s) else ""
        cards.append(("Step", f"{state.step:,}", f"of {state.num_steps:,}{', ' if left else ''}{left}"))
    if run is not None:
        for meter, curve in headlines(run):
            values = curve.finite().values
            cards.append((caption_of(meter).partition(",")[0].partition(";")[0].rstrip("."),
                          meter.text(float(values[-1])).removesuffix(f" {meter.unit}"),
                          f"from {meter.text(float(values[0]))}"))
    if math.isfinite(state.tokens_per_s):
        memory = last_value(run.curve("peak_memory_bytes")) / GIB if run is not None else math.nan
        cards.append(("Tokens a second", f"{state.tokens_per_s:,.0f}", f"{format_count(state.tokens)} so far"
                      + (f", {memory:.2f} GiB" if math.isfinite(memory) else "")))
    cards.append(("Checkpoint", f"step {state.checkpoint_step:,}" if state.checkpoint else "none yet",
                  f"{format_duration(state.checkpoint_age_s)} ago"
                  if math.isfinite(state.checkpoint_age_s) else ""))
    if found := state.warnings + sum(state.incidents.values()):
        cards.append(("Warnings, incidents", f"{found:,}", "see what happened"))
    return Panel(title, 12, figures=cards, text=one.problem or _line(state),
                 share=min(1.0, state.step / state.num_steps) if state.num_steps else -1.0)


def _line(state: Any) -> str:
    """Return stage, recipe, why, and how long ago the last event came."""
    ago = (f"last event {format_duration(max(0.0, state.last_event_age_s))} ago"
           if math.isfinite(state.last_event_age_s) else "")
    return ", ".join(w for w in (state.stage, state.recipe, state.why, ago) if w)


def _table_of(watched: Sequence[WatchedRun]) -> Panel:
    """Return how several runs stand, a row for each."""
    def row(one: WatchedRun) -> list[str]:
        state = one.state
        if state is None:
            return [one.path.name, one.problem or "nothing is there yet", *["–"] * 5]
        meters = headlines(one.run) if one.run is not None else []
        judged = "; ".join(f"{meter.title} {meter.text(float(curve.finite().values[-1]))}"
                           for meter, curve in meters) or "–"
        return [one.path.name, state.state, f"{state.step:,} of {state.num_steps:,}", judged,
                format_value(state.tokens_per_s, 5),
                format_duration(state.eta_s) if math.isfinite(state.eta_s) else "–",
                f"{format_duration(max(0.0, state.last_event_age_s))} ago"
                if math.isfinite(state.last_event_age_s) else "–"]

    head = ["run", "state", "step", "judged by", "tokens/s", "left", "last event"]
    return Panel("Runs", 12, tables=[PageTable(head, [row(one) for one in watched])])


def _learning_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return loss, gradient norm, learning rate, throughput and memory; losses of several objectives share
    no axis."""
    charts: list[Chart | None] = []
    for unit in dict.fromkeys(loss_unit(run) for run in runs):
        caption = "Training loss, nats per token." if unit == PER_TOKEN else f"{unit[:1].upper()}{unit[1:]}."
        charts.append(draw_lines(lines_of(runs, partial(loss_in, unit)), unit, caption, smooth=True,
                                 small=True))
    declared: tuple[StepLine, ...] = (*reversed(LEARNING), *THROUGHPUT)
    return [*(one for one in charts if one), *step_charts(runs, declared, small=True)]


def _heldout_charts(runs: Sequence[Run]) -> list[Chart]:
    if len(runs) == 1:
        return heldout_charts(runs[0], small=True)
    drawn = draw_lines(lines_of(runs, lambda run: run.overall_bits_per_byte), "bits per byte",
                       "Held-out bits per byte of all sources.", small=True)
    return [drawn] if drawn else []


def _news(watched: Sequence[WatchedRun], several: bool) -> list[PageTable]:
    """Return the newest events in words, the newest first."""
    found = sorted(((time_s, one.path.name, step, words) for one in watched
                    for time_s, step, words in one.news), key=lambda row: -row[0])[:MAX_NEWS]
    return tables(found, {
        "UTC": lambda row: time.strftime("%H:%M:%S", time.gmtime(row[0] if math.isfinite(row[0]) else 0)),
        **({"run": lambda row: row[1]} if several else {}), "step": lambda row: f"{row[2]:,}",
        "what": lambda row: _cut(row[3])})


def _about(groups: Sequence[ShownGroup]) -> str:
    return (f"Round {groups[0].round:,}: {len(groups)} prompts whose responses differ most in reward; the "
            "best and the worst responses of each." if groups else "")


def _group(group: ShownGroup) -> Comparison:
    def head(row: Any, judged: Any) -> str:
        reward = "not judged yet" if judged is None else (
            judged.status if judged.reward is None else f"reward {judged.reward:g}")
        return f"{reward} · {len(row.tokens):,} tokens · {row.finish_reason}"

    return Comparison(_cut(group.prompt), [(head(row, judged), _cut(row.response))
                                           for row, judged in group.responses])


def _samples(run: Run) -> list[Comparison]:
    return [Comparison(_cut(one.get("prompt")),
                       [(f"step {int(one.get('step') or 0):,}", _cut(one.get("text")))])
            for one in run.samples[:MAX_SAMPLES]]


def _cut(text: Any) -> str:
    """Return a stranger's text as a page can hold it: no control characters, no halves of pairs, not long."""
    text = "" if text is None else str(text)
    more = len(text) - MAX_CHARACTERS
    return visible(text[:MAX_CHARACTERS]) + (f" … ({more:,} more characters)" if more > 0 else "")


def work_panels(one: WatchedWork) -> Iterator[Panel]:
    """Yield the panels of work on rows: how far it is, what was rejected and why, some rows."""
    name = one.path.name
    if not one.what and not one.is_complete:
        yield Panel(name, 12, text=one.problem or "Nothing is there yet.")
        return
    of = f"of {one.num_items:,}" if one.num_items else ""
    rejected = one.rejected.total()
    speed = f"{one.speed:.3g}" if one.speed > 0 else "–"
    share = f"{rejected / (rejected + one.kept):.1%} of all" if rejected + one.kept else ""
    yield Panel(name, 12, text=one.problem or ", ".join([one.what, *one.facts.values()]), figures=[
        ("State", "complete" if one.is_complete else "at work", ""),
        (f"{one.unit[:1].upper()}{one.unit[1:]} done", f"{one.num_done:,}", of),
        ("Rows kept", f"{one.kept:,}", ""), ("Rows rejected", f"{rejected:,}", share),
        (f"{one.unit[:1].upper()}{one.unit[1:]} a second", speed, "over the last minutes"),
        *([("Time left", format_duration(one.left_s), "")] if one.left_s and not one.is_complete else [])],
        share=min(1.0, one.num_done / one.num_items) if one.num_items else -1.0)
    if rejected:
        yield Panel(f"Rejected in {name}", 5, tables=tables(one.rejected.most_common(), {
            "reason": lambda row: _cut(row[0]), "rows": lambda row: f"{row[1]:,}",
            "share": lambda row: f"{row[1] / rejected:.1%}"}))
    if one.rows:
        yield Panel(f"Rows of {name}", 7 if rejected else 12, comparisons=[
            Comparison(_cut(texts[0][1]) if texts else "", [(who, _cut(text)) for who, text in texts[1:]],
                       f"{_cut(what)}: {texts[0][0] if texts else ''}") for what, texts in one.rows])


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
