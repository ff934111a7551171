"""Parts of layers that the library has not: what a block adds to the residual, its output normalised and
multiplied where the architecture says so; norms by 1 + weight; layers that rotate at a speed of their own.

The first takes the place of the library's bias-dropout-add, which is where a layer hands over a block's
output together with the residual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.functional import dropout, gelu, rms_norm

gelu_tanh = partial(gelu, approximate="tanh")
"""GELU by its tanh approximation (arXiv 1606.08415, section 2)."""


def quick_gelu(gate: torch.Tensor) -> torch.Tensor:
    """Return GELU by its sigmoid approximation (arXiv 1606.08415, section 2); the library's own is compiled
    at its first call."""
    return gate * torch.sigmoid(1.702 * gate)


class BlockOutput(torch.nn.Module):
    """Residual + multiplier x dropout(norm(output))."""

    norm: torch.nn.Module | None
    """RMSNorm of the output; None: there is none."""

    def __init__(self, config: Any, norm: Any, multiplier: float) -> None:
        """Make the norm.

        Args:
            config: the library's TransformerConfig.
            norm: class of the norm; None: the output is not normalised.
            multiplier: factor on what is added.
        """
        super().__init__()
        self.norm = norm and norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self._multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return what adds a block's (output, bias) to the residual, as the library asks for it; there is no
        fused form."""
        def added(output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor,
                  share_dropped: float) -> torch.Tensor:
            output, bias = output_with_bias
            if bias is not None:
                output = output + bias
            if self.norm is not None:
                output = self.norm(output)
            output = dropout(output, share_dropped, training)
            return residual + (output if self._multiplier == 1 else output * self._multiplier)

        return added


class ZeroCenteredNorm(torch.nn.Module):
    """RMSNorm that multiplies by 1 + weight (Gemma), which torch does not have."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return rms_norm(states, self.weight.shape, 1 + self.weight, self._eps)


class OwnLayer(TransformerLayer):
    """A layer with residual sums of our own, which may rotate at another speed than the others.

    The library switches gradients on for its residual sums; with a norm's weight there that would keep a
    graph of every forward pass that wants none.
    """

    def __init__(self, *args: Any, turns: Sequence[float] | None, **kwargs: Any) -> None:
        """Make the layer.

        Args:
            turns: for each rotated channel, how often it turns while it turns once in other layers; None: as
                often.
        """
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        self._turns = turns
        self._kept: torch.Tensor | None = None  # no buffer: the library rounds those to the weights' dtype

    def _turns_beside(self, angles: torch.Tensor) -> torch.Tensor:
        """Return the turns where the angles are; a copy to a GPU in each pass would wait for it."""
        if self._kept is None or (self._kept.device, self._kept.dtype) != (angles.device, angles.dtype):
            self._kept = angles.new_tensor(self._turns)
        return self._kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, with its own angles."""
        if self._turns is not None:
            angles = kwargs["rotary_pos_emb"]
            kwargs["rotary_pos_emb"] = angles * self._turns_beside(angles)
        return super().forward(*args, **kwargs)
