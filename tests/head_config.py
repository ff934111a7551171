"""A stand-in for an output head, and the fields of a model config that a head reads."""

from types import SimpleNamespace
from typing import Any

import torch


class Logits:
    """Stand-in for the output head: its hidden states are already the logits."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = torch.nn.functional.cross_entropy(hidden, labels, reduction="none")
        return {term: (losses * w).sum() for term, w in weights.items()}, losses


def head_config(sequence_parallel: bool = False) -> Any:
    """Return the config of a head without a logit factor."""
    return SimpleNamespace(sequence_parallel=sequence_parallel, logits_multiplier=1.0)
