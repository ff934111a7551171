"""Models that TARGET can name, and the settings to run a checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines.target import Target, build_inference_config, find_target
from megatron_sov.model.config import LoraConfig
from megatron_sov.model.recipes import get


def test_find_target_detects_each_kind_of_folder(imported: dict[str, Path], hf_models: dict[str, Path],
                                                 tmp_path: Path) -> None:
    checkpoint, folder = imported["exaone_moe"], hf_models["exaone_moe"]
    for step in (9, 10):
        (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"run/checkpoints/step-{step}").symlink_to(checkpoint)
    (tmp_path / "run/config.json").write_text("{}")
    assert find_target(tmp_path / "run") == Target(tmp_path / "run/checkpoints/step-10", False)
    assert find_target(checkpoint) == Target(checkpoint, False)
    assert find_target(folder) == Target(folder, True)
    assert (find_target(folder).tokenizer_folder, find_target(checkpoint).tokenizer_folder) == (
        folder, checkpoint / "tokenizer")


def test_target_reports_size_and_training(imported: dict[str, Path], hf_models: dict[str, Path],
                                          tmp_path: Path) -> None:
    ours, theirs = Target(imported["solar_open"], False), Target(hf_models["solar_open"], True)
    assert (ours.vocab_size, theirs.vocab_size) == (1024, 1024)
    assert (ours.step, theirs.step) == (0, None)
    assert (ours.trained_tokens, theirs.trained_tokens) == (512, 512), (
        "an imported model is judged up to its own limit")
    assert ours.model == theirs.model
    trained = shutil.copytree(imported["solar_open"], tmp_path / "trained")
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["settings"] |= {"recipe": "tiny",
                             "data": {"phases": [{"name": "a", "seq_len": 64}, {"name": "b", "seq_len": 32}]}}
    manifest["content"]["step"] = 70
    (trained / "manifest.json").write_text(json.dumps(manifest | {"sha256": ""}))
    assert (Target(trained, False).trained_tokens, Target(trained, False).step) == (64, 70)


def test_checkpoint_runs_in_the_requested_precision(imported: dict[str, Path]) -> None:
    plain = build_inference_config(imported["solar_open"], [], 1)
    assert (plain.train.precision, plain.parallel.tp, plain.model.family) == ("fp32", 1, "solar_open")
    inference_config = build_inference_config(imported["solar_open"], ["train.precision=bf16",
                                                                       "parallel.pp=2"], 2)
    assert (inference_config.train.precision, inference_config.parallel.pp) == ("bf16", 2)
    with pytest.raises(UserError, match="2 must divide"):
        build_inference_config(imported["solar_open"], ["parallel.pp=2"], 1)


def test_other_adapter_settings_are_rejected(imported: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"--set lora\.rank=4: the adapters of .* are fixed"):
        build_inference_config(imported["solar_open"], ["parallel.pp=2", "lora.rank=4"], 2)


def test_architecture_change_is_not_an_adapter_change(tmp_path: Path) -> None:
    model = get("tiny-solar-open").model
    made_with = replace(get("tiny-solar-open"), lora=LoraConfig(4))
    with create_artifact(tmp_path / "adapter", "checkpoint") as artifact:
        artifact.settings = made_with.to_dict()
    inference_config = build_inference_config(tmp_path / "adapter", ["model.num_shared_experts=0"], 1)
    assert inference_config.lora == made_with.lora, "the checkpoint's tensors tell"
    assert inference_config.model != model, "the checkpoint's tensors tell"


def test_folders_without_a_model_are_rejected(hf_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        find_target(tmp_path / "nowhere")
    with pytest.raises(UserError, match="checkpoint, a run"):
        find_target(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="complete checkpoint yet"):
        find_target(tmp_path / "run")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: has no readable vocab_size"):
        print(Target(tmp_path, True).vocab_size)
