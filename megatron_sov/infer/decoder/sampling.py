"""From logits to tokens: truncated distributions, draws by quantile, drafts that the
model takes or refuses, and which of a few given words is the most probable.

Shapes: n positions, V vocabulary, k drafts.  Probabilities are float64, over token ids in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sov.infer.request import Sampling


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the tempered, truncated distributions [n, V] of logits [n, V]; the temperature must not be 0.

    As in transformers: the temperature first, then the top k, then the top p of what is left; of equally
    probable tokens the lower ids come first.
    """
    shares = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    # No sort where nothing is cut off.
    if not sampling.top_k and sampling.top_p == 1:
        return shares
    ordered, tokens = shares.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k:] = 0
        # top_p is a share of what top_k has left.
        ordered /= ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    # By the sum before a token, not with it: the most probable one always stays.
    ordered[before >= sampling.top_p] = 0
    kept = torch.zeros_like(shares).scatter(1, tokens, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def seed_of(*numbers: int) -> int:
    """Return a seed of 31 bits made of numbers that are not negative,
    for libraries that take a single one."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def draw(distributions: torch.Tensor, uniforms: Sequence[float]) -> list[int]:
    """Return the tokens at quantiles in [0, 1) of distributions [n, V], which need not be normalised.

    Tokens stand in the order of their ids, so a given quantile means the same at every layout.
    """
    reached = distributions.cumsum(dim=-1)
    total = reached[:, -1:]
    wanted = torch.tensor(list(uniforms), dtype=torch.float64, device=total.device)[:, None] * total
    # rounding must not step over the end
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    found: list[int] = torch.searchsorted(reached, wanted, right=True)[:, 0].tolist()
    return found


def accepted_greedily(drafts: Sequence[int], best: Sequence[int]) -> int:
    """Return how many drafts are the model's own choice; `best` [k + 1] stands behind the sequence and
    behind each draft."""
    count = 0
    while count < len(drafts) and drafts[count] == best[count]:
        count += 1
    return count


def accepted_by_chance(drafts: Sequence[int], guesses: torch.Tensor, targets: torch.Tensor,
                       uniforms: Sequence[float]) -> tuple[int, torch.Tensor]:
    """Judge drafts so that what is taken, with the next token drawn from what is returned,
    follows the targets alone.

    Leviathan et al., arXiv 2211.17192, algorithm 1: a draft x with probabilities q by the draft and p by the
    model is taken with probability min(1, p(x) / q(x)); the token in the place of the first refused one is
    drawn from max(0, p - q).

    Args:
        drafts: k tokens, each drawn from its guess.
        guesses: [k, V], q.
        targets: [k + 1, V], p behind the sequence and behind each draft.
        uniforms: k numbers in [0, 1).

    Returns:
        How many drafts are taken, and the distribution [V] (not normalised) of the token after them.
    """
    for place, (token, uniform) in enumerate(zip(drafts, uniforms, strict=True)):
        p, q = targets[place], guesses[place]
        # u >= p / q, without the division.
        if uniform * float(q[token]) >= float(p[token]):
            return place, (p - q).clamp(min=0)
    return len(drafts), targets[len(drafts)]
