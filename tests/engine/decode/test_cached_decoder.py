"""Reading span by span gives the states of whole sequences, of the trunk and of the prediction
layer, at every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_model

SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [1, 2, 3, 4, 90, 91, 92, 93]]
CUTS = [(0, 5), (5, 6), (6, 8)]
"""Pieces of both sequences, the last with the places that are compared."""


def logits(layout: dict[str, Any]) -> dict[str, Any]:
    """Return logits behind the last span of both depths, read in spans and (on one process) at once."""
    import torch

    from megatron_sov.engine.decode.cached_decoder import CachedDecoder, over_shares, share_place
    from megatron_sov.engine.decode.forward_only import ForwardModel, Inputs
    from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
    from megatron_sov.engine.model.logprobs import head_of
    from megatron_sov.engine.parallel import world

    _, model = tiny_model("tiny-k-exaone", "model.init_std=0.3", "model.sliding_window_tokens=3",
                          "model.num_layers=2", "train.precision=fp64", layout=layout)
    policy = ForwardModel(model, 50)
    found: dict[str, Any] = {"share": share_place(), "sum": over_shares(torch.tensor([1])).tolist()}
    with CachedDecoder(policy, CacheSize(2, 12, 2)) as decoder:
        found["rows"] = [decoder.common_row_tokens(n) for n in (3, 0)]
        for first, end in CUTS:
            spans = [CacheSpan(i, first, s[first:end]) for i, s in enumerate(SEQUENCES)]
            length = end - first
            read = decoder.read(spans, decoder.common_row_tokens(2 * length))
            places = list(range(2 * length))
            if decoder.last_stage:
                found["trunk"] = decoder.logits(read, places).tolist()
                ahead = torch.zeros(len(read.row.tokens), dtype=torch.int64)
                ahead[:2 * length] = torch.tensor([t for s in SEQUENCES for t in [*s, 0][first + 1:end + 1]])
                found["predicted"] = decoder.logits(decoder.predict(read, ahead), places).tolist()
        found["agreed"] = decoder.agree(torch.tensor([torch.distributed.get_rank()])).tolist()
    if not layout:
        row = Inputs([s[:9] for s in SEQUENCES], torch.device("cpu"))
        positions = torch.tensor([6, 7, 9 + 6, 9 + 7])
        found["whole"] = policy.map([row], lambda depths, *_: [
            head_of(model, 50).logits(d[positions, 0]).tolist() for d in depths])[0]
    world.leave()
    return found


@pytest.mark.distributed
def test_pieces_read_as_whole_sequences_do(ranks, job) -> None:
    layouts = [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (2, {"cp": 2})]
    results = ranks(*(job(__file__, "logits", n, {"layout": x}) for n, x in layouts))
    trunk, predicted = results[0][0]["whole"]
    for (count, layout), per_rank in zip(layouts, results, strict=True):
        shares = count if "cp" in layout else 1
        assert [r["share"] for r in per_rank] == [[i % shares, shares] for i in range(count)]
        assert all(r["sum"] == [shares] and r["rows"][1] == 0 for r in per_rank)
        # 3 tokens and padding
        assert per_rank[0]["rows"][0] == {"tp": 4, "cp": 4}.get(next(iter(layout), ""), 3)
        if "cp" not in layout:
            assert len({r["agreed"][0] for r in per_rank}) == 1
        seen = [r for r in per_rank if "trunk" in r]
        assert len(seen) == (1 if "pp" in layout else count)
        for result in seen:
            for name, expected in (("trunk", trunk), ("predicted", predicted)):
                for row, other in zip(result[name], expected, strict=True):
                    assert row == pytest.approx(other, abs=1e-9), (layout, name)


# A model that is only run: the same answers at every layout, and nothing in it changes.


def answers(layout: dict[str, Any]) -> dict[str, Any]:
    """Return logits at some positions of two documents, on every process."""
    import torch

    from megatron_sov.engine.decode.forward_only import ForwardModel, Inputs

    _, model = tiny_model("tiny-k-exaone", "model.init_std=0.3", layout=layout)
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
