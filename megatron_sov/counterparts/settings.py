"""A run's settings of Megatron-LM or Megatron-Bridge as ours, with what has no counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.counterparts import known
from megatron_sov.counterparts.architecture import KNOWN, architecture, not_default, refuse_odd_counts
from megatron_sov.errors import UserError

Stated = Mapping[str, Any]
SECTIONS = ("model", "train", "validation", "optimizer", "scheduler", "ddp", "checkpoint", "logger", "rng",
            "dataset", "tokenizer", "dist", "mixed_precision")
"""Of Bridge's ConfigContainer, whose names are read; a later one goes before an earlier one."""
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd",
             "inverse-square-root": "inverse_sqrt"}
DECAYS = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "one_minus_sqrt"}
MAX_RAMP = 100_000
"""Sizes that a batch may have while it grows."""
FP8 = {"tensorwise": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}


@dataclass
class Translated:
    """What was made of theirs."""

    ours: dict[str, Any] = field(default_factory=dict)
    """Our setting -> its value."""
    no_need: dict[str, str] = field(default_factory=dict)
    """Theirs without a counterpart, without which nothing is lost -> why."""
    lost: dict[str, str] = field(default_factory=dict)
    """Theirs that are not taken over -> why, and what to do."""
    unknown: list[str] = field(default_factory=list)
    """Theirs that are not known here."""
    is_whole: bool = False
    """Whether the architecture is said, so that a run can start."""


def of_sections(sections: Mapping[str, Stated]) -> dict[str, Any]:
    """Return the settings of Bridge's sections under one another; what stands in others is passed over."""
    found: dict[str, Any] = {}
    for name in SECTIONS:
        found |= {key: value for key, value in sections.get(name, {}).items()
                  if value is not None and not key.startswith("_")}
    return found


def translate(stated: Stated, family: str = "") -> Translated:
    """Return our settings.

    Args:
        stated: theirs, under the names of `TransformerConfig` and of Megatron-LM's Namespace.
        family: of the model; empty: the only one that has it.

    Raises:
        UserError: a value is of another kind than theirs.
    """
    refuse_odd_counts(stated)
    made = Translated(is_whole=bool(stated.get("num_layers")))
    said = ({**known.UNSAID} if made.is_whole else {}) | dict(stated)
    if made.is_whole:
        try:
            model = architecture(said, family)
            made.ours |= {f"model.{name}": value for name, value in not_default(model).items()}
        except UserError as e:
            made.is_whole = False
            made.lost["the architecture"] = str(e)
    for theirs, ours in known.SAME.items():
        if said.get(theirs) is not None and not ours.startswith("model."):
            made.ours[ours] = said[theirs]
    for part in (_length, _schedule, _precision, _optimizer, _pipeline, _memory, _experts, _ramp, _watching):
        try:
            part(said, made)
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"their settings: a value cannot be understood ({e}); mend it where it is "
                            "from") from None
    for name, value in said.items():
        if name in known.INSTEAD and _is_set(value):
            made.lost.setdefault(name, known.INSTEAD[name])
        elif name in known.NO_NEED:
            made.no_need[name] = known.NO_NEED[name]
        elif (name not in {*known.SAME, *known.WORKED_OUT, *known.INSTEAD} and name not in KNOWN
              and _is_set(value)):
            made.unknown.append(name)
    return made


def _is_set(value: Any) -> bool:
    return value not in (None, False, [], {}, "")


def _length(said: Stated, made: Translated) -> None:
    """Enter how long, and in samples of what length."""
    batch = said.get("global_batch_size")
    if said.get("train_iters"):
        made.ours["train.steps"] = said["train_iters"]
    elif said.get("train_samples") and batch:
        made.ours["train.steps"] = -(-said["train_samples"] // batch)
    length = said.get("seq_length") or said.get("sequence_length")
    if length:
        made.ours["data.phases"] = [{"name": "main", "seq_len": length}]
        made.ours["data.packing"] = "concat"  # theirs cut documents at the sample's end
    dropout = said.get("attention_dropout", 0.1 if made.is_whole else 0.0)
    if dropout:
        made.lost["attention_dropout"] = f"{dropout}: attention has no dropout here; large runs set it to 0"


def _schedule(said: Stated, made: Translated) -> None:
    """Enter warm-up and decay, in steps."""
    style, steps = said.get("lr_decay_style"), made.ours.get("train.steps")
    if style in SCHEDULES:
        made.ours["optim.schedule"] = SCHEDULES[style]
    elif style:
        made.lost["lr_decay_style"] = f"{style!r}: choose one of cosine, linear, constant, wsd, inverse_sqrt"

    def in_steps(name: str) -> int | None:
        if said.get(f"{name}_iters"):
            return int(said[f"{name}_iters"])
        samples, batch = said.get(f"{name}_samples"), said.get("global_batch_size")
        return -(-samples // batch) if samples and batch else None

    warmup = in_steps("lr_warmup")
    if warmup is None and said.get("lr_warmup_fraction") and steps:
        warmup = round(said["lr_warmup_fraction"] * (in_steps("lr_decay") or steps))
    if warmup is not None or "lr_warmup_iters" in said:
        made.ours["optim.warmup_steps"] = warmup or 0
    decay = in_steps("lr_decay")
    if decay and steps and decay != steps:
        made.lost["lr_decay_iters"] = (f"{decay}: the rate falls over the whole run of {steps} steps here; "
                                       f"set train.steps={decay}, or add a phase for what follows")
    if style == "WSD":
        last, form = in_steps("lr_wsd_decay"), said.get("lr_wsd_decay_style", "exponential")
        if last and steps:
            made.ours["optim.decay_share"] = last / steps
        if form in DECAYS:
            made.ours["optim.decay_form"] = DECAYS[form]
        else:
            forms = ", ".join(DECAYS.values())
            made.lost["lr_wsd_decay_style"] = f"{form!r}: choose optim.decay_form among {forms}"


def _precision(said: Stated, made: Translated) -> None:
    mixed = said.get("mixed_precision")
    if said.get("bf16") or (isinstance(mixed, str) and mixed.startswith("bf16")):
        made.ours["train.precision"] = "bf16"
    elif made.is_whole and not said.get("fp16"):
        made.ours["train.precision"] = "fp32"
    if not said.get("fp8"):
        return
    recipe = said.get("fp8_recipe") or "delayed"
    if recipe in FP8:
        made.ours |= {"train.fp8": FP8[recipe], "train.fp8_format": said["fp8"]}
    else:
        made.lost["fp8_recipe"] = (f"{recipe!r}: its history is in no checkpoint, so it is refused; choose "
                                   "train.fp8 = tensorwise, blockwise or mxfp8")


def _optimizer(said: Stated, made: Translated) -> None:
    name = said.get("optimizer")
    if name in ("muon", "dist_muon"):
        made.ours["optim.name"] = "muon"
    elif name not in (None, "adam", "adamw"):
        made.lost["optimizer"] = f"{name!r}: choose optim.name = adamw or muon"
    if said.get("decoupled_weight_decay") is False:
        made.lost["decoupled_weight_decay"] = "False: weight decay is always decoupled here (AdamW)"


def _pipeline(said: Stated, made: Translated) -> None:
    stages = said.get("pipeline_model_parallel_size") or 1
    if said.get("virtual_pipeline_model_parallel_size"):
        made.ours["parallel.vpp"] = said["virtual_pipeline_model_parallel_size"]
    elif said.get("num_layers_per_virtual_pipeline_stage") and said.get("num_layers"):
        per_run = said["num_layers_per_virtual_pipeline_stage"]
        made.ours["parallel.vpp"] = said["num_layers"] // stages // per_run


def _memory(said: Stated, made: Translated) -> None:
    granularity = said.get("recompute_granularity")
    if granularity == "full":
        made.ours["train.recompute"] = True
    elif granularity:
        modules = said.get("recompute_modules") or ["core_attn"]  # theirs where nothing is said
        made.ours |= {"train.recompute": "selective",
                      "gpu.recompute_modules": [modules] if isinstance(modules, str) else modules}


def _experts(said: Stated, made: Translated) -> None:
    kind = said.get("moe_token_dispatcher_type")
    if not said.get("num_moe_experts") or not kind:
        return
    backend = said.get("moe_flex_dispatcher_backend", "deepep")
    made.ours["parallel.expert_dispatcher"] = (
        "deepep" if said.get("moe_enable_deepep") else backend if kind == "flex" else kind)
    balancing = said.get("moe_router_load_balancing_type", "aux_loss")
    if balancing not in ("seq_aux_loss", "none") and said.get("moe_aux_loss_coeff"):
        made.lost["moe_router_load_balancing_type"] = (
            f"{balancing!r}: balancing is by sequence here (model.seq_aux_loss_coeff), or by router_bias")


def _ramp(said: Stated, made: Translated) -> None:
    ramp, full = said.get("rampup_batch_size"), said.get("global_batch_size")
    if not ramp or not full:
        return
    first, increment, samples = (int(n) for n in ramp)
    if not (0 < first <= full and increment > 0 and full <= MAX_RAMP * increment):
        raise ValueError(f"rampup_batch_size = {str(ramp)[:80]} does not lead to {full} in at most "
                         f"{MAX_RAMP:,} steps")
    stretches = max(1, (full - first) // increment)
    steps = sum(round(samples / stretches / (first + i * increment)) for i in range(stretches))
    made.ours |= {"train.ramp_from_batch_size": first, "train.ramp_increment": increment,
                  "train.ramp_steps": steps}
    made.lost["rampup_batch_size"] = ("the batch grows in stretches of as many steps here, theirs have as "
                                      f"many samples; train.ramp_steps = {steps} is as many steps in all")


def _watching(said: Stated, made: Translated) -> None:
    if said.get("tensorboard_dir"):
        made.ours["obs.tensorboard"] = True
    if said.get("wandb_project"):
        made.ours["obs.wandb"] = True


def nested(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with dots in their names as nested objects, as a config.json has them."""
    found: dict[str, Any] = {}
    for name, value in ours.items():
        *groups, last = name.split(".")
        node = found
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return found


