"""The parameters of speed that a team's own runs have taught: read, written, and used for a step.

A processor's speed is taken from runs on it: no data sheet tells what a small model reaches there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, warn
from megatron_sov.model.config import PhaseConfig, RunConfig
from megatron_sov.model.families.count import train_flops_per_token
from megatron_sov.plan.speed.parameters import Parameters, default, of_json
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import of_run
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import Chip, Links, default_links

RECOMPUTED = 4 / 3
"""FLOPs of a step that recomputes every layer, beside one that stores: four forward passes for three."""
LEAST_SPREAD = 1.5
"""Of the FLOPs of a layer, largest beside smallest, from which on its own cost is told apart from them."""


@dataclass(frozen=True)
class Passes:
    layers: float
    """Layers that a micro-batch goes through, forward and backward, one after the other; the head counts as
    one, and so do those in which a pipeline's stage is idle."""
    flops_per_thread: float


@dataclass(frozen=True)
class LocalMachine:
    """Seconds of a step are `layers` x `layer_s` + `flops_per_thread` / `flops_per_s`."""

    flops_per_s: float
    layer_s: float = 0.0
    """What a layer takes for a micro-batch beside its arithmetic: starting operations, most of all."""

    def seconds(self, passes: Passes) -> dict[str, float]:
        """Return part -> seconds of a step."""
        return {"arithmetic": passes.flops_per_thread / self.flops_per_s,
                "operations": passes.layers * self.layer_s}


def passes_of(config: RunConfig, num_ranks: int, threads: int, seq_len: int, batch_size: int) -> Passes:
    """Return what a process computes in a step."""
    replicas = num_ranks // config.parallel.ranks_per_replica
    micro_batches = batch_size / replicas / config.train.micro_batch_size
    # A pipeline fills and drains in pp - 1 further turns, in which this process waits.
    num_passes = micro_batches + config.parallel.pp - 1
    flops = train_flops_per_token(config.model, seq_len) * batch_size * seq_len / num_ranks
    flops *= RECOMPUTED if config.train.recompute is True else 1
    held = config.model.num_layers / config.parallel.pp + 1 + config.model.num_mtp_layers
    return Passes(held * num_passes, flops * num_passes / micro_batches / max(1, threads))


def learn(measured: Sequence[tuple[Passes, float]]) -> LocalMachine:
    """Return the machine that explains (a step's passes, its seconds) best, in relative error.

    Where all layers are about as large, their own cost cannot be told from their arithmetic, and is left
    out.  There is at least one step.
    """
    sizes = [passes.flops_per_thread / passes.layers for passes, _ in measured]
    layer_s = per_flop = 0.0
    if max(sizes) > LEAST_SPREAD * min(sizes):
        # least squares of a x + b y = 1, x and y each divided by the seconds
        x = [passes.layers / seconds for passes, seconds in measured]
        y = [passes.flops_per_thread / seconds for passes, seconds in measured]
        xx, yy, xy = (sum(a * b for a, b in zip(u, v, strict=True)) for u, v in ((x, x), (y, y), (x, y)))
        determinant = xx * yy - xy * xy
        layer_s = (sum(x) * yy - sum(y) * xy) / determinant
        per_flop = (sum(y) * xx - sum(x) * xy) / determinant
    # A negative time explains noise, not a machine: fall back to arithmetic alone.
    if layer_s <= 0 or per_flop <= 0:
        y = [passes.flops_per_thread / seconds for passes, seconds in measured]
        layer_s, per_flop = 0.0, sum(y) / sum(v * v for v in y)
    return LocalMachine(1 / per_flop, layer_s)


# What `plan --calibrate` leaves: parameters of the model of speed, and processors that runs were on.


MACHINES = "machines"
"""Key of the file: name of a processor -> what runs on it have shown."""
MAX_BYTES = 1 << 20
"""A larger file holds no parameters."""
MOST_RATE = 1e18
"""No processor is faster."""


@dataclass(frozen=True)
class LearnedCorrection:
    parameters: Parameters
    machines: Mapping[str, LocalMachine] = field(default_factory=dict)
    """Processors, by the name that they have for themselves."""


def shipped() -> LearnedCorrection:
    """Return what comes with the package, which knows no processors."""
    return LearnedCorrection(default())


def read_learned(path: Path) -> LearnedCorrection:
    """Return what stands in a file.

    Raises:
        UserError: it cannot be read, or is no file of parameters.
    """
    way_out = "pass a file that `megatron-sov plan --calibrate RUN --output FILE` wrote"
    try:
        with path.open(encoding="utf-8") as file:
            # Bounded: the file may be anybody's, and of any size.
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} characters")
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
            raise ValueError("it holds no object `parameters`")
        return LearnedCorrection(of_json(content["parameters"]), _machines(content.get(MACHINES, {})))
    except OSError as e:
        raise UserError(f"--parameters {path}: cannot be read ({e.strerror}); {way_out}") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"--parameters {path}: is no file of parameters ({e}); {way_out}") from None


def as_json(learned: LearnedCorrection, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": dataclasses.asdict(learned.parameters), "provenance": dict(provenance),
            MACHINES: {name: dataclasses.asdict(machine) for name, machine in learned.machines.items()}}


def _machines(found: Any) -> dict[str, LocalMachine]:
    """Return the processors of a file.

    Raises:
        ValueError: one is not described as they are.
    """
    if not isinstance(found, dict):
        raise ValueError(f"`{MACHINES}` is no object")
    names = {f.name for f in dataclasses.fields(LocalMachine)}
    for device, figures in found.items():
        if (not isinstance(figures, dict) or set(figures) != names or not all(map(_is_rate, figures.values()))
                or figures["flops_per_s"] < 1):
            raise ValueError(f"`{MACHINES}.{device}` must have {' and '.join(sorted(names))}: numbers, the "
                             f"first at least 1, none negative or above {MOST_RATE:g}")
    return {device: LocalMachine(**figures) for device, figures in found.items()}


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_RATE


CLUSTER = "SOV_CLUSTER"
"""Environment variable: the profile of the cluster that calibrating runs were on, as `--cluster` takes it."""


def links_of(chip: Chip, num_ranks: int) -> Links:
    """Return what joins a run's GPUs: as the profile in `SOV_CLUSTER` has it, if it has these GPUs; else as
    their maker builds servers."""
    name = os.environ.get(CLUSTER, "")
    if name:
        try:
            profile = cluster.load(name, needs_account=False)
            if profile.chip.key == chip.key:
                return cluster.links(profile, num_ranks)
        except UserError as e:
            warn(f"{CLUSTER}={name}: {e}; links of {chip.name} are taken as their maker builds servers")
    return default_links(chip)


def step_seconds(config: RunConfig, phase: PhaseConfig, num_ranks: int, chip: Chip,
                 parameters: Parameters) -> float:
    """Return the predicted seconds of a step of a phase on GPUs; the phase's own batch size holds.

    Raises:
        UserError: the chip has no products in the run's precision.
    """
    workload = of_run(config, phase, num_ranks, chip, links_of(chip, num_ranks))
    return sum(step_time(workload, parameters).components.values())
