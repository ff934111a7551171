"""Recommended layouts for recipes, by GPU and number of processes."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_sov.base.hints.table import load_package_table
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.gpu_capacity import can_run, get_usable_bytes, spill_experts
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.cluster import ClusterProfile

Layout = tuple[str, ...]
"""Settings for --set."""
_SEPARATOR = re.compile(r" (?=[a-z])")
"""Between the settings of a layout; spaces in lists are not followed by a letter."""
RECOMMENDED: dict[str, dict[str, tuple[Layout, ...]]] = {
    recipe: {gpu: tuple(tuple(_SEPARATOR.split(line)) for line in lines) for gpu, lines in layouts.items()}
    for recipe, layouts in load_package_table(Path(__file__).with_suffix(".yaml")).items()}
"""Recipe -> GPU (`clusters.chips.CHIPS`) -> layouts, best first."""
LAYOUT_PREFIXES = ("parallel.", "train.micro_batch_size=", "train.recompute=", "gpu.recompute_modules=")
"""Prefixes: such settings replace the recommended layout."""
DISPATCHER = "parallel.expert_dispatcher"
"""Setting that depends on the installed kernels: a user who sets it still gets a recommended layout."""
GRAPHS = 'gpu.cuda_graphs=["moe_router"]'
"""Setting that layouts get if the cluster profile allows it, and it is valid and fits: it decides the speed
with a slow host."""


def list_recommended(config: RunConfig, gpu: str) -> tuple[Layout, ...]:
    """Return a recipe's recommended layouts, best first; () for recipes outside `RECOMMENDED`."""
    return RECOMMENDED.get(config.recipe, {}).get(gpu, ())


def find_recommended(config: RunConfig, num_ranks: int, gpu: str,
                     user_settings: Sequence[str] = (),
                     profile: ClusterProfile | None = None) -> Layout | None:
    """Return the first recommended layout that is valid for `num_ranks` processes and fits `gpu` in `CHIPS`,
    with the chip's FP8 recipe; None: no layout does. `user_settings` from --set stay: layouts with another
    dispatcher are skipped. `profile`: its image decides about dispatchers and CUDA graphs; None: all work."""
    fixed = {setting.partition("=")[0] for setting in user_settings}
    allowed = [f"{DISPATCHER}={dispatcher}" for dispatcher in profile.dispatchers] if profile else []
    if DISPATCHER in fixed:
        allowed = [setting for setting in user_settings if _is_dispatcher(setting)]
    graphs = list_graphs(fixed, profile)
    for layout in list_recommended(config, gpu):
        if allowed and any(_is_dispatcher(setting) and setting not in allowed for setting in layout):
            continue
        layout = tuple(setting for setting in (*layout, *_choose_fp8(config, gpu))
                       if setting.partition("=")[0] not in fixed)
        if (fitting := complete_layout(config, layout, num_ranks, gpu, graphs)) is not None:
            return fitting
    return None


def list_graphs(fixed: Collection[str], profile: ClusterProfile | None) -> Layout:
    """Return the graphs for layouts; none if the user sets them or the profile does not allow them."""
    is_allowed = profile is None or "moe_router" in profile.cuda_graphs
    return (GRAPHS,) if is_allowed and "gpu.cuda_graphs" not in fixed else ()


def complete_layout(config: RunConfig, layout: Layout, num_ranks: int, gpu: str,
                    graphs: Layout = ()) -> Layout | None:
    """Return a layout that is valid and fits, with `graphs` if possible, and with `gpu.expert_spill` if it
    needs the setting; otherwise None."""
    for candidate in dict.fromkeys(((*layout, *graphs), layout)):
        changed = apply_settings(config, list(candidate))
        if can_run(changed, num_ranks, get_usable_bytes(CHIPS[gpu])):
            return candidate
        if spill := spill_experts(changed, num_ranks, CHIPS[gpu]):
            return (*candidate, spill)
    return None


def _choose_fp8(config: RunConfig, gpu: str) -> Layout:
    """Return the chip's `train.fp8` in place of `blockwise`: Blackwell multiplies MX blocks, and Transformer
    Engine 2.20 emulates larger blocks there."""
    return ("train.fp8=mxfp8",) if config.train.fp8 == "blockwise" and CHIPS[gpu].fp4_flops_per_s else ()


def _is_dispatcher(setting: str) -> bool:
    return setting.startswith(f"{DISPATCHER}=")


def sets_layout(settings: Sequence[str]) -> bool:
    """Return whether a setting replaces the recommended layout."""
    return any(setting.startswith(LAYOUT_PREFIXES) and not _is_dispatcher(setting) for setting in settings)
