"""Every layout trains the same model: same data, same losses, same gradients, same routing, to the order of float sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

RUN = str(Path(__file__).with_name("layout_run.py"))
TP2 = ["parallel.tp=2", "parallel.sp=true"]
LAYOUTS = {
    "TP2+SP": (2, TP2),
    "EP2": (2, ["parallel.ep=2"]),
    "EP2 allgather": (2, ["parallel.ep=2", "parallel.expert_dispatcher=allgather"]),
    "TP2+SP x EP2 x ETP2 allgather": (4, [*TP2, "parallel.ep=2", "parallel.etp=2", "parallel.expert_dispatcher=allgather"]),
    "PP2": (2, ["parallel.pp=2"]),
    "PP2 VPP2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "DP2": (2, []),
    "ETP2": (2, ["parallel.etp=2"]),
    "TP2+SP x PP2 x EP2": (4, [*TP2, "parallel.pp=2", "parallel.ep=2"]),
    "recompute": (1, ["train.recompute=true"]),
    "micro batch 1": (1, ["train.micro_batch_size=1"]),
    "micro batch 8": (1, ["train.micro_batch_size=8"]),
}
SFT = ["objective.text_coeff=0.3", 'data.phases=[{"name": "main", "seq_len": 64}]']
STEPS = 3
TOLERANCE = 5e-6
"""Relative; float32 sums in another order differ by some 1e-7."""


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "objective"), [("tiny-solar-open", "lm"), ("tiny-k-exaone", "lm"), ("tiny-k-exaone", "sft")])
def test_layouts_agree_with_one_rank(ranks: Any, job: Any, packed_data: Any, recipe: str, objective: str) -> None:
    paths = [str(packed_data.text)] + ([str(packed_data.chats)] if objective == "sft" else [])
    extra = SFT if objective == "sft" else []
    jobs = [job(RUN, "curve", nproc, {"recipe": recipe, "settings": [*extra, *layout], "paths": paths, "objective": objective,
                                      "steps": STEPS})
            for nproc, layout in [(1, []), *LAYOUTS.values()]]
    (reference,), *others = ranks(*jobs)
    assert len(reference) == STEPS and reference[0]["loss"] > reference[-1]["loss"]
    terms = {"term lm"} if objective == "lm" else {"term response", "term text"}
    assert terms | ({"term mtp"} if "exaone" in recipe else set()) <= set(reference[0])
    if objective == "sft":
        assert reference[0]["tokens"] < 8 * 64, "the batch should have padding"
    problems = []
    for name, per_rank in zip(LAYOUTS, others, strict=True):
        assert all(steps == per_rank[0] for steps in per_rank), f"{name}: ranks report different numbers"
        for number, (ours, theirs) in enumerate(zip(per_rank[0], reference, strict=True), 1):
            assert ours.keys() == theirs.keys()
            for what, value in ours.items():
                difference = np.abs(np.array(value) - np.array(theirs[what])).max() / max(1e-3, np.abs(theirs[what]).max())
                if difference > TOLERANCE:
                    problems.append(f"{name}: step {number}: {what} differs by {difference:.1e}: {value}, not {theirs[what]}")
    assert problems == []
