"""Dtypes under `train.precision`, and repeated bits under `train.deterministic`."""

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("precision_run.py"))
LAYOUT = ["parallel.tp=2", "parallel.sp=true", "parallel.ep=2"]


@pytest.mark.distributed
@pytest.mark.essential
def test_bf16_keeps_master_weights_gradients_routing_and_loss_in_float32(ranks: Any, job: Any,
                                                                         packed_data: Any) -> None:
    arguments = {"recipe": "tiny-k-exaone", "data": str(packed_data.text)}
    jobs = [job(RUN, "collect_dtypes", 2 if p == "bf16" else 1,
                {**arguments,
                 "settings": [f"train.precision={p}", "model.num_experts=8", "model.num_layers=3"]})
            for p in ("bf16", "fp32", "fp64")]
    (bf16, _), (fp32,), (fp64,) = ranks(*jobs)
    single = ["torch.float32"]
    assert bf16["dtypes"] == {
        "weights": ["torch.bfloat16"], "gradients": single, "master": single, "exp_avg": single,
        "exp_avg_sq": single, "router logits": single, "router weights": single, "router bias": single,
        "losses": single}
    # data-parallel reduction: dense and expert gradients have one buffer each
    assert bf16["reduced"]["torch.float32"] > 0.4 * bf16["gradients"]
    assert "torch.bfloat16" not in bf16["reduced"]
    assert {k: v for k, v in fp64["dtypes"].items() if v != ["torch.float64"]} == {"router bias": single}
    assert abs(fp32["loss"] / fp64["loss"] - 1) < 1e-6
    # bf16 has 8 bits: errors of 2^-9 in many roundings mostly average out
    assert 1e-6 < abs(bf16["loss"] / fp64["loss"] - 1) < 2**-9


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize(("nproc", "threads", "settings"), [
    (1, 2, []), (2, 1, [*LAYOUT, "train.precision=bf16"])], ids=["threads", "layouts"])
def test_deterministic_runs_repeat_their_bits(ranks: Any, job: Any, packed_data: Any, nproc: int,
                                              threads: int, settings: list[str]) -> None:
    once, repeated = ranks(*2 * [job(RUN, "train_deterministically", nproc, {
        "settings": settings, "data": str(packed_data.text), "threads": threads})])
    assert once == repeated
    assert once[0]["threads"] == threads and once[0]["torch"] and once[0]["library"]
