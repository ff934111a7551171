"""`megatron-sov ssp fuse`: merge the experts of a probe, or any checkpoints, into one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.model.config import weighted_path
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins


@dataclass(frozen=True, kw_only=True)
class SspFuseOptions(PluginOptions, OverwriteOptions, RedoOptions):
    """Merge the best checkpoint of each domain, or any checkpoints, into one."""

    checkpoints: Annotated[tuple[str, ...], Flag("PROBE_DIR|CHECKPOINT[:weight]")]
    """The folder of a probe, whose best checkpoint of each domain counts once for each, or checkpoints (a
    run: its newest one) with weights, 1 each unless given."""
    output: Annotated[Path, Flag(value="CHECKPOINT")]
    """Checkpoint to write: the mean of all weights, in float64."""
    workers: AtLeastOne = 1
    """Files at a time, each with two tensors in memory."""

def run_fuse(typed: argparse.Namespace) -> int:
    """Merge, and print what was merged.

    Raises:
        UserError: the checkpoints have no mean, or nothing can be written there.
    """
    args = read_options(SspFuseOptions, typed)
    load_plugins(args.plugins)
    from megatron_sov.post.ssp.probing import TABLE, experts_of

    first = Path(args.checkpoints[0])
    if (first / TABLE / MANIFEST).is_file():
        if len(args.checkpoints) > 1:
            raise UserError(f"{first}: is a probe, whose experts are merged by themselves; leave out "
                            f"{args.checkpoints[1]}")
        found = experts_of(first)
        if len(found) < 2:
            raise UserError(f"{first}: {found[0][0] if found else 'no single checkpoint'} is the best in "
                            "every domain, so there is nothing to merge; use it as it is")
    else:
        found = [(Path(path), weight) for path, weight in (weighted_path(c, c) for c in args.checkpoints)]
    from megatron_sov.engine import convert

    convert.average(found, args.output, workers=args.workers, overwrite=args.overwrite, redo=args.redo)
    total = sum(weight for _, weight in found)
    for path, weight in found:
        print(f"{weight / total:.4g} of {path}")
    print(f"wrote checkpoint {args.output}")
    return ExitCode.OK


FUSE = SimpleNamespace(add_arguments=partial(add_options, cls=SspFuseOptions), run=run_fuse)
