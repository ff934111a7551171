"""A model that is only run: the same answers at every layout, and nothing in it changes."""

from __future__ import annotations

from typing import Any

import pytest


def answers(layout: dict[str, Any]) -> dict[str, Any]:
    """Return logits at some positions of two documents, on every process."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.mcore.decode.forward_only import ForwardModel, Inputs
    from megatron_sov.mcore.model import init
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.parallel import world

    config = apply_settings(recipes.get("tiny-k-exaone"), [
        "model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.expert_ffn_dim=16",
        "model.init_std=0.3"])
    world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    init.initialise(model, config.model, 1)
    policy = ForwardModel(model, 3)
    row = Inputs([[5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 4]], torch.device("cpu"), min_tokens=13)
    logits = policy.logits(row, row.ends)
    assert policy.map([], lambda *_: 0) == [], "data.heldout_tokens = 0 leaves nothing to look at"
    counts = [float(m.local_tokens_per_expert.sum())
              for m in model.modules() if hasattr(m, "local_tokens_per_expert")]
    return {"logits": logits.tolist(), "ends": row.ends.tolist(), "training": model.training,
            "counted": sum(counts), "tokens": len(row.inputs.tokens),
            "padding": int(row.inputs.padding.sum()), "bounds": row.inputs.cu_seqlens.tolist(),
            "positions": row.inputs.positions.tolist(), "longest": row.inputs.max_document_tokens}


@pytest.mark.distributed
def test_every_process_of_every_layout_answers_alike(ranks, job) -> None:
    layouts = [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (2, {"ep": 2}), (2, {"cp": 2}),
               (4, {"cp": 2, "tp": 2, "sp": True})]
    results = ranks(*(job(__file__, "answers", n, {"layout": x}) for n, x in layouts))
    alone = results[0][0]
    assert alone["ends"] == [6, 10] and alone["tokens"] == 13 and alone["padding"] == 2
    assert alone["bounds"] == [0, 7, 11, 13] and alone["longest"] == 7
    assert alone["positions"] == [*range(7), *range(4), 0, 1]
    # lengths that the processes can share
    assert [results[i][0]["tokens"] for i in (1, 4, 5)] == [14, 16, 16]
    for (_, layout), per_rank in zip(layouts, results, strict=True):
        for result in per_rank:
            for row, expected in zip(result["logits"], alone["logits"], strict=True):
                assert row == pytest.approx(expected, abs=1e-4), layout
            assert result["training"] and result["counted"] == 0
