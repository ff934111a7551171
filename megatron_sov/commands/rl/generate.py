"""Options and checks for `megatron-sov rl generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegative
from megatron_sov.commands.rl.inputs.options import PromptOptions, SamplingOptions
from megatron_sov.infer.prompts import EngineOptions, ServerOptions
from megatron_sov.model.recipes.requested import RecipeOptions


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


GENERATE = DeclaredCommand(RlGenerateOptions, "megatron_sov.commands.rl.inputs.checks:check_generate",
                           "megatron_sov.commands.rl.generate_run:generate_rollouts")
