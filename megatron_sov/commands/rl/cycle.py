"""Options and checks for `megatron-sov rl run`, which generates, judges and trains all rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import DeclaredCommand, Flag, ProblemCode, SettingsProblem
from megatron_sov.commands.rl.inputs.prompts import SamplingOptions
from megatron_sov.commands.rl.train import RoundsOptions, RoundsRequest, check_rounds, report_completed_run
from megatron_sov.commands.score import JudgeOptions
from megatron_sov.infer.engine import ENGINE_SET, MEGATRON
from megatron_sov.infer.prompts import ServerOptions
from megatron_sov.post.rl.reward import ENVIRONMENT
from megatron_sov.runs.launch_environment import is_first_rank

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


@dataclass(frozen=True)
class CycleRequest:
    """Checked input for `cycle_run.run_cycle`."""

    options: RlRunOptions
    rounds: RoundsRequest


def check_cycle(options: RlRunOptions) -> CycleRequest | int:
    """Check the options. For a complete run, print the summary instead."""
    if report_completed_run(options):
        return ExitCode.OK
    # checked before anything is written; the first process runs the servers
    if options.engine != MEGATRON and is_first_rank():
        # clients of servers, which the help does without
        from megatron_sov.infer.engines.server_process import check_engine_program

        check_engine_program(options.engine, options.engine_url, options.engine_python)
    return CycleRequest(options, check_rounds(options, is_asked=options.environment is None))


RUN = DeclaredCommand(RlRunOptions, check_cycle, "megatron_sov.commands.rl.cycle_run:run_cycle")
