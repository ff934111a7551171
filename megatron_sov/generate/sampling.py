"""Text from a policy: greedy or sampled, batched over prompts, the same on every process.

Every new token costs a full forward pass over what is there already; for judging models, not for serving them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sov.generate.documents import next_logits, next_tokens
from megatron_sov.mcore.policy import Policy


def generate(policy: Policy, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, eos_id: int | None = None) -> list[list[int]]:
    """Continue prompts; called by all processes together, every one gets the same result.

    Args:
        policy: the model.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: longest continuation.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and sampled.
        top_p: samples come from the smallest set of tokens that holds this much probability (Holtzman et al., arXiv 1904.09751).
        seed: of the samples; those of a prompt depend on it and on the prompt's place in the list only.
        eos_id: token that ends a continuation.

    Returns:
        Each prompt's continuation, without the prompt, with the ending token where it came.
    """
    lengths = [len(p) for p in prompts]
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} has no token; every prompt needs at least one")
    sequences = [list(map(int, p)) for p in prompts]
    draws = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(len(prompts))]
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not active:
            break
        documents = [sequences[i] for i in active]
        if temperature == 0:
            chosen = next_tokens(policy, documents)[:, 0].tolist()
        else:
            logits = next_logits(policy, documents)
            chosen = [draw(logits[k], temperature, top_p, draws[i].random()) for k, i in enumerate(active)]
        for i, token in zip(active, chosen, strict=True):
            sequences[i].append(token)
        active = [i for i in active if sequences[i][-1] != eos_id]
    return [s[len(p):] for s, p in zip(sequences, prompts, strict=True)]


def draw(logits: torch.Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """Return the token at quantile `uniform` in [0, 1) of the tempered, truncated distribution of logits [vocabulary].

    Tokens stand in order of falling probability (equal ones by id), so a given quantile means the same at every layout.
    """
    probabilities, tokens = torch.softmax(logits.double() / temperature, 0).sort(descending=True, stable=True)
    reached = probabilities.cumsum(0)
    kept = reached[:int((reached < top_p).sum()) + 1]
    return int(tokens[min(int(torch.searchsorted(kept, uniform * kept[-1], right=True)), len(kept) - 1)])
