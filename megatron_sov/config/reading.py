"""Reading settings: from JSON, from `--set key=value`, and from `--data DIR[:weight]`."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from megatron_sov.config.not_offered import NOT_OFFERED
from megatron_sov.config.policy import PolicyParts
from megatron_sov.config.run import RunConfig
from megatron_sov.errors import UserError, list_problems, nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

RENAMED = {"evaluate.beside": "evaluate.background",
           "evaluate.background.judges": "evaluate.background.tasks", "guards.on_corruption": "guards.on_sdc"}
"""Setting of an earlier version -> what it is called now."""
SWITCHES = (("policy.method", "", tuple(f"policy.{part.name}" for part in dataclasses.fields(PolicyParts))),
            ("preference.method", "", ("preference.beta", "preference.simpo_gamma")),
            ("optim.schedule", "constant", ("optim.min_lr",)))
"""A setting that says which method is used, the value that it has to change from ("": any), and the numbers
that belong to the method: a recipe's are those of the recipe's method alone."""


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """Build a `RunConfig` from plain values.

    Raises:
        UserError: unknown fields (with the nearest known one) and values of the wrong type, all at once.
    """
    from pydantic import ValidationError

    try:
        return _validator().validate_python(raw)
    except ValidationError as e:
        raise UserError(list_problems("config", [_explain(error) for error in e.errors()])) from None


@cache
def _validator() -> TypeAdapter[RunConfig]:
    """Return what checks settings; to make it takes longer than all checks of a round."""
    from pydantic import TypeAdapter

    return TypeAdapter(RunConfig)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the types of a class's fields; they stand there as text, which takes longest to read."""
    return get_type_hints(cls)


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: no such setting{_instead(where, _fields_at(error['loc'][:-1]))}"
    return f"{where} = {error.get('input')!r}: {error['msg']}"


def _instead(key: str, known: list[str]) -> str:
    """Return what to write in place of a setting that does not exist."""
    if key in RENAMED:
        return f"; it is called {RENAMED[key]} now"
    group, dot, name = key.rpartition(".")
    if name in NOT_OFFERED:
        return f", since {NOT_OFFERED[name]}"
    return nearest(name, known, group + dot)


def _fields_at(path: tuple[Any, ...]) -> list[str]:
    """Return the field names of the config class that stands at a path, e.g. ("model", "yarn")."""
    cls: Any = RunConfig
    for part in path:
        if isinstance(part, int) or not dataclasses.is_dataclass(cls):
            continue
        hint = _hints(cast(Any, cls)).get(part)
        options = [hint, *get_args(hint)]
        cls = next((o for o in options if dataclasses.is_dataclass(o)), None)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def apply_settings(config: RunConfig, settings: list[str], option: str = "--set") -> RunConfig:
    """Return the config with `key=value` settings applied, e.g. ``train.steps=100`` or
    ``data.phases.0.seq_len=512``.

    Where a setting changes the method, the numbers of the recipe's method do not stay: those that are not set
    too are the new method's own (`SWITCHES`).

    Values are read as JSON where they parse (`true`, `1e-4`, `{"en": 1}`, `null`), else as text, then
    converted to the field's type.

    Args:
        config: what is changed.
        settings: the changes.
        option: that they are given by, for sentences.

    Raises:
        UserError: a key that does not exist (with the nearest), a malformed setting, broken JSON or a
            value of the wrong type.
    """
    raw = config.to_dict()
    before = {switch: _value(raw, switch) for switch, *_ in SWITCHES}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {setting!r}: must have the form key=value, e.g. {option} "
                            "train.steps=100")
        said = f"{option} {setting!r}"
        _assign(raw, key.split("."), _parse(text, said), said)
    given = {setting.partition("=")[0] for setting in settings}
    for switch, changed_from, numbers in SWITCHES:
        if switch in given and _value(raw, switch) != before[switch] and changed_from in ("", before[switch]):
            room = switch.partition(".")[0]
            own = dataclasses.asdict(type(getattr(config, room))())
            names = [number.partition(".")[2] for number in numbers if number not in given]
            raw[room].update({name: own[name] for name in names})
    return from_dict(raw)


def _value(raw: dict[str, Any], key: str) -> Any:
    room, _, name = key.partition(".")
    return raw[room].get(name) if isinstance(raw[room], dict) else None


def layout_settings(config: RunConfig) -> list[str]:
    """Return the `key=value` settings with which a model is run at a config's layout and precision."""
    layout = config.to_dict()["parallel"].items()
    return [*(f"parallel.{name}={json.dumps(value)}" for name, value in layout),
            f"train.precision={config.train.precision}"]


def _parse(text: str, said: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        if text.startswith(("{", "[", '"')):
            raise UserError(f"{said}: the value begins like JSON and is none ({e}); close what is "
                            "open, and put the whole setting into single quotes") from None
        return {"True": True, "False": False, "None": None}.get(text, text)


def _assign(raw: Any, parts: list[str], value: Any, said: str) -> None:
    cls: Any = RunConfig
    node = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"{said}: {'.'.join(parts[:depth])} has items 0 to "
                                f"{len(node) - 1}, not {part!r}")
            index: Any = int(part)
        else:
            known = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else None
            if known is not None and part not in known:
                where = ".".join(parts[:depth + 1])
                raise UserError(f"{said}: '{where}' does not exist{_instead(where, known)}")
            index = part
        cls = _class_below(cls, part)
        if last:
            node[index] = value
        else:
            child = node[index] if isinstance(node, list) else node.get(index)
            if child is None:
                child = node[index] = {}
            node = child
            if not isinstance(node, (dict, list)):
                raise UserError(f"{said}: '{'.'.join(parts[:depth + 1])}' is a value "
                                "and has no fields")


def _class_below(cls: Any, part: str) -> Any:
    """Return the dataclass (or container's item class) that a field holds, or None for plain values."""
    if dataclasses.is_dataclass(cls):
        hint = _hints(cast(Any, cls)).get(part)
    elif get_origin(cls) in (tuple, list):
        hint = get_args(cls)[0]
    else:
        return None
    if get_origin(hint) in (tuple, list):
        return hint
    return next((o for o in (hint, *get_args(hint)) if dataclasses.is_dataclass(o)), None)


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


def data_paths(data: list[str]) -> dict[str, float]:
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
