"""Where a run's figures are sent: webhooks and OpenTelemetry collectors.  They watch a run and never end it:
events.jsonl holds everything anyway.

Names, units and attributes follow OpenTelemetry's semantic conventions: `hw.*` is theirs (hardware), what
they have no name for stands under `sov.train`; units are UCUM, an annotation in braces says what is counted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_sov.base.errors import warn
from megatron_sov.runs.obs.history import KINDS, describe
from megatron_sov.version import __version__

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation


# Alerts to a webhook: a JSON body with `text`, as Slack, Mattermost and their like take it.
#
# They are sent by a thread of their own, tried again with growing pauses, and given up: an address that does
# not answer holds nothing up, and what it answers is not read.  Its URL is a secret, so it stands in an
# environment variable, and in no file, message or log of ours.

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


MAX_LABEL_SETS = 64
"""Sets of labels of one metric at most; what comes later is counted as `OTHER`, so that no run can fill a
time series database."""
MAX_LABEL_CHARACTERS = 64
OTHER = "other"
_UNITS = {"s": "seconds", "By": "bytes", "J": "joules", "W": "watts", "Cel": "celsius", "1": "ratio"}


@dataclass(frozen=True)
class TelemetryMetric:
    """One metric."""

    name: str
    """OpenTelemetry's form, words between dots."""
    kind: Literal["gauge", "counter"]
    """counter: only grows while a run lives."""
    unit: str
    """UCUM; empty: a number without one that is no share either."""
    description: str
    labels: tuple[str, ...] = ()
    """Names of its attributes besides `sov.run`."""

    @property
    def prometheus_name(self) -> str:
        """The name that OpenTelemetry's rules give it in Prometheus (its compatibility specification): words
        between underscores, the unit spelled out, `_total` behind a counter."""
        unit = re.sub(r"\{[^}]*\}", "", self.unit)
        over = "per_second" if unit.endswith("/s") else ""
        base = unit.removesuffix("/s") if over else unit
        words = [self.name.replace(".", "_"), _UNITS.get(base, base), over]
        return "_".join(filter(None, words)) + ("_total" if self.kind == "counter" else "")


def _gauge(name: str, unit: str, description: str, *labels: str) -> TelemetryMetric:
    return TelemetryMetric(name, "gauge", unit, description, labels)


def _counter(name: str, unit: str, description: str, *labels: str) -> TelemetryMetric:
    return TelemetryMetric(name, "counter", unit, description, labels)


METRICS = {metric.name: metric for metric in (
    _gauge("sov.train.running", "", "1 while the process that tells this trains, 0 once it has ended."),
    _gauge("sov.train.processes", "{process}", "Processes of the run."),
    _gauge("sov.train.steps.planned", "{step}", "Optimizer steps of the whole run."),
    _gauge("sov.train.steps.done", "{step}", "Optimizer steps done; falls when a run goes back."),
    _gauge("sov.train.last_event.time", "s", "Unix time of the run's last event."),
    _gauge("sov.train.loss", "", "Training loss of the last step, in nats per token."),
    _gauge("sov.train.gradient_norm", "", "Global gradient norm of the last step, before clipping."),
    _gauge("sov.train.learning_rate", "", "Learning rate of the last step."),
    _gauge("sov.train.step.duration", "s", "Time of the last optimizer step."),
    _gauge("sov.train.throughput", "{token}/s", "Tokens per second of the last step, over all processes."),
    _gauge("sov.train.model_flops", "{operation}/s", "Model FLOP/s of process 0; recomputing counts once."),
    _gauge("sov.train.mfu", "1", "Share of the GPU's peak that model FLOPs make."),
    _gauge("sov.train.memory.peak", "By", "Most memory that process 0 has had."),
    _counter("sov.train.tokens", "{token}", "Tokens that the model has learned from."),
    _counter("sov.train.checkpoints", "{checkpoint}", "Checkpoints written since this start."),
    _gauge("sov.train.checkpoint.duration", "s", "Time that the last checkpoint took to be written."),
    _counter("sov.train.incidents", "{incident}", "What went wrong since this start, by kind.", "sov.kind"),
    _gauge("sov.train.heldout.loss", "", "Held-out loss of the last evaluation, in nats per token.",
           "sov.source"),
    _gauge("sov.train.heldout.bits_per_byte", "", "Held-out bits per byte of the last evaluation.",
           "sov.source"),
    _counter("sov.train.energy", "J", "Energy of all GPUs of the run since this start, told at checkpoints."),
    _counter("hw.energy", "J", "Energy of process 0's GPU since this start.", "hw.id", "hw.type"),
    _gauge("hw.power", "W", "Power of process 0's GPU.", "hw.id", "hw.type"),
    _gauge("hw.temperature", "Cel", "Temperature of process 0's GPU.", "hw.id", "hw.type"),
    _gauge("hw.gpu.utilization", "1", "Share of time in which process 0's GPU computed something.", "hw.id",
           "hw.type"),
)}
"""Name -> metric."""


@dataclass(frozen=True)
class MetricSample:
    """The newest value of a metric."""

    metric: TelemetryMetric
    labels: tuple[str, ...]
    """Values of `metric.labels`, in their order."""
    value: float


class Board:
    """The newest values of all metrics; written by a run, read by threads."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._lock = threading.Lock()

    def set(self, name: str, value: float, *labels: str) -> None:
        with self._lock:
            row, key = self._place(name, labels)
            row[key] = value

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter; an amount that is negative or no number is left out."""
        if amount >= 0:
            with self._lock:
                row, key = self._place(name, labels)
                row[key] = row.get(key, 0.0) + amount

    def samples(self) -> list[MetricSample]:
        """Return all values as they are now, in the order of `METRICS`."""
        with self._lock:
            return [MetricSample(metric, labels, value) for metric in METRICS.values()
                    for labels, value in self._values.get(metric.name, {}).items()]

    def _place(self, name: str, labels: tuple[str, ...]) -> tuple[dict[tuple[str, ...], float],
                                                                  tuple[str, ...]]:
        metric = METRICS[name]
        assert len(labels) == len(metric.labels), f"{name} has labels {metric.labels}, not {labels}"
        row = self._values.setdefault(name, {})
        key = tuple(label[:MAX_LABEL_CHARACTERS] for label in labels)
        # Names of sources are the user's: without a limit each would be a time series for ever.
        full = key not in row and len(row) >= MAX_LABEL_SETS
        return row, (OTHER,) * len(key) if full else key


# Metrics to an OpenTelemetry collector, by OTLP over HTTP.

EXPORT_TIMEOUT_S = 5.0
"""Seconds that one sending may take, attempts after a failure counted in."""
PATH = "/v1/metrics"
SCOPE = "megatron_sov"


class Otlp:
    """Sends what stands on a board, when it is asked to."""

    name = "OpenTelemetry"

    def __init__(self, endpoint: str, board: Board, resource: dict[str, str],
                 exporter: Any | None = None) -> None:
        """Connect to nothing yet.

        Args:
            endpoint: the collector's address.
            board: what is sent.
            resource: attributes of the whole run, such as service.name.
            exporter: an OpenTelemetry `MetricExporter` in the place of the one over HTTP.

        Raises:
            ImportError: the extra `telemetry` is not installed.
        """
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.resources import Resource

        self._exporter = exporter if exporter is not None else _over_http(endpoint)
        self._reader = InMemoryMetricReader()  # collects when asked to, without a thread of its own
        self._provider = MeterProvider([self._reader], Resource.create(resource), shutdown_on_exit=False)
        meter = self._provider.get_meter(SCOPE, __version__)
        for metric in METRICS.values():
            make = (meter.create_observable_counter if metric.kind == "counter"
                    else meter.create_observable_gauge)
            make(metric.name, [_callback(board, metric, resource["service.instance.id"])], metric.unit,
                 metric.description)

    def send(self) -> None:
        """Send all values.

        Raises:
            ConnectionError: the collector did not take them.
        """
        from opentelemetry.sdk.metrics.export import MetricExportResult

        data = self._reader.get_metrics_data()
        if data is not None and self._exporter.export(data) is not MetricExportResult.SUCCESS:
            raise ConnectionError("the collector did not take them")

    def close(self) -> None:
        self._exporter.shutdown()
        self._provider.shutdown()


def _over_http(endpoint: str) -> Any:
    """Return the exporter; what a collector answers is not read beyond its headers."""
    import requests
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    session = requests.Session()
    session.stream = True  # an answer without end must not fill the memory
    # it would tell of every failure; the run tells of the first one
    logging.getLogger(OTLPMetricExporter.__module__).setLevel(logging.CRITICAL)
    url = endpoint.rstrip("/")
    return OTLPMetricExporter(url if url.endswith(PATH) else url + PATH, timeout=EXPORT_TIMEOUT_S,
                              session=session)


def _callback(board: Board, metric: TelemetryMetric,
              run: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    """Return what gives OpenTelemetry the values of one metric; it takes finite ones alone."""
    from opentelemetry.metrics import Observation

    def observed(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(sample.value, {"sov.run": run, **dict(zip(metric.labels, sample.labels,
                                                                       strict=True))})
                for sample in board.samples() if sample.metric is metric and math.isfinite(sample.value)]

    return observed
