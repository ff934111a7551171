"""Whole tensors from blocks on several processes: any grid, any owner, to rank 0 or to everyone."""

from __future__ import annotations

from typing import Any

import pytest


def gathered(everywhere: bool) -> dict[str, Any]:
    """Gather two tensors of which the ranks own uneven parts; "lonely" lives on rank 1 alone."""
    import torch

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.checkpoint.gather import Gatherer, in_order
    from megatron_sov.mcore.model.local_shards import LocalShard
    from megatron_sov.mcore.parallel import world

    rank = world.join(ParallelConfig()).rank
    whole = torch.arange(30.0).reshape(2, 3, 5)
    cuts = {0: [((0, 0, 0), (2, 1, 5)), ((1, 1, 0), (1, 2, 4))],
            1: [((0, 1, 0), (1, 2, 5)), ((1, 1, 4), (1, 2, 1))]}
    blocks = []
    for owner, places in cuts.items():
        for offset, shape in places:
            part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            # both hold it, one owns it
            blocks.append(LocalShard("spread", part, (2, 3, 5), offset, (int(rank != owner),)))
    if rank == 1:
        blocks.append(LocalShard("lonely", torch.full((4,), 7, dtype=torch.bfloat16), (4,), (0,), (0,)))
    gatherer = Gatherer(blocks, everywhere=everywhere)
    found = dict(in_order(gatherer, ["lonely", "spread"]))
    first = in_order(gatherer, ["spread", "lonely", "spread"])
    next(first)
    first.close()  # on both: what is left is gathered all the same, or the processes would lose step
    again = gatherer.gather("lonely")
    world.leave()
    return {"shapes": gatherer.shapes(), "again": None if again is None else again.tolist(),
            "found": {key: None if t is None else [str(t.dtype), t.tolist()] for key, t in found.items()}}


@pytest.mark.distributed
def test_any_grid_becomes_the_tensor(ranks: Any, job: Any) -> None:
    main_only, everywhere = ranks(job(__file__, "gathered", 2, {"everywhere": False}),
                                  job(__file__, "gathered", 2, {"everywhere": True}))
    spread = [[[float(15 * i + 5 * j + k) for k in range(5)] for j in range(3)] for i in range(2)]
    expected = {"lonely": ["torch.bfloat16", [7.0] * 4], "spread": ["torch.float32", spread]}
    assert [r["found"] for r in everywhere] == [expected, expected] and everywhere[1]["again"] == [7.0] * 4
    assert [r["found"] for r in main_only] == [expected, {"lonely": None, "spread": None}]
    assert (main_only[0]["again"] == [7.0] * 4
            and main_only[0]["shapes"] == {"spread": [2, 3, 5], "lonely": [4]})
