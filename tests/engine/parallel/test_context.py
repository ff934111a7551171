"""Context parallelism: a row of tokens is split over ranks and gathered in order, with its gradients."""

from typing import Any

import pytest

TOKENS = 16


def split_and_gather(cp: int, tp: int) -> dict[str, Any]:
    """Split a row over the ranks and gather it by each function of `context`.

    "grad" is the gradient of `gather_row`, after which every rank computes the same loss; "keys_grad" is
    that of `gather_keys`, after which every rank computes a loss of its own.
    """
    import torch
    from megatron.core import parallel_state

    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig

    world.join_world(ParallelConfig(cp=cp, tp=tp, sp=tp > 1))
    row = torch.arange(TOKENS)
    weights = torch.arange(1.0, TOKENS + 1)[:, None] * torch.tensor([1.0, -2.0])
    states = context.select_local(row[:, None] * torch.ones(2)).requires_grad_()
    gathered = context.gather_row(states)
    (gathered * weights).sum().backward()
    keys = context.select_local(row[:, None] * torch.ones(2)).requires_grad_()
    rank = parallel_state.get_context_parallel_rank()
    (context.gather_keys(keys) * weights * (rank + 1)).sum().backward()
    assert states.grad is not None and keys.grad is not None
    return {"local": context.select_local(row).tolist(), "local_spans": context.get_local_pieces(TOKENS),
            "multiple": context.get_row_multiple(),
            "index": context.compute_row_index(TOKENS, tp > 1, row.device).tolist(),
            "row": gathered[:, 0].tolist(),
            "grad": states.grad[:, 1].tolist(), "keys_grad": keys.grad[:, 0].tolist(),
            "gathered_tokens": context.gather_positions(context.select_local(row * 10),
                                                        torch.tensor([15, 0, 7, 7, 8])).tolist(),
            "gathered_states": context.gather_positions(context.select_local(weights),
                                                        torch.tensor([3, 12]))[:, 1].tolist()}


@pytest.mark.distributed
def test_a_row_is_split_and_gathered(ranks, job) -> None:
    layouts = [(1, 1), (2, 1), (4, 1), (2, 2)]
    results = ranks(*(job(__file__, "split_and_gather", cp * tp, {"cp": cp, "tp": tp}) for cp, tp in layouts))
    for (cp, tp), per_rank in zip(layouts, results, strict=True):
        cp_results = per_rank[::tp]  # tensor-parallel ranks are adjacent
        assert sorted(token for result in cp_results for token in result["local"]) == list(range(TOKENS))
        assert sorted(token for result in per_rank for token in result["index"]) == list(range(TOKENS))
        for rank, result in enumerate(per_rank):
            assert result["row"] == list(range(TOKENS))
            assert result["grad"] == [-2.0 * (t + 1) for t in result["local"]], "each token once"
            assert result["keys_grad"] == [(t + 1) * cp * (cp + 1) / 2 for t in result["local"]], (
                "summed over the ranks' losses, which rank r multiplies by r + 1")
            assert result["gathered_tokens"] == [150, 0, 70, 70, 80]
            assert result["gathered_states"] == [-8, -26]
            assert result["local"] == [t for first, end in result["local_spans"] for t in range(first, end)]
            num_local = TOKENS // cp // tp
            assert result["index"] == result["local"][rank % tp * num_local:(rank % tp + 1) * num_local]
            assert result["multiple"] == {(1, 1): 1, (2, 1): 4, (4, 1): 8, (2, 2): 8}[cp, tp]
        num_attended = {sum(token + 1 for token in result["local"]) for result in cp_results}
        assert len(num_attended) == 1, "every process attends to as many keys"
