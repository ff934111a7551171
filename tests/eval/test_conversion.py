"""verify runs both sides and writes a card: the same model passes in any combination of dtypes,
a wrong setting does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.artifacts import manifest_sha256
from megatron_sov.cli import main
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron
from megatron_sov.obs.events import EVENTS, EventLog, read_events

prepare_megatron()

from megatron_sov.eval.parity import prove_logits  # noqa: E402

LENGTHS = [1, 5, 40, 100_000]
"""The last one is longer than the models can take."""


def figures(a: Path, b: Path) -> tuple[dict[str, bool], dict[str, object]]:
    proof = prove_logits(a, b, LENGTHS)
    return {check.name: check.passed for check in proof.checks}, proof.method


SAME = {"largest difference of a logit": True, "greedy tokens that differ": True}


def test_both_sides_run_with_the_narrower_weights(imported: dict[str, Path], hf_models: dict[str, Path],
                                                  one_rank: None, tmp_path: Path) -> None:
    checkpoint, hf = imported["exaone_moe"], hf_models["exaone_moe"]
    found, method = figures(checkpoint, hf)
    assert found == SAME and "weights" not in method
    assert method["run by"] == {str(checkpoint): "megatron-core", str(hf): "transformers"}
    assert method["prompts"] == {"lengths": [1, 5, 40], "tokens": "random", "seed": 0}
    convert.to_hf(checkpoint, tmp_path / "bf16", "bfloat16")
    convert.from_hf(tmp_path / "bf16", tmp_path / "narrow")
    for a, b, narrower in ((tmp_path / "bf16", checkpoint, tmp_path / "bf16"),
                           (tmp_path / "narrow", hf, tmp_path / "narrow")):
        found, method = figures(a, b)
        assert found == SAME and method["weights"] == f"of the narrower side, {narrower}"
    assert figures(hf, hf)[0] == SAME
    assert "differ in dtype" in str(figures(hf, tmp_path / "bf16"))
    assert "equal weights, equal logits" in str(figures(checkpoint, tmp_path / "narrow"))


def test_the_card_says_everything_and_the_run_hears_of_it(
        imported: dict[str, Path], hf_models: dict[str, Path], one_rank: None, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
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
    assert card["logits"]["prompts"]["lengths"] == [3, 30] and card["versions"]["megatron-core"] == "0.16.1"
    assert card["tensors"]["model.norm.weight"] | {"sha256": 0} == {
        "shape": [[32], [32]], "dtype": ["float32"] * 2, "sha256": 0, "equal": True, "difference": 0.0}
    (event,) = read_events(tmp_path / EVENTS)
    assert (event["event"], event["checks"]) == ("conversion", card["checks"])

    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    assert main([*command, "--json"]) == 3
    wrong = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if not check["passed"]}
    assert {"config fields that differ", "largest difference of a logit"} <= wrong


def test_without_running_the_models(imported: dict[str, Path], hf_models: dict[str, Path], tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    hf = shutil.copytree(hf_models["solar_open"], tmp_path / "hf")
    command = ["convert", "verify", str(imported["solar_open"]), str(hf), "--no-load"]
    assert main(command) == 0
    assert "logits were not compared: --no-load" in capsys.readouterr().out
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones_like(tensors["lm_head.weight"])
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    assert main(command) == 3
    assert "FAIL  tensors whose values differ: 1 (limit 0); lm_head.weight" in capsys.readouterr().out
    assert main([*command, "--lengths", "0"]) == 2
