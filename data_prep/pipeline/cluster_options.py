"""What every command that submits its work to Slurm takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from megatron_sov.settings import Code, Flag, Problem


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where a run is submitted to."""

    cluster: Annotated[str, Flag(value="PROFILE")] = ""
    """Submit the run to Slurm: a cluster profile that comes with the package, or a YAML file of your own."""
    account: Annotated[str | None, Flag(value="NAME")] = None
    """Slurm account, where the profile names none."""
    partition: Annotated[str | None, Flag(value="NAME")] = None
    """Slurm partition, in place of the profile's."""

    only_with_cluster: ClassVar[tuple[str, ...]] = ("account", "partition")
    """Fields that say nothing of a run on this machine."""

    def problems(self) -> list[Problem]:
        """Return what would have no effect."""
        return [] if self.cluster else [
            Problem(Code.RULE, name, "goes only with --cluster", value, "name a profile, or leave it out")
            for name in self.only_with_cluster if (value := getattr(self, name))]
