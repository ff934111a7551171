"""Options of the commands that generate, judge and train rounds: `megatron-sov rl run`, `rl train`,
`rl generate` and `rl engines`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    DeclaredCommand, Flag, NotNegative, ProblemCode, SettingsProblem, excludes_field, requires_field)
from megatron_sov.commands.rl.store.reward import StoreRewardOptions
from megatron_sov.commands.score import JudgeOptions
from megatron_sov.commands.train.kinds import RUN_TRAINING
from megatron_sov.commands.train.setup.stage_options import TunedOptions
from megatron_sov.infer.engine import ENGINE_SET, EngineOptions, ServerOptions
from megatron_sov.infer.request import MEGATRON, Batching, BatchSize
from megatron_sov.judge.tools.registry import BUILT_IN
from megatron_sov.model.recipes.requested import RecipeOptions
from megatron_sov.post.rl.reward import ENVIRONMENT

CHECKPOINT_OPTION, URL_OPTION, VALIDATION_OPTION = "--teacher", "--teacher-url", "--validation"
RunEngine = Literal["megatron", "vllm"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are sampled from prompts."""

    plain: Annotated[bool, excludes_field("environment")] = False
    """Continue each prompt without the chat template."""
    environment: Annotated[str | None, Flag(
        value="ENV", help=f"Play the prompts as tasks in {', '.join(BUILT_IN)}, or your own class, "
                          "FILE.py:NAME")] = None
    env_set: Annotated[tuple[str, ...], Flag(value="key=value"), requires_field("environment")] = ()
    """Setting for the environment; may be repeated."""
    limit: Annotated[tuple[str, ...], Flag(value="key=value"), requires_field("environment")] = ()
    """Limit for an episode, e.g. max_turns=7; may be repeated."""
    batch_size: BatchSize = Batching.batch_size


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options that name the prompts."""

    prompts: Annotated[Path, Flag(value="FILE|DIR")]
    """Rows in JSON lines, JSON, Parquet or Arrow, or a `datasets` folder. A row has `prompt`, `messages` or a
    task, and the fields that the reward needs."""
    renames: Annotated[tuple[str, ...], Flag("--columns", "TARGET=FIELD,...")] = ()
    """Rename fields: prompt=question,answer=solution; FIELD+FIELD joins two fields by a line feed."""


class TeacherOption(NamedTuple):
    """A value of --teacher or --teacher-url."""

    option: str
    domain: str
    """The teacher scores responses to prompts in this domain; "": in every domain."""
    location: str
    """Path to a checkpoint or run, or server URL."""


@dataclass(frozen=True, kw_only=True)
class ScoringTeacherOptions:
    """Teachers that score the model's responses in on-policy distillation (policy.method=opd or gkd, or
    policy.opd_coeff)."""

    teacher: Annotated[tuple[str, ...], Flag(value="[DOMAIN=]CHECKPOINT|RUN")] = ()
    """Teacher with the model's architecture (any architecture with policy.method=gkd). DOMAIN restricts the
    teacher to prompts with this `domain`. May be repeated."""
    teacher_url: Annotated[tuple[str, ...], Flag(value="[DOMAIN=]URL")] = ()
    """vLLM or `megatron-sov serve` address for a teacher with the model's tokenizer; any size. Repeat it for
    more teachers or for replicas."""

    def parse_teachers(self) -> list[TeacherOption]:
        return [TeacherOption(CHECKPOINT_OPTION, *_split_domain(text)) for text in self.teacher] + [
            TeacherOption(URL_OPTION, *_split_domain(text)) for text in self.teacher_url]


def _split_domain(text: str) -> tuple[str, str]:
    # Search only the text before "://": a URL's query may contain "=".
    domain, sign, _ = text.partition("://")[0].rpartition("=")
    return domain, text[len(domain + sign):]


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(TunedOptions, PromptOptions, StoreRewardOptions, ScoringTeacherOptions):
    """Options for commands that train on rounds of rollouts."""

    stage: ClassVar[str] = "rl"
    groups: ClassVar[tuple[str, ...]] = ("policy", "rollout", "distillation", "preference")
    validation: Annotated[Path | None, Flag(VALIDATION_OPTION, "FILE|DIR")] = None
    """Held-out prompts, in the same form as --prompts. `rl run` evaluates its policies on them every
    rollout.validation_every_rounds."""

    def deciding_options(self) -> dict[str, Any]:
        return {"validation": self.validation}


@dataclass(frozen=True, kw_only=True)
class RlTrainOptions(RoundsOptions):
    """Train on rounds that separate jobs generate and judge."""

    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """Wait at most this long for the next judged round before the run exits with 75 (default: not at all)."""

    def problems(self) -> list[SettingsProblem]:
        if self.validation is None:
            return []
        return [SettingsProblem(
            ProblemCode.RULE, "validation", "needs an engine to generate responses, and `rl train` has none",
            self.validation, "use `rl run`, or measure its checkpoints by `megatron-sov eval passk`")]


TRAIN = DeclaredCommand(RlTrainOptions, "megatron_sov.commands.rl.checks:check_train", RUN_TRAINING)


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


RUN = DeclaredCommand(RlRunOptions, "megatron_sov.commands.rl.checks:check_cycle",
                      "megatron_sov.commands.rl.cycle_run:run_cycle")


@dataclass(frozen=True, kw_only=True)
class RlGenerateOptions(RecipeOptions, PromptOptions, SamplingOptions, EngineOptions, ServerOptions):
    """Generate responses for rounds with the policies of a run."""

    store: Annotated[Path, Flag(value="DIR", writes=True)]
    """Rollout store; created if it does not exist."""
    start_from: Annotated[Path, Flag("--from", "CHECKPOINT|HF_DIR")]
    """Policy for the first round: the model that `rl train` starts from."""
    run: Annotated[Path, Flag(value="DIR", may_be_missing=True)]
    """Run folder for `rl train`, whose checkpoints are the later policies; may not exist yet."""
    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Rounds to generate (default: all in rollout.rounds)."""
    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """Wait at most this long for a policy, or for pieces claimed by running jobs (default: only until the
    jobs are known to run; the command then exits with 75)."""


GENERATE = DeclaredCommand(RlGenerateOptions, "megatron_sov.commands.rl.checks:check_generate",
                           "megatron_sov.commands.rl.generate_run:generate_rollouts")


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
