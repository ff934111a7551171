"""A run's settings of Megatron-LM or Megatron-Bridge as ours, with what has no counterpart."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sov.base.documents.bounded_yaml import BoundedLoader
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import notes
from megatron_sov.model.counterparts.architecture import KNOWN, architecture, not_default, refuse_odd_counts

# Reading the arguments of Megatron-LM out of a command line or a shell script, which is read and never run.

MAX_CHARS = 1 << 20
_ASSIGNED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=([^\s()]+|\"[^\"]*\"|'[^']*')\s*(?:#.*)?$",
                       re.MULTILINE)
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)(?::-([^}]*))?\}?")
_OPTION = re.compile(r"--[a-z][a-z0-9_-]*\Z")
NEGATED = {"no_position_embedding": "add_position_embedding", "no_rope_fusion": "apply_rope_fusion",
           "no_masked_softmax_fusion": "masked_softmax_fusion",
           "no_async_tensor_model_parallel_allreduce": "",
           "no_bias_swiglu_fusion": "bias_swiglu_fusion", "no_gradient_accumulation_fusion": ""}
SPELLED = {"fp8_format": "fp8"}
"""Arguments whose place in the Namespace is called otherwise."""
LISTS = ("data_path", "train_data_path", "valid_data_path", "rampup_batch_size", "recompute_modules",
         "moe_aux_loss_coeff", "moe_router_load_balancing_type")


@dataclass
class Arguments:
    """What a text says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Name, as in Megatron-LM's Namespace -> value; True where the option stands alone."""
    unresolved: dict[str, str] = field(default_factory=dict)
    """Name -> a value with a variable that the text does not set."""


def read_arguments(text: str) -> Arguments:
    """Return the arguments in a command line or shell script.

    Comments are passed over, lines that end in a backslash joined, and variables put in that the text itself
    sets to a plain value (or that have a default); nothing is run.
    """
    plain = text[:MAX_CHARS].replace("\\\n", " ")
    variables = {name: value.strip("\"'") for name, value in _ASSIGNED.findall(plain)}
    words = [word for line in plain.splitlines() for word in _words(line)]
    found = Arguments()
    name, given = "", list[str]()
    for word in [*words, "--end"]:
        if not _OPTION.match(word):
            given.append(word)
            continue
        if name:
            _enter(found, name, [_put_in(value, variables) for value in given])
        name, given = word[2:].replace("-", "_"), []
    return found


def _words(line: str) -> list[str]:
    """Return the words of a line; an option quoted with its value ("--split '99,1,0'") is several."""
    try:
        # As a shell splits it; a line with an open quote falls back to blanks.
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split("#")[0].split()
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if " " in word and (word.startswith("--") or value.lstrip().startswith("--")):
            # an option quoted with its value, or a variable of options: GPT_ARGS="--num-layers 32 ..."
            found += _words(word) if word.startswith("--") else [*_words(value.strip()), "--end"]
        elif _OPTION.match(option) and equals:
            found += [option, value]
        elif word in ("(", ")", ";", "\\", "&&", "|") or re.match(r"\w+\+?=\(", word):
            found.append("--end")
        else:
            found.append(word if word.startswith(("[", "(")) else word.rstrip(")"))
    # what stands behind the last option of a line that does not go on is another command's
    return [*found, "--end"] if found and not found[0].startswith("-") and "--" not in line else found


def _put_in(value: str, variables: dict[str, str]) -> str:
    # Variables may hold variables; four rounds, so that two that name each other end.
    for _ in range(4):
        value = _VARIABLE.sub(lambda m: variables.get(m[1], m[2] if m[2] is not None else m[0]), value)
    return value


def _enter(found: Arguments, name: str, given: list[str]) -> None:
    if name == "end":
        return
    name = SPELLED.get(name, name)
    if name in NEGATED:
        found.values[NEGATED[name] or name] = not NEGATED[name]
        return
    values = [value for value in given if value]
    if any("$" in value for value in values):
        found.unresolved[name] = " ".join(values)
    elif not values:
        found.values[name] = True
    elif name in LISTS and (len(values) > 1 or name.endswith("data_path")):
        found.values[name] = [_value(value) for value in values]
    else:
        found.values[name] = _value(values[0])


def _value(text: str) -> Any:
    """Return a number where a text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


# Reading a YAML file of Megatron-Bridge (`ConfigContainer`) as plain values: `_target_` is text here.

MAX_BYTES = 8 << 20
"""A run's whole configuration has some 100 kB."""


def read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """Return the sections (model, train, optimizer, ...) of a file.

    Raises:
        UserError: it is no YAML of plain values, or has no sections.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: has {file.stat().st_size:,} bytes, and a file of settings has "
                            f"{MAX_BYTES:,} at most; pass a YAML file of Megatron-Bridge")
        found = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=BoundedLoader)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); see to its permissions") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{file}: is no YAML of plain values ({reason}); restore it from its "
                        "source") from None
    sections = {name: value for name, value in found.items() if isinstance(name, str)} \
        if isinstance(found, dict) else {}
    if not any(isinstance(value, dict) for value in sections.values()):
        raise UserError(f"{file}: has no sections such as model and train, so it is no configuration of "
                        "Megatron-Bridge")
    return {name: {str(key): item for key, item in value.items()} for name, value in sections.items()
            if isinstance(value, dict)}


# What settings of Megatron-LM and Megatron-Bridge become here: the same, nothing since nothing is lost, or
# nothing since it does not exist here.

SAME = {
    "tensor_model_parallel_size": "parallel.tp", "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp", "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp", "sequence_parallel": "parallel.sp",
    "use_distributed_optimizer": "parallel.zero1", "overlap_grad_reduce": "parallel.overlap_grad_reduce",
    "overlap_param_gather": "parallel.overlap_param_gather", "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size", "seed": "train.seed",
    "hidden_dropout": "train.hidden_dropout", "save_interval": "train.checkpoint_every_steps",
    "eval_interval": "train.eval_every_steps", "log_interval": "train.log_every_steps",
    "async_save": "train.async_save", "deterministic_mode": "train.deterministic", "lr": "optim.lr",
    "min_lr": "optim.min_lr", "weight_decay": "optim.weight_decay", "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2", "adam_eps": "optim.eps", "clip_grad": "optim.clip_grad",
    "muon_momentum": "optim.muon_momentum", "wandb_project": "obs.wandb_project",
    "moe_aux_loss_coeff": "model.seq_aux_loss_coeff",
}
"""Theirs -> ours, where a value means the same."""
UNSAID = {
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-08, "weight_decay": 0.01, "clip_grad": 1.0,
    "hidden_dropout": 0.1, "seed": 1234, "lr_decay_style": "linear", "lr_warmup_iters": 0, "min_lr": 0.0,
}
"""What Megatron takes where a whole configuration says nothing, and ours would be another value."""
WORKED_OUT = {
    "train_iters", "train_samples", "seq_length", "sequence_length", "lr_decay_style", "lr_decay_iters",
    "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_wsd_decay_iters",
    "lr_wsd_decay_samples", "lr_wsd_decay_style", "bf16", "fp16", "mixed_precision", "optimizer", "fp8",
    "fp8_recipe", "recompute_granularity", "virtual_pipeline_model_parallel_size", "rampup_batch_size",
    "num_layers_per_virtual_pipeline_stage", "moe_token_dispatcher_type", "moe_flex_dispatcher_backend",
    "moe_enable_deepep", "recompute_modules", "attention_dropout", "tensorboard_dir",
    "decoupled_weight_decay",
}
"""Theirs that are read together with others."""
NO_NEED = notes("no_need")
"""Theirs that have no counterpart, and that nothing is lost without: why."""
INSTEAD = notes("instead")
"""Theirs that have no counterpart as a setting: what to do."""


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
class TranslatedSettings:
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


def translate(stated: Stated, family: str = "") -> TranslatedSettings:
    """Return our settings.

    Args:
        stated: theirs, under the names of `TransformerConfig` and of Megatron-LM's Namespace.
        family: of the model; empty: the only one that has it.

    Raises:
        UserError: a value is of another kind than theirs.
    """
    refuse_odd_counts(stated)
    made = TranslatedSettings(is_whole=bool(stated.get("num_layers")))
    said = ({**UNSAID} if made.is_whole else {}) | dict(stated)
    if made.is_whole:
        try:
            model = architecture(said, family)
            made.ours |= {f"model.{name}": value for name, value in not_default(model).items()}
        except UserError as e:
            made.is_whole = False
            made.lost["the architecture"] = str(e)
    for theirs, ours in SAME.items():
        if said.get(theirs) is not None and not ours.startswith("model."):
            made.ours[ours] = said[theirs]
    for part in (_length, _schedule, _precision, _optimizer, _pipeline, _memory, _experts, _ramp, _watching):
        try:
            part(said, made)
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"their settings: a value cannot be understood ({e}); mend it where it is "
                            "from") from None
    for name, value in said.items():
        if name in INSTEAD and _is_set(value):
            made.lost.setdefault(name, INSTEAD[name])
        elif name in NO_NEED:
            made.no_need[name] = NO_NEED[name]
        elif (name not in {*SAME, *WORKED_OUT, *INSTEAD} and name not in KNOWN
              and _is_set(value)):
            made.unknown.append(name)
    return made


def _is_set(value: Any) -> bool:
    return value not in (None, False, [], {}, "")


def _length(said: Stated, made: TranslatedSettings) -> None:
    """Enter how long, and in samples of what length."""
    batch = said.get("global_batch_size")
    if said.get("train_iters"):
        made.ours["train.steps"] = said["train_iters"]
    elif said.get("train_samples") and batch:
        made.ours["train.steps"] = -(-said["train_samples"] // batch)
    length = said.get("seq_length") or said.get("sequence_length")
    weights, adopted = _blend(said, made)
    if length or weights:
        made.ours["data.phases"] = [{"name": "main", **({"seq_len": length} if length else {}),
                                     **({"blend": weights} if weights else {})}]
    if weights:
        made.lost["data_path"] = (f"run `sov-data adopt {adopted} --tokenizer DIR --output DIR`, and pass "
                                  "--data DIR; data.phases has the weights")
    if length:
        made.ours["data.packing"] = "concat"  # theirs cut documents at the sample's end
    dropout = said.get("attention_dropout", 0.1 if made.is_whole else 0.0)
    if dropout:
        made.lost["attention_dropout"] = f"{dropout}: attention has no dropout here; large runs set it to 0"


def _blend(said: Stated, made: TranslatedSettings) -> tuple[dict[str, float], str]:
    """Return source -> weight of `--data-path 0.3 A 0.7 B`, and its NAME=PREFIX words; nothing without
    weights, or where they cannot be a blend's, which is told."""
    words = said.get("data_path")
    if not isinstance(words, list) or len(words) < 2 or len(words) % 2 or not all(
            isinstance(weight, int | float) for weight in words[::2]):
        return {}, ""
    weights = words[::2]
    if not (all(weight > 0 and weight is not True for weight in weights) and math.isfinite(sum(weights))):
        made.lost["data_path"] = (f"{' '.join(map(str, weights))}: weights must be finite and above 0; mend "
                                  f"them, or {INSTEAD['data_path']}")
        return {}, ""
    prefixes = [str(prefix) for prefix in words[1::2]]
    last = [Path(prefix).name.removesuffix("_document").removesuffix("_text") for prefix in prefixes]
    # as `sov-data adopt` takes them
    last = [re.sub(r"[^\w.-]+", "-", name).lstrip(".-") for name in last]
    names = [name if name not in ("", "tokenizer") and last.count(name) == 1 else f"{name or 'source'}-{i}"
             for i, name in enumerate(last, 1)]
    return dict(zip(names, weights, strict=True)), " ".join(
        shlex.quote(f"{name}={prefix}") for name, prefix in zip(names, prefixes, strict=True))


def _schedule(said: Stated, made: TranslatedSettings) -> None:
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


def _precision(said: Stated, made: TranslatedSettings) -> None:
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


def _optimizer(said: Stated, made: TranslatedSettings) -> None:
    name = said.get("optimizer")
    if name in ("muon", "dist_muon"):
        made.ours["optim.name"] = "muon"
    elif name not in (None, "adam", "adamw"):
        made.lost["optimizer"] = f"{name!r}: choose optim.name = adamw or muon"
    if said.get("decoupled_weight_decay") is False:
        made.lost["decoupled_weight_decay"] = "False: weight decay is always decoupled here (AdamW)"


def _pipeline(said: Stated, made: TranslatedSettings) -> None:
    stages = said.get("pipeline_model_parallel_size") or 1
    if said.get("virtual_pipeline_model_parallel_size"):
        made.ours["parallel.vpp"] = said["virtual_pipeline_model_parallel_size"]
    elif said.get("num_layers_per_virtual_pipeline_stage") and said.get("num_layers"):
        per_run = said["num_layers_per_virtual_pipeline_stage"]
        made.ours["parallel.vpp"] = said["num_layers"] // stages // per_run


def _memory(said: Stated, made: TranslatedSettings) -> None:
    granularity = said.get("recompute_granularity")
    if granularity == "full":
        made.ours["train.recompute"] = True
    elif granularity:
        modules = said.get("recompute_modules") or ["core_attn"]  # theirs where nothing is said
        made.ours |= {"train.recompute": "selective",
                      "gpu.recompute_modules": [modules] if isinstance(modules, str) else modules}


def _experts(said: Stated, made: TranslatedSettings) -> None:
    kind = said.get("moe_token_dispatcher_type")
    if not said.get("num_moe_experts") or not kind:
        return
    if said.get("moe_enable_deepep"):
        kind = "deepep"
    elif kind == "flex":
        kind = said.get("moe_flex_dispatcher_backend", "deepep")
    made.ours["parallel.expert_dispatcher"] = kind
    balancing = said.get("moe_router_load_balancing_type", "aux_loss")
    if balancing not in ("seq_aux_loss", "none") and said.get("moe_aux_loss_coeff"):
        made.lost["moe_router_load_balancing_type"] = (
            f"{balancing!r}: balancing is by sequence here (model.seq_aux_loss_coeff), or by router_bias")


def _ramp(said: Stated, made: TranslatedSettings) -> None:
    ramp, full = said.get("rampup_batch_size"), said.get("global_batch_size")
    if not ramp or not full:
        return
    first, increment, samples = (int(n) for n in ramp)
    if not (0 < first <= full and increment > 0 and full <= MAX_RAMP * increment):
        raise ValueError(f"rampup_batch_size = {str(ramp)[:80]} does not lead to {full} in at most "
                         f"{MAX_RAMP:,} steps")
    stretches = max(1, (full - first) // increment)
    # Theirs ramps by samples: a stretch of larger batches has fewer steps.
    steps = sum(round(samples / stretches / (first + i * increment)) for i in range(stretches))
    made.ours |= {"train.ramp_from_batch_size": first, "train.ramp_increment": increment,
                  "train.ramp_steps": steps}
    made.lost["rampup_batch_size"] = ("the batch grows in stretches of as many steps here, theirs have as "
                                      f"many samples; train.ramp_steps = {steps} is as many steps in all")


def _watching(said: Stated, made: TranslatedSettings) -> None:
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
