"""Where a training stands: weights, optimizers and the number of steps, as safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_sov.base.artifacts import clear_leftovers, damaged_files, new_artifact, read_manifest
from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.omni.codecs.training.task import CodecTask

STATE_KIND = "codec_training"
"""Of the artifact."""
_TENSORS, _NUMBERS = "state.safetensors", "state.json"


def save_state(path: Path, task: CodecTask, step: int) -> None:
    """Write where a task stands behind a step, in place of an earlier one."""
    tensors = {f"network.{name}": tensor for name, tensor in task.networks.state_dict().items()}
    numbers: dict[str, Any] = {}
    for name, optimizer in task.optimizers.items():
        state = optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{index}.{key}"] = value
                else:
                    plain.setdefault(str(index), {})[key] = value
        numbers[name] = {"groups": state["param_groups"], "state": plain}
    with new_artifact(path, STATE_KIND, overwrite=True) as writer:
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
                  writer.path / _TENSORS)
        (writer.path / _NUMBERS).write_text(json.dumps({"optimizers": numbers}), encoding="utf-8")
        writer.content = {"step": step}


def load_state(path: Path, task: CodecTask) -> int:
    """Put a task where it stood; return the number of steps that are done, 0 where nothing was kept.

    Raises:
        UserError: what was kept is damaged, or of another network.
    """
    clear_leftovers(path)
    if not path.exists():
        return 0
    step = read_manifest(path, STATE_KIND).content.get("step")
    remedy = f"delete {path.parent} to begin again"
    if damaged := damaged_files(path):
        raise UserError(f"{damaged[0]}; {remedy}")
    try:
        tensors = load_file(path / _TENSORS)
        numbers = json.loads((path / _NUMBERS).read_text(encoding="utf-8"))["optimizers"]
        networks = {name.removeprefix("network."): tensor for name, tensor in tensors.items()
                    if name.startswith("network.")}
        task.networks.load_state_dict(networks)
        for name, optimizer in task.optimizers.items():
            optimizer.load_state_dict(_optimizer_state(name, numbers[name], tensors))
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"step {step!r}")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
        raise UserError(f"{path}: does not fit this training ({told_in_a_line(e)}); {remedy}") from None
    return step


def _optimizer_state(name: str, numbers: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return one optimizer's state as torch has it."""
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in numbers["state"].items()}
    begin = f"optimizer.{name}."
    for key, tensor in tensors.items():
        if key.startswith(begin):
            index, _, entry = key.removeprefix(begin).partition(".")
            state.setdefault(int(index), {})[entry] = tensor
    groups = [{key: tuple(value) if key == "betas" else value for key, value in group.items()}
              for group in numbers["groups"]]
    return {"state": state, "param_groups": groups}
