"""Recommended layouts for recipes, by GPU and number of processes."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.gpu_capacity import fits_gpu
from megatron_sov.work.clusters.chips import CHIPS

# Layouts for large recipes come from `plan --sweep` on 512 and 1,024 GPUs, for pretraining also on the 480
# GPUs in Solar Open's report: among the layouts within 2 % of the fastest, one that leaves memory free.
# Fallbacks that recompute every layer follow. No layout was timed. The number of processes decides which
# layout is valid: a global batch has to divide among the data-parallel processes (13,440 samples do over 480
# processes and, with 4 processes per row, over 512; over 1,024 they need 8), with `parallel.vpp` among the
# chunks. Layouts for HybridEP come first, then layouts without additional packages (docs/layouts.md).

Layout = tuple[str, ...]
"""Settings for --set: `parallel.*`, micro-batch size, recomputation, attention over split rows."""

_SELECTIVE: Layout = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
_FEW_ACTIVATIONS: Layout = ("train.recompute=selective", 'gpu.recompute_modules=["moe"]')
_STORED: Layout = ("train.recompute=false",)
_HALVES: Layout = ("parallel.tp=2", "parallel.sp=true")
_NODE: Layout = ("parallel.ep=8",)
"""Expert messages stay inside a node."""
_FOUR_STAGES: Layout = ("parallel.pp=4", "parallel.pipeline_layout=[12, 12, 13, 11]")
_FOUR_LIGHTER: Layout = ("parallel.pp=4", "parallel.pipeline_layout=[12, 13, 13, 10]")
_SIX_STAGES: Layout = ("parallel.pp=6", "parallel.pipeline_layout=[8, 8, 8, 8, 9, 7]")
_EIGHT_STAGES: Layout = ("parallel.pp=8", "parallel.pipeline_layout=[6, 6, 6, 6, 6, 6, 7, 5]")
_EIGHT_LIGHTER: Layout = ("parallel.pp=8", "parallel.pipeline_layout=[6, 6, 6, 6, 6, 7, 7, 4]")
"""For a last stage with prediction layers, or for cheap messages."""
_SIXTEEN_RUNS = "parallel.pipeline_layout=[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 1]"
"""For models with prediction layers on the last stage."""
_EIGHT_RUNS = "parallel.pipeline_layout=[6, 6, 6, 6, 6, 6, 7, 5]"
_TWELVE_RUNS = "parallel.pipeline_layout=[4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 3]"
_DEEP_RUNS = "parallel.pipeline_layout=[5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 1]"
"""For 78 layers and a prediction layer applied four times with the head (`mtp_depths`)."""
_DEEP_HALVES: Layout = (*_HALVES, "parallel.pp=16", *_NODE, _DEEP_RUNS)
_DEEP_STAGES: Layout = ("parallel.tp=1", "parallel.sp=false", "parallel.pp=8", "parallel.vpp=2", *_NODE,
                        _DEEP_RUNS)
_TWO_ROWS: Layout = ("train.micro_batch_size=2",)
_PASSES: Layout = ("parallel.expert_overlap=micro_batches",)
"""Expert messages overlap with another micro-batch."""
_HYBRID: Layout = ("parallel.expert_dispatcher=hybridep",)
"""Needs installed kernels; a later layout works without them."""
_FULL_ROWS: Layout = ("gpu.attention=fused",)
"""Under context parallelism, cuDNN attends over full rows for some heads per process."""
_HYBRID_STAGES: Layout = ("parallel.pp=4", "parallel.vpp=4", *_NODE)
_QUARTERS: Layout = ("parallel.tp=4", "parallel.sp=true")

_ZERO1: Layout = ("parallel.zero1=true",)
_SMALL: dict[str, tuple[Layout, ...]] = dict.fromkeys(("h100", "h200", "b200"), (_ZERO1, (*_ZERO1, *_HALVES)))
_SOLAR: tuple[Layout, ...] = ((*_EIGHT_STAGES, *_SELECTIVE), ("parallel.pp=4",), ("parallel.pp=8",))
_SOLAR_MID: tuple[Layout, ...] = (("parallel.pp=2", "parallel.cp=8", *_STORED, *_FULL_ROWS),
                                  ("parallel.pp=4", "parallel.cp=8", *_STORED, *_FULL_ROWS),
                                  ("parallel.pp=4", "parallel.cp=4", *_FULL_ROWS),
                                  ("parallel.pp=4", "parallel.cp=8", *_FULL_ROWS))

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
        "h100": ((*_HALVES, *_FOUR_STAGES, "parallel.cp=4", *_SELECTIVE, *_FULL_ROWS), *_SOLAR_MID[2:]),
        "h200": _SOLAR_MID, "b200": _SOLAR_MID},
    "solar-open-102b-extend": {
        "h100": (("parallel.pp=4", "parallel.vpp=4", *_NODE, *_SELECTIVE, *_FULL_ROWS), _FULL_ROWS),
        "h200": (("parallel.tp=2", "parallel.pp=4", "parallel.vpp=4", *_NODE, *_SELECTIVE, *_FULL_ROWS),
                 _FULL_ROWS),
        "b200": (("parallel.tp=1", "parallel.sp=false", "parallel.pp=2", "parallel.vpp=4", *_NODE,
                  *_FEW_ACTIVATIONS, *_FULL_ROWS),
                 ("parallel.tp=2", "parallel.pp=2", "parallel.cp=4", *_NODE, *_FEW_ACTIVATIONS, *_FULL_ROWS),
                 ("parallel.tp=2", "parallel.pp=2", *_NODE, *_SELECTIVE, *_FULL_ROWS), _FULL_ROWS)},
    "k-exaone-236b": {
        "h100": ((*_QUARTERS, "parallel.pp=2", "parallel.vpp=4", "parallel.ep=64", *_SELECTIVE, *_PASSES,
                  *_HYBRID),
                 (*_HALVES, "parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", "parallel.ep=32", *_SELECTIVE,
                  *_PASSES, *_FULL_ROWS),
                 (*_EIGHT_LIGHTER, *_NODE, "parallel.cp=4", *_SELECTIVE, *_FULL_ROWS),
                 ("parallel.pp=8", *_NODE), ("parallel.pp=4", "parallel.ep=16")),
        "h200": ((*_HALVES, "parallel.pp=2", "parallel.vpp=4", "parallel.ep=64",
                  "parallel.pipeline_layout=[6, 6, 6, 7, 7, 7, 7, 2]", *_SELECTIVE, *_PASSES, *_HYBRID),
                 (*_HALVES, "parallel.pp=4", "parallel.vpp=4", _SIXTEEN_RUNS, *_SELECTIVE, *_PASSES),
                 (*_HALVES, "parallel.pp=4", "parallel.pipeline_layout=[13, 13, 13, 9]", *_NODE, *_SELECTIVE),
                 ("parallel.pp=4", *_NODE)),
        "b200": ((*_HALVES, "parallel.pp=2", "parallel.vpp=4", "parallel.ep=32", *_STORED, *_PASSES,
                  *_HYBRID),
                 ("parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", *_NODE,
                  _SIXTEEN_RUNS, *_SELECTIVE, *_PASSES, *_FULL_ROWS),
                 ("parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", *_NODE, _SIXTEEN_RUNS, *_SELECTIVE,
                  *_FULL_ROWS),
                 ("parallel.pp=2", *_NODE), ("parallel.pp=4", *_NODE))},
    "k-exaone-236b-extend": {
        "h100": (("parallel.tp=2", "parallel.pp=8", "parallel.vpp=2", _SIXTEEN_RUNS, *_NODE, *_FULL_ROWS),
                 _FULL_ROWS),
        "h200": (("parallel.tp=2", "parallel.pp=4", "parallel.vpp=4", _SIXTEEN_RUNS, *_NODE, "parallel.cp=4",
                  *_FULL_ROWS), _FULL_ROWS),
        "b200": (("parallel.tp=4", "parallel.pp=2", "parallel.vpp=4", *_NODE, "parallel.cp=4",
                  _EIGHT_RUNS, *_TWO_ROWS, *_FULL_ROWS),
                 ("parallel.tp=4", "parallel.pp=4", *_NODE, *_FULL_ROWS), _FULL_ROWS)},
    "k-exaone2-750b": {"h100": (_DEEP_HALVES,), "h200": (_DEEP_STAGES, _DEEP_HALVES),
                       "b200": (_DEEP_STAGES, _DEEP_HALVES)},
    "solar-open2-250b": {
        "h100": ((*_HALVES, "parallel.pp=8", "parallel.vpp=2", *_NODE, *_TWO_ROWS),),
        "h200": (_HYBRID_STAGES,), "b200": ((*_HYBRID_STAGES, *_TWO_ROWS),)},
    **dict.fromkeys(("qwen2-1.5b", "qwen3-4b", "qwen3-4b-2507", "qwen3-8b", "qwen3-moe-30b",
                     "qwen3-30b-a3b-2507", "typhoon-s-8b", "vibethinker-1.5b"),
                    _SMALL),
    # on the same GPUs as a teacher with 30 B parameters
    "typhoon-s-8b-opd": dict.fromkeys(("h100", "h200", "b200"), (_ZERO1, (*_ZERO1, "parallel.pp=2"))),
}
"""Recipe -> GPU (`clusters.chips.CHIPS`) -> layouts, best first."""
LAYOUT_PREFIXES = ("parallel.", "train.micro_batch_size=", "train.recompute=", "gpu.recompute_modules=")
"""Prefixes: such settings replace the recommended layout."""
DISPATCHER = "parallel.expert_dispatcher"
"""Setting that depends on the installed kernels: a user who sets it still gets a recommended layout."""


def list_recommended(config: RunConfig, gpu: str) -> tuple[Layout, ...]:
    """Return a recipe's recommended layouts, best first; () for recipes outside `RECOMMENDED`."""
    return RECOMMENDED.get(config.recipe, {}).get(gpu, ())


def find_recommended(config: RunConfig, num_ranks: int, gpu: str,
                     user_settings: Sequence[str] = ()) -> Layout | None:
    """Return the first recommended layout that is valid for `num_ranks` processes and fits; None: no layout
    does.

    Args:
        config: the run.
        num_ranks: number of processes.
        gpu: key in `CHIPS`.
        user_settings: settings from --set, which stay: layouts with a different dispatcher are skipped.
    """
    fixed = {setting.partition("=")[0] for setting in user_settings}
    for layout in list_recommended(config, gpu):
        if DISPATCHER in fixed and any(_is_dispatcher(setting) and setting not in user_settings
                                       for setting in layout):
            continue
        layout = tuple(setting for setting in layout if setting.partition("=")[0] not in fixed)
        changed = apply_settings(config, list(layout))
        if not changed.problems(num_ranks) and fits_gpu(changed, num_ranks, CHIPS[gpu]):
            return layout
    return None


def _is_dispatcher(setting: str) -> bool:
    return setting.startswith(f"{DISPATCHER}=")


def sets_layout(settings: Sequence[str]) -> bool:
    """Return whether a setting replaces the recommended layout."""
    return any(setting.startswith(LAYOUT_PREFIXES) and not _is_dispatcher(setting) for setting in settings)


def get_recommended_settings(config: RunConfig, num_ranks: int, gpu: str,
                             user_settings: Sequence[str] = ()) -> Layout:
    return find_recommended(config, num_ranks, gpu, user_settings) or ()
