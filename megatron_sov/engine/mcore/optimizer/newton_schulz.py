"""Weight matrices for Muon: which rows of a tensor are a matrix of their own,
and how an update is made orthogonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, order=True)
class Matrix:
    """A two-dimensional tensor, or one expert's part of a three-dimensional one."""

    key: str
    """Name of the global tensor."""
    index: tuple[int, ...]
    """Place on the leading axes (expert), empty for a matrix."""
    rows: int
    """Outputs of the layer."""
    columns: int
    """Inputs of the layer."""

    @property
    def cost(self) -> int:
        """Multiplications of one Newton-Schulz iteration, but for a factor."""
        return self.rows * self.columns * min(self.rows, self.columns)


def parts(matrix: Matrix, config: Any) -> list[torch.Tensor]:
    """Return the rows [count] of each part that is orthogonalised on its own.

    A fused query-key-value weight holds for each of its groups the queries' rows, then the key's, then the
    value's; a gated feed-forward's first weight the gate's rows, then those of the other half.  Each is a
    matrix of its own (as in megatron.core.optimizer.muon, `split_qkv`).

    Args:
        matrix: a whole tensor or a whole expert.
        config: the library's TransformerConfig.
    """
    rows = torch.arange(matrix.rows)
    if matrix.key.endswith("linear_qkv.weight"):
        per_key = config.num_attention_heads // config.num_query_groups * config.kv_channels
        grouped = rows.view(config.num_query_groups, per_key + 2 * config.kv_channels)
        return [part.flatten()
                for part in grouped.split([per_key, config.kv_channels, config.kv_channels], dim=1)]
    if matrix.key.endswith("linear_fc1.weight") and config.gated_linear_unit:
        return list(rows.chunk(2))
    return [rows]


def orthogonalise(update: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """Return about U V^T of an update [rows, columns] = U S V^T,
    by Newton-Schulz iterations in its own dtype.

    The same operations in the same order as torch.optim.Muon (which always does them in bfloat16), after
    Keller Jordan, kellerjordan.github.io/posts/muon.
    """
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm().clamp(min=1e-7)  # its largest singular value is 1 at most
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def update_scale(kind: str, rows: int, columns: int) -> float:
    """Return the factor on an orthogonal update of a matrix with `rows` outputs and `columns` inputs.

    Args:
        kind: `match_rms_adamw`: entries have a root mean square of 0.2, about AdamW's (Liu et al., arXiv
            2502.16982); `original`: Keller Jordan's; `spectral`: outputs change as much as inputs do (Yang et
            al., arXiv 2310.17813).
    """
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns) if kind == "original" else rows / columns)
