"""`verify` passes for equal models, and reports differences."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_sov import convert
from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.convert.hf_export import ConversionProof, TensorRecord
from tests.convert.hf_folders import edit_tensors, round_trip, set_config


@pytest.fixture
def pair(exaone_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    hf = round_trip(exaone_dir, tmp_path)
    return tmp_path / "ckpt", hf


def list_failed_checks(proof: ConversionProof) -> dict[str, float]:
    checks = proof.checks
    assert all(check.passed == (check.value <= check.limit) for check in checks)
    return {check.name: check.value for check in checks if not check.passed}


def test_verify_accepts_all_forms_of_one_model(pair, exaone_dir: Path) -> None:
    checkpoint, hf = pair
    for a, b in ((checkpoint, hf), (exaone_dir, checkpoint), (hf, exaone_dir)):
        proof = convert.verify(a, b)
        assert list_failed_checks(proof) == {} and proof.passed
    assert sum("transformers" in check.name for check in proof.checks) == 6
    for name, tensor in load_file(exaone_dir / "model.safetensors").items():
        sha256 = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert proof.tensors.pop(name) == TensorRecord((tuple(tensor.shape),) * 2, (dtype,) * 2,
                                                       (sha256,) * 2, True)
    assert proof.tensors == {}


def test_export_has_all_files_for_the_hub(imported: dict[str, Path], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hf"
    convert.to_hf(imported["solar_open"], out)
    assert {"README.md", "config.json", "generation_config.json", "chat_template.jinja", "manifest.json",
            "tokenizer.json", "tokenizer_config.json"} <= {file.name for file in out.iterdir()}
    inside = json.loads((imported["solar_open"] / "tokenizer/tokenizer_config.json").read_text())
    assert (out / "chat_template.jinja").read_text() == inside["chat_template"]
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    chat = [{"role": "user", "content": "Hi"}]
    shown, expected = (AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
                       for folder in (out, imported["solar_open"] / "tokenizer"))
    assert shown == expected
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["megatron-sov"] and "## Provenance" in card.text
    assert "recipe from-hf" in card.text and manifest_sha256(imported["solar_open"])[:16] in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace("FOLDER", str(out))
    names: dict[str, Any] = {}
    exec(code, names)
    assert (names["model"].config.model_type, names["tokenizer"].decode(
        names["tokenizer"]("Hi").input_ids)) == ("solar_open", "Hi")
    # edits by a person are not damage, and no local path is exported
    (out / "README.md").write_text("mine\n")
    assert list_failed_checks(convert.verify(imported["solar_open"], out, load=False)) == {}
    assert str(imported["solar_open"].parent) not in "".join(
        file.read_text() for file in out.iterdir() if file.suffix in (".json", ".md"))


def test_verify_finds_and_measures_a_changed_weight(pair) -> None:
    checkpoint, hf = pair
    name = "model.layers.2.mlp.experts.6.up_proj.weight"
    edit_tensors(hf, lambda tensors: tensors[name][3, 4].add_(0.5))
    proof = convert.verify(checkpoint, hf, load=False)
    assert [c.detail for c in proof.checks if c.name == "tensors whose values differ"] == [name]
    assert [n for n, record in proof.tensors.items() if len(set(record.sha256)) == 2] == [name]
    assert list_failed_checks(proof) == {f"{hf}: files that differ from the manifest": 1,
                             "tensors whose values differ": 1,
                             "largest difference of a weight": pytest.approx(0.5, abs=2e-3)}
    with pytest.raises(UserError, match=r"model\.safetensors: has .* \(it holds .*lm_head\.weight"):
        convert.from_hf(hf, hf / "ckpt")


def test_verify_accepts_a_cast_copy_after_rounding(pair, tmp_path: Path) -> None:
    convert.to_hf(pair[0], tmp_path / "wide", "float32")
    assert list_failed_checks(convert.verify(pair[0], tmp_path / "wide", load=False)) == {}


def test_verify_finds_a_changed_config_field(pair) -> None:
    checkpoint, hf = pair
    set_config(hf, routed_scaling_factor=1.0)
    result = list_failed_checks(convert.verify(checkpoint, hf, load=False))
    assert result == {f"{hf}: files that differ from the manifest": 1, "config fields that differ": 1}


def test_verify_distinguishes_negative_zero(solar_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(solar_dir, tmp_path / "b")
    edit_tensors(tmp_path / "b", lambda tensors: tensors["model.norm.weight"].zero_())
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    edit_tensors(tmp_path / "c", lambda tensors: tensors["model.norm.weight"].neg_())
    assert list_failed_checks(convert.verify(tmp_path / "b", tmp_path / "c", load=False)) == {
        "tensors whose values differ": 1}


def test_inspect_counts_parameters_from_headers(pair, capsys) -> None:
    facts = []
    for folder in pair:
        assert main(["convert", "inspect", str(folder), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    tensors = load_file(pair[1] / "model.safetensors")
    assert facts[0]["parameters"] == facts[1]["parameters"]
    for weights in (facts[0]["weights"], facts[1]["weights"]):
        assert weights["num_tensors"] == len(tensors)
        assert weights["size_bytes"] == sum(t.nbytes for t in tensors.values())
        assert weights["dtypes"] == f"bfloat16 x {len(tensors) - 4}, float32 x 4"
    parameters = facts[0]["parameters"]
    assert parameters["total"] + parameters["mtp"] == sum(t.numel() for name, t in tensors.items()
                                                          if "correction" not in name)


def test_verify_fails_if_transformers_cannot_load(solar_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any exception, e.g. if a package for 8-bit weights is missing."""
    from transformers import AutoModelForCausalLM

    def lacks(*args: object, **kwargs: object) -> None:
        raise ImportError("Loading an FP8 quantized model requires accelerate")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacks)
    proof = convert.verify(solar_dir, solar_dir)
    assert list_failed_checks(proof) == {f"{solar_dir}: transformers loads it": 1} and not proof.passed
    assert "(ImportError: Loading an FP8 quantized model requires accelerate)" in proof.checks[-1].detail
