"""The options of `sov-data synth` that say how samples are checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.settings import Flag, one_of


def _identified() -> frozenset[str]:
    from data_prep.curate.quality.identify import KNOWN

    return KNOWN


Identified = Annotated[str, one_of(_identified)]
"""Language that texts are told to be in, as an ISO 639-1 code."""
Kappa = Annotated[float, Ge(-1), Le(1)]
"""Agreement beyond chance."""


@dataclass(frozen=True)
class CheckOptions:
    """How samples are checked when all are made."""

    steps: Annotated[Path | None, Flag("--checks", "FILE.yaml")] = None
    """Steps that samples go through when all are made, as pipeline files have them (default: the
    generator's, or those of its kind of record)."""
    benchmarks: Annotated[tuple[Path, ...], Flag(many=True)] = ()
    """Benchmarks that no sample may hold: .jsonl files, or folders of them."""
    languages: Annotated[tuple[Identified, ...], Flag(value="CODE", many=True)] = ()
    """Languages that answers, or texts, may be in, e.g. ko th (default: whatever the steps say)."""
    labels: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """What people say of some samples (`id` or `text`, and `good`): the page tells how far checks and judge
    agree with them."""
    min_kappa: Annotated[Kappa | None, Flag(value="K")] = None
    """End with 3 where Cohen's kappa against --labels is below this."""
