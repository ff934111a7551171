"""Split rows are gathered in order, and gradients count each token once."""

from typing import Any

import pytest

TOKENS = 16


def cut(cp: int, tp: int) -> dict[str, Any]:
    """Return this process's part of a row, and the gradients of both kinds of gather."""
    import torch
    from megatron.core import parallel_state

    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig

    world.join_world(ParallelConfig(cp=cp, tp=tp, sp=tp > 1))
    row = torch.arange(TOKENS)
    weights = torch.arange(1.0, TOKENS + 1)[:, None] * torch.tensor([1.0, -2.0])
    alike = context.select_local(row[:, None] * torch.ones(2)).requires_grad_()
    gathered = context.gather_row(alike)
    (gathered * weights).sum().backward()
    keys = context.select_local(row[:, None] * torch.ones(2)).requires_grad_()
    rank = parallel_state.get_context_parallel_rank()
    (context.gather_keys(keys) * weights * (rank + 1)).sum().backward()
    assert alike.grad is not None and keys.grad is not None
    return {"held": context.select_local(row).tolist(), "pieces": context.get_local_pieces(TOKENS),
            "multiple": context.get_row_multiple(),
            "index": context.compute_row_index(TOKENS, tp > 1, row.device).tolist(),
            "row": gathered[:, 0].tolist(),
            "grad": alike.grad[:, 1].tolist(), "keys_grad": keys.grad[:, 0].tolist(),
            "picked": context.gather_positions(context.select_local(row * 10),
                                               torch.tensor([15, 0, 7, 7, 8])).tolist(),
            "picked_states": context.gather_positions(context.select_local(weights),
                                                      torch.tensor([3, 12]))[:, 1].tolist()}


@pytest.mark.distributed
def test_a_row_is_split_and_gathered(ranks, job) -> None:
    layouts = [(1, 1), (2, 1), (4, 1), (2, 2)]
    for (cp, tp), per_rank in zip(layouts, ranks(*(job(__file__, "cut", cp * tp, {"cp": cp, "tp": tp})
                                                   for cp, tp in layouts)), strict=True):
        groups = per_rank[::tp]  # tensor-parallel ranks are adjacent
        assert sorted(t for r in groups for t in r["held"]) == list(range(TOKENS))
        assert sorted(t for r in per_rank for t in r["index"]) == list(range(TOKENS))
        for rank, result in enumerate(per_rank):
            assert result["row"] == list(range(TOKENS))
            assert result["grad"] == [-2.0 * (t + 1) for t in result["held"]], "each token once"
            assert result["keys_grad"] == [(t + 1) * cp * (cp + 1) / 2 for t in result["held"]], (
                "summed over processes")
            assert result["picked"] == [150, 0, 70, 70, 80] and result["picked_states"] == [-8, -26]
            assert result["held"] == [t for first, end in result["pieces"] for t in range(first, end)]
            part = TOKENS // cp // tp
            assert result["index"] == result["held"][rank % tp * part:(rank % tp + 1) * part]
            assert result["multiple"] == {(1, 1): 1, (2, 1): 4, (4, 1): 8, (2, 2): 8}[cp, tp]
        work = [sum(t + 1 for t in r["held"]) for r in groups]
        assert len(set(work)) == 1, "every process attends to as many keys"
