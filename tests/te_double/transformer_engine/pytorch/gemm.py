"""The matrix product of all linear layers: the one place where operands can be quantised.

Not a part of the real library's interface.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch

from ..common.recipe import Recipe

Kind = Literal["fprop", "dgrad", "wgrad"]

COUNTS: Counter[tuple[Kind | Literal["general"], str]] = Counter()
"""(kind, name of the recipe's class or "") -> products so far; those of `general_gemm` by layout."""


def gemm(a: torch.Tensor, b: torch.Tensor, kind: Kind, recipe: Recipe | None = None,
         out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a @ b.

    The summed axis is the last of `a` and the first of `b`, along which scaled blocks of one axis lie:

    - fprop: input [tokens, in] @ weight transposed [in, out],
    - dgrad: output gradient [tokens, out] @ weight [out, in],
    - wgrad: output gradient transposed [out, tokens] @ input [tokens, in].

    Args:
        a: [rows, summed].
        b: [summed, columns].
        kind: which product of the layer it is.
        recipe: the quantisation that was on in the forward pass; None: none.
        out_dtype: of the result, into which sums are not rounded on the way; None: that of `a`.
    """
    COUNTS[kind, type(recipe).__name__ if recipe is not None else ""] += 1
    if out_dtype is not None:
        a, b = a.to(out_dtype), b.to(out_dtype)
    return a @ b
