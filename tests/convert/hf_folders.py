"""Write, change and convert Hugging Face folders, whose tensors are in one file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.base.errors import UserError


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_tensors(folder, tensors)
    return folder


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def round_trip(folder: Path, tmp_path: Path) -> Path:
    """Convert a folder into the checkpoint `ckpt`, and that into the returned folder."""
    convert.from_hf(folder, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    return tmp_path / "back"


def check_refused(folder: Path, message: str) -> None:
    """Fail unless from-hf rejects a folder with a message that matches, and writes nothing."""
    out = folder.with_name("refused")
    with pytest.raises(UserError, match=message):
        convert.from_hf(folder, out)
    assert not out.exists()
