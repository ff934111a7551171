"""What a run tells to the world beside its own folder, as the settings `obs.*` ask for it.

It sees every event of the run and nothing else, so that it can be left out without a trace.  Nothing that
goes wrong here ends a run; values are sent by a thread, and a system that does not answer is waited for a few
seconds at the very end alone.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_sov.base.artifacts import atomic_write
from megatron_sov.base.errors import UserError, how_to_install, warn
from megatron_sov.model.config import ObsConfig
from megatron_sov.runs.obs.exporters import METRICS, Board, Otlp, Webhook, body_of, webhook_of
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.history import is_incident
from megatron_sov.version import __version__

OF_A_STEP = {
    "step": "sov.train.steps.done", "loss": "sov.train.loss", "grad_norm": "sov.train.gradient_norm",
    "lr": "sov.train.learning_rate", "step_time_s": "sov.train.step.duration",
    "tokens_per_s": "sov.train.throughput", "mfu": "sov.train.mfu",
    "peak_memory_bytes": "sov.train.memory.peak", "tokens": "sov.train.tokens"}
"""Field of a `step` event -> metric."""
OF_A_GPU = {"gpu_power_w": "hw.power", "gpu_temperature_c": "hw.temperature",
            "gpu_utilization": "hw.gpu.utilization"}
"""Field of a `step` event -> metric of the GPU."""
GPU = "gpu"
"""OpenTelemetry's `hw.type`."""
CLOSE_S = 6.0
"""How long the end of a run waits for its last values to be sent."""


# Metrics for Prometheus: at a port of process 0, or in a file that node-exporter reads.


def registry(board: Board, resource: dict[str, str]) -> Any:
    """Return a registry of `prometheus_client` that reads a board.

    Args:
        board: what is told.
        resource: attributes of the whole run; they stand in `target_info`, the run in every metric.

    Raises:
        ImportError: the extra `telemetry` is not installed.
    """
    from prometheus_client import CollectorRegistry

    made = CollectorRegistry(auto_describe=False, target_info={_label(k): v for k, v in resource.items()})
    made.register(_BoardCollector(board, resource["service.instance.id"]))
    return made


class _BoardCollector:
    """Gives `prometheus_client` what stands on a board."""

    def __init__(self, board: Board, run: str) -> None:
        self._board, self._run = board, run

    def collect(self) -> Iterator[Any]:
        """Yield one family for each metric that has a value."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        # One copy under the lock, so that all families of a scrape are of the same moment.
        samples = self._board.samples()
        for metric in METRICS.values():
            found = [s for s in samples if s.metric is metric]
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            if found:
                made = family(metric.prometheus_name, metric.description,
                              labels=[_label("sov.run"), *map(_label, metric.labels)])
                for sample in found:
                    made.add_metric([self._run, *sample.labels], sample.value)
                yield made


class Port:
    """The metrics at a port of this machine."""

    name = "Prometheus"

    def __init__(self, host: str, port: int, board: Board, resource: dict[str, str]) -> None:
        """Open it.

        Raises:
            ImportError: the extra `telemetry` is not installed.
            OSError: the port is another's, or the address is not this machine's.
        """
        from prometheus_client import start_http_server

        self._server, self._thread = start_http_server(port, host, registry(board, resource))

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class TextFile:
    """The metrics in a file, which is whole whenever it is read."""

    name = "Prometheus' text file"

    def __init__(self, path: Path, board: Board, resource: dict[str, str]) -> None:
        """Write nothing yet.

        Raises:
            ImportError: the extra `telemetry` is not installed.
        """
        self._path, self._registry = path, registry(board, resource)

    def send(self) -> None:
        """Write the file anew.

        Raises:
            UserError, OSError: it cannot be written.
        """
        from prometheus_client import generate_latest

        atomic_write(self._path, generate_latest(self._registry))

    def close(self) -> None:
        """Nothing is open."""


def _label(name: str) -> str:
    return name.replace(".", "_")


# From a run's events to the values of its metrics.


class TelemetryReading:
    """Takes events in, one after the other, and sets the values of a board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._gpu = ("", GPU)

    def observe(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind, board = event["event"], self._board
        board.set("sov.train.last_event.time", number(event.get("time_s")))
        if kind == "run_start":
            self._gpu = (str((event.get("machine") or {}).get("gpu_uuid", "")), GPU)
            board.set("sov.train.running", 1.0)
            board.set("sov.train.processes", number(event.get("num_ranks")))
            board.set("sov.train.steps.planned", number(event.get("num_steps")))
            board.set("sov.train.steps.done", number(event.get("resumed_from")))
        elif kind == "step":
            self._step(event)
        elif kind == "eval":
            for source, row in (event.get("heldout") or {}).items():
                board.set("sov.train.heldout.loss", number(row.get("loss")), str(source))
                board.set("sov.train.heldout.bits_per_byte", number(row.get("bits_per_byte")), str(source))
        elif kind == "checkpoint":
            board.add("sov.train.checkpoints", 1.0)
            board.set("sov.train.checkpoint.duration", number(event.get("save_s")))
        elif kind == "energy":
            board.set("sov.train.energy", number(event.get("energy_j")))
        elif is_incident(event):
            board.add("sov.train.incidents", 1.0, kind)

    def _step(self, event: dict[str, Any]) -> None:
        for field, name in OF_A_STEP.items():
            if field in event:
                self._board.set(name, number(event[field]))
        if "tflops_per_process" in event:
            self._board.set("sov.train.model_flops", 1e12 * number(event["tflops_per_process"]))
        for field, name in OF_A_GPU.items():
            if field in event:
                self._board.set(name, number(event[field]), *self._gpu)
        if "energy_j" in event:
            self._board.add("hw.energy", number(event["energy_j"]), *self._gpu)


class Sender(Protocol):
    """What sends or writes all values when it is asked to."""

    name: str

    def send(self) -> None:
        """Send the values as they are now."""

    def close(self) -> None:
        """Let go of what is open."""


class Telemetry:
    """Metrics and alerts of one run; without settings that ask for them nothing is imported or started.

    Only one process of a run may create this.

    Args:
        config: what is wanted.
        run: the run folder.
        recipe: name of its recipe.

    Raises:
        UserError: the extra `telemetry` is not installed.
    """

    def __init__(self, config: ObsConfig, run: Path, recipe: str) -> None:
        self._config, self._run, self._recipe = config, run.resolve(), recipe
        self._board = Board()
        self._reading: TelemetryReading | None = None
        self._senders: list[Sender] = []
        self._port: Port | None = None
        self._failing: set[str] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._webhook: Webhook | None = webhook_of(config.alert_webhook) if config.alert_webhook else None
        if config.otlp_endpoint or config.prometheus_port or config.prometheus_textfile:
            self._reading = TelemetryReading(self._board)
            self._start_metrics()

    def observe(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        try:
            if self._reading is not None:
                self._reading.observe(event)
            if self._webhook is not None and event["event"] in self._config.alert_on:
                self._webhook.send(body_of(event, self._run, self._recipe))
                if event["event"] == "hang":  # the process ends itself behind this event
                    self._webhook.flush()
        except Exception as e:  # an event of a form that nobody thought of must not end a run
            self._tell("telemetry", e)

    def close(self) -> None:
        self._board.set("sov.train.running", 0.0)
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            self._thread = None
        if self._port is not None:
            self._port.close()
            self._port = None
        if self._webhook is not None:
            self._webhook.close()
            self._webhook = None

    def _start_metrics(self) -> None:
        config, board = self._config, self._board
        resource = {"service.name": "megatron-sov", "service.version": __version__,
                    "service.instance.id": self._run.name, "host.name": platform.node(),
                    "sov.recipe": self._recipe}

        def open_port() -> None:
            self._port = Port(config.prometheus_host, config.prometheus_port, board, resource)

        if config.prometheus_port:
            self._try("obs.prometheus_port", open_port)
        if config.otlp_endpoint:
            self._try("obs.otlp_endpoint", lambda: self._senders.append(
                Otlp(config.otlp_endpoint, board, resource)))
        if config.prometheus_textfile:
            self._try("obs.prometheus_textfile", lambda: self._senders.append(
                TextFile(Path(config.prometheus_textfile), board, resource)))
        if self._senders:
            self._thread = threading.Thread(target=self._send_on, name="telemetry", daemon=True)
            self._thread.start()

    def _try(self, setting: str, start: Callable[[], None]) -> None:
        try:
            start()
        except ImportError as e:
            raise UserError(f"{setting} needs a package that cannot be imported ({e}); "
                            f"{how_to_install('telemetry')}, or leave the setting out") from None
        except Exception as e:  # a port that is taken must not cost a requeued run its place
            self._tell(setting, e)

    def _send_on(self) -> None:
        """Send until the end, and once more then."""
        while not self._closed.wait(self._config.telemetry_every_s):
            self._send()
        self._send()
        for sender in self._senders:
            try:
                sender.close()
            except Exception as e:
                self._tell(sender.name, e)

    def _send(self) -> None:
        for sender in self._senders:
            try:
                sender.send()
                self._failing.discard(sender.name)
            except Exception as e:  # it may be there again in a minute
                self._tell(sender.name, e)

    def _tell(self, name: str, error: Exception) -> None:
        """Say that something fails, once until it works again."""
        if name not in self._failing:
            self._failing.add(name)
            warn(f"{name} failed ({type(error).__name__}: {error}); the run goes on, and tries again")


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
