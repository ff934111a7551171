"""Sample tokens from logits, with truncation and speculative drafts.

Shapes: n positions, V vocabulary, k drafts. Probabilities are float64, in the order of token ids.
"""

from __future__ import annotations

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


def count_greedy_matches(drafts: Sequence[int], best: Sequence[int]) -> int:
    """Count drafts equal to the model's greedy choices; `best` [k + 1]: choice after the sequence and after
    each draft."""
    count = 0
    while count < len(drafts) and drafts[count] == best[count]:
        count += 1
    return count


def accept_sampled_drafts(drafts: Sequence[int], guesses: torch.Tensor, targets: torch.Tensor,
                          uniforms: Sequence[float]) -> tuple[int, torch.Tensor]:
    """Judge sampled drafts; accepted drafts and the next token follow the target distributions.

    Algorithm 1 of Leviathan et al., arXiv 2211.17192: a draft x with draft probability q and model
    probability p is accepted with probability min(1, p(x) / q(x)); the first rejected draft is replaced by a
    sample from max(0, p - q).

    Args:
        drafts: k tokens, each drawn from its guess.
        guesses: q, [k, V].
        targets: p after the sequence and after each draft, [k + 1, V].
        uniforms: k numbers in [0, 1).

    Returns:
        Number of accepted drafts, and the distribution [V] (not normalized) of the next token.
    """
    for place, (token, uniform) in enumerate(zip(drafts, uniforms, strict=True)):
        p, q = targets[place], guesses[place]
        # u >= p / q, without the division.
        if uniform * float(q[token]) >= float(p[token]):
            return place, (p - q).clamp(min=0)
    return len(drafts), targets[len(drafts)]
