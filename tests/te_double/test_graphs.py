"""Training with CUDA graphs of routers gives the bits that it gives without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("graph_run.py"))
SMALL = ["train.precision=bf16", "model.num_layers=3", "model.num_experts=4"]


@pytest.mark.distributed
def test_first(te_ranks: Any, job: Any, packed_data: Any) -> None:
    (found,), = te_ranks(job(RUN, "both", 1, {"recipe": "tiny-solar-open", "settings": SMALL,
                                              "paths": [str(packed_data.text)]}))
    plain, graphed = found
    print(plain["steps"][-1]["loss"], graphed["graphs"], graphed["replays"])
    assert graphed["steps"] == plain["steps"]
    assert graphed["weights"] == plain["weights"]
