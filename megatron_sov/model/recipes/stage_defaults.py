"""Post-training stage defaults, with sources, for settings that neither command line nor recipe sets (no
torch).

The architecture comes from --from. Learning rate, schedule and epochs come from this table, by stage and
model size. Sample lengths and batch sizes follow from the data (`commands.train.setup.data_defaults`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.model.config import LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

Stage = Literal["sft", "preference", "distill", "policy"]
COMMANDS: dict[str, str] = {"sft": "sft", "preference": "prefer", "distill": "distill", "policy": "rl"}
"""Stage objective -> stage name in messages."""
LENGTHS = ("rollout.rounds", "train.epochs", "train.steps", "train.tokens")
"""Settings for the run's length, by precedence."""
MAX_DEFAULT_EPOCHS = 20.0
"""Maximum passes over the data unless the user sets the length."""
MAX_RATE_RATIO = 5.0
"""Ratio to the stage's learning rate at which a pretraining recipe's rate is rejected."""
QLORA, REGRET = "QLoRA, arXiv 2305.14314", "ten times the full rate: LoRA Without Regret (2025)"
TULU, TRL, OURS = "Tülu 3, arXiv 2411.15124", "default of TRL 1.16", "ours"


@dataclass(frozen=True)
class Rate:
    """A peak learning rate."""

    lr: float
    source: str
    """Source for the value."""
    from_params: float = 0.0
    """Smallest number of parameters it applies to; the last matching rate is used."""


@dataclass(frozen=True)
class StageDefaults:
    rates: tuple[Rate, ...]
    """Learning rates by model size, ascending."""
    lora: tuple[Rate, ...]
    """Learning rates with `lora.rank` set."""
    epochs: float
    """Passes over the data."""
    schedule: Literal["cosine", "linear", "constant"]
    warmup_share: float
    """Warm-up as a share of the run."""
    batch_size: int
    """Maximum samples per step; small data sets get fewer."""
    source: str
    """Source for epochs, schedule, warm-up and batch size."""

    def rate(self, num_params: float, *, lora: bool) -> Rate:
        """Return the learning rate for a model with `num_params` parameters."""
        return [rate for rate in (self.lora if lora else self.rates) if rate.from_params <= num_params][-1]


_LORA = (Rate(2e-4, QLORA), Rate(1e-4, QLORA, 3e10))
_LORA_PAIRS = (Rate(1e-5, REGRET),)


def _pair_defaults(*rates: Rate) -> StageDefaults:
    return StageDefaults(rates, _LORA_PAIRS, epochs=1.0, schedule="linear", warmup_share=0.1, batch_size=128,
                         source=f"one epoch, linear, 10 % warm-up, batch 128: {TULU}")


DEFAULTS: dict[str, StageDefaults] = {
    "sft": StageDefaults(
        (Rate(2e-5, f"{TRL}; Alpaca"), Rate(1e-5, "LIMA, arXiv 2305.11206", 3e10), Rate(2e-6, TULU, 6.5e10)),
        _LORA, 3.0, "cosine", 0.03, 128, "three epochs, cosine, 3 % warm-up, batch 128: Stanford Alpaca"),
    "preference": _pair_defaults(Rate(1e-6, TRL), Rate(5e-7, TULU, 7e9), Rate(2e-7, TULU, 6.5e10)),
    "preference.dpo-norm": _pair_defaults(Rate(5e-7, TULU), Rate(2e-7, TULU, 6.5e10)),
    "preference.simpo": _pair_defaults(Rate(5e-7, "arXiv 2405.14734 takes 3e-7 to 1e-6, by the model")),
    "preference.orpo": _pair_defaults(Rate(8e-6, "arXiv 2403.07691")),
    "distill": StageDefaults((Rate(2e-5, f"{OURS}, as sft"), Rate(1e-5, f"{OURS}, as sft", 3e10)), _LORA, 3.0,
                             "cosine", 0.03, 128, f"{OURS}, as sft"),
    "policy": StageDefaults((Rate(1e-6, f"{TRL} of GRPO; DeepSeekMath, arXiv 2402.03300, section 4.2"),),
                            (Rate(1e-5, REGRET),), 3.0, "constant", 0.0, 0,
                            f"three passes over the prompts: {TRL} of GRPO; a constant rate: {OURS}")}
"""Stage, or stage and `preference.method` -> defaults."""


def find_stage_defaults(config: RunConfig, stage: Stage) -> StageDefaults:
    """Return stage defaults for the method in `config`."""
    if stage == "policy" and config.policy.learns_preferences:
        stage = "preference"
    return DEFAULTS.get(f"{stage}.{config.preference.method}", DEFAULTS[stage])


def build_base_config(name: str, model: ModelConfig, precision: Literal["fp32", "bf16", "fp64"], stage: Stage,
                      lora: LoraConfig | None = None) -> RunConfig:
    """Return a stage's settings without a recipe.

    Args:
        name: model name, used as recipe name.
        model: architecture of --from.
        precision: dtype of weights and activations.
        stage: stage name.
        lora: LoRA settings of an adapter that is trained further; None: no adapter.
    """
    # AdamW's defaults in fine-tuning libraries; `find_rate_settings` sets the learning rate later.
    return RunConfig(
        name, model, lora=lora or LoraConfig(),
        optim=OptimConfig(min_lr=0.0, warmup_steps=0, weight_decay=0.0, beta2=0.999),
        train=TrainConfig(epochs=DEFAULTS[stage].epochs, precision=precision, global_batch_size=1))


def find_rate_settings(config: RunConfig, stage: Stage, num_params: float, requested: Collection[str]
                       ) -> dict[str, str]:
    """Return `key=value` settings for learning rate and schedule -> source.

    Args:
        config: settings of the user and recipe.
        stage: stage name.
        num_params: model parameters.
        requested: keys set on the command line.
    """
    defaults = find_stage_defaults(config, stage)
    rate = defaults.rate(num_params, lora=config.lora.on)
    values = {f"optim.lr={rate.lr!r}": rate.source, f"optim.schedule={defaults.schedule}": defaults.source}
    if defaults.epochs != DEFAULTS[stage].epochs:
        values[f"train.epochs={defaults.epochs!r}"] = defaults.source
    return {setting: source for setting, source in values.items()
            if setting.partition("=")[0] not in requested}


def refuse_pretraining_rate(config: RunConfig, stage: Stage, num_params: float, requested: Collection[str]
                            ) -> None:
    """Reject a pretraining recipe's learning rate in a post-training stage. `config`: settings from a
    pretraining recipe; `requested`: keys set by the user. Raises `UserError`: the rate is far above the
    stage's rate; the proposed line also replaces the recipe's length."""
    defaults = find_stage_defaults(config, stage)
    rate = defaults.rate(num_params, lora=config.lora.on)
    if config.optim.lr > MAX_RATE_RATIO * rate.lr and not any(phase.lr for phase in config.data.phases):
        command, options = COMMANDS[stage], ["--set", f"optim.lr={rate.lr:g}"]
        if defaults.epochs and not {*LENGTHS} & {*requested}:
            options += ["--set", f"train.epochs={defaults.epochs:g}"]
        raise UserError(f"optim.lr = {config.optim.lr:g}: is the pretraining rate of recipe {config.recipe}, "
                        f"and {command} takes {rate.lr:g}; leave RECIPE out to train by the defaults of "
                        f"{command}, or set the rate that you want, e.g. {' '.join(options)}",
                        Fix(options=tuple(options)))
