"""The whole model: documents of a row do not see each other, at any layout, and positions restart."""

from __future__ import annotations

from typing import Any

import pytest


def hidden(recipe: str, layout: dict[str, Any], documents: list[list[int]]) -> list[list[float]] | None:
    """Return the hidden states of the last document of a row, trunk then prediction depths (None before the last stage)."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.mcore import init, world
    from megatron_sov.mcore.model import build, gather_sequence
    from megatron_sov.mcore.policy import Inputs, Policy

    config = apply_settings(recipes.get(recipe), ["model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8",
                                                  "model.expert_ffn_dim=16", "model.init_std=0.3"])
    place = world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    init.initialise(model, config.model, 1)
    row = Inputs(documents, torch.device("cpu"))
    first, last = (int(row.inputs.cu_seqlens[len(documents) - 1]), int(row.inputs.cu_seqlens[len(documents)]))
    found = Policy(model, 64).map([row], lambda depths, *_: [gather_sequence(d, model.config)[first:last] for d in depths])
    if not place.last_stage:
        return None
    trunk, *depths = found[0]
    return torch.cat([trunk, *(d[:-1] for d in depths)]).tolist()  # a depth's last place sees what follows, and is never learned


@pytest.mark.distributed
def test_a_document_is_the_same_alone_and_behind_others(ranks, job) -> None:
    document = [(7 * i + 3) % 96 for i in range(41)]  # longer than the window of 32
    before = [[(5 * i + 1) % 96 for i in range(n)] for n in (1, 38)]
    cases = [(recipe, *case) for recipe in ("tiny-k-exaone", "tiny-solar-open")
             for case in [(1, {}, [document]), (1, {}, [*before, document]), (2, {"tp": 2, "sp": True}, [*before, document]),
                          (2, {"pp": 2}, [*before, document]), (2, {"pp": 2, "vpp": 2}, [*before, document])]]
    results = ranks(*(job(__file__, "hidden", n, {"recipe": recipe, "layout": x, "documents": d}) for recipe, n, x, d in cases))
    for (recipe, _, layout, documents), per_rank in zip(cases, results, strict=True):
        states = [[x for row in s for x in row] for s in per_rank if s is not None]
        assert len(states) == (1 if "pp" in layout else len(per_rank))
        if documents == [document]:
            alone = states[0]
            assert max(map(abs, alone)) > 0.5
        for state in states:
            assert state == pytest.approx(alone, abs=5e-5), (recipe, layout)
