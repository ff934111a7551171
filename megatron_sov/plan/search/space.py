"""The layouts that a search looks at: every combination of the sizes that suit a model and its cluster."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_sov.model.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.plan.calibration.fitting import MAX_TP, changes

LEAST_GAIN = 0.01
"""Share by which the slowest stage has to become faster than with equal stages."""
MOST_OF_A_RUN = 4 / 3
"""Longest run of an interleaved pipeline, the head counted in, in units of their mean: the runs of a stage
take turns with those of others, which wait for longer ones; up to here no more than a hundredth of a step
(`tests/plan/test_search.py` plays the schedule)."""
MAX_CP = 64
"""Largest context parallel size that is looked at."""
MIN_LOCAL_TOKENS = 2048
"""Fewest tokens of a row that context parallelism leaves a process with: shorter rows fit without it."""
VPP = (1, 2, 4)
"""Runs of layers on a pipeline stage: beyond them the bubble is small and messages are many."""
MIN_STAGE_LAYERS = 2
"""Fewest layers of a stage, on average, where their number does not divide by that of the stages."""
LAYOUT = "parallel.pipeline_layout"
MICRO_BATCH_SIZES = (1, 2, 4, 8)
AXES = ("tp", "pp", "vpp", "cp", "ep", "etp")
"""Sizes of `parallel` that layouts differ in."""
Recompute = tuple[bool | Literal["selective"], tuple[str, ...]]
"""`train.recompute` and `gpu.recompute_modules`."""


# Uneven pipelines: the last stage, which has the output head and prediction layers beside its layers, gets
# fewer of them.


def uneven(num_layers: int, pp: int, vpp: int, beside: float) -> tuple[int, ...]:
    """Return `parallel.pipeline_layout` with the fastest slowest stage; empty: equal stages are as fast, or
    there are too few layers for runs that are nearly as long.

    Stages that have a layer more than others come late: fewer micro-batches wait on them.

    Args:
        num_layers: of the trunk.
        pp: pipeline stages, 2 at least.
        vpp: runs of each.
        beside: what the last stage computes beside its layers, in units of a layer.
    """
    # Every run has a layer at least, so this is what is left for the last stage.
    most_on_last = num_layers - (pp - 1) * vpp
    if most_on_last < vpp:
        return ()

    def slowest(last: int) -> float:
        return max(-(-(num_layers - last) // (pp - 1)), last + beside)

    # Of equally fast splits the one with most layers on the last stage: fewest micro-batches wait there.
    last = min(range(vpp, most_on_last + 1), key=lambda layers: (slowest(layers), -layers))
    if num_layers % (pp * vpp) == 0 and slowest(last) > (1 - LEAST_GAIN) * slowest(num_layers // pp):
        return ()
    stages = [_cut(total, vpp) for total in _cut(num_layers - last, pp - 1)]
    stages.append(_before_head(last, vpp, round(beside)))
    longest = max(max(map(max, stages)), stages[-1][-1] + beside)
    if vpp > 1 and longest * pp * vpp > MOST_OF_A_RUN * (num_layers + beside):
        return ()
    # In the order of the model: run 0 of every stage, then run 1, as `parallel.pipeline_layout` has it.
    return tuple(stage[run] for run in range(vpp) for stage in stages)


def _before_head(layers: int, runs: int, beside: int) -> list[int]:
    """Return the runs of the last stage, of which the last has the head."""
    if runs == 1:
        return [layers]
    on_last = max(1, _cut(layers + beside, runs)[-1] - beside)
    return [*_cut(layers - on_last, runs - 1), on_last]


def _cut(total: int, parts: int) -> list[int]:
    """Return a number in parts that differ by 1 at most, the larger ones last."""
    each, more = divmod(total, parts)
    return [each] * (parts - more) + [each + 1] * more


@dataclass(frozen=True)
class LayoutSpace:
    """Values of each setting; what a search looks at is their product."""

    tp: tuple[int, ...]
    pp: tuple[int, ...]
    vpp: tuple[int, ...]
    """Where pp > 1; the values that divide a stage's layers."""
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    etp: tuple[int, ...]
    """Either whole experts or cut as all else is: 1, tp, and what the run itself has."""
    zero1: tuple[bool, ...]
    micro_batch_size: tuple[int, ...]
    recompute: tuple[Recompute, ...]
    uneven: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """Pipelines of other than equal stages: pp, vpp, `parallel.pipeline_layout`."""
    expert_overlap: tuple[Literal["none", "micro_batches", "weight_gradients"], ...] = ("none",)

    @property
    def variants(self) -> int:
        """Layouts that differ in what does not touch `parallel`."""
        return len(self.micro_batch_size) * len(self.recompute)


@dataclass(frozen=True)
class LayoutChoice:
    parallel: ParallelConfig
    micro_batch_size: int
    recompute: Recompute

    def of(self, config: RunConfig) -> RunConfig:
        recompute, modules = self.recompute
        gpu: Any = {"recompute_modules": modules}
        return replace(config, parallel=self.parallel, gpu=replace(config.gpu, **gpu), train=replace(
            config.train, micro_batch_size=self.micro_batch_size, recompute=recompute))

    def settings(self, config: RunConfig) -> list[str]:
        """Return what makes it of a run's own settings, as --set takes it; the micro-batch is always there,
        since `extend` chooses one where nobody has."""
        found = changes(config.parallel, self.parallel)
        if self.micro_batch_size != config.train.micro_batch_size or config.extend.stages:
            found.append(f"train.micro_batch_size={self.micro_batch_size}")
        recompute, modules = self.recompute
        if recompute != config.train.recompute:
            found.append(f"train.recompute={str(recompute).lower()}")
        if modules != config.gpu.recompute_modules:
            found.append(f"gpu.recompute_modules={json.dumps(modules)}")
        return found


def space_of(config: RunConfig, num_ranks: int, domain: int, fixed: Collection[str] = (),
             beside: Collection[float] = ()) -> LayoutSpace:
    """Return what is looked at for a run, its own layout among it.

    ZeRO-1 is on: it needs less memory and sends the same bytes; a run without it is looked at both ways.

    Args:
        config: the run; dispatcher, precision and the optimizer stay its own, and so do overlaps but that of
            experts' messages.
        num_ranks: processes.
        domain: GPUs that NVLink joins, which tensor parallelism stays inside.
        fixed: settings that stay as the run has them, e.g. parallel.tp.
        beside: what the last pipeline stage computes beside its layers, in units of a layer; for each of them
            uneven pipelines are looked at.
    """
    model, own = config.model, config.parallel
    longest = config.data.max_seq_len()
    experts = model.num_moe_layers() > 0
    # Tensor parallelism sends messages in every layer, so it stays inside of NVLink.
    tp = _powers(min(MAX_TP, domain, num_ranks))
    found = LayoutSpace(
        tp=_with(tp, own.tp), pp=_with([d for d in _divisors(model.num_layers) if d <= num_ranks], own.pp),
        vpp=_with(VPP, own.vpp),
        cp=_with([c for c in _powers(min(MAX_CP, num_ranks)) if c == 1 or longest // c >= MIN_LOCAL_TOKENS],
                 own.cp),
        ep=_with([d for d in _divisors(model.num_experts) if d <= num_ranks], own.ep) if experts else (1,),
        etp=_with(tp, own.etp) if experts else (1,), zero1=(True,) if own.zero1 else (False, True),
        micro_batch_size=_with(MICRO_BATCH_SIZES, config.train.micro_batch_size),
        recompute=_recompute(config),
        expert_overlap=("none", "micro_batches") if own.expert_overlap == "none" else (own.expert_overlap,))
    choice = own_choice(config)
    stays: dict[str, Any] = {name: (getattr(own, name),) for name in (*AXES, "zero1", "expert_overlap")
                             if f"parallel.{name}" in fixed}
    if "train.micro_batch_size" in fixed:
        stays["micro_batch_size"] = (choice.micro_batch_size,)
    if {"train.recompute", "gpu.recompute_modules"} & set(fixed):
        stays["recompute"] = (choice.recompute,)
    found = replace(found, **stays)
    return replace(found, uneven=_uneven(config, found, num_ranks, fixed, beside))


def _uneven(config: RunConfig, space: LayoutSpace, num_ranks: int, fixed: Collection[str],
            beside: Collection[float]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Return the run's own uneven pipeline, and those that are worth a look; equal stages need numbers that
    divide the layers, which these do not."""
    own, layers = config.parallel, config.model.num_layers
    found = [(own.pp, own.vpp, own.pipeline_layout)] if own.pipeline_layout else []
    if LAYOUT in fixed:
        return tuple(found)
    more = [] if "parallel.pp" in fixed else [p for p in _powers(num_ranks) if MIN_STAGE_LAYERS * p <= layers]
    found += [(pp, vpp, proposed) for pp in sorted({*space.pp, *more}) for vpp in space.vpp for head in beside
              if pp > 1 and (proposed := uneven(layers, pp, vpp, head))]
    return tuple(dict.fromkeys(found))


def _recompute(config: RunConfig) -> tuple[Recompute, ...]:
    """Return nothing, everything, and the parts whose recomputation is cheap for what it saves."""
    own: Recompute = (config.train.recompute, config.gpu.recompute_modules)
    found: list[Recompute] = [(False, ()), (True, ()), *(("selective", modules)
                                                         for modules in _modules(config.model))]
    if config.gpu.offload_modules:  # which needs stored activations
        found.remove((True, ()))
    return tuple(dict.fromkeys([*found, own]))


def _modules(model: ModelConfig) -> list[tuple[str, ...]]:
    if model.num_moe_layers():
        return [("layernorm", "moe_act"), ("moe",)]
    return [("mlp",), ("core_attn", "mlp")]


def layouts(config: RunConfig, space: LayoutSpace) -> Iterator[ParallelConfig]:
    """Yield the layouts of a space; some break a rule.

    Sequence parallelism goes with tensor parallelism: it sends the same bytes and needs less memory.
    """
    own = config.parallel
    for (pp, vpp, stages), tp, cp, ep, etp, zero1, overlap in itertools.product(
            (*_equal(config, space), *space.uneven), space.tp, space.cp, space.ep, space.etp, space.zero1,
            space.expert_overlap):
        # Experts are whole, or cut as all else is; other sizes would multiply the space.
        # Most layouts cannot hide messages, and are not looked at twice.
        hides = overlap != "micro_batches" or (1 < ep < config.model.num_experts and (pp == 1 or vpp > 1))
        if etp in (1, tp, own.etp) and (hides or overlap == own.expert_overlap):
            yield replace(own, tp=tp, sp=tp > 1, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, zero1=zero1,
                          overlap_param_gather=own.overlap_param_gather and zero1, pipeline_layout=stages,
                          expert_overlap=overlap)


def _equal(config: RunConfig, space: LayoutSpace) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(pp, vpp, ()) for pp in space.pp for vpp in space.vpp
            if vpp == 1 or (pp > 1 and config.model.num_layers // pp % vpp == 0)]


def choices(config: RunConfig, space: LayoutSpace) -> Iterator[LayoutChoice]:
    for parallel in layouts(config, space):
        for size, recompute in itertools.product(space.micro_batch_size, space.recompute):
            yield LayoutChoice(parallel, size, recompute)


def own_choice(config: RunConfig) -> LayoutChoice:
    return LayoutChoice(config.parallel, config.train.micro_batch_size,
                        (config.train.recompute, config.gpu.recompute_modules))


def as_dict(choice: LayoutChoice) -> dict[str, Any]:
    """Return the settings that matter of a layout, as a `Quote` has them."""
    p = dataclasses.asdict(choice.parallel)
    named = ("tp", "sp", "pp", "vpp", "cp", "ep", "etp", "zero1", "expert_dispatcher", "expert_overlap",
             "pipeline_layout")
    return ({name: list(p[name]) if name == "pipeline_layout" else p[name] for name in named}
            | {"micro_batch_size": choice.micro_batch_size, "recompute": choice.recompute[0],
               "recompute_modules": list(choice.recompute[1])})


def _with(values: Iterable[int], own: int) -> tuple[int, ...]:
    return tuple(sorted({*values, own}))


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())] if most >= 1 else [1]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
