"""Options shared by training commands. Imports neither torch nor numpy."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.settings import AtLeastOne, Flag
from megatron_sov.commands.train.setup.starts import read_start_settings
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import REFERENCE_METHODS, PreferenceMethod
from megatron_sov.model.recipes.requested import BuiltIn, TrainingOptions
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, RUN, check_folder_kind, check_model_path, find_checkpoint)
from megatron_sov.train.guards.fault_injection import FAULT_STATES

INJECT = f"Inject this fault once, to test the run's reaction ({', '.join(FAULT_STATES)})."


@dataclass(frozen=True, kw_only=True)
class StageOptions(TrainingOptions):
    """Options for all training commands."""

    stage: ClassVar[str] = ""
    """Key in `commands.train.kinds.STAGE_KINDS`."""

    run: Annotated[Path, Flag(value="DIR", writes=True)]
    """Run folder."""
    start_from: Annotated[Path | None, Flag("--from", "CHECKPOINT|RUN|HF_DIR")] = None
    """Start from these weights and their architecture."""
    nproc: int | None = None
    """Local processes to start (under Slurm, or torchrun ... -m -- megatron_sov, the environment decides)."""
    inject: Annotated[tuple[str, ...], Flag(value="FAULT@step=N[,rank=R]", help=INJECT)] = ()
    resume: bool = False
    """Continue the run in --run."""
    until: Annotated[AtLeastOne | None, Flag(value="STEP")] = None
    """Save and stop after this step; schedules stay unchanged."""
    dry_run: bool = False
    """Check everything that needs no processes, print inputs, work and outputs, and exit."""

    def model_settings(self, objective: BuiltIn | None, has_gpus: bool | None = None
                       ) -> Callable[[], RunConfig] | None:
        """Return a function that reads default settings from the model in --from; None: the stage needs those
        of a recipe. `has_gpus`: whether the run has GPUs; None: ask this machine."""
        if self.start_from is None or objective is None or objective == "lm":
            return None
        return partial(read_start_settings, self.start_from, objective, has_gpus)

    def with_implied_settings(self) -> "StageOptions":
        """Return the options with --set values implied by other options."""
        return self

    def check_paths(self) -> None:
        """Check options that need no settings, before the recipe is read."""

    def check_settings(self, config: RunConfig) -> None:
        """Check options against the resolved settings."""

    def deciding_options(self) -> dict[str, Any]:
        """Return option name -> value for options that decide whether a setting acts."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TunedOptions(StageOptions):
    """Options for stages that start from a model."""

    start_from: Annotated[Path, Flag("--from", "CHECKPOINT|RUN|HF_DIR")] = dataclasses.field()
    """Start from these weights and their architecture."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(StageOptions):
    """Train by language modelling, or by a custom objective."""

    stage: ClassVar[str] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class SftOptions(TunedOptions):
    """Fine-tune on conversations."""

    stage: ClassVar[str] = "sft"


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(TunedOptions):
    """Train at longer contexts, stage by stage."""

    stage: ClassVar[str] = "extend"


@dataclass(frozen=True, kw_only=True)
class PreferOptions(TunedOptions):
    """Learn from preferences: pairs, groups or judged responses."""

    stage: ClassVar[str] = "prefer"
    groups: ClassVar[tuple[str, ...]] = ("preference",)

    method: PreferenceMethod | None = None
    """The loss (--set preference.method=...; default dpo)."""
    reference: Annotated[Path | None, Flag(value="CHECKPOINT|RUN")] = None
    """Reference model (dpo, ipo, dpo-norm; default: the model in --from)."""

    def with_implied_settings(self) -> "PreferOptions":
        if self.method is None:
            return self
        return dataclasses.replace(self, settings=(*self.settings, f"preference.method={self.method}"))

    def check_paths(self) -> None:
        self._refuse_unused_reference(self.method)
        if self.reference is not None and self.reference.is_dir():
            check_folder_kind(self.reference, (RUN, CHECKPOINT_KIND), "a checkpoint or a run")

    def check_settings(self, config: RunConfig) -> None:
        if self.reference is None:
            return
        self._refuse_unused_reference(config.preference.method)
        check_model_path(self.reference, "--reference ")
        find_checkpoint(self.reference)

    def _refuse_unused_reference(self, method: str | None) -> None:
        if self.reference is not None and method not in (None, *REFERENCE_METHODS):
            raise UserError(f"--reference {self.reference}: preference.method = {method} uses no reference; "
                            "leave it out", Fix(left_out=(f"--reference {self.reference}",)))
