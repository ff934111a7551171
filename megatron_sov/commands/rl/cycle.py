"""Options and checks for `megatron-sov rl run`, which generates, judges and trains all rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_sov.base.settings import DeclaredCommand, Flag, ProblemCode, SettingsProblem
from megatron_sov.commands.rl.inputs.options import SamplingOptions
from megatron_sov.commands.rl.train import RoundsOptions
from megatron_sov.commands.score import JudgeOptions
from megatron_sov.infer.engine import ENGINE_SET
from megatron_sov.infer.prompts import ServerOptions
from megatron_sov.infer.request import MEGATRON
from megatron_sov.post.rl.reward import ENVIRONMENT

RunEngine = Literal["megatron", "vllm"]


@dataclass(frozen=True, kw_only=True)
class RlRunOptions(RoundsOptions, SamplingOptions, JudgeOptions, ServerOptions):
    """Train in rounds whose responses the trained model generates."""

    engine: Annotated[RunEngine, Flag(help="Engine that generates: the trained model itself, or servers, "
                                           "which receive its weights every round")] = MEGATRON
    engine_set: Annotated[tuple[str, ...], Flag(ENGINE_SET, "key=value")] = ()
    """Servers, e.g. servers=2 or tp=8 (engine vllm)."""

    def problems(self) -> list[SettingsProblem]:
        if self.engine == MEGATRON and (self.engine_set or self.engine_url or self.engine_python):
            return [SettingsProblem(ProblemCode.RULE, "engine", "has no servers for the server options",
                                    self.engine, "add --engine vllm, or leave the options out")]
        if self.reward == ENVIRONMENT and self.environment is None:
            return [SettingsProblem(ProblemCode.RULE, "reward", "takes its rewards from an environment, and "
                                                                "--environment is missing", self.reward,
                                    "add --environment, or choose another reward")]
        return []


RUN = DeclaredCommand(RlRunOptions, "megatron_sov.commands.rl.inputs.checks:check_cycle",
                      "megatron_sov.commands.rl.cycle_run:run_cycle")
