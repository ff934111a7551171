"""Artifacts written with megatron-core 0.16.1: run and adapter continue with equal losses, exports are
equal."""

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

MADE = Path(__file__).with_name("made_before")
LOSSES = {"run": [5.726841978340635, 5.583874911591953], "lora": [5.672828841575447, 5.700213409574315]}
"""Folder -> losses of steps 3 and 4 with megatron-core 0.16.1, torch 2.13 and one thread."""
RunCommand = Callable[..., Any]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Copy all artifacts; the adapter names the base next to it."""
    shutil.copytree(MADE, tmp_path / "made")
    manifest = tmp_path / "made/lora/checkpoints/step-2/manifest.json"
    text = manifest.read_text()
    sealed = json.loads(text)["sha256"]
    text = text.replace("/tmp/before/run", str(tmp_path / "made/run")).replace(sealed, "0" * 64)
    manifest.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    return tmp_path / "made"


@pytest.mark.parametrize("name", LOSSES)
def test_old_run_continues_with_equal_losses(name: str, made: Path, run_command: RunCommand) -> None:
    base = ("--from", str(made / "run/checkpoints/step-2")) if name == "lora" else ()
    run_command("pretrain", "--run", str(made / name), *base, "--resume", "--config",
                str(made / name / "config.json"), "--data", str(made / "text")).check_returncode()
    losses = {event["step"]: event["loss"] for event in read_run_events(made / name, "step")}
    assert [losses[3], losses[4]] == pytest.approx(LOSSES[name], rel=1e-6)


def test_old_exports_are_equal_and_readable(made: Path, run_command: RunCommand) -> None:
    run, lora = made / "run/checkpoints/step-2", made / "lora/checkpoints/step-2"
    for words in (("to-hf", run, made / "hf-again"), ("to-peft", lora, made / "peft-again"),
                  ("from-hf", made / "hf", made / "imported"),
                  ("from-peft", made / "peft", made / "imported-adapter", "--base", run)):
        run_command("convert", *map(str, words)).check_returncode()
    for file in ("hf/model.safetensors", "hf/config.json", "peft/adapter_model.safetensors"):
        folder, _, name = file.partition("/")
        assert (made / f"{folder}-again" / name).read_bytes() == (made / file).read_bytes()
    for part, written, imported in (("model", run, "imported"), ("adapter", lora, "imported-adapter")):
        ours, theirs = TensorReader(written, part), TensorReader(made / imported, part)
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.read(key), theirs.read(key)) for key in set(ours.keys()))
