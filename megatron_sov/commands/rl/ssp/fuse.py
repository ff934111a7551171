"""Options for `megatron-sov ssp fuse`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.model.config import split_weight
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND, check_model_path, find_checkpoint


@dataclass(frozen=True, kw_only=True)
class SspFuseOptions(PluginOptions, OverwriteOptions, RedoOptions):
    """Average the best checkpoint per domain, or chosen checkpoints."""

    checkpoints: Annotated[tuple[str, ...], Flag("PROBE_DIR|CHECKPOINT[:weight]")]
    """Probe folder: its best checkpoint per domain counts once per domain. Or checkpoints with weights
    (default 1); a run stands for its newest checkpoint."""
    output: Annotated[Path, Flag(value="CHECKPOINT")]
    """Checkpoint to write: the mean, computed in float64."""
    workers: AtLeastOne = 1
    """Files processed at a time; a file holds two tensors in memory."""


def check_fuse(options: SspFuseOptions) -> SspFuseOptions:
    load_plugins(options.plugins)
    if not (Path(options.checkpoints[0]) / "table").is_dir():  # no probe
        for text in options.checkpoints:
            check_model_path(path := Path(split_weight(text, text)[0]))
            find_checkpoint(path)
    check_output_folder(options.output, CHECKPOINT_KIND, options.overwrite)
    return options


FUSE = DeclaredCommand(SspFuseOptions, check_fuse, "megatron_sov.commands.rl.ssp.fuse_run:fuse_checkpoints")
