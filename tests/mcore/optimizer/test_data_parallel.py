"""What is sent beside the computation: it is sent then, and nobody reads a weight before it has arrived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).parents[2] / "layouts/layout_run.py")
FP64, ZERO1 = "train.precision=fp64", "parallel.zero1=true"
REDUCE, GATHER, BUCKETS = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
                           "parallel.bucket_params=9000")
PP2 = ["parallel.pp=2", "parallel.vpp=2"]


@pytest.mark.distributed
def test_overlap_is_overlap_and_evaluation_waits_for_the_weights(ranks: Any, job: Any,
                                                                 packed_data: Any) -> None:
    layouts = {"plain": (2, []), "reduce": (2, [REDUCE, BUCKETS]),
               "both": (2, [ZERO1, REDUCE, GATHER, BUCKETS]), "one bucket": (2, [ZERO1, REDUCE, GATHER]),
               "interleaved": (4, [ZERO1, REDUCE, GATHER, BUCKETS, *PP2])}
    results = dict(zip(layouts, ranks(*(
        job(RUN, "deferred", n, {"settings": [FP64, *settings], "paths": [str(packed_data.text)]})
        for n, settings in layouts.values())), strict=True))
    plain = results["plain"][0]
    assert plain["heldout"] and plain["losses"][-1] < plain["losses"][0]
    for name, per_rank in results.items():
        for result in per_rank:
            assert result["losses"] == pytest.approx(plain["losses"], rel=1e-12), name
            assert result["heldout"] == pytest.approx(plain["heldout"], rel=1e-11), name
        same_part = [r for r in per_rank if r["place"] == 0], [r for r in per_rank if r["place"] == 1]
        gathers_later = name in ("both", "one bucket", "interleaved")
        for one, other in zip(*same_part, strict=True):
            assert (one["updated"] != other["updated"]) == gathers_later, (
                f"{name}: each process has its own updates only")
            assert one["evaluated"] == other["evaluated"] and one["ended"] == other["ended"], name
    assert results["both"][0]["groups"] > results["one bucket"][0]["groups"] == 2, (
        "dense and expert parameters")
    assert set(results["plain"][0]["on their way"]) == {0}
    for name in ("reduce", "both", "one bucket", "interleaved"):
        for result in results[name]:  # the first step only learns how often each gradient is added to
            assert result["on their way"][1:] == [result["groups"]] * 3, name
