"""What every command that submits its work to a cluster takes; apart from `arrays`, for
`--help` needs no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_sov.base.settings import Flag, only_with


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where a run is submitted to."""

    cluster: Annotated[str, Flag(value="PROFILE")] = ""
    """Submit the run to Slurm: a cluster profile that comes with the package, or a YAML file of
    your own."""
    account: Annotated[str | None, Flag(value="NAME"), only_with("cluster")] = None
    """Slurm account, where the profile names none."""
    partition: Annotated[str | None, Flag(value="NAME"), only_with("cluster")] = None
    """Slurm partition, in place of the profile's."""
