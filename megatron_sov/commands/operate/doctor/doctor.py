"""`megatron-sov doctor [--json]`."""

import dataclasses

from megatron_sov.base.settings import DeclaredCommand


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine, and show how to install missing parts."""

    json: bool = False
    """Print JSON."""


DOCTOR = DeclaredCommand(DoctorOptions,
                         run_function="megatron_sov.commands.operate.doctor.checks:show_checks")
