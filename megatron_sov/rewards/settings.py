"""Settings of a reward or an environment from `--set key=value`, or another option."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_sov.errors import UserError


def parse_settings(given: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Return settings as nested plain values: dots in a key lead inwards.

    Values are read as JSON where they parse, else as text, as in `--set` of the training commands.

    Args:
        given: what stands behind the option, each time.
        option: that they are given by, for sentences.

    Raises:
        UserError: one has another form, broken JSON, or is set twice.
    """
    found: dict[str, Any] = {}
    for setting in given:
        key, equals, text = setting.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise UserError(f"{option} {setting!r}: must have the form key=value, e.g. {option} "
                            "max_length=4096")
        node = found
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{option} {setting!r}: {part!r} was set to a value before and has no fields")
        if parts[-1] in node:
            raise UserError(f"{option} {setting!r}: {key!r} is set twice; set it once")
        node[parts[-1]] = _value(text, f"{option} {setting!r}")
    return found


def _value(text: str, said: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        if text.startswith(("{", '"')) or (text.startswith("[") and text.endswith("]")):
            raise UserError(f"{said}: the value begins like JSON and is none ({e}); close what is open, and "
                            "put the whole setting into single quotes") from None
        return {"True": True, "False": False, "None": None}.get(text, text)
