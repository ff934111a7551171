"""The recommended layout of a recipe on so many GPUs of a kind."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.recipes.layouts import RECOMMENDED, Layout
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.calibration.fitting import fits, fullest
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.units import GIB

SHOWN_RANKS = (8, 64, 480, 512, 1024)
"""Numbers of processes that a table of layouts shows."""
OF_LAYOUT = ("parallel.", "train.micro_batch_size=", "train.recompute=", "gpu.recompute_modules=")
"""How settings begin that a recommended layout may have."""


def layouts(config: RunConfig, gpu: str) -> tuple[Layout, ...]:
    """Return the recommended layouts of the recipe that `config` is, best first; none for other recipes."""
    return RECOMMENDED.get(config.recipe, {}).get(gpu, ())


def recommended(config: RunConfig, num_ranks: int, gpu: str) -> Layout | None:
    """Return the first recommended layout that so many processes can have and that fits; None: there is
    none."""
    for layout in layouts(config, gpu):
        changed = apply_settings(config, list(layout))
        if not changed.problems(num_ranks) and fits(changed, num_ranks, CHIPS[gpu]):
            return layout
    return None


def leaves_layout_open(request: RecipeRequest) -> bool:
    """Return whether nobody has said anything about a run's layout, its micro-batch or what it recomputes:
    neither --set, nor a file, nor a recipe of the user's own under the name of another one."""
    base = request.base
    return (not request.from_file and not says_layout(request.settings)
            and base.recipe in RECOMMENDED and base.parallel == recipes.get(base.recipe).parallel)


def says_layout(settings: Sequence[str]) -> bool:
    """Return whether one of some settings is about what a recommended layout says."""
    return any(setting.startswith(OF_LAYOUT) for setting in settings)


def settings_for(config: RunConfig, num_ranks: int, gpu: str) -> Layout:
    """Return the settings that make a run's layout the recommended one; none where none is."""
    return recommended(config, num_ranks, gpu) or ()


def memory_gib(config: RunConfig, layout: Layout, gpu: str) -> dict[int, float]:
    """Return number of processes -> GiB that the fullest needs, where so many can have the layout and it
    fits."""
    changed = apply_settings(config, list(layout))
    return {n: fullest(changed, n)[1].total / GIB for n in SHOWN_RANKS
            if not changed.problems(n) and fits(changed, n, CHIPS[gpu])}


def table(config: RunConfig) -> list[str]:
    """Return a line for each recommended layout of a recipe, best first: GPU, settings, memory at some
    numbers of processes."""
    lines = []
    for name, gpu in CHIPS.items():
        for layout in layouts(config, name):
            needs = memory_gib(config, layout, name)
            said = " ".join(f"--set {shlex.quote(s)}" for s in layout) or "as the recipe has it"
            figures = ", ".join(f"{need:.0f} GiB on {n:,}" for n, need in needs.items())
            lines.append(f"{name}  {said}" + (f"  ({figures} processes of {gpu.name})" if figures else ""))
    return lines
