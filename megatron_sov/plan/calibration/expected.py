"""What a run's settings predict on the machine on which it is about to run: the plan that it keeps."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import PhaseConfig, RunConfig
from megatron_sov.model.config.schedules import Schedule
from megatron_sov.plan.calibration.learned import LearnedCorrection, passes_of, read_learned, shipped
from megatron_sov.plan.footprint.kept import KeptPlan, StretchPlan
from megatron_sov.plan.footprint.memory import account
from megatron_sov.plan.operation import checkpoint_bytes, conditions, goodput, write_times
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import of_run
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import Chip, Links, default_links, of_device
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR

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
        learnt = ("" if machine.on_gpu else "; `megatron-sov plan --calibrate RUN --out FILE` learns its "
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
