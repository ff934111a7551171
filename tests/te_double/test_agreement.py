"""Transformer Engine's branch of the library computes what the local one does, at every layout.

The double of Transformer Engine stands in for it: what is proven is how the model is put together, split,
wrapped and saved with its modules, not the real one's kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TE_RUN = str(Path(__file__).with_name("te_run.py"))
LAYOUT_RUN = str(Path(__file__).parents[1] / "layouts" / "layout_run.py")


@pytest.mark.distributed
def test_models_are_made_of_its_modules(te_ranks: Any, job: Any, packed_data: Any) -> None:
    (found,), = te_ranks(job(TE_RUN, "one_step", 1, {
        "recipe": "tiny-k-exaone", "settings": ["model.num_layers=3"], "paths": [str(packed_data.text)]}))
    # a dense layer, two of experts, a dense one for multi-token prediction
    assert found["modules"]["TEDotProductAttention"] == 4
    assert found["modules"]["TEColumnParallelGroupedLinear"] == 2
    assert found["optimizers"] == ["FusedAdam"]
