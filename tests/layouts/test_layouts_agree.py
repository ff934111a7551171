"""Objectives and precisions beside the table of test_agreement.py: every layout trains the same model.

Families beside these are proved by tests/proof in one process; what they compute in several is compared with
transformers by test_gradients.py.

In float64 that order is some 1e-16, and nothing else can hide in a tolerance of 1e-12.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.checkpoint.sharded_tensors import TensorReader

RUN = str(Path(__file__).with_name("layout_run.py"))
TP2 = ["parallel.tp=2", "parallel.sp=true"]
ZERO1 = ["parallel.zero1=true"]
OVERLAP = [*ZERO1, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
           "parallel.bucket_params=9000"]
"""Buckets of 9,000 parameters: several of them even in these models, so that an unfinished one can
be read too early."""
PASSES = ["parallel.ep=2", "parallel.expert_overlap=micro_batches"]
"""A micro-batch is computed while tokens of another one travel."""
LAYOUTS = {
    "TP2+SP x PP2 x EP2": (4, [*TP2, "parallel.pp=2", "parallel.ep=2"]),
    "TP2+SP x CP2 x EP2 ZeRO-1 overlapped": (4, [*TP2, "parallel.cp=2", "parallel.ep=2", *OVERLAP]),
    "CP2 x DP2 x EP2 ZeRO-1 overlapped": (4, ["parallel.cp=2", "parallel.ep=2", *OVERLAP]),
    "PP2 VPP2 x DP2 ZeRO-1 overlapped": (4, ["parallel.pp=2", "parallel.vpp=2", *OVERLAP]),
    "EP2 ZeRO-1 overlapped, passes overlapped": (2, [*PASSES, *OVERLAP, "train.micro_batch_size=1"]),
    "PP2 VPP2 x EP2, passes overlapped": (4, [*PASSES, "parallel.pp=2", "parallel.vpp=2",
                                              "train.micro_batch_size=1"]),
    "micro batch 1": (1, ["train.micro_batch_size=1"]),
    "micro batch 8": (1, ["train.micro_batch_size=8"]),
}
SFT = ["objective.text_coeff=0.3", "objective.loss_per=turn", 'data.phases=[{"name": "main", "seq_len": 64}]']
STEPS = 2
FP64 = (["train.precision=fp64"], 1e-12)
FP32 = (["train.precision=fp32",
         # Adam with eps 1e-8 turns float noise of near-zero gradients into whole updates: gradients still
         # agree to 1e-6 then, but losses only to 1e-4 after some steps.  With a larger eps a disagreement of
         # layouts cannot hide in that.
         "optim.eps=1e-3"], 5e-6)
"""Settings and largest relative difference."""
DEEPSEEK = [*SFT, "model.seq_aux_loss_coeff=0.01"]
CHUNKS = ['data.phases=[{"name": "main", "seq_len": 160}]', "train.global_batch_size=4"]
"""Rows of several chunks of linear attention."""
CASES = {
    "micro batches": ("tiny-k-exaone", "lm", [], FP64, ("micro batch 1", "micro batch 8")),
    "sft": ("tiny-k-exaone", "sft", SFT, FP64, ("PP2 VPP2 x DP2 ZeRO-1 overlapped",)),
    "passes": ("tiny-k-exaone", "sft", SFT, FP64, ("PP2 VPP2 x EP2, passes overlapped",)),
    "passes, further": ("tiny-k-exaone", "sft", SFT, FP64, ("EP2 ZeRO-1 overlapped, passes overlapped",)),
    # experts in the prediction layer, chosen within groups
    "deepseek_v3 sft": ("tiny-deepseek-v3", "sft", DEEPSEEK, FP64, ("TP2+SP x PP2 x EP2",)),
    "deepseek_v3 sft, further": ("tiny-deepseek-v3", "sft", DEEPSEEK, FP64, (
        "CP2 x DP2 x EP2 ZeRO-1 overlapped", "micro batch 1")),
    "solar_open2": ("tiny-solar-open2", "lm", CHUNKS, FP64, ("TP2+SP x CP2 x EP2 ZeRO-1 overlapped",)),
    "solar_open2, further": ("tiny-solar-open2", "lm", CHUNKS, FP64, (
        "TP2+SP x PP2 x EP2", "CP2 x DP2 x EP2 ZeRO-1 overlapped", "micro batch 1")),
    "fp32": ("tiny-k-exaone", "lm", [], FP32, ("TP2+SP x PP2 x EP2",)),
}


DEEP = ("passes, further", "deepseek_v3 sft", "deepseek_v3 sft, further", "solar_open2, further", "fp32")
"""Rarer cases; passes that overlap without stages are trained by te_double/test_agreement.py, and fp32
and chosen groups are compared with transformers by test_gradients.py."""


@pytest.mark.distributed
@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.deep] * (case in DEEP))
                                  for case in CASES])
def test_layouts_agree_with_one_rank(ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                     case: str) -> None:
    recipe, objective, extra, (precision, tolerance), names = CASES[case]
    layouts = {name: LAYOUTS[name] for name in names}
    paths = [str(packed_data.text)] + ([str(packed_data.chats)] if objective == "sft" else [])
    jobs = [
        job(RUN, "curve", nproc, {"recipe": recipe, "settings": [*precision, *extra, *layout], "paths": paths,
                                  "objective": objective, "steps": STEPS, "out": str(tmp_path / name)})
        for name, (nproc, layout) in {"one rank": (1, []), **layouts}.items()]
    (reference,), *others = ranks(*jobs)
    assert len(reference) == STEPS and reference[0]["loss"] > reference[-1]["loss"]
    terms = {"term lm"} if objective == "lm" else {"term response", "term text"}
    predicts = any(name in recipe for name in ("exaone", "glm", "next"))
    assert terms | ({"term mtp"} if predicts else set()) <= set(reference[0])
    if objective == "sft":
        assert reference[0]["tokens"] < 8 * 64, "the batch should have padding"
    problems = []
    for name, per_rank in zip(layouts, others, strict=True):
        assert all(steps == per_rank[0] for steps in per_rank), f"{name}: ranks report different numbers"
        for number, (ours, theirs) in enumerate(zip(per_rank[0], reference, strict=True), 1):
            assert ours.keys() == theirs.keys()
            for what, value in ours.items():
                difference = np.abs(np.array(value) - np.array(theirs[what])).max() / max(
                    1e-3, np.abs(theirs[what]).max())
                if difference > tolerance:
                    problems.append(f"{name}: step {number}: {what} differs by {difference:.1e}: "
                                    f"{value}, not {theirs[what]}")
        if tolerance < 1e-7:
            problems += _different_tensors(tmp_path / name, tmp_path / "one rank")
    assert problems == []


def _different_tensors(ours: Path, theirs: Path) -> list[str]:
    """Compare moments (the gradients of all steps), weights and router biases,
    beside the largest value of each tensor.

    A gradient near zero is divided by Adam's eps of 1e-8, so that its last bits, some 1e-18,
    move a weight by lr * 1e-10.
    """
    problems = []
    for part, tolerance in (("model", 2e-11), ("optimizer", 1e-12)):
        a, b = TensorReader(ours, part), TensorReader(theirs, part)
        assert sorted(a.keys()) == sorted(b.keys()) and len(a.keys()) > 20
        for key in sorted(a.keys()):
            assert b.dtype(key) == a.dtype(key) == (torch.float32 if key.endswith("expert_bias")
                                                    else torch.float64), key
            difference = float(
                (a.read(key) - b.read(key)).abs().max() / b.read(key).abs().max().clamp(min=1e-12))
            if difference > tolerance:
                problems.append(f"{ours.name}: {part} {key} differs by {difference:.1e}")
    return problems
