"""Where a run is watched from outside its folder: trackers, metrics, alerts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Le, MinLen

from megatron_sov.settings import Code, Problem, find_broken

AlertKind = Literal["stop", "rollback", "hang", "gate_failed", "restart", "sdc", "failure", "run_end"]


@dataclass(frozen=True)
class ObsConfig:
    """Where a run is watched, besides events.jsonl and the progress bar."""

    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard (extra `dev`)."""
    wandb: bool = False
    """Log to Weights & Biases; works offline with WANDB_MODE=offline (extra `dev`)."""
    wandb_project: str = "megatron-sov"
    """Weights & Biases project."""
    mlflow: bool = False
    """Log to MLflow: to the server whose address stands in the variable MLFLOW_TRACKING_URI, else into
    RUN/mlflow (extra `mlflow`)."""
    mlflow_experiment: str = "megatron-sov"
    """MLflow experiment."""
    otlp_endpoint: str = ""
    """Send metrics to this OpenTelemetry collector by OTLP over HTTP, e.g. http://localhost:4318 (extra
    `telemetry`); what it wants as headers stands in the variable OTEL_EXPORTER_OTLP_HEADERS.  Empty: none."""
    prometheus_port: Annotated[int, Ge(0), Le(65535)] = 0
    """Port of process 0 at which Prometheus finds the metrics (extra `telemetry`); 0: none."""
    prometheus_host: Annotated[str, MinLen(1)] = "127.0.0.1"
    """Address that this port is open at; 0.0.0.0: to the whole network, without a password."""
    prometheus_textfile: str = ""
    """File that node-exporter's textfile collector reads, whose name ends in .prom (extra `telemetry`);
    empty: none."""
    telemetry_every_s: Annotated[float, Ge(1), Le(3600)] = 15.0
    """Seconds between what is sent to the collector, and between writings of the text file."""
    nvml: bool = True
    """Read power, energy, use and temperature of each process's GPU, where `pynvml` is there to ask the
    driver (extra `telemetry`)."""
    alert_webhook: str = ""
    """Name of the environment variable that holds the URL that alerts are sent to (Slack's form): the URL is
    a secret, and so in no file.  Empty: no alerts."""
    alert_on: tuple[AlertKind, ...] = ("stop", "rollback", "hang", "gate_failed", "restart", "sdc", "failure")
    """Events that alerts are sent of; run_end: the run is complete."""

    def problems(self) -> list[Problem]:
        """Return every rule that these settings break."""
        p = find_broken(
            self, "obs",
            (not self.prometheus_textfile or self.prometheus_textfile.endswith(".prom"),
             "prometheus_textfile", "must end in .prom: node-exporter reads no other files"),
            (len(set(self.alert_on)) == len(self.alert_on), "alert_on", "names an event twice"))
        # what stands in these two by mistake may be a secret, so it is not repeated
        if re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", self.alert_webhook) is None:
            p.append(Problem(Code.RULE, "obs.alert_webhook", "must be the name of an environment variable "
                             "that holds the URL, such as SOV_ALERT_URL; what it is now is not shown, for it "
                             "may be the URL, which no file should hold"))
        if wrong := _wrong_endpoint(self.otlp_endpoint):
            p.append(Problem(Code.RULE, "obs.otlp_endpoint", wrong))
        return p


def _wrong_endpoint(endpoint: str) -> str:
    """Return what is wrong with the address of a collector; one with a password in it is not repeated."""
    if not endpoint:
        return ""
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound, parts = False, urlsplit("")
    if "@" in parts.netloc or parts.query or parts.fragment:
        return ("must be an address alone, without user, password or query; put what the collector wants to "
                "know into the variable OTEL_EXPORTER_OTLP_HEADERS")
    return "" if sound else "must be http://HOST:PORT or https://HOST:PORT"
