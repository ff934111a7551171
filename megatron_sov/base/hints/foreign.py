"""Configuration files of other programs (axolotl, TRL, torchtitan, NeMo RL), recognised by their keys."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sov.base.hints.table import by_word, last_part, settings_called

MAX_BYTES = 1 << 20
MAX_KEYS = 2_000
"""Maximum number of keys: aliases in a short file can stand for any number of keys."""


def read_foreign(file: Path, exists: Callable[[str], Any]) -> dict[str, list[str]]:
    """Return the settings of another program's configuration file, as words of a command line.

    Args:
        file: YAML, JSON or TOML.
        exists: key with dots -> whether it is a setting of ours.

    Returns:
        Key with dots -> its values, of scalars, lists of scalars and paths in lists of sections; empty if
        the file is ours, cannot be read, or has no key that the table of words has.
    """
    try:
        visited = list(islice(_leaves(_parse(file), ""), MAX_KEYS))
    except RecursionError:  # aliases that hold themselves
        return {}
    leaves = {key: words for key, words in visited if words is not None}
    theirs = [key for key in leaves if not exists(key)]
    is_known = any(settings_called(last_part(key)) for key in theirs)
    return leaves if is_known and 2 * len(theirs) > len(leaves) and "recipe" not in leaves else {}


def recipe_of(run: Path) -> str:
    """Return the recipe that `config.json` of a run's folder names; "": none."""
    found = _parse(run / "config.json") if (run / "events.jsonl").is_file() else None
    return str(found.get("recipe") or "") if isinstance(found, dict) else ""


def blend_of(words: Sequence[str]) -> list[str]:
    """Return weights and folders in turn, as Megatron-LM takes them, as --data FOLDER:WEIGHT of ours; the
    weights of a folder that comes several times are added."""
    weights: dict[str, float] = {}
    for weight, folder in zip(words[::2], words[1::2], strict=False):
        if not re.fullmatch(r"\d*\.?\d+", weight) or folder.startswith("-"):
            break
        weights[shards_of(folder)] = weights.get(shards_of(folder), 0.0) + float(weight)
    return [word for folder, weight in weights.items() for word in ("--data", f"{folder}:{weight:g}")]


def shards_of(path: str) -> str:
    """Return the folder of shards of ours that holds a pair of .bin and .idx; other paths as they are."""
    if not Path(f"{path}.idx").is_file():
        return path
    return next((str(folder) for folder in Path(path).parents if (folder / "manifest.json").is_file()), path)


def is_translated(key: str) -> bool:
    """Return whether the table has the last part of a key as a setting or an option."""
    return bool(settings_called(last_part(key)) or last_part(key) in by_word("options"))


def _parse(file: Path) -> Any:
    import yaml

    try:
        # a pipe can be read once, by the command
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return None
        text = file.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MAX_KEYS:  # YAML takes seconds for deep ones
            return None
        return tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # the command's own reader names the fault
        return None


def _leaves(value: Any, key: str) -> Iterator[tuple[str, list[str] | None]]:
    """Yield keys and their values, None of sections and nulls, which aliases multiply too."""
    if isinstance(value, Mapping):
        yield key, None
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        # of datasets: [{path: FILE, type: ...}] the paths
        items = [one.get("path", one.get("name")) if isinstance(one, Mapping) else one
                 for one in value[:MAX_KEYS]]
        yield key, [_text(one) for one in items if one is not None and not isinstance(one, (Mapping, list))]
    elif key:
        yield key, None if value is None else [_text(value)]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
