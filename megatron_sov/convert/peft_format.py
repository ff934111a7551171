"""PEFT's names and shapes for the tensors of an adapter, and the settings that it wants beside them.

What decides them (peft 0.21.2): a linear layer's A and B stand under its name.  A stack of experts is a
parameter and not a layer: PEFT wraps the folder of both stacks twice, the gate and up projections inside
(`base_layer`), and lays all experts' A upon one another and their B beside one another.  In families with
experts PEFT takes `gate_proj` in `target_modules` for these stacks, so that feed-forward layers beside them
(shared experts, dense layers) must be named as parameters too, which PEFT adapts by the same names.  An
embedding's factors are transposed, and have each other's names.  Beside an adapter of embedding or head PEFT
saves their frozen weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_sov.config import LoraConfig, ModelConfig
from megatron_sov.config.lora import EMBEDDING, EXPERTS, FEED_FORWARD, HEAD, TARGETS
from megatron_sov.errors import UserError
from megatron_sov.models.adapters import MAGNITUDE, A, Adapted, B, adapted_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_ENDS = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}
_ENDS_OF_EMBEDDING = {A: ".lora_embedding_B", B: ".lora_embedding_A"}
_FROZEN = ".base_layer.weight"
MAX_RANK, MAX_ALPHA = 1 << 20, 1e30
"""What no adapter reaches: sizes and scales that are computed from more leave the range of numbers."""
_IGNORED = ("inference_mode", "lora_dropout", "task_type", "init_lora_weights", "base_model_name_or_path",
            "revision", "auto_mapping", "peft_version", "r", "lora_alpha", "target_modules", "peft_type",
            "target_parameters", "use_dora", "use_rslora", "megatron_core", "loftq_config",
            "runtime_config", "qalora_group_size", "fan_in_fan_out", "exclude_modules")
"""Fields of adapter_config.json that are understood, or that change no number of a trained adapter."""
_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` under which the adapter belongs to the base as it is; PiSSA, OLoRA, CorDA,
LoftQ and LoRA-GA take something out of it first."""


def peft_name(of: Adapted, tensor: str) -> str:
    """Return PEFT's name of one of a module's tensors (`A`, `B`, `MAGNITUDE`)."""
    folder = of.name
    if is_embedding(of):
        return f"{_PREFIX}{folder}{_ENDS_OF_EMBEDDING[tensor]}"
    if of.num_experts:
        folder = of.name.rpartition(".")[0] + (".base_layer" if of.halves > 1 else "")
    return f"{_PREFIX}{folder}{_ENDS[tensor]}"


def is_embedding(of: Adapted) -> bool:
    """Return whether the token embedding is adapted."""
    return of.name.endswith(f".{EMBEDDING}")


def frozen_copies(names: Iterable[str]) -> dict[str, str]:
    """Return which tensors of a PEFT folder are frozen weights of the base: theirs -> the base's name."""
    return {name: name.removeprefix(_PREFIX).removesuffix(_FROZEN) + ".weight" for name in names
            if name.endswith((f"{HEAD}{_FROZEN}", f"{EMBEDDING}{_FROZEN}"))}


def to_peft_shape(of: Adapted, tensor: str, ours: torch.Tensor) -> torch.Tensor:
    """Return one of our tensors as PEFT has it."""
    if is_embedding(of):
        return ours.T
    if not of.num_experts:
        return ours
    if tensor == A:
        return ours.flatten(0, 1)
    stacked = ours.reshape(of.num_experts, of.out_features, -1)
    return stacked.permute(1, 2, 0).reshape(of.out_features, -1)


def from_peft_shape(of: Adapted, tensor: str, theirs: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return one of PEFT's tensors as we have it, with `shape`."""
    if is_embedding(of):
        return theirs.T.contiguous()
    if of.num_experts and tensor == B:
        theirs = theirs.reshape(of.out_features, -1, of.num_experts).permute(2, 0, 1)
    return theirs.reshape(*shape).contiguous()


def peft_config(model: ModelConfig, lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Raises:
        UserError: PEFT does not know such an adapter.
    """
    modules: set[str] = set()
    parameters: set[str] = set()
    for of in adapted_modules(model, lora):
        kind = of.name.rpartition(".")[2]
        inside = of.name.removeprefix("model.layers.").partition(".")[2]
        if of.num_experts:
            parameters.add(inside)
        elif model.num_moe_layers() and kind in FEED_FORWARD:
            if lora.dora:
                raise UserError("lora.dora = True on feed-forward layers beside experts: PEFT 0.21 adapts "
                                "these as parameters, without DoRA; use `convert to-hf`")
            parameters.add(f"{inside}.weight")
        else:
            modules.add(kind)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
            "inference_mode": True, "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
            "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": lora.dora,
            "target_modules": sorted(modules), "target_parameters": sorted(parameters) or None,
            "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True}


def lora_of(config: dict[str, Any], names: Sequence[str], model: ModelConfig, where: object) -> LoraConfig:
    """Return the settings of a PEFT adapter.

    Args:
        config: the content of its adapter_config.json.
        names: of its tensors, which say what is adapted.
        model: the architecture of its base.
        where: the folder, for messages.

    Raises:
        UserError: it is no adapter that we have the like of; the message names the field or the tensor.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type = {config.get('peft_type')!r}; only LORA adapters can be read")
    unknown = [f"{name} = {value!r}" for name, value in config.items()
               if name not in _IGNORED and (value is True or value not in (None, False, {}, [], "none", 1))]
    if unknown or config.get("fan_in_fan_out"):
        raise UserError(f"{where}: {', '.join(unknown) or 'fan_in_fan_out = True'} in {CONFIG} cannot be "
                        "kept; merge the adapter with PEFT, and convert the merged model")
    started = config.get("init_lora_weights", True)
    if str(started).lower() not in _KEEP_THE_BASE:
        raise UserError(f"{where}: init_lora_weights = {started!r} in {CONFIG} has changed the base, and the "
                        "adapter belongs to what was left; merge it with PEFT, and convert the merged model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_RANK
            or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA):
        raise UserError(f"{where}: r = {rank!r} and lora_alpha = {alpha!r} in {CONFIG} must be positive "
                        f"numbers, up to {MAX_RANK:,} and {MAX_ALPHA:g}; restore it from its source")
    scale = math.sqrt(rank) if config.get("use_rslora") else 1.0
    dora = bool(config.get("use_dora"))
    targets = _targets(set(names), model, dora, where)
    return LoraConfig(rank, float(alpha) * scale, targets, dora)


def _targets(names: set[str], model: ModelConfig, dora: bool, where: object) -> tuple[Any, ...]:
    """Return what a set of tensors adapts, which must be whole."""
    of_target: dict[str, set[str]] = {}
    tables = (HEAD, EMBEDDING)
    known: tuple[Any, ...] = TARGETS
    every = LoraConfig(1, 1.0, tuple(
        t for t in known if t not in tables or not (model.tied_embeddings or dora)))
    for of in adapted_modules(model, every):
        target = EXPERTS if of.num_experts else of.name.rpartition(".")[2]
        of_target.setdefault(target, set()).update(
            peft_name(of, tensor) for tensor in ((A, B, MAGNITUDE) if dora else (A, B)))
    unknown = sorted(names - {name for known in of_target.values() for name in known})
    vocabulary = [name for name in unknown if any(target in name for target in tables)]
    if vocabulary and model.tied_embeddings:
        raise UserError(f"{where}: {vocabulary[0]} adapts one side of a weight that is embedding and head "
                        "(model.tied_embeddings), so that no merged model could hold it; train an adapter "
                        "without it")
    if vocabulary and dora:
        raise UserError(f"{where}: {vocabulary[0]} under use_dora = True: DoRA is not built for "
                        f"{' and '.join(tables)}; merge the adapter with PEFT, and convert the merged model")
    if unknown:
        raise UserError(f"{where}: {unknown[0]} ({len(unknown)} such tensors) adapts nothing that can be "
                        f"adapted here ({', '.join(TARGETS[1:])})")
    found = tuple(target for target, known in of_target.items() if known & names)
    for target in found:
        missing = sorted(of_target[target] - names)
        if missing:
            raise UserError(f"{where}: adapts {target} in some layers and not in others (it lacks "
                            f"{missing[0]}), which cannot be said by lora.targets; merge it with PEFT, and "
                            "convert the merged model")
    if not found:
        raise UserError(f"{where}: holds no tensor of an adapter")
    return found
