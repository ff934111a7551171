"""Runs `megatron-sov ssp fuse`."""

from pathlib import Path

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError
from megatron_sov.commands.rl.ssp.fuse import SspFuseOptions
from megatron_sov.model.config import split_weight
from megatron_sov.post.ssp import TABLE, read_experts


def fuse_checkpoints(options: SspFuseOptions) -> None:
    """Write the weighted mean of `checkpoints`, and print their shares."""
    probe, min_checkpoints = Path(options.checkpoints[0]), 2
    # A probe's table lists the best checkpoints with weights.
    if (probe / TABLE / MANIFEST).is_file():
        if len(options.checkpoints) > 1:
            raise UserError(f"{probe}: is a probe, which already contains its checkpoints and weights; leave "
                            f"out {options.checkpoints[1]}")
        # A single checkpoint may be the best in every domain; the next stage still needs a start.
        experts, min_checkpoints = read_experts(probe), 1
    else:
        pairs = [split_weight(text, text) for text in options.checkpoints]
        experts = [(Path(path), weight) for path, weight in pairs]
    convert.average(experts, options.output, workers=options.workers, overwrite=options.overwrite,
                    redo=options.redo, min_checkpoints=min_checkpoints)
    total = sum(weight for _, weight in experts)
    for path, weight in experts:
        print(f"{weight / total:.4g} of {path}")
    print(f"wrote checkpoint {options.output}")
