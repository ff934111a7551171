"""The arguments that all training commands share, and how they become a config.  No torch here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.config import RunConfig, data_paths, from_dict
from megatron_sov.errors import UserError
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.guards.fault_injection import STATES


def add_stage_arguments(parser: argparse.ArgumentParser, *, needs_start: bool) -> None:
    """Add RECIPE --data --run --from --nproc --set --deterministic --inject --resume."""
    parser.add_argument("recipe", help="name of a recipe; `megatron-sov recipes` lists them")
    parser.add_argument("--data", action="append", required=True, metavar="DIR[:weight]",
                        help="token shards made by `sov-data pack`; several are mixed by weight")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of this run")
    parser.add_argument("--from", dest="start_from", type=Path, required=needs_start, metavar="CHECKPOINT|RUN|HF_DIR",
                        help="start from these weights (and their architecture)")
    parser.add_argument("--nproc", type=int, default=None, metavar="N",
                        help="local processes to start (under Slurm or torchrun the environment decides)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value",
                        help="change a setting, e.g. --set train.steps=100 --set parallel.ep=2")
    parser.add_argument("--deterministic", action="store_true",
                        help="the same bits in every run (--set train.deterministic=true)")
    parser.add_argument("--inject", action="append", default=[], metavar="FAULT@step=N[,rank=R]",
                        help=f"do this to the run, once, to see what it does ({', '.join(STATES)})")
    parser.add_argument("--resume", action="store_true", help="continue the run that is in --run")


def resolve_start(start_from: Path | None, run: Path) -> Path | None:
    """Return the checkpoint that --from means; a Hugging Face folder is converted into RUN.from-hf first.

    Raises:
        UserError: it is no checkpoint, run or Hugging Face folder.
    """
    if start_from is None:
        return None
    if not start_from.is_dir():
        raise UserError(f"--from {start_from}: does not exist; pass a checkpoint, a run or a Hugging Face folder")
    from megatron_sov import convert
    from megatron_sov.runs.checkpoints import find_checkpoint

    return _converted(start_from, run) if convert.is_hf_folder(start_from) else find_checkpoint(start_from)


def _converted(hf_dir: Path, run: Path) -> Path:
    """Convert, unless the run has a checkpoint and needs no weights: what lies there may come from another folder."""
    from megatron_sov import convert
    from megatron_sov.mcore.parallel import world
    from megatron_sov.runs import checkpoints

    out = run.with_name(run.name + ".from-hf")
    if (out / MANIFEST).is_file() and checkpoints.latest(run / checkpoints.CHECKPOINTS_OF_A_RUN) is not None:
        return out
    if num_ranks(None) > 1:
        raise UserError(f"--from {hf_dir}: many processes would convert it at once; run `megatron-sov convert from-hf` "
                        "before, and pass its output")
    # in a process of its own: threads that torch starts here would be missing in the ranks, which are forked from this process
    code = world.launch(lambda: convert.from_hf(hf_dir, out, overwrite=True), 1)
    if code:
        raise SystemExit(code)
    return out


def stage_config(args: argparse.Namespace, checkpoint: Path | None, *, objective: Literal["lm", "sft"] = "lm",
                 defaults: tuple[str, ...] = ()) -> RunConfig:
    """Return the resolved settings of a training command: recipe, checkpoint's architecture, data, then --set.

    Without a checkpoint (before --from is resolved, which may take long) it finds the mistakes that need none.

    Raises:
        UserError: unknown recipe or setting, missing data, another family or objective than the command's.
    """
    from megatron_sov import recipes
    from megatron_sov.config import apply_settings

    config = recipes.get(args.recipe)
    if checkpoint is not None:
        config = _with_model_of(config, checkpoint)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=data_paths(args.data)))
    flags = ["train.deterministic=true"] if args.deterministic else []
    config = apply_settings(config, [f"objective.name={objective}", *defaults, *args.settings, *flags])
    if config.objective.name != objective:
        raise UserError(f"objective.name = {config.objective.name}: this command trains by {objective!r}; leave the setting out, "
                        f"or use `megatron-sov {'sft' if objective == 'lm' else 'pretrain'}`")
    return config


def _with_model_of(config: RunConfig, start_from: Path) -> RunConfig:
    """Return `config` with the architecture that a checkpoint was made with.

    Raises:
        UserError: the checkpoint belongs to another family than the recipe.
    """
    from megatron_sov.runs.checkpoints import KIND

    made_with = from_dict(read_manifest(start_from, KIND).settings).model
    if made_with.family != config.model.family:
        raise UserError(f"--from {start_from}: is a {made_with.family} model, recipe {config.recipe} is for "
                        f"{config.model.family}; choose a recipe of that family")
    return dataclasses.replace(config, model=made_with)
