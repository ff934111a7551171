"""An adapter's checkpoint read as the model that it makes of its base: W + alpha / rank B A."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import torch

from megatron_sov.artifacts import ArtifactWriter
from megatron_sov.config import LoraConfig
from megatron_sov.convert.sources import CheckpointWeights, check_exact
from megatron_sov.mcore.checkpoint.sharded_tensors import TensorReader
from megatron_sov.models.adapters import MAGNITUDE, Adapted, Place, adapted_modules, places
from megatron_sov.runs.checkpoints import ADAPTER, AdapterBase, adapter_base, found_base, settings_of


def merged(weight: torch.Tensor, place: Place, tensors: dict[str, torch.Tensor],
           lora: LoraConfig) -> torch.Tensor:
    """Return a weight with its adapter inside, computed in float32 or the weight's own wider dtype.

    Args:
        weight: the frozen one.
        place: what changes it.
        tensors: the adapted module's, by name.
        lora: rank, scale and kind.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (t.to(wide) for t in place.update(tensors))
    total = weight.to(wide) + lora.alpha / lora.rank * (b @ a)
    magnitude = tensors.get(place.of.key(MAGNITUDE))
    if magnitude is not None:
        # rounded as the trained lengths are: where these have not moved, rows stay as long as they were
        lengths = torch.linalg.vector_norm(total, dim=1).to(magnitude.dtype)
        total *= (magnitude.to(wide) / lengths.to(wide))[:, None]
    return total.to(weight.dtype)


class AdaptedWeights:
    """The tensors of an adapter's base, with the adapter inside."""

    def __init__(self, path: Path, base: AdapterBase) -> None:
        self.path, self.base = path, CheckpointWeights(found_base(path, base))
        settings = settings_of(path)
        self.model, self.links, self.lora = settings.model, self.base.links, settings.lora
        self._places, self._of_thread = places(self.model, self.lora), threading.local()
        self.reader = TensorReader(path, ADAPTER)
        """The adapter's own tensors."""
        expected: dict[str, tuple[int, ...]] = {}
        for of in adapted_modules(self.model, self.lora):
            expected |= of.shapes(self.lora)
        found = {key: self.reader.shape(key)
                 for key in self.reader.keys()}  # noqa: SIM118  (a method of the reader, not a dict)
        check_exact(path, found, expected, "the checkpoint is damaged or of another version")
        self.reader.check_complete()

    def names(self) -> list[str]:
        """Return the names in the order of the weight map."""
        return self.base.names()

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the frozen tensor stands in its file."""
        return self.base.dtype(name)

    def held_in(self, file: str) -> list[str]:
        """Return the adapter's tensors of which one of its files holds a block."""
        return self.reader.held_in(file)

    def files_of(self, name: str) -> set[str]:
        """Return the adapter's files that hold what changes a tensor."""
        return {file for key in self._changing(name) for file in self.reader.files_of(key)}

    def _changing(self, name: str) -> list[str]:
        return list(self._places[name].of.shapes(self.lora)) if name in self._places else []

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor; `UserError` where a file is damaged."""
        weight = self.base.read(name)
        if name not in self._places:
            return weight
        of = self._places[name].of
        # all experts of a layer come from one stack, which is therefore kept
        last: tuple[Adapted, dict[str, torch.Tensor]] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] is not of:
            self._of_thread.last = None
            last = self._of_thread.last = (of, {key: self.reader.read(key) for key in of.shapes(self.lora)})
        return merged(weight, self._places[name], last[1], self.lora)


def checkpoint_weights(path: Path) -> CheckpointWeights | AdaptedWeights:
    """Open a checkpoint: of an adapter as the model that it makes of its base.

    Raises:
        UserError: its tensors are not exactly those of its model, or its base is not there.
    """
    base = adapter_base(path)
    return CheckpointWeights(path) if base is None else AdaptedWeights(path, base)


def add_inputs(writer: ArtifactWriter, weights: CheckpointWeights | AdaptedWeights, *,
               leaves: bool = False) -> None:
    """Record what an artifact is made from, see `ArtifactWriter.add_input`: a checkpoint, and of an adapter
    its base."""
    writer.add_input(weights.path, leaves=leaves)
    if isinstance(weights, AdaptedWeights):
        writer.add_input(weights.base.path, leaves=leaves)


def adapter_facts(weights: Any) -> dict[str, Any]:
    """Return what `inspect` says about an adapter; empty: these are weights of their own."""
    if not isinstance(weights, AdaptedWeights):
        return {}
    lora = weights.lora
    count = sum(math.prod(shape) for of in adapted_modules(weights.model, lora)
                for shape in of.shapes(lora).values())
    return {"adapter": f"{'DoRA' if lora.dora else 'LoRA'}, rank {lora.rank}, alpha {lora.alpha:g}, of "
                       f"{', '.join(sorted(lora.adapted(weights.model)))}",
            "adapter_parameters": count, "base": str(weights.base.path)}
