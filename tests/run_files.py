"""Read events and weights of run folders."""

from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.runs.obs.events import EVENTS, final_step_events, read_events


def read_run_events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's events of one kind, in order."""
    return [event for event in read_events(run / EVENTS) if event["event"] == kind]


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Return a run's events of steps; of a step that a killed run has run twice, the last."""
    return final_step_events([*read_events(run / EVENTS)])


def list_losses(run: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step."""
    return [(step["loss"], step["grad_norm"]) for step in read_steps(run)]


def read_weight_digests(run: Path, step: int) -> dict[str, str]:
    """Return file -> digest of the weights that a run saved after a step."""
    files = read_manifest(run / f"checkpoints/step-{step}").files
    return {name: record.digest for name, record in files.items() if name.endswith(".safetensors")}
