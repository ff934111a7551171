"""The recommended layout of a recipe on so many GPUs of a kind."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.calibration.fitting import fits, fullest
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.units import GIB

# Layouts of large recipes are what `plan --sweep` finds on 512 and 1,024 GPUs, of pretraining also on the
# 480 of Solar Open's report: of the layouts within 2 % of the fastest one that leaves memory; behind them are
# some that recompute every layer, which fit where those do not.  None has been timed.  Which one serves
# depends on the number of processes: a global batch has to divide among the data-parallel ones (13,440
# samples do over 480 processes and, where 4 compute a row together, over 512; over 1,024 they need 8), with
# `parallel.vpp` among them and the stages.  Those for HybridEP come first, those that need nothing installed
# next (docs/layouts.md says what they switch on).

Layout = tuple[str, ...]
"""Settings as --set takes them: of `parallel`, the micro-batch, what is recomputed, and the attention of rows
that are cut."""

_SELECTIVE: Layout = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
_EXPERTS_AGAIN: Layout = ("train.recompute=selective", 'gpu.recompute_modules=["moe"]')
_STORED: Layout = ("train.recompute=false",)
_HALVES: Layout = ("parallel.tp=2", "parallel.sp=true")
_NODE: Layout = ("parallel.ep=8",)
"""Experts are exchanged inside a node."""
_FOUR_STAGES: Layout = ("parallel.pp=4", "parallel.pipeline_layout=[12, 12, 13, 11]")
_FOUR_LIGHTER: Layout = ("parallel.pp=4", "parallel.pipeline_layout=[12, 13, 13, 10]")
_SIX_STAGES: Layout = ("parallel.pp=6", "parallel.pipeline_layout=[8, 8, 8, 8, 9, 7]")
_EIGHT_STAGES: Layout = ("parallel.pp=8", "parallel.pipeline_layout=[6, 6, 6, 6, 6, 6, 7, 5]")
_EIGHT_LIGHTER: Layout = ("parallel.pp=8", "parallel.pipeline_layout=[6, 6, 6, 6, 6, 7, 7, 4]")
"""Where the last stage weighs more beside layers: with prediction layers, or where messages cost little."""
_SIXTEEN_RUNS = "parallel.pipeline_layout=[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 1]"
"""Of models whose last stage has prediction layers."""
_EIGHT_RUNS = "parallel.pipeline_layout=[6, 6, 6, 6, 6, 6, 7, 5]"
_TWELVE_RUNS = "parallel.pipeline_layout=[4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 3]"
_DEEP_RUNS = "parallel.pipeline_layout=[5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 1]"
"""Of 78 layers before a prediction layer that is applied four times, each time with the head."""
_DEEP_HALVES: Layout = (*_HALVES, "parallel.pp=16", *_NODE, _DEEP_RUNS)
_DEEP_STAGES: Layout = ("parallel.tp=1", "parallel.sp=false", "parallel.pp=8", "parallel.vpp=2", *_NODE,
                        _DEEP_RUNS)
_TWO_ROWS: Layout = ("train.micro_batch_size=2",)
_PASSES: Layout = ("parallel.expert_overlap=micro_batches",)
"""Tokens travel to experts behind another micro-batch."""
_HYBRID: Layout = ("parallel.expert_dispatcher=hybridep",)
"""Kernels that have to be installed; a layout behind it is without."""
_WHOLE_ROWS: Layout = ("gpu.attention=fused",)
"""Of rows that are cut each process attends over the whole row, for its share of the heads, by cuDNN."""
_HYBRID_STAGES: Layout = ("parallel.pp=4", "parallel.vpp=4", *_NODE)
_QUARTERS: Layout = ("parallel.tp=4", "parallel.sp=true")

_ZERO1: Layout = ("parallel.zero1=true",)
_SMALL: dict[str, tuple[Layout, ...]] = dict.fromkeys(("h100", "h200", "b200"), (_ZERO1, (*_ZERO1, *_HALVES)))
_SOLAR: tuple[Layout, ...] = ((*_EIGHT_STAGES, *_SELECTIVE), ("parallel.pp=4",), ("parallel.pp=8",))
_SOLAR_MID: tuple[Layout, ...] = (("parallel.pp=2", "parallel.cp=8", *_STORED, *_WHOLE_ROWS),
                                  ("parallel.pp=4", "parallel.cp=8", *_STORED, *_WHOLE_ROWS),
                                  ("parallel.pp=4", "parallel.cp=4", *_WHOLE_ROWS),
                                  ("parallel.pp=4", "parallel.cp=8", *_WHOLE_ROWS))

RECOMMENDED: dict[str, dict[str, tuple[Layout, ...]]] = {
    "solar-open-102b": {
        "h100": ((*_HALVES, "parallel.pp=3", "parallel.vpp=4", "parallel.ep=32", *_TWO_ROWS, *_SELECTIVE,
                  *_PASSES, *_HYBRID),
                 (*_FOUR_LIGHTER, "parallel.ep=16", *_SELECTIVE, *_HYBRID),
                 (*_EIGHT_LIGHTER, *_SELECTIVE, *_HYBRID), (*_SIX_STAGES, *_SELECTIVE), *_SOLAR),
        "h200": ((*_FOUR_LIGHTER, *_TWO_ROWS, *_SELECTIVE, *_HYBRID),
                 (*_EIGHT_LIGHTER, *_TWO_ROWS, *_SELECTIVE, *_HYBRID),
                 (*_EIGHT_LIGHTER, *_SELECTIVE, *_HYBRID),
                 ("parallel.pp=4", "parallel.vpp=4", _SIXTEEN_RUNS, *_SELECTIVE, *_PASSES),
                 (*_FOUR_STAGES, *_SELECTIVE), *_SOLAR),
        "b200": (("parallel.pp=2", "parallel.vpp=4", "parallel.ep=16", _EIGHT_RUNS, *_TWO_ROWS, *_SELECTIVE,
                  *_PASSES, *_HYBRID),
                 (*_EIGHT_LIGHTER, *_TWO_ROWS, *_SELECTIVE, *_HYBRID),
                 (*_EIGHT_LIGHTER, *_SELECTIVE, *_HYBRID),
                 ("parallel.pp=3", "parallel.vpp=4", _TWELVE_RUNS, *_TWO_ROWS, *_SELECTIVE, *_PASSES),
                 ("parallel.pp=2", "parallel.pipeline_layout=[25, 23]", *_TWO_ROWS, *_SELECTIVE),
                 (*_EIGHT_STAGES, *_TWO_ROWS, *_SELECTIVE), *_SOLAR)},
    "solar-open-102b-mid": {
        "h100": ((*_HALVES, *_FOUR_STAGES, "parallel.cp=4", *_SELECTIVE, *_WHOLE_ROWS), *_SOLAR_MID[2:]),
        "h200": _SOLAR_MID, "b200": _SOLAR_MID},
    "solar-open-102b-extend": {
        "h100": (("parallel.pp=4", "parallel.vpp=4", *_NODE, *_SELECTIVE, *_WHOLE_ROWS), _WHOLE_ROWS),
        "h200": (("parallel.tp=2", "parallel.pp=4", "parallel.vpp=4", *_NODE, *_SELECTIVE, *_WHOLE_ROWS),
                 _WHOLE_ROWS),
        "b200": (("parallel.tp=1", "parallel.sp=false", "parallel.pp=2", "parallel.vpp=4", *_NODE,
                  *_EXPERTS_AGAIN, *_WHOLE_ROWS),
                 ("parallel.tp=2", "parallel.pp=2", "parallel.cp=4", *_NODE, *_EXPERTS_AGAIN, *_WHOLE_ROWS),
                 ("parallel.tp=2", "parallel.pp=2", *_NODE, *_SELECTIVE, *_WHOLE_ROWS), _WHOLE_ROWS)},
    "k-exaone-236b": {
        "h100": ((*_QUARTERS, "parallel.pp=2", "parallel.vpp=4", "parallel.ep=64", *_SELECTIVE, *_PASSES,
                  *_HYBRID),
                 (*_HALVES, "parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", "parallel.ep=32", *_SELECTIVE,
                  *_PASSES, *_WHOLE_ROWS),
                 (*_EIGHT_LIGHTER, *_NODE, "parallel.cp=4", *_SELECTIVE, *_WHOLE_ROWS),
                 ("parallel.pp=8", *_NODE), ("parallel.pp=4", "parallel.ep=16")),
        "h200": ((*_HALVES, "parallel.pp=2", "parallel.vpp=4", "parallel.ep=64",
                  "parallel.pipeline_layout=[6, 6, 6, 7, 7, 7, 7, 2]", *_SELECTIVE, *_PASSES, *_HYBRID),
                 (*_HALVES, "parallel.pp=4", "parallel.vpp=4", _SIXTEEN_RUNS, *_SELECTIVE, *_PASSES),
                 (*_HALVES, "parallel.pp=4", "parallel.pipeline_layout=[13, 13, 13, 9]", *_NODE, *_SELECTIVE),
                 ("parallel.pp=4", *_NODE)),
        "b200": ((*_HALVES, "parallel.pp=2", "parallel.vpp=4", "parallel.ep=32", *_STORED, *_PASSES,
                  *_HYBRID),
                 ("parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", *_NODE,
                  _SIXTEEN_RUNS, *_SELECTIVE, *_PASSES, *_WHOLE_ROWS),
                 ("parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", *_NODE, _SIXTEEN_RUNS, *_SELECTIVE,
                  *_WHOLE_ROWS),
                 ("parallel.pp=2", *_NODE), ("parallel.pp=4", *_NODE))},
    "k-exaone-236b-extend": {
        "h100": (("parallel.tp=2", "parallel.pp=8", "parallel.vpp=2", _SIXTEEN_RUNS, *_NODE, *_WHOLE_ROWS),
                 _WHOLE_ROWS),
        "h200": (("parallel.tp=2", "parallel.pp=4", "parallel.vpp=4", _SIXTEEN_RUNS, *_NODE, "parallel.cp=4",
                  *_WHOLE_ROWS), _WHOLE_ROWS),
        "b200": (("parallel.tp=4", "parallel.pp=2", "parallel.vpp=4", *_NODE, "parallel.cp=4",
                  _EIGHT_RUNS, *_TWO_ROWS, *_WHOLE_ROWS),
                 ("parallel.tp=4", "parallel.pp=4", *_NODE, *_WHOLE_ROWS), _WHOLE_ROWS)},
    "k-exaone2-750b": {"h100": (_DEEP_HALVES,), "h200": (_DEEP_STAGES, _DEEP_HALVES),
                       "b200": (_DEEP_STAGES, _DEEP_HALVES)},
    "solar-open2-250b": {
        "h100": ((*_HALVES, "parallel.pp=8", "parallel.vpp=2", *_NODE, *_TWO_ROWS),),
        "h200": (_HYBRID_STAGES,), "b200": ((*_HYBRID_STAGES, *_TWO_ROWS),)},
    **dict.fromkeys(("qwen2-1.5b", "qwen3-4b", "qwen3-4b-2507", "qwen3-8b", "qwen3-moe-30b",
                     "qwen3-30b-a3b-2507", "typhoon-s-8b", "vibethinker-1.5b"),
                    _SMALL),
    # with a teacher of 30 B beside
    "typhoon-s-8b-opd": dict.fromkeys(("h100", "h200", "b200"), (_ZERO1, (*_ZERO1, "parallel.pp=2"))),
}
"""Recipe -> kind of GPU (`clusters.chips.CHIPS`) -> layouts."""


SHOWN_RANKS = (8, 64, 480, 512, 1024)
"""Numbers of processes that a table of layouts shows."""
OF_LAYOUT = ("parallel.", "train.micro_batch_size=", "train.recompute=", "gpu.recompute_modules=")
"""How settings begin that make a layout one's own."""
DISPATCHER = "parallel.expert_dispatcher="
"""Which kernels there are is a matter of what is installed: who names one is still recommended a layout."""


def layouts(config: RunConfig, gpu: str) -> tuple[Layout, ...]:
    """Return the recommended layouts of the recipe that `config` is, best first; none for other recipes."""
    return RECOMMENDED.get(config.recipe, {}).get(gpu, ())


def recommended(config: RunConfig, num_ranks: int, gpu: str, said: Sequence[str] = ()) -> Layout | None:
    """Return the first recommended layout that so many processes can have and that fits; None: there is
    none.

    Args:
        config: the run.
        num_ranks: processes.
        gpu: kind of their GPUs.
        said: settings that it has from --set, which stay: a layout for another dispatcher is passed over.
    """
    named = {setting.partition("=")[0] for setting in said}
    for layout in layouts(config, gpu):
        if DISPATCHER[:-1] in named and any(setting.startswith(DISPATCHER) and setting not in said
                                            for setting in layout):
            continue
        layout = tuple(setting for setting in layout if setting.partition("=")[0] not in named)
        changed = apply_settings(config, list(layout))
        if not changed.problems(num_ranks) and fits(changed, num_ranks, CHIPS[gpu]):
            return layout
    return None


def says_layout(settings: Sequence[str]) -> bool:
    """Return whether one of some settings is about what a recommended layout says."""
    return any(setting.startswith(OF_LAYOUT) and not setting.startswith(DISPATCHER) for setting in settings)


def settings_for(config: RunConfig, num_ranks: int, gpu: str, said: Sequence[str] = ()) -> Layout:
    """Return the settings that make a run's layout the recommended one, see `recommended`; none where none
    is."""
    return recommended(config, num_ranks, gpu, said) or ()


def memory_gib(config: RunConfig, layout: Layout, gpu: str) -> dict[int, float]:
    """Return number of processes -> GiB that the fullest needs, where so many can have the layout and it
    fits."""
    changed = apply_settings(config, list(layout))
    return {n: fullest(changed, n)[1].total / GIB for n in SHOWN_RANKS
            if not changed.problems(n) and fits(changed, n, CHIPS[gpu])}
