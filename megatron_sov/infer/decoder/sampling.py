"""Sample tokens from logits, with truncation.

Shapes: n positions, V vocabulary. Probabilities are float64, in the order of token ids.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sov.infer.request import Sampling


def compute_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the distributions [n, V] after temperature, top_k and top_p; the temperature must not be 0.

    The order is as in transformers: temperature, top_k, top_p of the remaining tokens. Ties are broken by the
    lower id.
    """
    shares = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    # Sorting is only needed for truncation.
    if not sampling.top_k and sampling.top_p == 1:
        return shares
    ordered, tokens = shares.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k:] = 0
        # top_p counts probability after the top_k cut
        ordered /= ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    # compare the sum before each token, so that the most probable token always stays
    ordered[before >= sampling.top_p] = 0
    truncated = torch.zeros_like(shares).scatter(1, tokens, ordered)
    return truncated / truncated.sum(dim=-1, keepdim=True)


def derive_seed(*numbers: int) -> int:
    """Derive a 31-bit seed from non-negative numbers, for libraries that take a single seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def draw_tokens(distributions: torch.Tensor, uniforms: Sequence[float]) -> list[int]:
    """Return the tokens at quantiles in [0, 1) for distributions [n, V], normalized or not.

    Tokens are ordered by id, so a quantile selects the same token at every layout.
    """
    cumulative = distributions.cumsum(dim=-1)
    total = cumulative[:, -1:]
    thresholds = torch.tensor(list(uniforms), dtype=torch.float64, device=total.device)[:, None] * total
    # Rounding must not exceed the total.
    thresholds = torch.minimum(thresholds, torch.nextafter(total, torch.zeros_like(total)))
    tokens: list[int] = torch.searchsorted(cumulative, thresholds, right=True)[:, 0].tolist()
    return tokens
