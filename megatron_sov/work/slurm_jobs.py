"""Which of Slurm's jobs work in a run's folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sov.clusters import client
from megatron_sov.errors import UserError
from megatron_sov.sealed import try_read_json, write_json

FILE = "slurm/jobs.json"


@dataclass(frozen=True)
class Jobs:
    """The jobs that the last command has submitted."""

    address: str
    """Address of the plan that they work on."""
    numbers: dict[str, str]
    """Stage -> number of its array."""

    @staticmethod
    def read(output: Path) -> Jobs:
        """Return what is on record; nothing where there is none."""
        return Jobs(**(try_read_json(output / FILE) or {"address": "", "numbers": {}}))

    def write(self, output: Path) -> None:
        """Put it on record."""
        (output / FILE).parent.mkdir(parents=True, exist_ok=True)
        write_json(output / FILE, asdict(self))

    def living(self) -> list[str]:
        """Return the numbers of those that wait or run."""
        return sorted(client.states(list(self.numbers.values())))


def refuse_living(output: Path) -> None:
    """Raise `UserError` where jobs work in a run's folder, as far as can be known here."""
    jobs = Jobs.read(output)
    try:
        living = jobs.living()
    except UserError:  # no Slurm here
        return
    if living:
        raise UserError(f"{output}: Slurm's jobs {', '.join(living)} work in this folder; pass --cluster to "
                        "see how far they are, or `scancel` them")
