"""Quantile balancing: selection biases that would have given each expert an equal share of a global batch.

The form with histograms (Megatron-LM pull request 6637; Kimi K3's technical report, section 2.3.3): counts
add up exactly over micro-batches and processes. Megatron-LM pull request 5349 averages the quantiles of
micro-batches, so its biases depend on the layout."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.model.config.model import QUANTILE_BINS


def count_required_biases(scores: torch.Tensor, bias: torch.Tensor, top_k: int,
                          valid: torch.Tensor | None) -> torch.Tensor:
    """Count the biases that each expert needs to be among a token's top K: the best rejected biased score
    minus the expert's score. Bins divide `_get_range`.

    Args:
        scores: [tokens, experts] in (0, 1), without bias.
        bias: [experts], by which the step chooses.
        top_k: experts per token, below the number of experts.
        valid: [tokens] bool, False = padding. None: no padding.

    Returns:
        [experts, QUANTILE_BINS] int32.
    """
    best_rejected = (scores + bias).topk(top_k + 1, dim=1).values[:, -1:]
    low, width = _get_range(bias)
    bins = ((best_rejected - scores - low) / width).long().clamp(0, QUANTILE_BINS - 1)
    is_counted = torch.ones_like(bins, dtype=torch.int32)
    if valid is not None:
        is_counted *= valid[:, None]
    counts = torch.zeros(len(bias), QUANTILE_BINS, dtype=torch.int32, device=bias.device)
    return counts.scatter_add_(1, bins.T, is_counted.T)


def set_quantile_biases(routers: list[Any]) -> None:
    """Set each router's bias to the quantile K / experts of its required biases over the global batch, minus
    the mean over experts. Collective over the processes of a pipeline stage."""
    if not routers:
        return
    counts = torch.stack([router.required_biases for router in routers])
    dist.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    for router, router_counts in zip(routers, counts, strict=True):
        router.expert_bias.copy_(solve_biases(router_counts, router.expert_bias, router.topk))


def solve_biases(counts: torch.Tensor, bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the quantiles of counts [experts, bins], interpolated within bins, minus their mean."""
    # integers, whose cumulative sums are deterministic on GPUs too
    cumulative = counts.cumsum(dim=1).double()
    target = cumulative[:, -1:] * (top_k / len(bias))
    index = (cumulative < target).sum(dim=1, keepdim=True)
    in_bin = counts.gather(1, index).clamp(min=1)
    low, width = _get_range(bias)
    quantile = low + width * (index + 1 - (cumulative.gather(1, index) - target) / in_bin)[:, 0]
    return (quantile - quantile.mean()).to(bias.dtype)


def _get_range(bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest required bias for scores in (0, 1), and the width of a bin."""
    low = bias.min() - 1
    return low, (bias.max() + 1 - low) / QUANTILE_BINS
