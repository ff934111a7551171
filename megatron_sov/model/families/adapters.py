"""What a low-rank adapter of a model consists of: which Hugging Face modules it adapts, with tensors of which
names and shapes, and where each belongs in the megatron-core tensors.

The tensors have the names of the modules that they adapt, so that an adapter says the same here and in PEFT.
Routed experts are adapted as transformers holds them, in two stacks a layer: each expert has one A and one B
for its gate and up projections together.
"""

from __future__ import annotations

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
"""What the names of all tensors of an adapter begin with."""
A, B, MAGNITUDE = "lora_A", "lora_B", "magnitude"
_TRUNK = "decoder.layers."
_STACK = ".experts.experts."


@dataclass(frozen=True)
class Adapted:
    """A Hugging Face module that is adapted: a linear layer, the embedding, or one of a layer's two stacks of
    experts."""

    name: str
    """As transformers calls it: `model.layers.0.self_attn.q_proj`, `model.layers.0.mlp.experts.down_proj`."""
    link: Link
    """The block of a megatron-core tensor that its weight is in; of experts, that of the first one."""
    part: int
    """Which of the link's Hugging Face tensors its weight is; of experts 0: all of them together."""
    num_experts: int
    """How many experts are stacked; 0: none."""
    out_features: int
    """Rows of its weight, or of each expert's."""
    in_features: int
    """Columns."""

    @property
    def linear(self) -> str:
        """Return the name of the megatron-core module, with the layer's number in the whole model."""
        return self.link.key.removesuffix(".weight")

    @property
    def halves(self) -> int:
        """Return how many matrices B holds one upon the other: gate and up of experts, else one."""
        return len(self.link.hf_names) if self.num_experts else 1

    def key(self, tensor: str) -> str:
        """Return the name of one of its tensors (`A`, `B`, `MAGNITUDE`) in checkpoints and rules."""
        return f"{PREFIX}{self.name}.{tensor}"

    def shapes(self, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
        """Return the global shape of each of its tensors, by name."""
        found: dict[str, tuple[int, ...]] = {
            self.key(A): (lora.rank, self.in_features), self.key(B): (self.out_features, lora.rank)}
        if self.num_experts:
            # Gate and up share one A: they have the same input. B holds a half for each.
            halves = () if self.halves == 1 else (self.halves,)
            found = {self.key(A): (self.num_experts, lora.rank, self.in_features),
                     self.key(B): (self.num_experts, *halves, self.out_features // self.halves, lora.rank)}
        return found | ({self.key(MAGNITUDE): (self.out_features,)} if lora.dora else {})


@lru_cache(maxsize=256)
def adaptable(model: ModelConfig) -> frozenset[str]:
    """Return what of a model may be adapted, as `lora.targets` names it: what its family's weight map has of
    that outside of prediction layers."""
    found = set()
    for section in models.get(model.family).weights:
        # Prediction layers never: transformers drops them, and nothing could load their adapter.
        for entry in section.entries if not section.where.startswith("mtp") and section.layers(model) else ():
            names = [name.removesuffix(".weight").rpartition(".")[2] for name in entry.hf_names]
            if isinstance(entry, Experts) or _STACK in entry.megatron:
                names = [EXPERTS]
            # no shared experts are some of width 0
            found |= {*names} & {*TARGETS} if math.prod(entry.layout(model).block) else set()
    return frozenset(found)


def adapted(lora: LoraConfig, model: ModelConfig) -> frozenset[str]:
    """Return what is adapted in a model, with `all-linear` spelled out.

    Raises:
        SettingsError: the settings name what the model lacks.
    """
    if not lora.on:
        return frozenset()
    named, having = frozenset(lora.targets) - {ALL_LINEAR}, adaptable(model)
    # Of one table for embedding and head, `LoraConfig.problems` tells more.
    if missing := sorted(named - having - {HEAD, EMBEDDING}):
        raise SettingsError("settings", [SettingsProblem(
            ProblemCode.RULE, "lora.targets", f"names {target}, which this model lacks", lora.targets,
            "leave it out") for target in missing])
    # Heads and embeddings are never among `all-linear`, as in PEFT.
    return named | (having - {HEAD, EMBEDDING} if ALL_LINEAR in lora.targets else frozenset())


def identity(lora: LoraConfig, model: ModelConfig) -> dict[str, Any]:
    """Return what makes an adapter of a model another one than that of other settings, by the setting's name:
    what is adapted in the place of how that is spelled; without adapters `rank` alone."""
    if not lora.on:
        return {"rank": 0}
    return asdict(lora) | {"targets": sorted(adapted(lora, model))}


def adapted_modules(model: ModelConfig, lora: LoraConfig) -> list[Adapted]:
    """Return every module that an adapter adapts, in the order of the weight map."""
    return list(_found(model, lora))


def adapter_params(model: ModelConfig, lora: LoraConfig) -> int:
    """Return the parameters of a model's adapter, all of which learn."""
    return sum(math.prod(shape) for of in adapted_modules(model, lora) for shape in of.shapes(lora).values())


def _found(model: ModelConfig, lora: LoraConfig) -> Iterator[Adapted]:
    targets = adapted(lora, model)
    for link in models.get(model.family).links(model) if lora.on else ():
        # [experts, rows, columns], a stack of routed experts (a convolution has three axes, too). One entry
        # per stack, taken at its first expert.
        if _STACK in link.key and len(link.shape) == 3:
            if EXPERTS in targets and not link.offset[0] and link.key.startswith(_TRUNK):
                yield _stack(link, model.family)
        # Trunk, head and embedding alone: this leaves prediction layers and encoders out.
        elif link.key.startswith(_TRUNK) or any(name in link.hf_names[0] for name in (HEAD, EMBEDDING)):
            for part, (name, shape) in enumerate(link.hf_shapes().items()):
                module = name.removesuffix(".weight")
                # Two axes: norms and biases cannot be factored.
                if len(shape) == 2 and module.rpartition(".")[2] in targets:
                    yield Adapted(in_memory(module, model.family), link, part, 0, *shape)


def in_memory(name: str, family: str) -> str:
    """Return transformers' name of a module that a folder has under `name`."""
    for folder, memory in models.get(family).in_memory:
        name = name.replace(folder, memory)
    return name


def _stack(link: Link, family: str) -> Adapted:
    """Return the stack of experts whose first one's block is given."""
    folder = in_memory(link.hf_names[0].partition(".experts.0.")[0], family) + ".experts"
    name = "gate_up_proj" if len(link.hf_names) > 1 else "down_proj"
    return Adapted(f"{folder}.{name}", link, 0, link.shape[0], *link.block_shape)


@dataclass(frozen=True)
class AdapterPlace:
    """What changes one Hugging Face weight."""

    of: Adapted
    """Whose tensors."""
    expert: int
    """Which of the stacked experts; 0 where none are."""
    half: int
    """Which half of B: 0 the gate's, 1 the up projection's; 0 where there is one."""

    def update(self, tensors: dict[str, Any]) -> tuple[Any, Any]:
        """Return the A and B of this weight.

        Args:
            tensors: the adapted module's whole ones, by name.
        """
        a, b = tensors[self.of.key(A)], tensors[self.of.key(B)]
        if self.of.num_experts:
            a, b = a[self.expert], b[self.expert]
        return a, b[self.half] if self.of.halves > 1 else b


def places(model: ModelConfig, lora: LoraConfig) -> dict[str, AdapterPlace]:
    """Return what changes each Hugging Face weight that an adapter changes, by the weight's name."""
    found: dict[str, AdapterPlace] = {}
    # The map names each expert's tensors; an adapter names the stack, so the way back goes over the
    # Megatron key.
    stacks = {of.link.key: of for of in adapted_modules(model, lora) if of.num_experts}
    found |= {of.link.hf_names[of.part]: AdapterPlace(of, 0, 0)
              for of in adapted_modules(model, lora) if not of.num_experts}
    for link in models.get(model.family).links(model) if stacks else ():
        if link.key in stacks:
            found |= {name: AdapterPlace(stacks[link.key], link.offset[0], half)
                      for half, name in enumerate(link.hf_names)}
    return found
