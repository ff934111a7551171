"""Loss and every gradient of a training step equal those of transformers' model classes, document by document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RUN = str(Path(__file__).with_name("layout_run.py"))
SETTINGS = ["train.precision=fp32", "model.seq_aux_loss_coeff=0", "model.num_mtp_layers=0", "model.init_std=0.2"]
"""The reference knows neither the balancing loss nor the prediction layer; a large spread makes every detail matter."""
CASES = {
    "solar lm": ("tiny-solar-open", "lm", []),
    "exaone lm": ("tiny-k-exaone", "lm", []),
    "qwen2 lm": ("tiny-qwen2", "lm", []),
    "qwen3 lm": ("tiny-qwen3", "lm", ["model.tied_embeddings=false"]),
    "qwen3_moe lm": ("tiny-qwen3-moe", "lm", [
        "model.norm_topk_prob=false", "model.num_dense_layers=1", "model.dense_ffn_dim=48"]),
    "solar sft": ("tiny-solar-open", "sft", ["objective.text_coeff=0.3", 'data.phases=[{"name": "main", "seq_len": 64}]']),
}


def _segments(result: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tokens, labels, weights and types of each part of a document in the batch, padding left out."""
    for m in result["micro_batches"]:
        for a, b in zip(m["bounds"], m["bounds"][1:], strict=False):
            if b > a and not m["padding"][a]:
                yield {name: torch.tensor(m[name][a:b]) for name in ("tokens", "labels", "weights", "types")}


def _reference(weights: Path, gradients: Path, result: dict[str, Any], objective: str) -> float:
    """Run transformers on each segment alone; returns the loss and saves the model with gradients in the weights' place."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, float] = {}
    for s in _segments(result):
        logits = model(input_ids=s["tokens"][None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, s["labels"], reduction="none")
        for kind in set(s["types"].tolist()):
            chosen = s["weights"] * (s["types"] == kind)
            sums[kind] = sums.get(kind, torch.zeros(())) + (losses * chosen).sum()
            counts[kind] = counts.get(kind, 0.0) + float(chosen.sum())
    text, response = 0, 2
    loss = sums[text] / counts[text] if objective == "lm" else sums[response] / counts[response] + 0.3 * sums[text] / counts[text]
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else 0.0)
    model.save_pretrained(gradients)
    return loss.item()


def test_loss_and_all_gradients_equal_transformers(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    from megatron_sov.convert import to_hf

    jobs = []
    for name, (recipe, objective, settings) in CASES.items():
        paths = [str(packed_data.text)] + ([str(packed_data.chats)] if objective == "sft" else [])
        jobs.append(job(RUN, "one_batch", 1, {"recipe": recipe, "settings": [*SETTINGS, *settings], "paths": paths,
                                              "objective": objective, "out": str(tmp_path / name)}))
    for (name, (_, objective, _)), (result,) in zip(CASES.items(), ranks(*jobs), strict=True):
        out = tmp_path / name
        for part in ("weights", "gradients"):
            to_hf(out / part, out / f"hf-{part}")
        expected = _reference(out / "hf-weights", out / "reference", result, objective)
        assert result["loss"] == pytest.approx(expected, abs=1e-5), name
        ours, theirs = load_file(out / "hf-gradients/model.safetensors"), load_file(out / "reference/model.safetensors")
        checked = [key for key in theirs if not key.endswith("e_score_correction_bias")]
        assert len(checked) > 30 and set(checked) <= set(ours)
        for key in checked:
            scale = theirs[key].abs().max()
            assert (ours[key] - theirs[key]).abs().max() <= 1e-4 * scale + 1e-8, f"{name}: {key}"
        assert sum(bool(theirs[key].abs().max() > 1e-6) for key in checked) > 0.7 * len(checked), "gradients reach the experts"
