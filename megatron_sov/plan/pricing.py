"""Price a run's stages on a cluster's nodes: predicted memory, time and cost per stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ExtendStageConfig, PhaseConfig, RunConfig, apply_settings
from megatron_sov.model.config.post_training import REFERENCE_METHODS
from megatron_sov.model.recipes.extension import find_micro_batch_size
from megatron_sov.plan.footprint.gpu_capacity import can_run, find_fullest_stage, get_usable_bytes
from megatron_sov.plan.pages.quotes import Quote, QuotedMemory
from megatron_sov.plan.search.recommended_layouts import GRAPHS
from megatron_sov.plan.search.space import choice_to_dict, get_current_choice
from megatron_sov.plan.speed.parameters import UNITS, load_default_parameters
from megatron_sov.plan.speed.step import (
    SLOW_HOST, PartsCache, StepTime, estimate_extra_layers, estimate_router_s, estimate_step, load_slow_host)
from megatron_sov.plan.speed.workload import PRECISIONS, Workload, build_workload
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS, Chip, Links
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import SECONDS_PER_HOUR

if TYPE_CHECKING:
    from megatron_sov.runs.obs.routing import RecordedRoutes  # imports numpy

MAX_NODES = 1_000_000
"""Larger values for --nodes are refused as typing errors."""
PHASE = "phase"  # `RunStage.kind` of entries in `data.phases`
DOCUMENT_TOKENS = 1000
"""Assumed mean length of conversations: tokens in a packed row attend only within theirs (Typhoon-S: 340,000
conversations with about 1,000 tokens)."""
PACKED = ("sft", "preference", "distill")
"""Objectives that pack several conversations into a row."""
FITTED_HOST_SHARE = 0.1
"""Weight of the step time with the fitted host in `compute_rank_s`. It decides among layouts whose steps wait
for a slow host: their times with a slow host are equal."""
KINDS = {"extension": "extension stage", "midtraining": "mid-training stage"}
"""`extend.stages.N.kind` -> `RunStage.kind`, as a `Quote` names it."""


@dataclass(frozen=True)
class Machines:
    """Nodes in a cluster."""

    cluster: str
    """Profile name or file, as in --cluster."""
    profile: ClusterProfile
    nodes: int
    routes: "RecordedRoutes | None" = None
    """Recorded expert loads to plan with; None: `Parameters.real_imbalance` is assumed."""

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.profile.tasks_per_node

    @property
    def chip(self) -> Chip | None:
        return self.profile.chip if self.profile.gpus_per_node and self.profile.gpu else None

    def compute_links(self) -> Links:
        """Return bandwidth and latency between the GPUs. Raises `UserError`: the profile lacks them."""
        try:
            return cluster.compute_links(self.profile, self.num_ranks)
        except UserError as e:
            raise UserError(f"--cluster {self.cluster}: {e}") from None

    @property
    def limit_bytes(self) -> int:
        """Usable bytes per GPU; 0: unknown."""
        return get_usable_bytes(self.chip) if self.chip else 0

    def with_nodes(self, nodes: int) -> "Machines":
        return replace(self, nodes=nodes)


def load_machines(name: str, nodes: int | None) -> Machines:
    """Load a cluster profile; `nodes` defaults to 1. Raises `UserError`: unknown profile or bad `nodes`."""
    number = 1 if nodes is None else nodes
    if not 1 <= number <= MAX_NODES:
        raise UserError(f"--nodes {number}: must be at least 1"
                        + (f" and at most {MAX_NODES:,}" if number > 1 else ""))
    return Machines(name, cluster.load_profile(name, needs_account=False), number)


@dataclass(frozen=True)
class RunStage:
    """A part of a run whose steps are alike: a phase in `data.phases`, or an entry in `extend.stages`."""

    name: str
    kind: str
    """phase, extension stage or mid-training stage."""
    config: RunConfig
    """The run's settings with a single phase."""
    steps: int
    tokens: int
    """Tokens in all steps, padding included."""

    @property
    def phase(self) -> PhaseConfig:
        return self.config.data.phases[0]

    @property
    def global_batch_size(self) -> int:
        """Samples per step after a batch-size ramp."""
        return self.phase.global_batch_size or self.config.train.global_batch_size

    def with_config(self, config: RunConfig) -> "RunStage":
        return replace(self, config=config)


def list_run_stages(config: RunConfig, num_ranks: int, *, micro_batch_set: bool = False) -> list[RunStage]:
    """Return a run's stages in order. `micro_batch_set`: the user or a search sets `train.micro_batch_size`;
    otherwise `extend` raises it for shorter samples."""
    if config.extend.stages:
        return [_build_extension_stage(config, stage, num_ranks, micro_batch_set)
                for stage in config.extend.stages]
    schedule = Schedule(config)
    starts = [*config.phase_starts(), config.num_steps()]  # first step of each phase, then the run's end
    tokens_before = [schedule.count_tokens(step - 1) if step else 0 for step in starts]
    return [RunStage(phase.name, PHASE, _select_phase(config, phase, keeps_ramp=i == 0),
                     starts[i + 1] - starts[i], tokens_before[i + 1] - tokens_before[i])
            for i, phase in enumerate(config.data.phases) if starts[i + 1] > starts[i]]


def group_stages(stages: Sequence[RunStage]) -> list[tuple[RunStage, list[RunStage]]]:
    """Group stages with equally expensive steps: the first stage per group, and the group."""
    groups: dict[tuple[int, int, int], list[RunStage]] = {}
    for stage in stages:
        # These values determine a step's seconds and bytes.
        key = stage.phase.seq_len, stage.global_batch_size, stage.config.train.micro_batch_size
        groups.setdefault(key, []).append(stage)
    return [(group[0], group) for group in groups.values()]


def _select_phase(config: RunConfig, phase: PhaseConfig, *, keeps_ramp: bool) -> RunConfig:
    """Return a run's settings for a single phase; only the first phase has a batch-size ramp."""
    train = config.train if keeps_ramp else replace(config.train, ramp_from_batch_size=0)
    return replace(config, data=replace(config.data, phases=(phase,)), train=train)


def _build_extension_stage(config: RunConfig, stage: ExtendStageConfig, num_ranks: int,
                           micro_batch_set: bool) -> RunStage:
    """Build an extension stage's most expensive case: its gate passes only after the last step, so all steps
    are trained."""
    size = stage.global_batch_size or config.train.global_batch_size
    steps = max(stage.max_steps, stage.steps or math.ceil(stage.tokens / (size * stage.seq_len))
                or config.train.steps or config.num_steps())
    train = replace(config.train, global_batch_size=size, ramp_from_batch_size=0)
    if not micro_batch_set:
        per_rank = max(1, size // max(1, num_ranks // max(1, config.parallel.ranks_per_replica)))
        # Micro-batches of short samples have as many tokens as the longest sample: equal memory.
        limit_tokens = config.train.micro_batch_size * config.data.max_seq_len()
        train = replace(train, micro_batch_size=find_micro_batch_size(limit_tokens, stage.seq_len, per_rank))
    tokens = steps * size * stage.seq_len
    phase = PhaseConfig(stage.name, tokens=tokens, seq_len=stage.seq_len, global_batch_size=size)
    model = replace(config.model, max_position_tokens=max(config.model.max_position_tokens, stage.seq_len))
    return RunStage(stage.name, KINDS[stage.kind], replace(
        config, model=model, train=train, data=replace(config.data, phases=(phase,))), steps, tokens)


@dataclass(frozen=True)
class Pricing:
    """Memory and time for stages on nodes with known GPUs."""

    machines: Machines
    _parts_cache: PartsCache = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_ranks(self) -> int:
        return self.machines.num_ranks

    @cached_property
    def limit_bytes(self) -> int:
        """Usable bytes per GPU."""
        return self.machines.limit_bytes

    @cached_property
    def chip(self) -> Chip:
        assert self.machines.chip is not None, self.machines.cluster
        return self.machines.chip

    @cached_property
    def links(self) -> Links:
        return self.machines.compute_links()

    def count_bytes(self, stage: RunStage) -> int:
        """Return the predicted bytes on the fullest GPU."""
        return find_fullest_stage(stage.config, self.num_ranks)[1].total

    def build_workload(self, stage: RunStage) -> Workload:
        """Build a step's workload; expert loads are `Machines.routes` or else `Parameters.real_imbalance`."""
        config, routes = stage.config, self.machines.routes
        imbalance = load_default_parameters().real_imbalance if config.model.num_moe_layers() else 1.0
        if routes is not None:
            imbalance = routes.compute_imbalance(config.parallel, config.model.num_layers)
        work = build_workload(config, stage.phase, self.num_ranks, self.chip, self.links, imbalance)
        if config.objective.name in PACKED and not config.extend.stages:
            work = replace(work, document_tokens=min(DOCUMENT_TOKENS, work.seq_len))
        return work

    def time_step(self, stage: RunStage) -> StepTime:
        return estimate_step(self.build_workload(stage), load_default_parameters(), self._parts_cache)

    def time_slow_host(self, stage: RunStage) -> StepTime:
        """Estimate a step with a host that takes `SLOW_HOST` times as long for launches."""
        return estimate_step(self.build_workload(stage), load_slow_host(), self._parts_cache)

    def compute_rank_s(self, stage: RunStage) -> float:
        """Return the stage's seconds with a slow host, plus a share of those with the fitted host."""
        slow_s, step_s = self.time_slow_host(stage).total_s, self.time_step(stage).total_s
        return (slow_s + FITTED_HOST_SHARE * step_s) * stage.steps

    def estimate_extra_layers(self, stage: RunStage) -> float:
        """Return the cost of head and prediction layers on the last pipeline stage, in layers."""
        return estimate_extra_layers(self.build_workload(stage), load_default_parameters())


def build_pricing(machines: Machines) -> Pricing | None:
    """Build the pricing; None: the cluster profile names no GPUs."""
    return Pricing(machines) if machines.chip else None


def refuse_precision(config: RunConfig, chip: Chip) -> None:
    """Refuse `train.fp8` on a chip whose tensor cores lack the format. Raises `UserError`: the format is
    missing; the message names the nearest precision that works."""
    precision = config.train.fp8
    unit = UNITS[PRECISIONS[precision]]
    if unit == "bf16":
        return
    try:
        chip.flops_per_s(unit)
        # Hopper multiplies in FP8 too, but without block scales; chips with FP4 have both.
        if precision == "mxfp8" and not chip.fp4_flops_per_s:
            chips = ", ".join(c.key for c in CHIPS.values() if c.fp4_flops_per_s)
            raise UserError(f"MXFP8 on {chip.name}: its tensor cores scale no blocks of 32 values, those of "
                            f"{chips} do")
    except UserError as e:
        works = "tensorwise" if chip.fp8_flops_per_s else "none"
        raise UserError(f"train.fp8 = {precision}: {e}; the nearest that works: "
                        f"--set train.fp8={works}") from None


def quote_stage(stage: RunStage, pricing: Pricing) -> Quote:
    """Predict a stage's memory, time and cost. Raises `UserError`: the chip has no tensor cores for
    the run's precision."""
    refuse_precision(stage.config, pricing.chip)
    pipeline_stage, account = find_fullest_stage(stage.config, pricing.num_ranks)
    work, step = pricing.build_workload(stage), pricing.time_step(stage)
    # the smaller steps of a batch-size ramp are assumed to be as fast per token
    train_s = stage.tokens / (step.tokens_per_s_per_gpu * pricing.num_ranks)
    gpu_hours = train_s / SECONDS_PER_HOUR * pricing.num_ranks
    price = find_price(pricing.machines.profile)
    return Quote(
        name=stage.name, kind=stage.kind, gpu=pricing.chip.name, num_gpus=pricing.num_ranks,
        tokens=stage.tokens, steps=stage.steps, seq_len=stage.phase.seq_len,
        global_batch_size=stage.global_batch_size, layout=choice_to_dict(get_current_choice(stage.config)),
        memory=QuotedMemory(account.components(), pricing.limit_bytes, pipeline_stage, account.on_host),
        seconds=step.components, bubble_share=step.bubble_s / step.total_s, imbalance=work.imbalance,
        tokens_per_s_per_gpu=step.tokens_per_s_per_gpu, tflops_per_gpu=step.tflops_per_gpu, mfu=step.mfu,
        hours=train_s / SECONDS_PER_HOUR, cost_usd=gpu_hours * price.typical,
        cost_range_usd=(gpu_hours * price.low, gpu_hours * price.high),
        notes=(f"Cost: {price.source}.", *_list_expert_notes(work, step, pricing.machines.routes),
               *_list_host_notes(stage, pricing), *_list_packing_notes(stage.config, work)))


@dataclass(frozen=True)
class GpuPrice:
    """Price of a GPU hour in USD."""

    low: float
    """Lowest published price; equal to `typical` for a price from the profile."""
    typical: float
    high: float
    source: str
    """The price and its source, as a clause."""


def find_price(profile: ClusterProfile) -> GpuPrice:
    """Return the profile's price of a GPU hour, or the published prices. Raises `UserError`: the profile does
    not name its GPUs."""
    if own := profile.price_per_gpu_hour:
        return GpuPrice(own, own, own, f"{own:.2f} USD for a GPU and hour, price_per_gpu_hour of the profile")
    price = profile.chip.price
    source = (f"{price.typical:.2f} USD for a GPU and hour, typical price of {price.date}, "
              f"{profile.chip.sources['price']}")
    return GpuPrice(price.low, price.typical, price.high, f"a guess: {source}" if price.guess else source)


def _list_expert_notes(work: Workload, step: StepTime, routes: "RecordedRoutes | None") -> list[str]:
    if not work.shape.num_moe_layers:
        return []
    seconds = estimate_router_s(work, load_default_parameters())
    source = f"as {routes.run} recorded" if routes else "which is assumed; --routes RUN reads a run's record"
    return [f"The busiest experts meet {work.imbalance:.2f} times as many tokens as the mean, {source}.",
            f"Routers take {seconds:.2g} s of a step, {seconds / step.total_s:.1%}, counted under dense and "
            "memory-bound."]


def _list_host_notes(stage: RunStage, pricing: Pricing) -> list[str]:
    """Return notes on speed with a slow host, and on speed with CUDA graphs of routers toggled."""
    slow = pricing.time_slow_host(stage)
    notes = [f"With a host {SLOW_HOST} times as slow (docs/plan.md), a step takes {slow.total_s:.1f} s, "
             f"MFU {slow.mfu:.1%}."]
    setting = "gpu.cuda_graphs=[]" if stage.config.gpu.cuda_graphs else GRAPHS
    other = stage.with_config(apply_settings(stage.config, [setting]))
    if other.config.model.num_moe_layers() and can_run(other.config, pricing.num_ranks, pricing.limit_bytes):
        slow = pricing.time_slow_host(other)
        notes.append(f"With {setting} the MFU is {pricing.time_step(other).mfu:.1%}, and {slow.mfu:.1%} with "
                     "the slow host; cuda_graphs in a profile allow graphs (docs/gpu.md).")
    return notes


def _list_packing_notes(config: RunConfig, work: Workload) -> list[str]:
    """Return the assumptions for packed conversations, and the parts without a price."""
    if not work.document_tokens:
        return []
    notes = [f"Documents of {work.document_tokens:,} tokens are assumed in rows of {work.seq_len:,}."]
    name = config.objective.name
    if name == "distill":
        notes.append("The teacher's forward passes and output head are not priced.")
    elif name == "preference" and config.preference.method in REFERENCE_METHODS:
        notes.append("The forward passes of the reference are not priced: about a quarter of these hours.")
    return notes
