"""`megatron-sov doctor [--json]`."""

import dataclasses

from megatron_sov.base.settings import DeclaredCommand


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Show what this machine has, and what is missing."""

    json: bool = False
    """Print the checks as JSON."""


DOCTOR = DeclaredCommand(DoctorOptions,
                         run_function="megatron_sov.commands.operate.doctor.checks:show_checks")
