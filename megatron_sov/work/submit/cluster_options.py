"""Command-line options for submission to a cluster; separate from `arrays` for a fast `--help`."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sov.base.settings import Flag, requires_field


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Options for submitting a run."""

    cluster: Annotated[str, Flag(value="PROFILE")] = ""
    """Submit the run to Slurm: a cluster profile that comes with the package, or your own YAML file."""
    account: Annotated[str | None, Flag(value="NAME"), requires_field("cluster")] = None
    """Slurm account, where the profile names none."""
    partition: Annotated[str | None, Flag(value="NAME"), requires_field("cluster")] = None
    """Slurm partition instead of the profile's."""
