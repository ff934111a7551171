"""Where a run is watched from outside its folder: trackers, metrics, alerts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Le, MinLen

from megatron_sov.settings import ONCE, Bound, Breach, Code

AlertKind = Literal["stop", "rollback", "hang", "gate_failed", "restart", "sdc", "failure", "run_end"]


def _no_address(endpoint: str) -> Breach | None:
    if not endpoint:
        return None
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound, parts = False, urlsplit("")
    if "@" in parts.netloc or parts.query or parts.fragment:
        return (Code.BOUND, "must be an address alone, without user, password or query",
                "put what the collector wants to know into the variable OTEL_EXPORTER_OTLP_HEADERS")
    return None if sound else (Code.BOUND, "must be http://HOST:PORT or https://HOST:PORT", "")


def _no_variable(name: str) -> Breach | None:
    return None if re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", name) else (
        Code.BOUND, "must be the name of an environment variable that holds the URL, such as SOV_ALERT_URL; "
        "what it is now is not shown, for it may be the URL, which no file should hold", "")


def _not_read(file: str) -> Breach | None:
    return None if not file or file.endswith(".prom") else (
        Code.BOUND, "must end in .prom: node-exporter reads no other files", "")


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
    otlp_endpoint: Annotated[str, Bound(_no_address, may_be_secret=True)] = ""
    """Send metrics to this OpenTelemetry collector by OTLP over HTTP, e.g. http://localhost:4318 (extra
    `telemetry`); what it wants as headers stands in the variable OTEL_EXPORTER_OTLP_HEADERS.  Empty: none."""
    prometheus_port: Annotated[int, Ge(0), Le(65535)] = 0
    """Port of process 0 at which Prometheus finds the metrics (extra `telemetry`); 0: none."""
    prometheus_host: Annotated[str, MinLen(1)] = "127.0.0.1"
    """Address that this port is open at; 0.0.0.0: to the whole network, without a password."""
    prometheus_textfile: Annotated[str, Bound(_not_read)] = ""
    """File that node-exporter's textfile collector reads, whose name ends in .prom (extra `telemetry`);
    empty: none."""
    telemetry_every_s: Annotated[float, Ge(1), Le(3600)] = 15.0
    """Seconds between what is sent to the collector, and between writings of the text file."""
    nvml: bool = True
    """Read power, energy, use and temperature of each process's GPU, where `pynvml` is there to ask the
    driver (extra `telemetry`)."""
    alert_webhook: Annotated[str, Bound(_no_variable, may_be_secret=True)] = ""
    """Name of the environment variable that holds the URL that alerts are sent to (Slack's form): the URL is
    a secret, and so in no file.  Empty: no alerts."""
    alert_on: Annotated[tuple[AlertKind, ...], ONCE] = (
        "stop", "rollback", "hang", "gate_failed", "restart", "sdc", "failure")
    """Events that alerts are sent of; run_end: the run is complete."""
