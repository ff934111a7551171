"""Responses of a row: what losses over whole answers are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Responses:
    """R responses, one per document of a packed row."""

    logprobs: torch.Tensor
    """[R] float64: log-probability of each, the sum over its tokens; differentiable."""
    num_tokens: torch.Tensor
    """[R] float64: learned tokens of each; 0 where a document has none, such as padding."""

    @property
    def means(self) -> torch.Tensor:
        """[R]: log-probability per token, 0 of a document without learned tokens."""
        return self.logprobs / self.num_tokens.clamp(min=1)


def responses_of(logprobs: torch.Tensor, learned: torch.Tensor, cu_seqlens: torch.Tensor) -> Responses:
    """Sum the log-probabilities of each document's learned labels.

    Sums are float64: answers of 32,768 tokens would lose digits in float32, and the order in which a GPU adds
    would be seen.

    Args:
        logprobs: [n] of a whole row's labels, as `Head.logprobs` returns them.
        learned: [n] bool: whether a label belongs to the response.
        cu_seqlens: [R + 1] int32: cumulative lengths of the row's documents, padding's too.

    Returns:
        One response per document.
    """
    num_documents = len(cu_seqlens) - 1
    document = torch.repeat_interleave(torch.arange(num_documents, device=logprobs.device),
                                       cu_seqlens.diff().long(), output_size=len(logprobs))
    # not a product: labels that are not learned may have a log-probability of -inf
    values = logprobs.double().where(learned, 0.0)
    zeros = values.new_zeros(num_documents)
    return Responses(zeros.index_add(0, document, values), zeros.index_add(0, document, learned.double()))
