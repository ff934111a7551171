"""Weights that live in 8 bits (`train.fp8_weights`): what is learned, saved and read is what it is with bf16
weights beside them, since both ways quantise the same bf16 numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("quantized_run.py"))
IN_8_BITS = "train.fp8_weights=true"


@pytest.mark.distributed
def test_losses_are_those_of_bf16_weights(te_ranks: Any, job: Any, packed_data: Any) -> None:
    """To the bit, at any layout: with gathers at once or beside the forward pass, of experts and others."""
    cases = [
        ("tiny-solar-open", 2, ["train.fp8=tensorwise", "gpu.moment_dtype=bf16"]),
        ("tiny-solar-open", 2, ["train.fp8=blockwise", "parallel.overlap_param_gather=true",
                                "parallel.overlap_grad_reduce=true"]),
        ("tiny-solar-open", 2, ["train.fp8=mxfp8"]),
        ("tiny-k-exaone", 2, ["train.fp8=mxfp8", "parallel.overlap_param_gather=true",
                              "parallel.overlap_grad_reduce=true", "train.fp8_bf16_layers_at_end=1"]),
        ("tiny-k-exaone", 2, ["train.fp8=blockwise", "parallel.tp=2", "parallel.sp=true", "parallel.ep=2"]),
        ("tiny-solar-open", 2, ["train.fp8=blockwise", "parallel.pp=2", "optim.name=muon"]),
    ]
    jobs = [job(RUN, "losses", nproc, {"recipe": recipe, "path": str(packed_data.text), "steps": 3,
                                       "settings": [*settings, "parallel.zero1=true", *more]})
            for recipe, nproc, settings in cases for more in ([], [IN_8_BITS])]
    found = te_ranks(*jobs)
    for case, bf16, in_8_bits in zip(cases, found[::2], found[1::2], strict=True):
        assert [r["losses"] for r in in_8_bits] == [r["losses"] for r in bf16], case
        assert [r["products"] for r in in_8_bits] == [r["products"] for r in bf16], case
