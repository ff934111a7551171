"""Entries of a weight map for experts that a Hugging Face folder holds as one tensor of a layer, with inputs
before outputs, and the columns of gate and up projection in turns (gpt-oss)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sov.config import ModelConfig
from megatron_sov.models.weights import Layout, shape_of


@dataclass(frozen=True)
class StackLayout(Layout):
    """A block that is one Hugging Face tensor, whose axes stand in another order."""

    order: tuple[int, ...] = ()
    """Axes of the view in the order in which they are stored."""
    hf_shape: tuple[int, ...] = ()
    """[experts, inputs, outputs], or [experts, outputs] of biases."""

    @property
    def rows_stay(self) -> bool:
        """Return that the stored tensor is no run of the block's rows."""
        return False

    @property
    def block(self) -> tuple[int, ...]:
        """Return [experts, outputs, inputs], or [experts, outputs] of biases."""
        experts, *rest = self.hf_shape
        return (experts, *reversed(rest))

    def stored(self, length: int) -> tuple[int, ...]:
        """Return the stored shape: there is one part."""
        return self.hf_shape

    def to_stored(self, part: Any, length: int) -> Any:
        """Return the block as Hugging Face stores it."""
        return part.permute(self.order).reshape(self.hf_shape).contiguous()

    def to_view(self, tensor: Any, length: int) -> Any:
        """Return the stored tensor as the view."""
        turned = tensor.reshape([self.view[axis] for axis in self.order])
        return turned.permute([self.order.index(axis) for axis in range(len(self.order))])

    def places(self, stored: Any) -> Any:
        """Return where in the block (row-major) values lie, by their places in the stored tensor
        (row-major): numbers or integer tensors."""
        coordinates = {}
        for axis in reversed(self.order):
            coordinates[axis] = stored % self.view[axis]
            stored = stored // self.view[axis]
        place = coordinates[0]
        for axis in range(1, len(self.view)):
            place = place * self.view[axis] + coordinates[axis]
        return place


@dataclass(frozen=True)
class ExpertStack:
    """One Hugging Face tensor of all experts, which is a Megatron tensor with its axes turned."""

    megatron: str
    hf: str
    shape: str
    """Letters of one expert's tensor: inputs, outputs, or the outputs of a bias."""
    in_turns: bool = False
    """Whether columns of two matrices of that shape stand in turns, which in Megatron stand one behind the
    other: gate and up projection."""
    fp32: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Return the one name."""
        return (self.hf,)

    def layout(self, model: ModelConfig) -> Layout:
        """Return the whole tensor as one part, viewed as [experts, (gate and up,) outputs, (inputs)]."""
        *inputs, outputs = shape_of(self.shape, model)
        halves = [2] if self.in_turns else []
        view = (model.num_experts, *halves, outputs, *inputs)
        at_outputs = 1 + len(halves)
        order = (0, *(at_outputs + 1 for _ in inputs), at_outputs, *(1 for _ in halves))
        hf_shape = (model.num_experts, *inputs, outputs * (1 + len(halves)))
        return StackLayout(view, 0, (model.num_experts,), 1, order, hf_shape)
