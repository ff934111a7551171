"""What stages of post-training take where neither the command line nor a post-training recipe says it: one
table, each value with its source.  No torch here.

The architecture comes from --from.  Rate, schedule and passes over the data come from this table, by the
stage and the model's size; the lengths of samples and batches come from the data
(`train.stages.stage_defaults`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.model.config import LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

Stage = Literal["sft", "preference", "distill", "policy"]
COMMANDS: dict[str, str] = {"sft": "sft", "preference": "prefer", "distill": "distill", "policy": "rl"}
"""Objective of a stage -> what people call the stage."""
MOST_EPOCHS = 20.0
"""Passes over the data that a plan may have without being asked for."""
PRETRAINING_RATE = 5.0
"""A pretraining recipe's rate is refused from so many times the stage's own on."""
QLORA, REGRET = "QLoRA, arXiv 2305.14314", "ten times the full rate: LoRA Without Regret (2025)"
TULU, TRL, OURS = "Tülu 3, arXiv 2411.15124", "default of TRL 1.16", "ours"


@dataclass(frozen=True)
class Rate:
    """A peak learning rate."""

    lr: float
    source: str
    """Where it is from."""
    from_params: float = 0.0
    """Parameters of the smallest model that it is for; of several rates the last that fits holds."""


@dataclass(frozen=True)
class StageDefaults:
    """What a stage takes."""

    rates: tuple[Rate, ...]
    """By size, ascending."""
    lora: tuple[Rate, ...]
    """The same where `lora.rank` is set."""
    epochs: float
    """Passes over the data."""
    schedule: Literal["cosine", "linear", "constant"]
    warmup_share: float
    """Part of the run."""
    batch_size: int
    """Samples of a step at most; less where the data is small."""
    source: str
    """Where epochs, schedule, warm-up and batch are from."""

    def rate(self, num_params: float, *, lora: bool) -> Rate:
        """Return the rate for a model of so many parameters."""
        return [rate for rate in (self.lora if lora else self.rates) if rate.from_params <= num_params][-1]


_LORA = (Rate(2e-4, QLORA), Rate(1e-4, QLORA, 3e10))
_LORA_PAIRS = (Rate(1e-5, REGRET),)


def _pairs(*rates: Rate) -> StageDefaults:
    return StageDefaults(rates, _LORA_PAIRS, 1.0, "linear", 0.1, 128,
                         f"one epoch, linear, 10 % warm-up, batch 128: {TULU}")


DEFAULTS: dict[str, StageDefaults] = {
    "sft": StageDefaults(
        (Rate(2e-5, f"{TRL}; Alpaca"), Rate(1e-5, "LIMA, arXiv 2305.11206", 3e10), Rate(2e-6, TULU, 6.5e10)),
        _LORA, 3.0, "cosine", 0.03, 128, "three epochs, cosine, 3 % warm-up, batch 128: Stanford Alpaca"),
    "preference": _pairs(Rate(1e-6, TRL), Rate(5e-7, TULU, 7e9), Rate(2e-7, TULU, 6.5e10)),
    "preference.dpo-norm": _pairs(Rate(5e-7, TULU), Rate(2e-7, TULU, 6.5e10)),
    "preference.simpo": _pairs(Rate(5e-7, "arXiv 2405.14734 takes 3e-7 to 1e-6, by the model")),
    "preference.orpo": _pairs(Rate(8e-6, "arXiv 2403.07691")),
    "distill": StageDefaults((Rate(2e-5, f"{OURS}, as sft"), Rate(1e-5, f"{OURS}, as sft", 3e10)), _LORA, 3.0,
                             "cosine", 0.03, 128, f"{OURS}, as sft"),
    "policy": StageDefaults((Rate(1e-6, f"{TRL} of GRPO; DeepSeekMath, arXiv 2402.03300, section 4.2"),),
                            (Rate(1e-5, REGRET),), 3.0, "constant", 0.0, 0,
                            f"three passes over the prompts: {TRL} of GRPO; a constant rate: {OURS}"),
}
"""Stage, or stage and `preference.method`, -> what it takes."""


def defaults_of(config: RunConfig, stage: Stage) -> StageDefaults:
    """Return what a stage takes, by the method that the settings name."""
    if stage == "policy" and config.policy.learns_preferences:
        stage = "preference"
    return DEFAULTS.get(f"{stage}.{config.preference.method}", DEFAULTS[stage])


def base_of_model(name: str, model: ModelConfig, precision: Literal["fp32", "bf16", "fp64"], stage: Stage,
                  lora: LoraConfig | None = None) -> RunConfig:
    """Return the settings that a stage begins with where no recipe is named.

    Args:
        name: of the model, in the recipe's place.
        model: the architecture of --from.
        precision: of weights and activations.
        stage: which.
        lora: of an adapter that is trained on; None: there is none.
    """
    # AdamW as libraries of fine-tuning have it; the rate itself depends on settings that are still to come
    return RunConfig(
        name, model, lora=lora or LoraConfig(),
        optim=OptimConfig(min_lr=0.0, warmup_steps=0, weight_decay=0.0, beta2=0.999),
        train=TrainConfig(epochs=DEFAULTS[stage].epochs, precision=precision, global_batch_size=1))


def rate_settings(config: RunConfig, stage: Stage, num_params: float, said: Collection[str]
                  ) -> dict[str, str]:
    """Return the settings of rate and schedule that the table gives -> where each is from.

    Args:
        config: the settings with what was said.
        stage: which.
        num_params: of the model.
        said: keys that the command line sets.
    """
    found = defaults_of(config, stage)
    rate = found.rate(num_params, lora=config.lora.on)
    given = {f"optim.lr={rate.lr!r}": rate.source, f"optim.schedule={found.schedule}": found.source}
    if found.epochs != DEFAULTS[stage].epochs:
        given[f"train.epochs={found.epochs!r}"] = found.source
    return {setting: source for setting, source in given.items() if setting.partition("=")[0] not in said}


def refuse_pretraining_rate(config: RunConfig, stage: Stage, num_params: float) -> None:
    """Refuse the rate that a pretraining recipe brings to a stage of post-training.

    Args:
        config: the settings, of a recipe of pretraining.
        stage: which.
        num_params: of the model.

    Raises:
        UserError: it is far above the stage's own.
    """
    rate = defaults_of(config, stage).rate(num_params, lora=config.lora.on)
    if config.optim.lr > PRETRAINING_RATE * rate.lr and not any(phase.lr for phase in config.data.phases):
        command = COMMANDS[stage]
        raise UserError(f"optim.lr = {config.optim.lr:g}: is the pretraining rate of recipe {config.recipe}, "
                        f"and {command} takes {rate.lr:g}; leave RECIPE out to train by the defaults of "
                        f"{command}, or set the rate that you want, e.g. --set optim.lr={rate.lr:g}",
                        Fix(options=("--set", f"optim.lr={rate.lr:g}")))
