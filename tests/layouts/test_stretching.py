"""Objectives of other kinds than the project's own agree between one rank and everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("stretching.py"))
EVERYTHING = ["parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.cp=2", "parallel.ep=2"]
EVERYTHING_AT_ONCE = "TP2+SP x PP2 x CP2 x EP2"
LARGE_VOCABULARY = ["model.vocab_size=65536", "train.global_batch_size=4"]
"""A third of Solar Open's; its logits of a chunk of 24 tokens are 13 MB in float64, and never more exist."""
STEPS, TOLERANCE = 2, 1e-12


@pytest.mark.distributed
@pytest.mark.parametrize(("objective", "settings"),
                         [("pairs", []), ("sequence ratio", []), ("lm", LARGE_VOCABULARY)])
def test_an_objective_is_the_same_at_every_layout(ranks: Any, job: Any, packed_data: Any, objective: str,
                                                  settings: list[str]) -> None:
    layouts = {"one rank": (1, []), EVERYTHING_AT_ONCE: (8, EVERYTHING)}
    found = ranks(*(job(RUN, "steps", nproc, {
        "objective": objective, "recipe": "tiny-k-exaone",
        "settings": ["train.precision=fp64", *settings, *layout],
        "paths": [str(packed_data.text)],
        "count": STEPS}) for nproc, layout in layouts.values()), timeout_s=600)
    one = found[0][0]
    assert len({step["loss"] for step in one}) == STEPS
    for name, per_rank in zip(layouts, found, strict=True):
        for result in per_rank:
            for ours, expected in zip(result, one, strict=True):
                assert ours == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), name
