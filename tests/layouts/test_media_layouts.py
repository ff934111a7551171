"""Pictures and sounds over placeholders: every layout computes what one process computes, and that is what
transformers' model computes when it is given the features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.mcore.checkpoint.sharded_tensors import TensorReader

RUN = str(Path(__file__).with_name("media_run.py"))
FP64 = ["train.precision=fp64"]
EXPERTS = ["model.num_experts=4", "model.expert_ffn_dim=16", "model.seq_aux_loss_coeff=0.01"]
SP = ["parallel.tp=2", "parallel.sp=true"]
OVERLAP = ["parallel.zero1=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
           "parallel.bucket_params=3000"]
LAYOUTS = {
    "TP2": ("tiny-qwen3", 2, ["parallel.tp=2"]),
    "TP2+SP recompute": ("tiny-qwen3", 2, [*SP, "train.recompute=true"]),
    "PP2": ("tiny-qwen3", 2, ["parallel.pp=2"]),
    "CP2": ("tiny-qwen3", 2, ["parallel.cp=2"]),
    "DP2 overlapped": ("tiny-qwen3", 2, OVERLAP),
    "EP2": ("tiny-qwen3-moe", 2, ["parallel.ep=2"]),
    "TP2+SP x CP2 x EP2": ("tiny-qwen3-moe", 4, [*SP, "parallel.cp=2", "parallel.ep=2"]),
}


def _apart(ours: Path, theirs: Path, part: str = "model") -> dict[str, float]:
    """Return how far each tensor is from another's, beside its largest value; a key's bias has no gradient but for
    the last bits of others."""
    a, b = TensorReader(ours, part), TensorReader(theirs, part)
    assert sorted(a.keys()) == sorted(b.keys())
    return {key: float((a.read(key) - b.read(key)).abs().max() / b.read(key).abs().max().clamp(min=1e-9))
            for key in sorted(a.keys())}


@pytest.mark.distributed
def test_layouts_agree_with_one_rank(ranks: Any, job: Any, tmp_path: Path) -> None:
    def settings(recipe: str, layout: list[str]) -> list[str]:
        return [*FP64, *(EXPERTS if "moe" in recipe else []), *layout]

    one = {recipe: (recipe, 1, []) for recipe in ("tiny-qwen3", "tiny-qwen3-moe")}
    every = {**one, **LAYOUTS}
    results = ranks(*(job(RUN, "one_batch", n, {"recipe": recipe, "settings": settings(recipe, layout),
                                                "out": str(tmp_path / name)})
                      for name, (recipe, n, layout) in every.items()))
    losses = {name: per_rank[0]["losses"] for name, per_rank in zip(every, results, strict=True)}
    for name, (recipe, _, _) in LAYOUTS.items():
        assert losses[name] == pytest.approx(losses[recipe], rel=1e-12), name
        apart = _apart(tmp_path / name / "gradients", tmp_path / recipe / "gradients")
        assert max(apart.values()) < 1e-10, (name, {k: v for k, v in apart.items() if v > 1e-10})
    gradients = TensorReader(tmp_path / "tiny-qwen3" / "gradients", "model")
    for key in ("vision.encoder.embeddings.patch_embedding.weight", "audio.encoder.conv1.weight",
                "audio.compressor.query_token", "vision.adapter.fc2.weight"):
        assert float(gradients.read(key).abs().max()) > 1e-6, key
