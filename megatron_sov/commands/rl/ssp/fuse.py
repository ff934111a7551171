"""Options for `megatron-sov ssp fuse`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins


@dataclass(frozen=True, kw_only=True)
class SspFuseOptions(PluginOptions, OverwriteOptions, RedoOptions):
    """Merge the best checkpoint of each domain, or any checkpoints, into one."""

    checkpoints: Annotated[tuple[str, ...], Flag("PROBE_DIR|CHECKPOINT[:weight]")]
    """The folder of a probe, whose best checkpoint in each domain counts once per domain; or checkpoints with
    weights (default 1), a run standing for its newest checkpoint."""
    output: Annotated[Path, Flag(value="CHECKPOINT")]
    """Checkpoint to write: the mean of all weights, in float64."""
    workers: AtLeastOne = 1
    """Files at a time, each with two tensors in memory."""


def check_fuse(options: SspFuseOptions) -> SspFuseOptions:
    load_plugins(options.plugins)
    return options


FUSE = DeclaredCommand(SspFuseOptions, check_fuse, "megatron_sov.commands.rl.ssp.fuse_run:fuse_checkpoints")
