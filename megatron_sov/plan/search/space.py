"""The search space for layouts: parallel sizes, micro-batch sizes and recomputation that suit a run."""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_sov.model.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.model.config.layout import AXES
from megatron_sov.plan.footprint.gpu_capacity import MAX_TP, list_changed_settings, list_divisors

LEAST_GAIN = 0.01
"""Smallest relative gain on the slowest stage for which uneven stages replace equal stages."""
MAX_RELATIVE_CHUNK = 4 / 3
"""Longest chunk in an interleaved pipeline, the head included, relative to the mean chunk. Longer chunks
would delay other stages by more than 1 % of a step (`tests/plan/test_search.py` simulates the schedule)."""
MAX_CP = 64
"""Largest context parallel size."""
MIN_LOCAL_TOKENS = 2048
"""Fewest tokens per process and sample under context parallelism: shorter samples fit without it."""
VPP = (1, 2, 4)
"""Chunks per pipeline stage: with more chunks the bubble hardly shrinks, and messages multiply."""
MIN_STAGE_LAYERS = 2
"""Fewest layers per stage, on average, for uneven pipelines."""
LAYOUT = "parallel.pipeline_layout"
MICRO_BATCH_SIZES = (1, 2, 4, 8)
CHOICE_FIELDS = ("tp", "sp", "pp", "vpp", "cp", "ep", "etp", "zero1", "expert_dispatcher", "expert_overlap",
                 "pipeline_layout")
"""Fields in `parallel` that a layout's JSON contains."""
Recompute = tuple[bool | Literal["selective"], tuple[str, ...]]
"""`train.recompute` and `gpu.recompute_modules`."""


@dataclass(frozen=True)
class LayoutSpace:
    """Values per setting; the search space is their product."""

    tp: tuple[int, ...]
    pp: tuple[int, ...]
    vpp: tuple[int, ...]
    """Used if pp > 1 and the value divides a stage's layers."""
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    etp: tuple[int, ...]
    """`iter_layouts` uses 1, `tp` and the run's value."""
    zero1: tuple[bool, ...]
    micro_batch_size: tuple[int, ...]
    recompute: tuple[Recompute, ...]
    uneven: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """Uneven pipelines: pp, vpp and `parallel.pipeline_layout`."""
    expert_overlap: tuple[Literal["none", "micro_batches", "weight_gradients"], ...] = ("none",)

    @property
    def variants(self) -> int:
        """Layouts with equal `parallel` settings."""
        return len(self.micro_batch_size) * len(self.recompute)


@dataclass(frozen=True)
class LayoutChoice:
    """A point in the search space."""

    parallel: ParallelConfig
    micro_batch_size: int
    recompute: Recompute

    def apply_to(self, config: RunConfig) -> RunConfig:
        recompute, modules = self.recompute
        gpu: Any = {"recompute_modules": modules}
        train = replace(config.train, micro_batch_size=self.micro_batch_size, recompute=recompute)
        return replace(config, parallel=self.parallel, gpu=replace(config.gpu, **gpu), train=train)

    def list_settings(self, config: RunConfig) -> list[str]:
        """Return the changes from `config` to the layout, for --set; for `extend` always with the micro-batch
        size, because `extend` otherwise chooses it."""
        settings = list_changed_settings(config.parallel, self.parallel)
        if self.micro_batch_size != config.train.micro_batch_size or config.extend.stages:
            settings.append(f"train.micro_batch_size={self.micro_batch_size}")
        recompute, modules = self.recompute
        if recompute != config.train.recompute:
            settings.append(f"train.recompute={str(recompute).lower()}")
        if modules != config.gpu.recompute_modules:
            settings.append(f"gpu.recompute_modules={json.dumps(modules)}")
        return settings


def build_space(config: RunConfig, num_ranks: int, domain: int, fixed: Collection[str] = (),
                extra_layers: Collection[float] = ()) -> LayoutSpace:
    """Build the search space for a run; the run's layout is included. Dispatcher, precision, optimizer, all
    overlaps except the experts', and `fixed` settings (e.g. parallel.tp) keep the run's value.

    ZeRO-1 is on, because it saves memory and sends the same bytes; runs without it are tried both ways.
    `domain`: GPUs per NVLink domain, the limit for tensor parallelism. `extra_layers`: cost of the head and
    prediction layers on the last pipeline stage, in layers; each value adds uneven pipelines.
    """
    model, current = config.model, config.parallel
    longest = config.data.max_seq_len()
    has_experts = model.num_moe_layers() > 0
    # Tensor parallelism sends messages in every layer: stay inside NVLink.
    tp = _list_powers(min(MAX_TP, domain, num_ranks))
    pp = [size for size in list_divisors(model.num_layers) if size <= num_ranks]
    cp = [size for size in _list_powers(min(MAX_CP, num_ranks))
          if size == 1 or longest // size >= MIN_LOCAL_TOKENS]
    ep = [size for size in list_divisors(model.num_experts) if size <= num_ranks]
    space = LayoutSpace(
        tp=_include(tp, current.tp), pp=_include(pp, current.pp), vpp=_include(VPP, current.vpp),
        cp=_include(cp, current.cp), ep=_include(ep, current.ep) if has_experts else (1,),
        etp=_include(tp, current.etp) if has_experts else (1,),
        zero1=(True,) if current.zero1 else (False, True),
        micro_batch_size=_include(MICRO_BATCH_SIZES, config.train.micro_batch_size),
        recompute=_list_recompute(config),
        expert_overlap=(current.expert_overlap,) if current.expert_overlap == "weight_gradients"
        else ("none", "micro_batches"))
    choice = get_current_choice(config)
    fixed_values: dict[str, Any] = {
        name: (getattr(current, name),) for name in (*AXES, "zero1", "expert_overlap")
        if f"parallel.{name}" in fixed}
    if "train.micro_batch_size" in fixed:
        fixed_values["micro_batch_size"] = (choice.micro_batch_size,)
    if {"train.recompute", "gpu.recompute_modules"} & set(fixed):
        fixed_values["recompute"] = (choice.recompute,)
    space = replace(space, **fixed_values)
    return replace(space, uneven=_list_uneven(config, space, num_ranks, fixed, extra_layers))


def _list_uneven(config: RunConfig, space: LayoutSpace, num_ranks: int, fixed: Collection[str],
                 extra_layers: Collection[float]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Return the run's uneven pipeline, and uneven pipelines with a faster last stage; unlike equal
    stages, their number need not divide the layers."""
    current, layers = config.parallel, config.model.num_layers
    uneven = [(current.pp, current.vpp, current.pipeline_layout)] if current.pipeline_layout else []
    if LAYOUT in fixed:
        return tuple(uneven)
    sizes = {*space.pp}
    if "parallel.pp" not in fixed:
        sizes |= {size for size in _list_powers(num_ranks) if MIN_STAGE_LAYERS * size <= layers}
    for pp, vpp, extra in itertools.product(sorted(sizes), space.vpp, extra_layers):
        if pp > 1 and (split := find_uneven_split(layers, pp, vpp, extra)):
            uneven.append((pp, vpp, split))
    return tuple(dict.fromkeys(uneven))


def find_uneven_split(num_layers: int, pp: int, vpp: int, extra_layers: float) -> tuple[int, ...]:
    """Return the `parallel.pipeline_layout` with the fastest slowest stage: the last stage, with the head and
    prediction layers, gets fewer layers. Empty: equal stages are as fast, or chunk lengths differ too much.

    Stages with an additional layer come late, because fewer micro-batches wait on them.

    Args:
        num_layers: layers of the trunk.
        pp: pipeline stages, at least 2.
        vpp: chunks per stage.
        extra_layers: cost of the head and prediction layers on the last stage, in units of a layer.
    """
    # Each chunk has at least one layer, which limits the last stage.
    most_on_last = num_layers - (pp - 1) * vpp
    if most_on_last < vpp:
        return ()

    def get_slowest(last: int) -> float:
        return max(-(-(num_layers - last) // (pp - 1)), last + extra_layers)

    # Of equally fast splits, choose most layers on the last stage: fewest micro-batches wait there.
    last = min(range(vpp, most_on_last + 1), key=lambda layers: (get_slowest(layers), -layers))
    if num_layers % (pp * vpp) == 0 and get_slowest(last) > (1 - LEAST_GAIN) * get_slowest(num_layers // pp):
        return ()
    stages = [_split_evenly(total, vpp) for total in _split_evenly(num_layers - last, pp - 1)]
    stages.append(_split_last_stage(last, vpp, round(extra_layers)))
    longest = max(max(map(max, stages)), stages[-1][-1] + extra_layers)
    if vpp > 1 and longest * pp * vpp > MAX_RELATIVE_CHUNK * (num_layers + extra_layers):
        return ()
    # `parallel.pipeline_layout` lists chunk 0 of every stage, then chunk 1.
    return tuple(stage[chunk] for chunk in range(vpp) for stage in stages)


def _split_last_stage(layers: int, vpp: int, extra_layers: int) -> list[int]:
    """Split the last stage's layers into chunks; the head is in the last chunk."""
    if vpp == 1:
        return [layers]
    in_last = max(1, _split_evenly(layers + extra_layers, vpp)[-1] - extra_layers)
    return [*_split_evenly(layers - in_last, vpp - 1), in_last]


def _split_evenly(total: int, parts: int) -> list[int]:
    """Split a number into parts that differ by at most 1, in increasing order."""
    size, rest = divmod(total, parts)
    return [size] * (parts - rest) + [size + 1] * rest


def _list_recompute(config: RunConfig) -> tuple[Recompute, ...]:
    """Return no, full and cheap selective recomputation, and the run's current setting."""
    current: Recompute = (config.train.recompute, config.gpu.recompute_modules)
    options: list[Recompute] = [(False, ())]
    if not config.gpu.offload_modules:  # offloading needs stored activations
        options.append((True, ()))
    options += [("selective", modules) for modules in _list_modules(config.model)]
    return tuple(dict.fromkeys([*options, current]))


def _list_modules(model: ModelConfig) -> list[tuple[str, ...]]:
    if model.num_moe_layers():
        return [("layernorm", "moe_act"), ("moe",)]
    return [("mlp",), ("core_attn", "mlp")]


def iter_layouts(config: RunConfig, space: LayoutSpace) -> Iterator[ParallelConfig]:
    """Yield the `parallel` settings in a space; some violate a rule.

    Sequence parallelism accompanies tensor parallelism: it sends the same bytes and needs less memory.
    """
    current = config.parallel
    for (pp, vpp, stages), tp, cp, ep, etp, zero1, overlap in itertools.product(
            (*_list_equal(config, space), *space.uneven), space.tp, space.cp, space.ep, space.etp,
            space.zero1, space.expert_overlap):
        # Experts are whole or split like dense layers: further sizes would multiply the space.
        # Most layouts cannot overlap the experts' messages, and are tried once.
        can_overlap = 1 < ep < config.model.num_experts and (pp == 1 or vpp > 1)
        is_useful = overlap != "micro_batches" or can_overlap or overlap == current.expert_overlap
        if etp in (1, tp, current.etp) and is_useful:
            yield replace(current, tp=tp, sp=tp > 1, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, zero1=zero1,
                          overlap_param_gather=current.overlap_param_gather and zero1, pipeline_layout=stages,
                          expert_overlap=overlap)


def _list_equal(config: RunConfig, space: LayoutSpace) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(pp, vpp, ()) for pp in space.pp for vpp in space.vpp
            if vpp == 1 or (pp > 1 and config.model.num_layers // pp % vpp == 0)]


def iter_choices(config: RunConfig, space: LayoutSpace) -> Iterator[LayoutChoice]:
    for parallel in iter_layouts(config, space):
        for size, recompute in itertools.product(space.micro_batch_size, space.recompute):
            yield LayoutChoice(parallel, size, recompute)


def get_current_choice(config: RunConfig) -> LayoutChoice:
    return LayoutChoice(config.parallel, config.train.micro_batch_size,
                        (config.train.recompute, config.gpu.recompute_modules))


def choice_to_dict(choice: LayoutChoice) -> dict[str, Any]:
    """Return a layout's settings by name, as in `plan --json`."""
    parallel = dataclasses.asdict(choice.parallel)
    values = {name: parallel[name] for name in CHOICE_FIELDS}
    values["pipeline_layout"] = list(values["pipeline_layout"])
    return values | {"micro_batch_size": choice.micro_batch_size, "recompute": choice.recompute[0],
                     "recompute_modules": list(choice.recompute[1])}


def _include(values: Iterable[int], current: int) -> tuple[int, ...]:
    return tuple(sorted({*values, current}))


def _list_powers(limit: int) -> list[int]:
    """Return 1, 2, 4, ... up to `limit`, at least 1."""
    return [1 << i for i in range(limit.bit_length())] if limit >= 1 else [1]
