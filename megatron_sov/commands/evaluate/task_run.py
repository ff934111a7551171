"""Runs a task of `megatron-sov eval` on a checkpoint or a Hugging Face folder, and prints its figures."""

import json
from collections.abc import Callable
from typing import Any

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.commands.evaluate.task import OutOptions
from megatron_sov.infer.engine import PRECISION_KEY
from megatron_sov.infer.engines.load import run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.engines.transformers_engine import load_configured_hf
from megatron_sov.infer.request import RankOptions


def measure_target(options: RankOptions, target: Target, measure_policy: Callable[[Any], Any],
                   measure_hf: Callable[[Any], Any]) -> Any:
    """Measure a checkpoint on ranks, or a Hugging Face folder with transformers; None on ranks after the
    first."""
    if not target.is_hf:
        return run_forward_model(target, options.settings, options.nproc, measure_policy)
    rank_options = [f"--set {setting}" for setting in options.settings
                    if setting.partition("=")[0] != PRECISION_KEY]
    if options.nproc is not None:
        rank_options.append(f"--nproc {options.nproc}")
    if rank_options:
        raise UserError(f"{', '.join(rank_options)}: is for checkpoints, and {target.path} is a Hugging Face "
                        "folder; leave it out, or convert it first with `megatron-sov convert from-hf`")
    return measure_hf(load_configured_hf(target.path, options.settings))


def record_figures(options: OutOptions, figures: Any, text: str) -> None:
    """Write figures to --output and print them, as JSON or as `text`."""
    if options.out is not None:
        write_output(options.out, format_json(figures))
    print(json.dumps(figures, indent=1, ensure_ascii=False) if options.json else text)
