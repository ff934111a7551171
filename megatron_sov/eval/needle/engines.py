"""The models that needle tests ask: a policy at its layout, or transformers."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sov.eval.needle.suite import Engine
from megatron_sov.generate.generator import generate
from megatron_sov.generate.hf import generate_hf
from megatron_sov.generate.request import Sampling
from megatron_sov.mcore.decode.forward_only import ForwardModel, Inputs
from megatron_sov.mcore.parallel import collectives
from megatron_sov.mcore.parallel.device import local_device

ROW_TOKENS, ROW_DOCUMENTS = 8192, 16
"""What a forward pass reads at a time, unless one document alone is longer: bounds memory, that of the logits too."""


def policy_engine(policy: ForwardModel) -> Engine:
    """Return a policy as an engine, for as long as the policy lives."""
    def choose(documents: list[list[int]], count: int, words: tuple[int, ...]) -> list[list[int]]:
        rank, size = collectives.data_place()
        rows = _rows(documents)
        rows += [[]] * (-len(rows) % size)  # processes that share experts must run forward equally often
        found = torch.zeros(len(documents), count, dtype=torch.float64)
        for row in rows[rank::size]:
            batch = Inputs([documents[i][:-1] for i in row] or [[0]], local_device())
            positions = (batch.ends[:, None] - torch.arange(count - 1, -1, -1)).flatten() if row else batch.ends
            logits = policy.logits(batch, positions)
            if row:
                found[row] = _best(logits, words).double().reshape(len(row), count)
        tokens: list[list[int]] = collectives.all_reduce_dp(found).long().tolist()
        return tokens

    return Engine(lambda prompts, count: generate(policy, prompts, Sampling(count)).continuations, choose)


def hf_engine(model: Any) -> Engine:
    """Return a transformers model as an engine."""
    @torch.no_grad()
    def choose(documents: list[list[int]], count: int, words: tuple[int, ...]) -> list[list[int]]:
        found: list[list[int]] = []
        for row in _rows(documents):
            ids = torch.tensor([documents[i][:-1] for i in row], device=model.device)
            logits = model(input_ids=ids, logits_to_keep=count, use_cache=False).logits
            found += _best(logits.flatten(0, 1), words).reshape(len(row), count).tolist()
        return found

    return Engine(lambda prompts, count: generate_hf(model, prompts, Sampling(count)).continuations, choose)


def _rows(documents: list[list[int]]) -> list[list[int]]:
    """Return documents of equal length, by index, in groups that go through the model together."""
    each = max(1, min(ROW_DOCUMENTS, ROW_TOKENS // len(documents[0])))
    return [list(range(start, min(start + each, len(documents)))) for start in range(0, len(documents), each)]


def _best(logits: torch.Tensor, words: tuple[int, ...]) -> torch.Tensor:
    """Return the most probable of the words [places] int64 by logits [places, vocabulary]."""
    chosen = torch.tensor(words, device=logits.device)
    return chosen[logits[:, chosen].float().argmax(dim=-1)].cpu()
