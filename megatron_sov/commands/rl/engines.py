"""Options and checks for `megatron-sov rl engines`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.commands.rl.cycle import RlRunOptions
from megatron_sov.infer.request import MEGATRON


@dataclass(frozen=True, kw_only=True)
class RlEnginesOptions(RlRunOptions):
    """Run the engine servers for an `rl run` on other machines. Takes the run's arguments; the run connects
    with --engine-url."""

    port: Annotated[int, Ge(1), Le(65535), Flag(value="N")] = 8000
    """Port for the first server; further servers use the next ports."""


def check_engines(options: RlEnginesOptions) -> RlEnginesOptions:
    if options.engine == MEGATRON:
        raise UserError(f"--engine {options.engine}: has no servers; add --engine vllm, as in the run")
    return options


ENGINES = DeclaredCommand(RlEnginesOptions, check_engines,
                          "megatron_sov.commands.rl.engines_run:keep_servers")
