"""Options and checks shared by `megatron-sov eval` tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.settings import AtLeastOne, Flag
from megatron_sov.commands.shared_options import FigureOptions, check_token_shards
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.runs.folder import RunEvents


@dataclass(frozen=True, kw_only=True)
class OutOptions(FigureOptions):
    """`--output` for tasks that print figures."""

    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """Also write the figures to a JSON file."""


@dataclass(frozen=True, kw_only=True)
class HeldoutOptions(FigureOptions):
    """Options for tasks on held-out documents."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with held-out documents."""
    seq_len: AtLeastOne | None = None
    """Tokens per row (default: the longest trained length)."""


def check_task(options: Any) -> Any:
    """Check --run and TARGET, and return the options."""
    RunEvents(options.run)
    check_model(options.target, options.settings, options.nproc)
    check_token_shards(getattr(options, "data", ()))
    return options
