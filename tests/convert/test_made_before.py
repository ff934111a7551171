"""Artifacts of megatron-core 0.16.1: a run and an adapter resume with equal losses, and exports are equal."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov.checkpoint.sharded_tensors import TensorReader
from tests.run_files import read_run_events

STORED_ARTIFACTS = Path(__file__).with_name("made_before")
LOSSES = {"run": [5.726841978340635, 5.583874911591953], "lora": [5.672828841575447, 5.700213409574315]}
"""Folder -> losses of steps 3 and 4 with megatron-core 0.16.1, torch 2.13 and one thread."""
RunCommand = Callable[..., Any]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Copy the artifacts; let the adapter's manifest name the copied base model, and hash it again."""
    shutil.copytree(STORED_ARTIFACTS, tmp_path / "made")
    manifest = tmp_path / "made/lora/checkpoints/step-2/manifest.json"
    text = manifest.read_text()
    digest = json.loads(text)["sha256"]
    text = text.replace("/tmp/before/run", str(tmp_path / "made/run")).replace(digest, "0" * 64)
    manifest.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    return tmp_path / "made"


@pytest.mark.parametrize("name", LOSSES)
def test_old_run_continues_with_equal_losses(name: str, artifacts: Path, run_command: RunCommand) -> None:
    base = ("--from", str(artifacts / "run/checkpoints/step-2")) if name == "lora" else ()
    run_command("pretrain", "--run", str(artifacts / name), *base, "--resume", "--config",
                str(artifacts / name / "config.json"), "--data", str(artifacts / "text")).check_returncode()
    losses = {event["step"]: event["loss"] for event in read_run_events(artifacts / name, "step")}
    assert [losses[3], losses[4]] == pytest.approx(LOSSES[name], rel=1e-6)


def test_old_exports_are_equal_and_readable(artifacts: Path, run_command: RunCommand) -> None:
    run, lora = artifacts / "run/checkpoints/step-2", artifacts / "lora/checkpoints/step-2"
    for command in (("to-hf", run, artifacts / "hf-again"), ("to-peft", lora, artifacts / "peft-again"),
                    ("from-hf", artifacts / "hf", artifacts / "imported"),
                    ("from-peft", artifacts / "peft", artifacts / "imported-adapter", "--base", run)):
        run_command("convert", *map(str, command)).check_returncode()
    for file in ("hf/model.safetensors", "hf/config.json", "peft/adapter_model.safetensors"):
        folder, _, name = file.partition("/")
        assert (artifacts / f"{folder}-again" / name).read_bytes() == (artifacts / file).read_bytes()
    for part, checkpoint, imported in (("model", run, "imported"), ("adapter", lora, "imported-adapter")):
        original, reimported = TensorReader(checkpoint, part), TensorReader(artifacts / imported, part)
        assert set(original.keys()) == set(reimported.keys())
        assert all(torch.equal(original.read(key), reimported.read(key)) for key in set(original.keys()))
