"""A checkpoint of any layout, with and without ZeRO-1, continues at any other as if it had never stopped,
optimizer included.

Each layout continues what two others saved, and each two meet; SOV_WRITE_TABLE=1 tries all pairs both ways.
`make test` has layouts on two processes: of AdamW rows, experts and stages are cut, of Muon tensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RUN = str(Path(__file__).with_name("layout_run.py"))
TP2 = ["parallel.tp=2", "parallel.sp=true"]
ZERO1 = ["parallel.zero1=true"]
OVERLAP = [*ZERO1, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
           "parallel.bucket_params=9000"]
PP2 = ["parallel.pp=2", "parallel.vpp=2"]
LAYOUTS = {
    "one rank": (1, []),
    "DP2 ZeRO-1": (2, ZERO1),
    "CP2 x EP2 x ZeRO-1": (2, [*ZERO1, "parallel.cp=2", "parallel.ep=2"]),
    "TP2+SP x EP2 x ZeRO-1": (4, [*TP2, *ZERO1, "parallel.ep=2"]),
    "PP2 VPP2 x DP2 ZeRO-1 overlapped": (4, [*PP2, *OVERLAP, "train.micro_batch_size=2"]),
}
UNEQUAL = {
    "one rank": (1, []),
    "CP2 x EP2 x ZeRO-1": LAYOUTS["CP2 x EP2 x ZeRO-1"],
    "PP2 of 1 and 3 layers": (2, ["parallel.pp=2", "parallel.pipeline_layout=[1, 3]"]),
    "DP2 ZeRO-1 padded": (2, [*ZERO1, "gpu.pad_buckets=on"]),
}
OF_MUON = {"one rank": (1, []), "TP2+SP x EP2": (2, [*TP2, "parallel.ep=2"]),
           "DP2 ZeRO-1 overlapped": (2, OVERLAP)}
FURTHER_OF_MUON = ("one rank", "TP2+SP x EP2 x ZeRO-1", "PP2 VPP2 x DP2 ZeRO-1 overlapped")
MUON = ["optim.name=muon", "optim.schedule=wsd",
        'data.phases=[{"name": "a", "seq_len": 32, "share": 3}, '
        '{"name": "b", "seq_len": 32, "share": 17, "rewarm_steps": 2}]']
WHOLE_TABLE = bool(os.environ.get("SOV_WRITE_TABLE"))
MEETING = (1, 2)
"""These and their negatives give every number modulo 4 and 5: layout i continues what the layouts i + 1
and i + 2 saved; what it saved itself is test_the_same_layout_continues_bit_for_bit's."""
FEWER = ["train.micro_batch_size=4"]
"""As few operations as will do: two micro-batches on one rank."""
FP64 = ["train.precision=fp64", *FEWER]
TOLERANCES = {"steps": 1e-12, "model": 2e-11, "optimizer": 1e-12}
"""Relative; Adam divides gradients near zero by its eps, so that their last bits move a weight by some
1e-10 of the step."""


@pytest.mark.distributed
@pytest.mark.parametrize(("chosen", "layouts"), [
    pytest.param([], LAYOUTS, id="adamw", marks=[pytest.mark.deep] * (not WHOLE_TABLE)),
    pytest.param([], UNEQUAL, id="unequal parts"),
    pytest.param(MUON, OF_MUON, id="muon"),
    pytest.param(MUON, {name: LAYOUTS[name] for name in FURTHER_OF_MUON}, id="muon, stages",
                 marks=pytest.mark.deep)])
def test_any_layout_continues_what_any_other_saved(ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                                   chosen: list[str], layouts: dict[str, Any]) -> None:
    names = tuple(layouts)
    paths, folders = [str(packed_data.text)], {name: str(tmp_path / name) for name in names}
    settings = [*FP64, *chosen]
    saving = [job(RUN, "trained", n, {"settings": [*settings, *layout], "paths": paths, "out": folders[name],
                                      "num_steps": 4 if name == "one rank" else 3})
              for name, (n, layout) in layouts.items()]
    apart = range(len(names)) if WHOLE_TABLE else MEETING
    sources = {name: list(dict.fromkeys(names[(i + d) % len(names)] for d in apart))
               for i, name in enumerate(names)}
    loading = [job(RUN, "continued", n, {"settings": [*settings, *layout], "paths": paths,
                                         "sources": [folders[source] for source in sources[name]],
                                         "expected": [folders["one rank"]] * len(sources[name])})
               for name, (n, layout) in layouts.items()]
    results = ranks(*saving, *loading)
    never_stopped = results[0][0]
    assert never_stopped[0]["loss"] > never_stopped[-1]["loss"]
    if chosen:  # up in two steps, stable, and again from step 4 on, where the second phase begins
        assert [step["lr"] for step in never_stopped] == [2e-3, 4e-3, 4e-3, 2e-3]
    problems = []
    for target, per_rank in zip(names, results[len(names):], strict=True):
        for result in per_rank:
            for source, found in zip(sources[target], result, strict=True):
                steps = max(_distance(a, b) for a, b in zip(found["steps"], never_stopped[3:], strict=True))
                differences = {**found["apart"], "steps": steps}
                problems += [f"{source} -> {target}: {what} differ by {differences[what]:.1e}"
                             for what, limit in TOLERANCES.items() if not differences[what] <= limit]
    assert problems == []


def _distance(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest relative difference of any number of a step."""
    assert ours.keys() == theirs.keys() and {"loss", "grad_norm", "router bias", "load"} <= ours.keys()
    return max(
        float(np.abs(np.array(value) - np.array(theirs[what])).max() / max(1e-3, np.abs(theirs[what]).max()))
        for what, value in ours.items())


@pytest.mark.distributed
@pytest.mark.parametrize("cases", [
    [("bf16", 2, [*OVERLAP, "parallel.ep=2"])],
    pytest.param([("fp32", 2, PP2), ("bf16", 2, ZERO1), ("bf16", 4, [*TP2, *OVERLAP, "optim.name=muon"]),
                  ("fp32", 4, [*PP2, *OVERLAP, "parallel.ep=2"])], marks=pytest.mark.deep)],
    ids=["experts", "stages, tensors, more"])
def test_the_same_layout_continues_bit_for_bit(ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                               cases: list[Any]) -> None:
    jobs = []
    for number, (precision, n, layout) in enumerate(cases):
        common = {"settings": [f"train.precision={precision}", *layout],
                  "paths": [str(packed_data.text)]}
        out = str(tmp_path / str(number))
        jobs += [job(RUN, "trained", n, {**common, "out": out}),
                 job(RUN, "continued", n, {**common, "sources": [out], "expected": [out]})]
    results = ranks(*jobs)
    for case, trained, continued in zip(cases, results[::2], results[1::2], strict=True):
        for before, (after,) in zip(trained, continued, strict=True):
            assert after == {"steps": before[3:], "apart": {"model": 0.0, "optimizer": 0.0}}, case
