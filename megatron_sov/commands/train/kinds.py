"""The kinds of training stages: a `TrainingKind` per command that trains a model.

A command is three steps: options (a subclass of `StageOptions`), checks without torch
(`setup.training.check_training`), and the run (`training_run.run_training`). A `TrainingKind`
names the parts in which commands differ.
"""

from dataclasses import dataclass

from megatron_sov.base.settings import DeclaredCommand
from megatron_sov.commands.train.setup.stage_options import (
    ExtendOptions, PreferOptions, PretrainOptions, SftOptions)
from megatron_sov.model.recipes.requested import BuiltIn

CHECK_TRAINING = "megatron_sov.commands.train.setup.training:check_training"
RUN_TRAINING = "megatron_sov.commands.train.training_run:run_training"


@dataclass(frozen=True)
class TrainingKind:
    """A training command's objective, data needs and stage setup."""

    name: BuiltIn
    """`objective.name` of the run; `model.objectives.COMMAND_FORMATS` lists its data formats."""
    objective: str
    """`module:NAME` for the objective class, or for a function (settings) -> class."""
    is_chosen_by_settings: bool = False
    """Whether `objective` is a function."""
    fill_stage: str = ""
    """`module:function` that adds data, inputs and hooks to a `Stage`. "": nothing to add."""
    needs_data: bool = True
    """Whether --data is required."""


LANGUAGE_MODELLING = "megatron_sov.train.objectives.data_objective:LanguageModelling"
STAGE_KINDS: dict[str, TrainingKind] = {
    "pretrain": TrainingKind("lm", LANGUAGE_MODELLING),
    # a sequence of stages, which `extend_run` plans and runs
    "extend": TrainingKind("lm", LANGUAGE_MODELLING),
    "sft": TrainingKind("sft", "megatron_sov.post.sft:SupervisedFineTuning"),
    "prefer": TrainingKind("preference", "megatron_sov.post.preference:select_objective",
                           is_chosen_by_settings=True,
                           fill_stage="megatron_sov.commands.train.prefer_run:add_reference"),
    "distill": TrainingKind("distill", "megatron_sov.post.distillation.distill:Distillation",
                            fill_stage="megatron_sov.commands.train.distill_run:add_teacher"),
    "rl": TrainingKind("policy", "megatron_sov.post.policy:build_policy_objective",
                       is_chosen_by_settings=True, needs_data=False,
                       fill_stage="megatron_sov.commands.rl.cycle_run:add_rounds"),
}
"""`StageOptions.stage` -> kind."""


PRETRAIN = DeclaredCommand(PretrainOptions, CHECK_TRAINING, RUN_TRAINING)
SFT = DeclaredCommand(SftOptions, CHECK_TRAINING, RUN_TRAINING)
PREFER = DeclaredCommand(PreferOptions, CHECK_TRAINING, RUN_TRAINING)
EXTEND = DeclaredCommand(ExtendOptions, "megatron_sov.commands.train.setup.training:check_extension",
                         "megatron_sov.commands.train.extend_run:run_extension",
                         proposal_function="megatron_sov.commands.train.extend_run:check_proposal")
