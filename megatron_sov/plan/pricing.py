"""The machines that a plan is for: nodes of a cluster profile, their GPUs, and what joins them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_sov.base.errors import UserError
from megatron_sov.model import recipes
from megatron_sov.model.config import ExtendStageConfig, ModelConfig, PhaseConfig, RunConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE
from megatron_sov.model.recipes.extension import micro_batch_size
from megatron_sov.plan.calibration.fitting import TEACHERS, fullest, usable_bytes
from megatron_sov.plan.operation import Cost, Operation, cost, operation
from megatron_sov.plan.pages.quote import Checkpoint, Quote, QuotedMemory, Traffic
from megatron_sov.plan.search.space import as_dict, own_choice
from megatron_sov.plan.speed.parameters import UNITS, Parameters, default
from megatron_sov.plan.speed.step import Known, StepTime, beside_layers, router_s, step_time
from megatron_sov.plan.speed.traffic import messages
from megatron_sov.plan.speed.workload import PRECISIONS, ModelShape, Workload, of_model, of_run
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS, Chip, Links
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import SECONDS_OF_AN_HOUR

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
            return cluster.links(self.profile, self.num_ranks)
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
    return Machines(name, cluster.load(name, needs_account=False), number)


# The stages of a run that are priced apart: phases of its curriculum, or the stages of its extension.


PHASE = "phase"
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
    read = [schedule.tokens(step - 1) if step else 0 for step in starts]
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
        train = replace(train, micro_batch_size=micro_batch_size(limit_tokens, stage.seq_len, per_rank))
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
        return of_run(stage.config, stage.phase, self.num_ranks, self.chip, self.links, imbalance)

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
        traffic=tuple(Traffic(m.group, m.link, m.num_bytes, m.ideal_s) for m in messages(work)),
        bubble_share=step.bubble_s / step.total_s, imbalance=work.imbalance,
        tokens_per_s_per_gpu=step.tokens_per_s_per_gpu, tflops_per_gpu=step.tflops_per_gpu, mfu=step.mfu,
        hours=train_s / SECONDS_OF_AN_HOUR, effective_share=kept.effective_share,
        energy_kwh=paid.energy_kwh, cost_usd=paid.usd, cost_range_usd=(paid.usd_low, paid.usd_high),
        checkpoint=Checkpoint(kept.checkpoint_bytes, kept.stall_s + kept.write_s, kept.stall_s,
                              kept.interval_s, kept.interval_steps),
        notes=(*_notes(paid, kept, work.imbalance), *_of_routers(work, step, pricing.parameters)))


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


# Fine-tuning, preferences and distillation: the steps, and the passes of a reference or teacher before them.


DOCUMENT_TOKENS = 1000
"""Fine-tuning: mean tokens of a conversation; attention stays inside of it (Typhoon-S: 340,000 of about 1,000
each)."""
MAX_WEIGHTS_SHARE = 0.5
"""Of a GPU's memory that the weights of a reference or teacher may take."""
MAX_TP = 8
"""Most GPUs that a reference or teacher is split over: a node."""
TUNING_KINDS = {"sft": "SFT", "preference": "preference", "distill": "distillation"}
"""Objective -> what its stage is called."""
FORWARD_TOKENS = 16384
"""Of a pass that only looks, which keeps no activations."""


def covers(config: RunConfig) -> bool:
    """Return whether a run is post-training, which is priced here; extensions and rounds are none."""
    return config.objective.name in TUNING_KINDS and not config.extend.stages


def quotes(config: RunConfig, pricing: Pricing) -> list[Quote]:
    """Return the quotes of a run's jobs, one after the other on the same GPUs."""
    stages = run_stages(config, pricing.num_ranks)
    before = [q for stage in stages for q in _before(stage, pricing)]
    return [*before, *(_train(stage, pricing) for stage in stages)]


def _train(stage: RunStage, pricing: Pricing) -> Quote:
    """Return the quote of the optimizer steps of a stage: a phase's, with short documents in its rows."""
    kind = TUNING_KINDS[stage.config.objective.name]
    whole = quote(stage, pricing)
    document = min(DOCUMENT_TOKENS, stage.phase.seq_len)
    step = replace(pricing.workload(stage), document_tokens=document)
    seconds = step_time(step, pricing.parameters).components
    if kind == "distillation":
        seconds["teacher's head"] = _teachers_head_s(stage, pricing)
    if kind == "preference" and stage.config.preference.method == "kto":
        # its distance from the reference is one number of the whole batch, found before the losses
        forward = replace(step, objective="forward", sharding="none", recompute="none", recompute_modules=())
        seconds["distance"] = sum(step_time(forward, pricing.parameters).components.values())
    job = priced(pricing, stage.name, f"{kind}: train" if kind != "SFT" else kind,
                 replace(stage.phase, global_batch_size=stage.global_batch_size), steps=stage.steps,
                 tokens=stage.tokens, seconds=seconds, memory=whole.memory,
                 flops_per_token=whole.tflops_per_gpu * 1e12 / whole.tokens_per_s_per_gpu,
                 notes=(f"documents of {document:,} tokens are assumed in rows of "
                        f"{stage.phase.seq_len:,}",))
    return replace(job, layout=whole.layout, traffic=whole.traffic, bubble_share=whole.bubble_share,
                   imbalance=whole.imbalance, checkpoint=whole.checkpoint)


def _before(stage: RunStage, pricing: Pricing) -> list[Quote]:
    """Return the quotes of what is done before a stage's first step: by a reference or a teacher."""
    objective = stage.config.objective.name
    if objective == "preference" and stage.config.preference.method in WITH_REFERENCE:
        return [_forward(stage, pricing, "reference", "preference: reference", stage.config)]
    if objective != "distill":
        return []
    config = replace(stage.config, model=_teacher(stage.config))
    return [_forward(stage, pricing, "teacher", "distillation: teacher", config,
                     (f"teacher: {TEACHERS.get(stage.config.recipe, 'one as large as the student')} reads "
                       "all samples",))]


def _teacher(config: RunConfig) -> ModelConfig:
    """Return the teacher's model; the student's where nobody names one."""
    name = TEACHERS.get(config.recipe)
    return recipes.get(name).model if name else config.model


def _forward(stage: RunStage, pricing: Pricing, name: str, kind: str, config: RunConfig,
             notes: tuple[str, ...] = ()) -> Quote:
    """Return the quote of one pass over all of a stage's tokens that only looks, every GPU by itself or with
    as few others as hold the model."""
    shape = of_model(config.model)
    tp = _split(shape, pricing)
    base = pricing.workload(stage)
    replicas = max(1, pricing.num_ranks // tp)
    together = max(1, min(FORWARD_TOKENS // stage.phase.seq_len, stage.global_batch_size // replicas))
    alone = replace(base, shape=shape, micro_batch_size=together, tp=tp, sp=tp > 1, pp=1,
                    vpp=1, cp=1, ep=1, etp=1, sharding="none", objective="forward", recompute="none",
                    recompute_modules=())
    weights = round(shape.params() * 2 / tp)
    seconds = step_time(alone, pricing.parameters).components
    return priced(pricing, name, kind, replace(stage.phase, global_batch_size=stage.global_batch_size),
                  steps=stage.steps, tokens=stage.tokens, seconds=seconds,
                  memory=QuotedMemory({"weights": weights}, pricing.limit_bytes),
                  flops_per_token=shape.forward_flops_per_token(stage.phase.seq_len), notes=notes)


def _split(shape: ModelShape, pricing: Pricing) -> int:
    """Return how many GPUs hold a model that only looks: as few as its weights need."""
    tp = 1  # powers of two divide heads
    while tp < min(MAX_TP, pricing.num_ranks) and (
            shape.params() * 2 / tp > MAX_WEIGHTS_SHARE * pricing.chip.memory_bytes):
        tp *= 2
    return tp


def _teachers_head_s(stage: RunStage, pricing: Pricing) -> float:
    """Return the seconds of the teacher's output head in a step, which the student's last stage applies to
    its hidden states."""
    model = _teacher(stage.config)
    flops = 2 * model.hidden_size * model.vocab_size * stage.global_batch_size * stage.phase.seq_len
    share = pricing.parameters.product_fraction[pricing.chip.generation]["bf16"]
    on = pricing.num_ranks / stage.config.parallel.pp
    return flops / on / (pricing.chip.bf16_flops_per_s * share)


def priced(pricing: Pricing, name: str, kind: str, phase: PhaseConfig, *, steps: int, tokens: int,
           seconds: Mapping[str, float], memory: QuotedMemory, flops_per_token: float = 0.0,
           notes: tuple[str, ...] = ()) -> Quote:
    """Return the quote of a job."""
    step_s = sum(seconds.values())
    gpus = pricing.num_ranks
    paid = cost(steps * step_s, gpus, pricing.machines.profile)
    rate = tokens / (steps * step_s) / gpus
    tflops = rate * flops_per_token / 1e12
    return Quote(
        name=name, kind=kind, gpu=pricing.chip.name, num_gpus=gpus, tokens=tokens,
        steps=steps, seq_len=phase.seq_len, global_batch_size=phase.global_batch_size, layout={},
        memory=memory, seconds={part: s for part, s in seconds.items() if s}, tokens_per_s_per_gpu=rate,
        tflops_per_gpu=tflops, mfu=tflops * 1e12 / pricing.chip.bf16_flops_per_s,
        hours=steps * step_s / SECONDS_OF_AN_HOUR, effective_share=1.0, energy_kwh=paid.energy_kwh,
        cost_usd=paid.usd, cost_range_usd=(paid.usd_low, paid.usd_high),
        notes=(*notes, f"Cost: {paid.price_note}."))
