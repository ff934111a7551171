"""What tasks of `eval` share: options, the look before Megatron is imported, the model that is measured, and
figures written and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import AtLeastOne, Flag
from megatron_sov.commands.shared_options import RecordOptions
from megatron_sov.infer.engine import PRECISION_KEY
from megatron_sov.infer.request import RankOptions
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target


@dataclass(frozen=True, kw_only=True)
class OutOptions(RecordOptions):
    """What tasks take whose figures a file may keep."""

    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """Also write the figures into a JSON file, which appears whole."""


@dataclass(frozen=True, kw_only=True)
class HeldoutOptions(RecordOptions):
    """What tasks take that read held-out documents."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with held-out documents."""
    seq_len: AtLeastOne | None = None
    """Tokens of a row (default: the longest that was trained on)."""


def begin_task(args: RecordOptions, *models: Path, out: Path | None = None) -> RunEvents:
    """Refuse what cannot be read or written, before Megatron is imported; returns the run's events."""
    events = RunEvents(args.run)
    check_output("--output", out)
    for model in models:
        check_model_path(model)
    return events


def measure_target(args: RankOptions, target: Target, on_policy: Callable[[Any], Any],
                   on_hf: Callable[[Any], Any]) -> Any:
    """Return what the task found, a checkpoint on ranks, a Hugging Face folder in transformers; None:
    not ours to print."""
    if not target.is_hf:
        from megatron_sov.infer.engines.load import run_forward_model

        return run_forward_model(target, args.settings, args.nproc, on_policy)
    given = [*(f"--set {setting}" for setting in args.settings
               if setting.partition("=")[0] != PRECISION_KEY),
             *([] if args.nproc is None else [f"--nproc {args.nproc}"])]
    if given:
        raise UserError(f"{', '.join(given)}: is for checkpoints, and {target.path} is a Hugging Face "
                        "folder; leave it out, or convert it first with `megatron-sov convert from-hf`")
    from megatron_sov.infer.engines.transformers_engine import load_configured_hf

    return on_hf(load_configured_hf(target.path, args.settings))


def write_figures(out: Path | None, values: Any) -> None:
    if out is not None:
        write_output(out, format_json(values))


def show_figures(as_json: bool, values: Any, text: str) -> None:
    print(json.dumps(values, indent=1, ensure_ascii=False) if as_json else text)
