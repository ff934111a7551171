"""Alerts to a webhook: a JSON body with `text`, as Slack, Mattermost and their like take it.

They are sent by a thread of their own, tried again with growing pauses, and given up: an address that does
not answer holds nothing up, and what it answers is not read.  Its URL is a secret, so it stands in an
environment variable, and in no file, message or log of ours.
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

from megatron_sov.obs.incidents import KINDS, describe
from megatron_sov.obs.warning import warn
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
