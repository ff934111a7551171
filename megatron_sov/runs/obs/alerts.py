"""Alerts of a run to a webhook: a JSON body with `text`, as Slack, Mattermost and their like take it.

A thread of their own sends them, tries again with growing pauses, and gives up: an address that does not
answer holds nothing up, and its answer is not read. The URL is a secret, so it stands in an environment
variable, and in no file, message or log of ours.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import warn
from megatron_sov.model.config import ObsConfig
from megatron_sov.runs.obs.history import KINDS, describe
from megatron_sov.version import __version__

TIMEOUT_S = 5.0
PAUSES_S = (1.0, 4.0, 16.0)
"""Seconds before each further attempt."""
FLUSH_S = 8.0
"""How long the end of a process waits for alerts that are on their way."""
MAX_WAITING = 32
"""Alerts that wait at most; of a flood the first ones are sent."""
MAX_TEXT_CHARACTERS = 2000
_WORDS = {"stop": "stopped early, with everything saved", "gate_failed": "a gate did not pass",
          "run_end": "complete", **KINDS}
_CODES_WORTH_A_RETRY = {408, 425, 429, 500, 502, 503, 504}


def body_of(event: dict[str, Any], run: Path, recipe: str) -> dict[str, Any]:
    """Return what is sent of an event: `text` for people, the rest for programs."""
    kind, step = str(event["event"]), event.get("step")
    details = describe(event) if kind in KINDS else str(event.get("reason") or event.get("text") or "")
    at = f" at step {step}" if isinstance(step, int) else ""
    text = f"megatron-sov: {run.name} ({recipe}) on {platform.node()}: {_WORDS[kind]}{at}"
    text = f"{text}: {details}" if details else text
    return {"text": _plain(text), "event": kind, "run": run.name, "recipe": recipe, "host": platform.node(),
            "step": step, "time_s": event.get("time_s")}


def _plain(text: str) -> str:
    """Return a text in which Slack sees no commands: `<!channel>` would wake up everybody."""
    cut = text if len(text) <= MAX_TEXT_CHARACTERS else text[:MAX_TEXT_CHARACTERS - 2] + " …"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Webhook:
    """Sends alerts in the background."""

    def __init__(self, url: str, variable: str, pause: Callable[[float], object] | None = None) -> None:
        """Connect to nothing yet.

        Args:
            url: where to.
            variable: name of the environment variable that holds it, for messages.
            pause: waits between attempts; None: by the clock, until `close`.
        """
        self._url, self._variable = url, variable
        self._closed = threading.Event()
        self._pause: Callable[[float], object] = self._closed.wait if pause is None else pause
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(MAX_WAITING)
        self._warned = False
        self._thread: threading.Thread | None = None

    def send(self, body: dict[str, Any]) -> None:
        """Send a body as soon as possible; returns at once."""
        try:
            # Never blocks: a step does not wait for a chat server.
            self._waiting.put_nowait(body)
        except queue.Full:
            self._warn(f"more than {MAX_WAITING} alerts wait; further ones are left out")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
            self._thread.start()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until all is sent or given up, so long at most; returns whether it is."""
        deadline_s = time.monotonic() + timeout_s
        while self._waiting.unfinished_tasks and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return not self._waiting.unfinished_tasks

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Wait as `flush`, and leave the rest."""
        if not self.flush(timeout_s):
            self._warn(f"an alert was still on its way after {timeout_s:g} s, and is left")
        self._closed.set()

    def _work(self) -> None:
        while True:
            body = self._waiting.get()
            try:
                if not self._closed.is_set():
                    self._deliver(json.dumps(body, ensure_ascii=False).encode())
            except Exception as e:  # whatever an address answers, the next alert is sent
                self._warn(f"an alert could not be sent ({type(e).__name__})")
            finally:
                self._waiting.task_done()

    def _deliver(self, data: bytes) -> None:
        for pause_s in (*PAUSES_S, None):
            problem, again = self._post(data)
            if not problem:
                return
            if pause_s is None or not again or self._closed.is_set():
                self._warn(f"an alert could not be sent ({problem})")
                return
            self._pause(pause_s)

    def _post(self, data: bytes) -> tuple[str, bool]:
        """Return what went wrong, or "", and whether another attempt may help."""
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.request import HTTPRedirectHandler, Request, build_opener

        class NoRedirects(HTTPRedirectHandler):
            """An address that sends on to another one gets nothing sent there."""

            def redirect_request(self, *_: Any, **__: Any) -> None:
                """Return no request in the place of the first."""

        request = Request(self._url, data, {
            "Content-Type": "application/json", "User-Agent": f"megatron-sov/{__version__}"})
        try:
            build_opener(NoRedirects).open(request, timeout=TIMEOUT_S).close()
        except HTTPError as e:
            e.close()
            return f"the answer was {e.code}", e.code in _CODES_WORTH_A_RETRY
        except (OSError, HTTPException) as e:  # its text may hold the URL
            return type(getattr(e, "reason", e)).__name__, True
        return "", False

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warn(f"the webhook of {self._variable}: {text}; the run goes on")


def webhook_of(variable: str) -> Webhook | None:
    """Return the webhook whose URL an environment variable holds; None where it holds none, which is said."""
    url = os.environ.get(variable, "").strip()
    if url.startswith(("http://", "https://")) and not any(c.isspace() for c in url):
        return Webhook(url, variable)
    state = "holds no http:// or https:// address" if url else "is not set"
    warn(f"obs.alert_webhook = {variable}: this environment variable {state}, so no alerts are sent")
    return None


class Alerts:
    """The alerts of one run; nothing is started without `obs.alert_webhook`.

    Only one process of a run may create this.

    Args:
        config: what is wanted.
        run: the run folder.
        recipe: name of its recipe.
    """

    def __init__(self, config: ObsConfig, run: Path, recipe: str) -> None:
        self._config, self._run, self._recipe = config, run.resolve(), recipe
        self._failed = False
        self._webhook: Webhook | None = webhook_of(config.alert_webhook) if config.alert_webhook else None

    def observe(self, event: dict[str, Any]) -> None:
        """Send an event that `obs.alert_on` names."""
        if self._webhook is None or event["event"] not in self._config.alert_on:
            return
        try:
            self._webhook.send(body_of(event, self._run, self._recipe))
            if event["event"] == "hang":  # the process ends itself after this event
                self._webhook.flush()
        except Exception as e:  # an event of a form that nobody thought of must not end a run
            if not self._failed:
                self._failed = True
                warn(f"an alert failed ({type(e).__name__}: {e}); the run goes on")

    def close(self) -> None:
        """Wait a few seconds for alerts that are on their way."""
        if self._webhook is not None:
            self._webhook.close()
            self._webhook = None


def alert(config: dict[str, Any], run: Path, event: dict[str, Any]) -> None:
    """Send the alert of an event that is added to a run from outside, if its settings ask for one, and wait
    for it a few seconds at most.

    Args:
        config: the run's settings as its config.json has them, of whatever version.
        run: its folder.
        event: what was added.
    """
    settings = config.get("obs")
    if not isinstance(settings, dict) or event["event"] not in (settings.get("alert_on") or ()):
        return
    variable = settings.get("alert_webhook")
    sound = isinstance(variable, str) and variable.isidentifier() and variable.isascii()
    webhook = webhook_of(str(variable)) if sound else None
    if webhook is not None:
        webhook.send(body_of(event, run.resolve(), str(config.get("recipe", ""))))
        webhook.close()
