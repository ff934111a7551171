"""`megatron-sov doctor`: what works on this machine, what is missing, and the command that adds it."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.operate.doctor.checks import MachineCheck, all_checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Show what this machine has, and what is missing."""

    json: bool = False
    """Print the checks as JSON."""


add_arguments = partial(add_options, cls=DoctorOptions)


def run(typed: argparse.Namespace) -> int:
    """Print every check; return 0 when training on this machine's CPU works,
    2 when something it needs is broken."""
    args = read_options(DoctorOptions, typed)
    checks = all_checks()
    works = not any(check.status == "broken" for check in checks)
    if args.json:
        print(to_json({"works": works, "checks": [dataclasses.asdict(check) for check in checks]}), end="")
    else:
        print(as_text(checks))
        print("\nThis machine can train." if works
              else "\nThis machine cannot train yet: mend what is broken above.")
    return ExitCode.OK if works else ExitCode.USER_ERROR


def as_text(checks: list[MachineCheck]) -> str:
    """Return one line per check, and a line with the remedy under it where there is one."""
    name_width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{name_width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<8} {'':<{name_width}}  -> {check.remedy}")
    return "\n".join(lines)
