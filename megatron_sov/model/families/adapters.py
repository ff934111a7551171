"""LoRA adapter tensors: names, shapes, and their places in Megatron-Core tensors.

Tensors are named after the Hugging Face modules they adapt, as in PEFT. Routed experts are adapted as
transformers stores them, in two stacks per layer: an expert has a single A and B for gate and up projections
together.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from megatron_sov.base.settings import ProblemCode, SettingsError, SettingsProblem
from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.config.lora import ALL_LINEAR, EMBEDDING, EXPERTS, HEAD, TARGETS
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.weights import Experts, Link

PREFIX = "adapter."
"""Prefix for all adapter tensors in checkpoints."""
A, B, MAGNITUDE = "lora_A", "lora_B", "magnitude"
_TRUNK = "decoder.layers."
_STACK = ".experts.experts."


@dataclass(frozen=True)
class AdaptedModule:
    """An adapted Hugging Face module: a linear layer, the embedding, or a stack of experts."""

    name: str
    """Module name in transformers: `model.layers.0.self_attn.q_proj`,
    `model.layers.0.mlp.experts.down_proj`."""
    link: Link
    """Megatron-Core block with the module's weight; for experts, expert 0's block."""
    part: int
    """Index of the weight among the link's Hugging Face tensors; 0 for experts."""
    num_experts: int
    """Stacked experts; 0 for other modules."""
    out_features: int
    """Rows in the weight (for experts, in a single expert's weight)."""
    in_features: int
    """Columns in the weight."""

    @property
    def linear(self) -> str:
        """Megatron-Core module name, with the layer's global index."""
        return self.link.key.removesuffix(".weight")

    @property
    def halves(self) -> int:
        """Matrices stacked in B: 2 for gate and up projections of experts, else 1."""
        return len(self.link.hf_names) if self.num_experts else 1

    def key(self, tensor: str) -> str:
        """Return the checkpoint name of tensor `A`, `B` or `MAGNITUDE`."""
        return f"{PREFIX}{self.name}.{tensor}"

    def shapes(self, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
        """Return checkpoint name -> global shape of the module's adapter tensors."""
        shapes: dict[str, tuple[int, ...]] = {
            self.key(A): (lora.rank, self.in_features), self.key(B): (self.out_features, lora.rank)}
        if self.num_experts:
            # Gate and up projections have the same input and share A; B has a half for each.
            halves = () if self.halves == 1 else (self.halves,)
            shapes = {self.key(A): (self.num_experts, lora.rank, self.in_features),
                      self.key(B): (self.num_experts, *halves, self.out_features // self.halves, lora.rank)}
        return shapes | ({self.key(MAGNITUDE): (self.out_features,)} if lora.dora else {})


@lru_cache(maxsize=256)
def find_adaptable_modules(model: ModelConfig) -> frozenset[str]:
    """Return the values of `lora.targets` that the model's weight map supports, prediction layers
    excluded."""
    targets = set()
    for section in models.get_family(model.family).weights:
        # Prediction layers are excluded: transformers drops them, so it could not load an adapter.
        for entry in section.entries if not section.where.startswith("mtp") and section.layers(model) else ():
            names = [name.removesuffix(".weight").rpartition(".")[2] for name in entry.hf_names]
            if isinstance(entry, Experts) or _STACK in entry.megatron:
                names = [EXPERTS]
            if math.prod(entry.layout(model).block):  # 0 for a model without shared experts
                targets |= {*names} & {*TARGETS}
    return frozenset(targets)


def resolve_targets(lora: LoraConfig, model: ModelConfig) -> frozenset[str]:
    """Return the targets adapted in `model`, with all-linear replaced by module names. Raises
    `SettingsError`: a target does not exist in the model."""
    if not lora.on:
        return frozenset()
    named, having = frozenset(lora.targets) - {ALL_LINEAR}, find_adaptable_modules(model)
    # `LoraConfig.problems` reports tied embeddings and heads.
    if missing := sorted(named - having - {HEAD, EMBEDDING}):
        raise SettingsError("settings", [SettingsProblem(
            ProblemCode.RULE, "lora.targets", f"names {target}, which this model lacks", lora.targets,
            "leave it out") for target in missing])
    # As in PEFT, all-linear excludes output head and embedding.
    return named | (having - {HEAD, EMBEDDING} if ALL_LINEAR in lora.targets else frozenset())


def adapter_identity(lora: LoraConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the LoRA settings that distinguish adapters, with resolved targets; only `rank` without LoRA."""
    if not lora.on:
        return {"rank": 0}
    return asdict(lora) | {"targets": sorted(resolve_targets(lora, model))}


def find_adapted_modules(model: ModelConfig, lora: LoraConfig) -> list[AdaptedModule]:
    """Return all adapted modules in weight map order."""
    return list(_iter_adapted_modules(model, lora))


def count_adapter_params(model: ModelConfig, lora: LoraConfig) -> int:
    """Count adapter parameters, all trained."""
    return sum(math.prod(shape) for module in find_adapted_modules(model, lora)
               for shape in module.shapes(lora).values())


def _iter_adapted_modules(model: ModelConfig, lora: LoraConfig) -> Iterator[AdaptedModule]:
    targets = resolve_targets(lora, model)
    for link in models.get_family(model.family).links(model) if lora.on else ():
        # A stack of routed experts [experts, rows, columns]; a convolution has three axes, too. Yield a
        # stack once, at expert 0.
        if _STACK in link.key and len(link.shape) == 3:
            if EXPERTS in targets and not link.offset[0] and link.key.startswith(_TRUNK):
                yield _expert_stack(link, model.family)
        # Transformer layers, output head and embedding; not prediction layers and encoders.
        elif link.key.startswith(_TRUNK) or any(name in link.hf_names[0] for name in (HEAD, EMBEDDING)):
            for part, (name, shape) in enumerate(link.hf_shapes().items()):
                module = name.removesuffix(".weight")
                # Norms and biases have one axis and cannot be factored.
                if len(shape) == 2 and module.rpartition(".")[2] in targets:
                    yield AdaptedModule(to_memory_name(module, model.family), link, part, 0, *shape)


def to_memory_name(name: str, family: str) -> str:
    """Return transformers' name for a module called `name` in a folder."""
    for folder, memory in models.get_family(family).in_memory:
        name = name.replace(folder, memory)
    return name


def _expert_stack(link: Link, family: str) -> AdaptedModule:
    """Return the expert stack for expert 0's link."""
    folder = to_memory_name(link.hf_names[0].partition(".experts.0.")[0], family) + ".experts"
    name = "gate_up_proj" if len(link.hf_names) > 1 else "down_proj"
    return AdaptedModule(f"{folder}.{name}", link, 0, link.shape[0], *link.block_shape)


@dataclass(frozen=True)
class AdapterPlace:
    """The adapter matrices that update a Hugging Face weight."""

    of: AdaptedModule
    """Adapted module."""
    expert: int
    """Index in the stack of experts; 0 for other modules."""
    half: int
    """Half of B: 0 for the gate, 1 for the up projection; 0 for modules without halves."""

    def update(self, tensors: dict[str, Any]) -> tuple[Any, Any]:
        """Return A and B for this weight.

        Args:
            tensors: full adapter tensors by checkpoint name.
        """
        a, b = tensors[self.of.key(A)], tensors[self.of.key(B)]
        if self.of.num_experts:
            a, b = a[self.expert], b[self.expert]
        return a, b[self.half] if self.of.halves > 1 else b


def find_adapter_places(model: ModelConfig, lora: LoraConfig) -> dict[str, AdapterPlace]:
    """Return Hugging Face weight name -> adapter place, for all adapted weights."""
    adapter_places: dict[str, AdapterPlace] = {}
    # The weight map has a link per expert, an adapter has a module per stack: match them by Megatron key.
    stacks = {module.link.key: module for module in find_adapted_modules(model, lora) if module.num_experts}
    adapter_places |= {module.link.hf_names[module.part]: AdapterPlace(module, 0, 0)
                       for module in find_adapted_modules(model, lora) if not module.num_experts}
    for link in models.get_family(model.family).links(model) if stacks else ():
        if link.key in stacks:
            adapter_places |= {name: AdapterPlace(stacks[link.key], link.offset[0], half)
                               for half, name in enumerate(link.hf_names)}
    return adapter_places
