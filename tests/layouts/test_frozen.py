"""Frozen parameters stay bit for bit at any layout, have no optimizer state, and the others train as
if on one process."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.checkpoint.sharded_tensors import TensorReader

RUN = str(Path(__file__).with_name("layout_run.py"))
FROZEN = ("embedding.*", "decoder.layers.0.*", "decoder.layers.1.*", "*router.weight")
"""Of two stages all that the first stage has, and every router."""
SETTINGS = ["train.precision=fp64", "model.router_bias_update_rate=0",
            "optim.name=muon", "train.recompute=true",
            "optim.groups=[" + ", ".join(f'{{"pattern": "{pattern}", "frozen": true}}'
                                         for pattern in FROZEN) + "]"]
ZERO1 = ["parallel.zero1=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {"one rank": (1, []),
           "PP2 x DP2 ZeRO-1 overlapped": (4, ["parallel.pp=2", *ZERO1]),
           "TP2+SP x EP2": (2, ["parallel.tp=2", "parallel.sp=true", "parallel.ep=2"])}


@pytest.mark.distributed
def test_frozen_parameters_stay_and_the_rest_trains_alike(ranks: Any, job: Any, packed_data: Any,
                                                          tmp_path: Path) -> None:
    common = {"recipe": "tiny-k-exaone", "paths": [str(packed_data.text)]}
    start = job(RUN, "curve", 1, {**common, "settings": SETTINGS, "out": str(tmp_path / "start"), "steps": 0})
    runs = [job(RUN, "curve", n,
                {**common, "settings": [*SETTINGS, *layout], "out": str(tmp_path / name), "steps": 2})
            for name, (n, layout) in LAYOUTS.items()]
    results = ranks(start, *runs)[1:]
    before = TensorReader(tmp_path / "start")
    for name, per_rank in zip(LAYOUTS, results, strict=True):
        for steps in per_rank:
            assert [s["loss"]
                    for s in steps] == pytest.approx([s["loss"] for s in results[0][0]], rel=1e-12), name
            assert [s["grad_norm"]
                    for s in steps] == pytest.approx([s["grad_norm"] for s in results[0][0]], rel=1e-12), name
        after, state = TensorReader(tmp_path / name), TensorReader(tmp_path / name, "optimizer")
        for key in before.keys():  # noqa: SIM118  (a reader is no dict)
            frozen = any(fnmatch.fnmatchcase(key, pattern) for pattern in FROZEN)
            if key.endswith("expert_bias"):  # a buffer, moved by counts of tokens and not by gradients
                assert before.read(key).equal(after.read(key)), (name, key)
            else:
                assert before.read(key).equal(after.read(key)) == frozen, (name, key)
                assert any(k.partition("/")[2] == key
                           for k in state.keys()) != frozen, (name, key)  # noqa: SIM118
