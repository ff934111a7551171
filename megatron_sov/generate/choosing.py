"""Which of some words a model finds the most probable: rows of documents, and the best of a few logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sov.generate.request import Tokens

ROW_TOKENS, ROW_DOCUMENTS = 8192, 16
"""What a forward pass reads at a time, unless one document alone is longer: bounds memory,
that of the logits too."""


def rows_of(documents: Sequence[Tokens]) -> list[list[int]]:
    """Return documents of equal length, by index, in groups that go through the model together."""
    each = max(1, min(ROW_DOCUMENTS, ROW_TOKENS // len(documents[0])))
    return [list(range(start, min(start + each, len(documents)))) for start in range(0, len(documents), each)]


def best_words(logits: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    """Return the most probable of the words [places] int64 by logits [places, vocabulary]."""
    chosen = torch.tensor(list(words), device=logits.device)
    return chosen[logits[:, chosen].float().argmax(dim=-1)].cpu()
