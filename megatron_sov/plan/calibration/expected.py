"""What a run's settings predict on the machine on which it is about to run: the plan that it keeps.

A processor's speed is taken from runs on it: no data sheet tells what a small model reaches there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import PhaseConfig, RunConfig
from megatron_sov.model.families.count import train_flops_per_token
from megatron_sov.plan.footprint.kept import KeptPlan, StretchPlan
from megatron_sov.plan.footprint.memory import account
from megatron_sov.plan.operation import checkpoint_bytes, conditions, goodput, write_times
from megatron_sov.plan.speed.parameters import Parameters, default, of_json
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import of_run
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import Chip, Links, default_links, of_device
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR

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
ENGINE = "engine"
"""Key of the file: what `plan --calibrate-engine` measured of a decoding engine."""
ENGINE_SECONDS = ("step_s", "layer_s", "response_s", "message_s")
"""What a server shows of `EngineCosts`; its other fields stay those of published rounds."""
MAX_BYTES = 1 << 20
"""A larger file holds no parameters."""
MOST_RATE = 1e18
"""No processor is faster."""


@dataclass(frozen=True)
class LearnedCorrection:
    parameters: Parameters
    machines: Mapping[str, LocalMachine] = field(default_factory=dict)
    """Processors, by the name that they have for themselves."""
    engine: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a decoding engine that was measured, by field of `EngineCosts`; empty: none was."""


def shipped() -> LearnedCorrection:
    """Return what comes with the package, which knows no processors."""
    return LearnedCorrection(default())


def read_learned(path: Path, option: str = "--parameters ") -> LearnedCorrection:
    """Return what stands in a file.

    Raises:
        UserError: it cannot be read, or is no file of parameters.
    """
    way_out = ("pass a file that `megatron-sov plan --calibrate RUN --output FILE` wrote, or the same with "
               "--calibrate-engine URL")
    try:
        with path.open(encoding="utf-8") as file:
            # Bounded: the file may be anybody's, and of any size.
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} characters")
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
            raise ValueError("it holds no object `parameters`")
        return LearnedCorrection(of_json(content["parameters"]), _machines(content.get(MACHINES, {})),
                                 _engine(content.get(ENGINE, {})))
    except OSError as e:
        raise UserError(f"{option}{path}: cannot be read ({e.strerror}); {way_out}") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{option}{path}: is no file of parameters ({e}); {way_out}") from None


def as_json(learned: LearnedCorrection, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": dataclasses.asdict(learned.parameters), "provenance": dict(provenance),
            MACHINES: {name: dataclasses.asdict(machine) for name, machine in learned.machines.items()},
            **({ENGINE: dict(learned.engine)} if learned.engine else {})}


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


def _engine(found: Any) -> dict[str, float]:
    """Return the decoding engine of a file.

    Raises:
        ValueError: it is not described as one is.
    """
    if found and (not isinstance(found, dict) or set(found) != set(ENGINE_SECONDS)
                  or not all(map(_is_rate, found.values()))):
        raise ValueError(f"`{ENGINE}` must have {', '.join(ENGINE_SECONDS)}: numbers, none negative")
    return dict(found)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_RATE


CLUSTER = "SOV_CLUSTER"
"""Environment variable: what `--cluster` takes; job scripts of `submit` set it."""
PARAMETERS = "SOV_PLAN_PARAMETERS"
"""Environment variable: the file that `plan --calibrate` wrote, for the plans that runs keep."""
SHIPPED = "those that come with the package"
WAITS = ("policy", "distill")
"""Objectives whose steps wait for responses and teachers, which `plan` prices as jobs of their own."""


# The cluster that a run is on, as far as somebody has told it: what joins its GPUs, its storage, how often
# something fails.


@dataclass(frozen=True)
class Surroundings:
    """What a run's plan reckons with beside its GPUs."""

    profile: ClusterProfile
    links: Links
    told: str
    """Where they come from, for people."""


def surroundings(chip: Chip, num_ranks: int) -> Surroundings:
    """Return the profile that `SOV_CLUSTER` names; where it names none, or one that does not serve, the
    defaults: a run does not fail for its plan."""
    name = os.environ.get(CLUSTER, "")
    told = f"servers of {chip.name} as their maker builds them, for {CLUSTER} names no profile"
    if name:
        try:
            profile = cluster.load(name, needs_account=False)
            if profile.chip.key == chip.key:
                return Surroundings(profile, cluster.links(profile, num_ranks), f"profile {name}")
            why = f"has {profile.chip.name} and the run has found {chip.name}"
        except UserError as e:
            why = str(e)
        told = f"servers of {chip.name} as their maker builds them, for {CLUSTER}={name}: {why}"
    return Surroundings(ClusterProfile(description="of GPUs that are known"), default_links(chip), told)


@dataclass(frozen=True)
class Machine:
    device: str
    """What the GPUs, or the processor, call themselves."""
    on_gpu: bool
    threads: int
    memory_before_bytes: int
    """What a process had of the host's memory before its model was built."""

    @property
    def chip(self) -> Chip | None:
        """What is known of its GPUs; None: nothing, or there are none."""
        return of_device(self.device) if self.on_gpu else None


def expected(config: RunConfig, num_ranks: int, machine: Machine) -> KeptPlan:
    """Return the plan of a run; what cannot be predicted is said in its place."""
    longest = max(phase.seq_len for phase in config.data.phases)
    stages = [account(config, num_ranks, stage, longest) for stage in range(config.parallel.pp)]
    learned, told, trouble = _learned()
    # Memory is predicted anyway: it needs no speed.
    no_speed = _why_no_speed(config, machine, learned)
    plan = KeptPlan(
        time_s=time.time(), recipe=config.recipe, num_ranks=num_ranks, layout=config.to_dict()["parallel"],
        device=machine.device, chip=machine.chip.key if machine.chip else "", threads=machine.threads,
        no_speed="; ".join(filter(None, (no_speed, trouble if no_speed else ""))), parameters=told,
        memory_bytes=tuple(of_stage.components() for of_stage in stages),
        memory_before_bytes=0 if machine.on_gpu else machine.memory_before_bytes,
        checkpoint_bytes=checkpoint_bytes(config).total, checkpoint_s=0.0, failures_per_hour=0.0,
        effective_share=0.0, power_w=machine.chip.power_w if machine.chip else 0.0, stretches=())
    try:
        plan = replace(plan, stretches=_stretches(config, num_ranks, machine,
                                                  None if no_speed else learned))
        if no_speed or machine.chip is None:
            return plan
        return _operated(plan, config, surroundings(machine.chip, num_ranks))
    except UserError as e:  # a chip without the products that are asked for; the run itself says so too
        return replace(plan, no_speed=str(e), stretches=_stretches(config, num_ranks, machine, None))


def _operated(plan: KeptPlan, config: RunConfig, around: Surroundings) -> KeptPlan:
    """Return a plan with what failures and checkpoints cost: as often as the profile says, or published GPUs
    fail, on storage that takes what it says, or the processes can write."""
    storage = around.profile.storage_write_gbytes_per_s * 1e9
    times = write_times(config, plan.num_ranks, storage or math.inf)
    # The longest: it loses most to a failure between two checkpoints.
    longest_s = max(stretch.step_s for stretch in plan.stretches)
    c = conditions(around.profile, plan.num_ranks, config.train.checkpoint_every_steps * longest_s,
                   times.stall_s, times.background_s)
    return replace(plan, checkpoint_s=times.stall_s + times.background_s, cluster=around.told,
                   failures_per_hour=c.failures_per_s * SECONDS_OF_AN_HOUR, effective_share=goodput(c))


def _learned() -> tuple[LearnedCorrection, str, str]:
    """Return the numbers of the model of speed, where they come from, and why they are not those that were
    asked for: a run does not fail for its plan."""
    file = os.environ.get(PARAMETERS, "")
    if not file:
        return shipped(), SHIPPED, ""
    try:
        learned = read_learned(Path(file), f"{PARAMETERS}=")
        return learned, f"{file} (sha256 {sha256_file(Path(file))[:12]})", ""
    except UserError as e:
        return shipped(), SHIPPED, str(e)


def _why_no_speed(config: RunConfig, machine: Machine, learned: LearnedCorrection) -> str:
    """Return why no speed can be predicted, or nothing."""
    if config.objective.name in WAITS:
        return (f"steps of objective {config.objective.name} wait for what other jobs write; "
                f"`megatron-sov plan {config.recipe}` prices these")
    if machine.chip is None and machine.device not in learned.machines:
        learnt = ("" if machine.on_gpu else "; `megatron-sov plan --calibrate RUN --output FILE` learns its "
                                            f"speed from a run, and {PARAMETERS}=FILE tells the next one")
        return f"no prediction: chip unknown ({machine.device}){learnt}"
    return ""


def _stretches(config: RunConfig, num_ranks: int, machine: Machine,
               learned: LearnedCorrection | None) -> tuple[StretchPlan, ...]:
    """Return the stretches of the curriculum, with their speed where there is what tells it."""
    schedule = Schedule(config)
    ends = [*(s.first_step for s in schedule.stretches), schedule.num_steps]
    found = []
    for stretch, (first, end) in zip(schedule.stretches, pairwise(ends), strict=True):
        phase = replace(schedule.phases[stretch.phase], seq_len=stretch.seq_len,
                        global_batch_size=stretch.batch_size)
        seconds = step_seconds(config, phase, num_ranks, machine, learned) if learned else {}
        found.append(StretchPlan(phase.name, first + 1, end, phase.seq_len, phase.global_batch_size, seconds))
    return tuple(found)


def step_seconds(config: RunConfig, phase: PhaseConfig, num_ranks: int, machine: Machine,
                 learned: LearnedCorrection) -> dict[str, float]:
    """Return component -> seconds of a step of a phase, whose own batch size holds.

    Raises:
        UserError: the chip has no products in the run's precision.
    """
    if machine.chip is None:
        return learned.machines[machine.device].seconds(passes_of(
            config, num_ranks, machine.threads, phase.seq_len, phase.global_batch_size))
    workload = of_run(config, phase, num_ranks, machine.chip,
                      surroundings(machine.chip, num_ranks).links)
    components = step_time(workload, learned.parameters).components
    return {name: seconds for name, seconds in components.items() if seconds}
