"""Logits agree with transformers up to rounding for two families, and wrong details are detected."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sov import convert
from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.eval.parity import _Difference, compare_logits, draw_random_prompts, prove_logits
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

FAMILIES = ("solar_open", "exaone_moe")
PROMPTS = draw_random_prompts([1, 6, 40, 300, 17], 1024)
"""Prompts of these lengths. The one of 300 tokens exceeds Solar's original context (256) and K-EXAONE's
window (8)."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_for_packed_documents(family: str, imported: dict[str, Path], hf_models: dict[str, Path],
                                           one_rank: None) -> None:
    difference, greedy = compare_logits(imported[family], hf_models[family], PROMPTS)
    assert difference.passed and greedy.passed
    assert difference.value < 1e-4
    assert difference.limit > 2e-4, "logits of this size would agree whatever the model does"


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e6}
WRONG_CONFIGS = [
    ("solar_open", {"rope_parameters": DEFAULT_ROPE | {"rope_type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 256}}),
    ("solar_open", {"rope_parameters": DEFAULT_ROPE}),
    ("solar_open", {"routed_scaling_factor": 1.6}),
    ("solar_open", {"num_experts_per_tok": 3}),
    ("exaone_moe", {"sliding_window": 9}),
    ("exaone_moe", {"layer_types": ["full_attention"] + ["sliding_attention"] * 4}),
    ("exaone_moe", {"rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize(("family", "change"), WRONG_CONFIGS, ids=lambda x: str(x)[:40])
def test_wrong_detail_is_detected(family: str, change: dict, imported: dict[str, Path],
                                  hf_models: dict[str, Path], one_rank: None, tmp_path: Path) -> None:
    other = shutil.copytree(hf_models[family], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    difference, _ = compare_logits(imported[family], other, PROMPTS)
    assert not difference.passed and difference.value > 3 * difference.limit


def test_different_vocabularies_are_rejected() -> None:
    with pytest.raises(UserError, match="have 10 and 12"):
        _Difference().add_document(0, torch.zeros(3, 10), torch.zeros(3, 12))


LENGTHS = [1, 5, 40, 100_000]
"""Prompt lengths; the models' context is too short for the last one, which is left out."""


def prove(a: Path, b: Path) -> tuple[dict[str, bool], dict[str, object]]:
    """Return check name -> whether it passed, and the method of the proof."""
    proof = prove_logits(a, b, LENGTHS)
    return {check.name: check.passed for check in proof.checks}, proof.method


ALL_PASSED = {"largest difference of a logit": True, "greedy tokens that differ": True}


def test_both_sides_use_the_narrower_dtype(imported: dict[str, Path], hf_models: dict[str, Path],
                                           one_rank: None, tmp_path: Path) -> None:
    checkpoint, hf = imported["exaone_moe"], hf_models["exaone_moe"]
    checks, method = prove(checkpoint, hf)
    assert checks == ALL_PASSED and "weights" not in method
    assert method["run by"] == {str(checkpoint): "megatron-core", str(hf): "transformers"}
    assert method["prompts"] == {"lengths": [1, 5, 40], "tokens": "random", "seed": 0}
    convert.to_hf(checkpoint, tmp_path / "bf16", "bfloat16")
    convert.from_hf(tmp_path / "bf16", tmp_path / "narrow")
    for a, b, narrower in ((tmp_path / "bf16", checkpoint, tmp_path / "bf16"),
                           (tmp_path / "narrow", hf, tmp_path / "narrow")):
        proof = prove_logits(a, b, LENGTHS)
        assert [check.passed for check in proof.checks] == [True, True]
        assert proof.method["weights"] == f"of the narrower side, {narrower}"
        assert all(check.detail.endswith("weights of both in bfloat16") for check in proof.checks)
    assert "equal weights, equal logits" in str(prove(hf, tmp_path / "bf16"))
    assert "equal weights, equal logits" in str(prove(checkpoint, tmp_path / "narrow"))


def test_card_is_complete_and_recorded(imported: dict[str, Path], hf_models: dict[str, Path], one_rank: None,
                                       tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, hf = imported["solar_open"], shutil.copytree(hf_models["solar_open"], tmp_path / "hf")
    EventLog(tmp_path / EVENTS).close()
    command = ["convert", "verify", str(checkpoint), str(hf), "--lengths", "3", "30", "--card",
               str(tmp_path / "card.json")]
    assert main([*command, "--run", str(tmp_path)]) == 0
    assert "verified: the same model" in capsys.readouterr().out
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["passed"] is True and {"largest difference of a logit", "tensors whose values differ"} <= {
        check["name"] for check in card["checks"]}
    assert card["a"] == {"path": str(checkpoint), "kind": "checkpoint",
                         "manifest_sha256": manifest_sha256(checkpoint)}
    assert card["b"] == {"path": str(hf), "kind": "hf_model"}
    assert card["logits"]["prompts"]["lengths"] == [3, 30] and card["versions"]["megatron-core"] == "0.19.2"
    assert card["tensors"]["model.norm.weight"] | {"sha256": 0} == {
        "shape": [[32], [32]], "dtype": ["float32"] * 2, "sha256": 0, "equal": True, "difference": 0.0}
    (event,) = read_events(tmp_path / EVENTS)
    assert (event["event"], event["checks"]) == ("conversion", card["checks"])

    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    assert main([*command, "--json"]) == 3
    wrong = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if not check["passed"]}
    assert {"config fields that differ", "largest difference of a logit"} <= wrong
