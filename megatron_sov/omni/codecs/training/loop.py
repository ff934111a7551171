"""The loop that trains a codec: steps, events, what is kept to continue from, and its folder at the end.

What is under way lies in `OUTPUT.training` beside the output.  The same command, started again after a kill,
goes on from what was kept last and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge, Le
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from megatron_sov.base.artifacts import (
    atomic_write, clear_leftovers, damaged_files, new_artifact, read_manifest, refuse_existing, to_json)
from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.omni.codecs.folder import KIND, save_codec
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.work.progress.locks import holding
from megatron_sov.work.progress.progress_bar import work_bar


class CodecTask(Protocol):
    """Networks and how they learn; a function of its settings, of the media, and of the step's number."""

    networks: nn.ModuleDict
    """Everything with weights, a discriminator too."""
    optimizers: dict[str, Optimizer]
    """Name -> optimizer over some of the weights."""

    def learn(self, step: int) -> dict[str, float]:
        """Take step `step` (the first is 1) and return its figures, "loss" among them.

        What is random comes from `generator(seed, step)`, so that weights, optimizers and the number of
        steps are all there is to continue from.
        """
        ...

    def look(self) -> dict[str, float]:
        """Return figures on media that are not learned from; {} where there are none."""
        ...

    def codec(self) -> nn.Module:
        """Return what is written at the end; it has `.settings`."""
        ...


def generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """Return a generator on the CPU for one purpose at one step."""
    digest = hashlib.sha256(f"{seed}:{step}:{purpose}".encode()).digest()
    # hashed: seed, step and purpose become one seed of 63 bits, which torch takes as signed
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_rows(num_rows: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Return the rows [batch_size] of a step, the first being step 1.

    Every row is met once before any is met again; the order of each round is another one.
    """
    begin = (step - 1) * batch_size
    places = torch.arange(begin, begin + batch_size)
    rows = torch.empty(batch_size, dtype=torch.int64)
    # a batch may end one round and begin the next, or hold several
    for epoch in (places // num_rows).unique().tolist():
        order = torch.randperm(num_rows, generator=generator(seed, epoch, "order"))
        here = places // num_rows == epoch
        rows[here] = order[places[here] % num_rows]
    return rows


END_SHARE = 0.1
"""Of the highest learning rate, at the last step."""


@dataclass(frozen=True)
class CodecSchedule:
    """Steps, order and learning rate: ours where a kind of network does not name a source."""

    steps: Annotated[int, Ge(1), Le(100000000)] = 100_000
    """Optimizer steps."""
    seed: Annotated[int, Ge(0), Le(2 ** 63 - 1)] = 0
    """Of weights, order and noise."""
    batch_size: Annotated[int, Ge(1), Le(1000000)] = 64
    """Pictures or pieces of sound in a step."""
    learning_rate: Annotated[float, Ge(0), Le(10)] = 3e-4
    """Of AdamW, at its highest."""
    warmup_steps: Annotated[int, Ge(0), Le(100000000)] = 100
    """From 0 up to it; then a cosine down to a tenth."""
    heldout_share: Annotated[float, Ge(0), Le(0.9)] = 0.05
    """Of the files; never learned from."""

    def set_rate(self, optimizer: Optimizer, step: int) -> float:
        """Give an optimizer the learning rate of a step, the first being 1, and return it."""
        # share of the cosine that is done: 0 at the end of the warmup, 1 at the last step
        gone = min(max(step - self.warmup_steps, 0) / max(self.steps - self.warmup_steps, 1), 1.0)
        down = END_SHARE + (1 - END_SHARE) * (1 + math.cos(math.pi * gone)) / 2
        rate = self.learning_rate * min(step / max(self.warmup_steps, 1), 1.0) * down
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


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
                # safetensors holds tensors alone; the other entries, such as flags, go into the JSON
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{index}.{key}"] = value
                else:
                    plain.setdefault(str(index), {})[key] = value
        numbers[name] = {"groups": state["param_groups"], "state": plain}
    # renamed into place when whole: a kill leaves the earlier state
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
    # of a process that was killed while it wrote
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
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in numbers["state"].items()}
    begin = f"optimizer.{name}."
    for key, tensor in tensors.items():
        if key.startswith(begin):
            index, _, entry = key.removeprefix(begin).partition(".")
            state.setdefault(int(index), {})[entry] = tensor
    # JSON has made a list of the tuple, and the same bits need the same types
    groups = [dict(group) for group in numbers["groups"]]
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    return {"state": state, "param_groups": groups}


SETTINGS, CHECKPOINT = "settings.json", "checkpoint"


@dataclass(frozen=True)
class CodecTrainingPlan:
    """How long a training goes, and where it writes."""

    kind: str
    """Kind of the codec, one of `folder.KNOWN`."""
    output: Path
    """The codec's folder."""
    steps: int
    """Optimizer steps in all."""
    settings: Mapping[str, Any]
    """Everything that the result is a function of; a training is continued with the same ones alone."""
    checkpoint_every_s: float = 60.0
    """Seconds between two states that are kept."""
    look_every: int = 0
    """Steps between two looks at held-out media; 0: at the end alone."""
    overwrite: bool = False
    """Replace a codec that is already at the output."""


def train(plan: CodecTrainingPlan, make_task: Callable[[Path], CodecTask]) -> dict[str, float]:
    """Train, or go on, and write the codec; returns the last figures.

    Args:
        plan: how long, and where to.
        make_task: is given the folder for what is under way, where media may be kept as training reads them.

    Raises:
        UserError: the output is taken, another process trains it, or what is under way has other settings.
    """
    refuse_existing(plan.output, KIND, plan.overwrite)
    folder = plan.output.with_name(f"{plan.output.name}.training")
    with _own_folder(folder, plan.settings):
        task = make_task(folder)
        # behind `make_task`, which draws the first weights: they are replaced where a state was kept
        first = load_state(folder / CHECKPOINT, task)
        events = EventLog(folder / EVENTS)
        try:
            _steps(plan, task, folder, events, first)
            # in the `try`: a failure here too leaves the events closed and the state on disk
            figures = task.look()
            events.write("codec_heldout", step=plan.steps, **figures)
        finally:
            events.close()
        save_codec(plan.output, plan.kind, task.codec(), training=plan.settings, overwrite=plan.overwrite,
                   facts={"steps": plan.steps, "heldout": figures}, files={EVENTS: folder / EVENTS})
    # only when the codec is on disk: until then it is all that there is
    shutil.rmtree(folder, ignore_errors=True)
    return figures


def _steps(plan: CodecTrainingPlan, task: CodecTask, folder: Path, events: EventLog, first: int) -> None:
    kept_s = time.monotonic()
    with work_bar("training", plan.steps, "step") as bar:
        bar.update(first)
        for step in range(first + 1, plan.steps + 1):
            figures = task.learn(step)
            events.write("codec_step", step=step, **figures)
            # before a state is kept: a broken one would end every later attempt
            if not math.isfinite(figures["loss"]):
                raise UserError(f"{folder}: the loss of step {step} is {figures['loss']}; lower "
                                f"learning.learning_rate, and delete {folder} to begin again")
            bar.update(1)
            if plan.look_every and step % plan.look_every == 0 and step < plan.steps:
                events.write("codec_heldout", step=step, **task.look())
            # at the last step too: a kill while the codec is written costs no training
            if time.monotonic() - kept_s >= plan.checkpoint_every_s or step == plan.steps:
                save_state(folder / CHECKPOINT, task, step)
                kept_s = time.monotonic()


@contextmanager
def _own_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder of a training, which is made, or continued where it has the same settings."""
    with holding(folder, folder):
        _refuse_other_settings(folder, json.loads(to_json(dict(settings))))
        yield


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or raise `UserError` where others were trained with."""
    file = folder / SETTINGS
    if not file.exists():
        atomic_write(file, to_json(settings))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    # other settings would give a mixture that no settings describe
    if before != settings:
        known = before if isinstance(before, dict) else {}
        differs = [key for key in settings if known.get(key) != settings[key]]
        raise UserError(f"{folder}: is a training with other settings ({', '.join(differs) or 'more'}); "
                        f"give the same ones to go on, or delete {folder} to begin again")
