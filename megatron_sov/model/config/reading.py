"""Reading settings: from JSON, from `--set key=value`, and from `--data DIR[:weight]`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import assign_all, parse_changes, read
from megatron_sov.model.config.policy import PolicyParts
from megatron_sov.model.config.run import RunConfig

# The library's ways to be faster or smaller that no setting offers, and why: what is told to who asks.

_OVERLAP = ("the library's schedule for it calls routers without the mask of padding, which they would send "
            "to experts and count as load, and computes losses of its own; leave it out: "
            "gpu.shared_expert_overlap = on hides a part of the same messages")
_GRAPHS = ("the library's CUDA graphs refuse packed rows, which all rows are here, and experts take as many "
           "tokens as come; leave it out, and give the GPU more work for each launch by a larger "
           "train.micro_batch_size")
_WEIGHTS = ("checkpoints, exports and the replica checks read weights in bf16; leave it out: with train.fp8 "
            "products take 8 bits all the same")

NOT_OFFERED = {
    "cuda_graphs": _GRAPHS, "cuda_graph_impl": _GRAPHS, "cuda_graph_scope": _GRAPHS,
    "enable_cuda_graph": _GRAPHS, "external_cuda_graph": _GRAPHS,
    "expert_parallel_overlap": _OVERLAP, "overlap_moe_expert_parallel_comm": _OVERLAP,
    "delay_wgrad_compute": _OVERLAP,
    "fp8_weights": _WEIGHTS, "fp8_param": _WEIGHTS, "fp8_param_gather": _WEIGHTS,
    "reuse_grad_buf_for_mxfp8_param_ag": _WEIGHTS,
}
"""Last part of a setting's name -> why it does not exist, and what to do."""


RENAMED = {"evaluate.beside": "evaluate.background",
           "evaluate.background.judges": "evaluate.background.tasks", "guards.on_corruption": "guards.on_sdc"}
"""Setting of an earlier version -> what it is called now."""
SWITCHES = (("policy.method", "", tuple(f"policy.{part.name}" for part in dataclasses.fields(PolicyParts))),
            ("preference.method", "", ("preference.beta", "preference.simpo_gamma")),
            ("optim.schedule", "constant", ("optim.min_lr",)))
"""A setting that says which method is used, the value that it has to change from ("": any), and the numbers
that belong to the method: a recipe's are those of the recipe's method alone."""


def from_dict(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Build a `RunConfig` from plain values; the rules between them are asked by `RunConfig.problems`.

    Args:
        raw: as JSON has them.
        where: the file that messages begin with.

    Raises:
        SettingsError: unknown settings (with the nearest known one), values of a wrong type or out of bounds.
    """
    return read(RunConfig, raw, where, instead=_instead, rules=False)


def _instead(key: str) -> str:
    """Return what to write in place of a setting that does not exist."""
    if key in RENAMED:
        return f"it is called {RENAMED[key]} now"
    return NOT_OFFERED.get(key.rpartition(".")[2], "")


def apply_settings(config: RunConfig, settings: Sequence[str], option: str = "--set") -> RunConfig:
    """Return the config with `key=value` settings applied, e.g. ``train.steps=100`` or
    ``data.phases.0.seq_len=512``.

    Where a setting changes the method, the numbers of the recipe's method do not stay: those that are not set
    too are the new method's own (`SWITCHES`).

    Args:
        config: what is changed.
        settings: the changes.
        option: that they are given by, for sentences.

    Raises:
        SettingsError: see `megatron_sov.base.settings.change`.
    """
    given = parse_changes(settings, option)
    before = config.to_dict()
    raw = assign_all(config, given, option, _instead)
    for switch, changed_from, numbers in SWITCHES:
        if switch in given and _value(raw, switch) != _value(before, switch) and \
                changed_from in ("", _value(before, switch)):
            room = switch.partition(".")[0]
            own = dataclasses.asdict(type(getattr(config, room))())
            names = [number.partition(".")[2] for number in numbers if number not in given]
            raw[room].update({name: own[name] for name in names})
    return from_dict(raw, option)


def _value(raw: dict[str, Any], key: str) -> Any:
    room, _, name = key.partition(".")
    return raw[room].get(name) if isinstance(raw[room], dict) else None


def layout_settings(config: RunConfig) -> list[str]:
    """Return the `key=value` settings with which a model is run at a config's layout and precision."""
    layout = config.to_dict()["parallel"].items()
    return [*(f"parallel.{name}={json.dumps(value)}" for name, value in layout),
            f"train.precision={config.train.precision}"]


def weighted_path(argument: str, said: str) -> tuple[str, float]:
    """Return folder and weight of an argument FOLDER[:weight]; the weight defaults to 1.

    Args:
        argument: what a user wrote; a folder may have a colon in its name.
        said: what a message begins with.

    Raises:
        UserError: there is no such folder, and what follows the last colon is no number.
    """
    if Path(argument).exists() or ":" not in argument:
        return argument, 1.0
    path, _, text = argument.rpartition(":")
    try:
        return path, float(text)
    except ValueError:
        raise UserError(f"{said}: does not exist, and {text!r} after the colon is not a weight") from None


def data_paths(data: Sequence[str]) -> dict[str, float]:
    """Return folder -> weight of --data arguments; the weight after the last colon defaults to 1.

    Raises:
        UserError: a folder that does not exist or is given twice, or a weight that is not a number.
    """
    paths: dict[str, float] = {}
    for argument in data:
        path, weight = weighted_path(argument, f"--data {argument}")
        if not 0 <= weight < math.inf:
            raise UserError(f"--data {argument}: the weight must be a number that is not negative")
        if not path:
            raise UserError(f"--data {argument!r}: names no folder; pass one made by `sov-data pack`")
        if not Path(path).is_dir():
            named = " as DIR or DIR:WEIGHT; its sources have the names that pack gave them" * ("=" in path)
            raise UserError(f"--data {path}: "
                            f"{'is not a folder' if Path(path).exists() else 'does not exist'}; "
                            f"pass a folder made by `sov-data pack`{named}")
        if path in paths:
            raise UserError(f"--data {path}: is given twice; name it once, with a weight if you like")
        paths[path] = weight
    return paths
