"""The machines that a plan is for: nodes of a cluster profile, their GPUs, and what joins them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ExtendStageConfig, PhaseConfig, RunConfig
from megatron_sov.model.config.post_training import REFERENCE_METHODS
from megatron_sov.model.recipes.extension import find_micro_batch_size
from megatron_sov.plan.calibration.fitting import fullest, usable_bytes
from megatron_sov.plan.operation import Cost, Operation, cost, operation
from megatron_sov.plan.pages.quote import Checkpoint, Quote, QuotedMemory
from megatron_sov.plan.search.space import as_dict, own_choice
from megatron_sov.plan.speed.parameters import UNITS, Parameters, default
from megatron_sov.plan.speed.step import Known, StepTime, beside_layers, router_s, step_time
from megatron_sov.plan.speed.workload import PRECISIONS, Workload, of_run
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS, Chip, Links
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import SECONDS_PER_HOUR

MAX_NODES = 1_000_000
"""More than anybody has; a number beyond is a slip of the finger."""


@dataclass(frozen=True)
class Machines:
    cluster: str
    """Name or file of the profile, as --cluster takes it."""
    profile: ClusterProfile
    nodes: int

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.profile.tasks_per_node

    @property
    def chip(self) -> Chip | None:
        return self.profile.chip if self.profile.gpus_per_node and self.profile.gpu else None

    def links(self) -> Links:
        """Return what joins the GPUs.

        Raises:
            UserError: the profile does not say it.
        """
        try:
            return cluster.compute_links(self.profile, self.num_ranks)
        except UserError as e:
            raise UserError(f"--cluster {self.cluster}: {e}") from None

    @property
    def limit_bytes(self) -> int:
        """What a run may take of each GPU; 0: nobody knows."""
        return usable_bytes(self.chip) if self.chip else 0

    def with_nodes(self, nodes: int) -> Machines:
        return Machines(self.cluster, self.profile, nodes)


def machines(name: str, nodes: int | None) -> Machines:
    """Return nodes of a cluster.

    Raises:
        UserError: there is no such profile, or nobody has so many nodes.
    """
    number = 1 if nodes is None else nodes
    if not 1 <= number <= MAX_NODES:
        raise UserError(f"--nodes {number}: must be at least 1"
                        + (f" and at most {MAX_NODES:,}" if number > 1 else ""))
    return Machines(name, cluster.load_profile(name, needs_account=False), number)


# The stages of a run that are priced apart: phases of its curriculum, or the stages of its extension.


PHASE = "phase"
DOCUMENT_TOKENS = 1000
"""Mean tokens of a conversation, which attention stays inside of (Typhoon-S: 340,000 of about 1,000 each)."""
PACKED = ("sft", "preference", "distill")
"""Objectives whose rows hold several conversations."""
KINDS = {"extension": "extension stage", "midtraining": "mid-training stage"}
"""`extend.stages.N.kind` -> what it is called beside other stages."""


@dataclass(frozen=True)
class RunStage:
    """A part of a run whose steps are all alike."""

    name: str
    kind: str
    """phase, extension stage, mid-training stage."""
    config: RunConfig
    """The run's settings with this phase alone."""
    steps: int
    tokens: int
    """Tokens that they read, padding counted in."""

    @property
    def phase(self) -> PhaseConfig:
        return self.config.data.phases[0]

    @property
    def global_batch_size(self) -> int:
        """Samples of a step, behind any ramp."""
        return self.phase.global_batch_size or self.config.train.global_batch_size

    def with_config(self, config: RunConfig) -> RunStage:
        return replace(self, config=config)


def run_stages(config: RunConfig, num_ranks: int, *, micro_batch_set: bool = False) -> list[RunStage]:
    """Return the stages of a run, in order.

    Args:
        config: the run; where it has `extend.stages` these are the stages, as `extend` trains them.
        num_ranks: processes.
        micro_batch_set: whether somebody has chosen `train.micro_batch_size`; otherwise `extend` fills the
            row of a shorter stage with more samples.
    """
    if config.extend.stages:
        return [_of_extension(config, stage, num_ranks, micro_batch_set) for stage in config.extend.stages]
    schedule, starts = Schedule(config), [*config.phase_starts(), config.num_steps()]
    read = [schedule.count_tokens(step - 1) if step else 0 for step in starts]
    return [RunStage(phase.name, PHASE, _alone(config, phase, ramps=i == 0),
                     starts[i + 1] - starts[i], read[i + 1] - read[i])
            for i, phase in enumerate(config.data.phases) if starts[i + 1] > starts[i]]


def group_stages(stages: Sequence[RunStage]) -> list[tuple[RunStage, list[RunStage]]]:
    """Return stages by what a step of theirs computes: the first of each kind, with all of that kind."""
    kinds: dict[tuple[int, int, int], list[RunStage]] = {}
    for stage in stages:
        size = stage.config.train.micro_batch_size
        # The seconds and bytes of a step depend on these three alone, so a search weighs each kind once.
        kinds.setdefault((stage.phase.seq_len, stage.global_batch_size, size), []).append(stage)
    return [(same[0], same) for same in kinds.values()]


def _alone(config: RunConfig, phase: PhaseConfig, *, ramps: bool) -> RunConfig:
    """Return a run's settings with one of its phases; the batch ramps up in the first one alone."""
    train = config.train if ramps else replace(config.train, ramp_from_batch_size=0)
    return replace(config, data=replace(config.data, phases=(phase,)), train=train)


def _of_extension(config: RunConfig, stage: ExtendStageConfig, num_ranks: int,
                  micro_batch_set: bool) -> RunStage:
    """Return a stage as `extend` trains it if its gate takes all its steps."""
    # The dearest case is priced: a gate that takes all of its steps.
    size = stage.global_batch_size or config.train.global_batch_size
    steps = max(stage.max_steps, stage.steps or math.ceil(stage.tokens / (size * stage.seq_len))
                or config.train.steps or config.num_steps())
    train = replace(config.train, global_batch_size=size, ramp_from_batch_size=0)
    if not micro_batch_set:
        per_rank = max(1, size // max(1, num_ranks // max(1, config.parallel.ranks_per_replica)))
        # Rows of short samples are filled up to the tokens of the longest row, so memory stays the same.
        limit_tokens = config.train.micro_batch_size * config.data.max_seq_len()
        train = replace(train, micro_batch_size=find_micro_batch_size(limit_tokens, stage.seq_len, per_rank))
    tokens = steps * size * stage.seq_len
    phase = PhaseConfig(stage.name, tokens=tokens, seq_len=stage.seq_len, global_batch_size=size)
    model = replace(config.model, max_position_tokens=max(config.model.max_position_tokens, stage.seq_len))
    return RunStage(stage.name, KINDS[stage.kind], replace(
        config, model=model, train=train, data=replace(config.data, phases=(phase,))), steps, tokens)


# What each stage of a run takes on a cluster: memory, time, messages, checkpoints, failures, cost.


@dataclass(frozen=True)
class Pricing:
    """Weighs and times stages of a run on the nodes of a cluster with known GPUs; what `search` asks."""

    machines: Machines
    parameters: Parameters
    _known: Known = field(default_factory=dict, compare=False, repr=False)
    """Parts of steps that were timed before."""

    @property
    def num_ranks(self) -> int:
        return self.machines.num_ranks

    @cached_property
    def limit_bytes(self) -> int:
        """What a run may take of each GPU."""
        return self.machines.limit_bytes

    @cached_property
    def chip(self) -> Chip:
        assert self.machines.chip is not None, self.machines.cluster
        return self.machines.chip

    @cached_property
    def links(self) -> Links:
        return self.machines.links()

    def needs(self, stage: RunStage) -> int:
        return fullest(stage.config, self.num_ranks)[1].total

    def workload(self, stage: RunStage) -> Workload:
        """Return a step of a stage; experts meet the imbalance that real routers have."""
        imbalance = self.parameters.real_imbalance if stage.config.model.num_moe_layers() else 1.0
        work = of_run(stage.config, stage.phase, self.num_ranks, self.chip, self.links, imbalance)
        if stage.config.objective.name in PACKED and not stage.config.extend.stages:
            work = replace(work, document_tokens=min(DOCUMENT_TOKENS, work.seq_len))
        return work

    def step(self, stage: RunStage) -> StepTime:
        return step_time(self.workload(stage), self.parameters, self._known)

    def beside_layers(self, stage: RunStage) -> float:
        """Return what the last pipeline stage computes beside its layers, in units of a layer."""
        return beside_layers(self.workload(stage), self.parameters)

    def seconds(self, stage: RunStage) -> dict[str, float]:
        return self.step(stage).components


def pricing(machines: Machines, learned: Parameters | None = None) -> Pricing | None:
    """Return what prices stages on some nodes, by what was learned there or by what comes with the package;
    None: the profile does not say what GPUs they have."""
    return Pricing(machines, learned or default()) if machines.chip else None


def refuse_precision(config: RunConfig, chip: Chip) -> None:
    """Refuse products that a chip has none of.

    Raises:
        UserError: `train.fp8` asks for them; the message names precisions and chips that go together.
    """
    asked = config.train.fp8
    unit = UNITS[PRECISIONS[asked]]
    if unit == "bf16":
        return
    try:
        chip.flops_per_s(unit)
        # Hopper multiplies in FP8 too, but without scales of blocks; chips with FP4 have both.
        if asked == "mxfp8" and not chip.fp4_flops_per_s:
            can = ", ".join(c.key for c in CHIPS.values() if c.fp4_flops_per_s)
            raise UserError(f"MXFP8 on {chip.name}: its tensor cores scale no blocks of 32 values, those of "
                            f"{can} do")
    except UserError as e:
        works = "tensorwise" if chip.fp8_flops_per_s else "none"
        raise UserError(f"train.fp8 = {asked}: {e}; the nearest that works: "
                        f"--set train.fp8={works}") from None


def quote(stage: RunStage, pricing: Pricing) -> Quote:
    """Return what a stage takes.

    Raises:
        UserError: the chip has no products in the run's precision.
    """
    refuse_precision(stage.config, pricing.chip)
    at, needs = fullest(stage.config, pricing.num_ranks)
    work, step = pricing.workload(stage), pricing.step(stage)
    # a ramp's smaller steps are taken to be as quick for each of their tokens
    train_s = stage.tokens / (step.tokens_per_s_per_gpu * pricing.num_ranks)
    kept = operation(stage.config, pricing.machines.profile, pricing.num_ranks, step.total_s, stage.steps)
    paid = cost(train_s, pricing.num_ranks, pricing.machines.profile, kept.effective_share)
    return Quote(
        name=stage.name, kind=stage.kind, gpu=pricing.chip.name, num_gpus=pricing.num_ranks,
        tokens=stage.tokens, steps=stage.steps, seq_len=stage.phase.seq_len,
        global_batch_size=stage.global_batch_size, layout=as_dict(own_choice(stage.config)),
        memory=QuotedMemory(needs.components(), pricing.limit_bytes, at, needs.on_host),
        seconds=step.components,
        bubble_share=step.bubble_s / step.total_s, imbalance=work.imbalance,
        tokens_per_s_per_gpu=step.tokens_per_s_per_gpu, tflops_per_gpu=step.tflops_per_gpu, mfu=step.mfu,
        hours=train_s / SECONDS_PER_HOUR, effective_share=kept.effective_share,
        energy_kwh=paid.energy_kwh, cost_usd=paid.usd, cost_range_usd=(paid.usd_low, paid.usd_high),
        checkpoint=Checkpoint(kept.checkpoint_bytes, kept.stall_s + kept.write_s, kept.stall_s,
                              kept.interval_s, kept.interval_steps),
        notes=(*_notes(paid, kept, work.imbalance), *_of_routers(work, step, pricing.parameters),
               *_packing_notes(stage.config, work)))


def _packing_notes(config: RunConfig, work: Workload) -> list[str]:
    """Return what is assumed of packed conversations, and what their price leaves out."""
    if not work.document_tokens:
        return []
    notes = [f"Documents of {work.document_tokens:,} tokens are assumed in rows of {work.seq_len:,}."]
    name = config.objective.name
    if name == "distill":
        notes.append("The teacher's forward passes and output head are not priced.")
    elif name == "preference" and config.preference.method in REFERENCE_METHODS:
        notes.append("The forward passes of the reference are not priced: about a quarter of these hours.")
    return notes


def _of_routers(work: Workload, step: StepTime, parameters: Parameters) -> list[str]:
    if not work.shape.num_moe_layers:
        return []
    seconds = router_s(work, parameters)
    return [f"Routers take {seconds:.2g} s of a step, {seconds / step.total_s:.1%}, counted under dense and "
            "memory-bound."]


def _notes(paid: Cost, kept: Operation, imbalance: float) -> tuple[str, ...]:
    notes = [f"Cost: {paid.price_note}."]
    if imbalance > 1:
        notes.append(f"The busiest experts are taken to meet {imbalance:.2f} times as many tokens as the "
                     "mean.")
    if not kept.storage_known:
        notes.append("Nobody has said what the storage takes (storage_write_gbytes_per_s in the profile): "
                     "checkpoints are as fast as the processes can write at best.")
    return tuple(notes)
