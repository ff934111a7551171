"""What a block adds to the residual: its output, normalised and multiplied where the architecture says so.

It takes the place of the library's bias-dropout-add, which is where a layer hands over a block's output
together with the residual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.functional import dropout


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


class OwnGradModeLayer(TransformerLayer):
    """A layer whose residual sums compute gradients only where the rest does: the library's switch them on,
    and a norm's weight there would keep a graph of every forward pass that wants none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
