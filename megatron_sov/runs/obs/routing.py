"""MoE expert load statistics for the trainer's alarms, for reports and for plans."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, ParallelConfig
from megatron_sov.runs.obs.events import EVENTS, final_step_events, read_events

ExpertLoads = npt.NDArray[np.float64]
"""Tokens or token shares per expert, shape [layers, experts]."""
MAX_RECORDS = 64
"""`read_routes` takes at most this many evenly spaced records."""


def max_violation(load: ExpertLoads) -> npt.NDArray[np.float64]:
    """Return MaxVio per layer (arXiv 2408.15664): maximum expert load / mean load - 1; 0 means balance."""
    return np.asarray(load.max(axis=1) / load.mean(axis=1) - 1)


def load_entropy(load: ExpertLoads) -> npt.NDArray[np.float64]:
    """Return the load entropy per layer over ``ln(experts)``: 1 for uniform load, 0 for one expert."""
    if load.shape[1] < 2:
        return np.ones(len(load))
    share = load / load.sum(axis=1, keepdims=True)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(axis=1) / np.log(load.shape[1]))


def compute_process_load(load: ExpertLoads, ep: int) -> float:
    """Return the mean over layers of the busiest expert-parallel process's tokens, relative to the mean."""
    tokens = load.reshape(len(load), ep, -1).sum(axis=2)
    return float((tokens / tokens.mean(axis=1, keepdims=True)).mean(axis=0).max())


def count_dead_experts(load: ExpertLoads) -> npt.NDArray[np.int64]:
    return np.asarray((load == 0).sum(axis=1), dtype=np.int64)


def list_stage_rows(parallel: ParallelConfig, num_layers: int, layers: Sequence[int]) -> list[list[int]]:
    """Return each pipeline stage's rows in loads of `layers` (from 0); the last stage has the prediction
    layers."""
    rows = []
    for stage in range(parallel.pp):
        on_stage = {*parallel.stage_layers(stage, num_layers)}
        is_last = stage == parallel.pp - 1
        rows.append([row for row, layer in enumerate(layers)
                     if layer in on_stage or (is_last and layer >= num_layers)])
    return rows


@dataclass(frozen=True, eq=False)
class RecordedRoutes:
    """Expert loads that a run recorded at its evaluations."""

    run: Path
    layers: tuple[int, ...]
    """Layers with experts, from 0."""
    loads: npt.NDArray[np.float64]
    """Tokens or token shares, shape [records, layers, experts]."""
    _busiest: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    """`parallel.ep` -> the busiest process's load per layer, relative to the mean; mean over records."""

    def compute_imbalance(self, parallel: ParallelConfig, num_layers: int) -> float:
        """Return the load of the busiest expert-parallel processes, relative to the mean: the mean over the
        layers of the pipeline stage with the largest mean. In a layer all processes wait for the busiest."""
        if parallel.ep not in self._busiest:
            tokens = self.loads.reshape(*self.loads.shape[:2], parallel.ep, -1).sum(axis=3)
            self._busiest[parallel.ep] = (tokens.max(axis=2) / tokens.mean(axis=2)).mean(axis=0)
        stages = list_stage_rows(parallel, num_layers, self.layers)
        return max(float(self._busiest[parallel.ep][rows].mean()) for rows in stages if rows)


def read_routes(run: Path, model: ModelConfig) -> RecordedRoutes:
    """Read a run's `expert_load` events. Raises `UserError`: none, or records of another model."""
    events = final_step_events([event for event in read_events(run / EVENTS)
                                if {"load", "layers"} <= event.keys() and "source" not in event],
                               "expert_load")
    if not events:
        raise UserError(f"--routes {run}: {EVENTS} has no expert load; name the folder of a run of a model "
                        "with experts that has reached an evaluation")
    events = events[::-(-len(events) // MAX_RECORDS)]
    layers = range(model.num_dense_layers, model.num_layers + model.num_mtp_moe_layers())
    try:
        loads = np.array([event["load"] for event in events], np.float64)
    except ValueError:  # records of unequal shapes
        loads = np.zeros(0)
    sums = loads.sum(axis=-1)
    if events[-1]["layers"] != [layer + 1 for layer in layers] or (
            loads.shape[1:] != (len(layers), model.num_experts)) or not (
            (loads >= 0).all() and ((sums > 0) & (sums < np.inf)).all()):
        raise UserError(f"--routes {run}: its expert loads are not those of {len(layers)} layers with "
                        f"{model.num_experts} experts; name a run of this model")
    return RecordedRoutes(run, tuple(layers), loads)
