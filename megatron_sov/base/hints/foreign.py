"""Readers of files and arguments of other programs: configuration files (axolotl, TRL, torchtitan, NeMo RL),
recognised by their keys, and data blends (Megatron-LM)."""

import contextlib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sov.base.hints.table import get_last_part, index_words, translate_to_settings

MAX_BYTES = 1 << 20
"""Largest configuration file that is read."""
MAX_KEYS = 2_000
"""Maximum number of keys: aliases in a short file can stand for any number of keys."""


def read_foreign_config(file: Path, exists: Callable[[str], Any]) -> dict[str, list[str]]:
    """Read another program's configuration file (YAML, JSON or TOML) as dotted key -> values in command-line
    form; empty if the file is a config of this program, cannot be read, or has no key in `words.yaml`."""
    try:
        leaves = list(islice(_iter_leaves(_parse_file(file), ""), MAX_KEYS))
    except RecursionError:  # aliases that contain themselves
        return {}
    settings = {key: values for key, values in leaves if values is not None}
    if "recipe" in settings:  # only configs of this program have this key
        return {}
    foreign_keys = [key for key in settings if not exists(key)]
    has_counterpart = any(translate_to_settings(get_last_part(key)) for key in foreign_keys)
    # several programs share keys like `seed`: a foreign file has mostly keys that this program lacks
    is_foreign = has_counterpart and 2 * len(foreign_keys) > len(settings)
    return settings if is_foreign else {}


def read_recipe_name(run: Path) -> str:
    """Return the recipe in a run folder's `config.json`; "": none."""
    config = _parse_file(run / "config.json") if os.path.isfile(run / "events.jsonl") else None
    return str(config.get("recipe") or "") if isinstance(config, dict) else ""


def read_merge(file: Path) -> list[str]:
    """Return the models of a mergekit file as `FOLDER:WEIGHT`; empty for other files."""
    config = _parse_file(file) if file.suffix in (".yml", ".yaml") else None
    models = config.get("models") if isinstance(config, dict) and "merge_method" in config else None
    if not isinstance(models, list):
        return []
    return [f"{row.get('model')}:{(row.get('parameters') or {}).get('weight', 1)}"
            for row in models if isinstance(row, dict)]


def parse_object(text: str) -> dict[str, str]:
    """Return dotted key -> value of a JSON object of settings; empty for other texts."""
    import yaml  # not at the top: `--help` of a program reads no YAML

    try:
        leaves = _iter_leaves(yaml.safe_load(text), "")
        return {key: values[0] for key, values in leaves if values and len(values) == 1}
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}


def multiply_context(model: str, factor: str) -> str:
    """Return `factor` times the context length of a Hugging Face folder or run; "TOKENS" if unknown."""
    config: Any = _parse_file(Path(model) / "config.json") if model else None
    length = config.get("max_position_embeddings") if isinstance(config, dict) else None
    with contextlib.suppress(LookupError, TypeError, ValueError):  # no settings of a run
        length = max(phase["seq_len"] for phase in config["data"]["phases"])
    number = re.search(r"(?:\A|factor\W{1,4})(\d+(?:\.\d+)?)(?=\Z|[,}])", factor)
    if not isinstance(length, int) or number is None:
        return "TOKENS"
    return str(round(length * float(number[1])))


def parse_blend(words: Sequence[str]) -> list[str]:
    """Convert Megatron-LM's alternating weights and folders to words FOLDER:WEIGHT.

    Weights of a repeated folder are added. Reading stops at the first pair that is not a weight and a path.
    """
    weights: dict[str, float] = {}
    for weight, path in zip(words[::2], words[1::2], strict=False):
        if not re.fullmatch(r"\d*\.?\d+", weight) or path.startswith("-"):
            break
        folder = find_shards(path)
        weights[folder] = weights.get(folder, 0.0) + float(weight)
    return [f"{folder}:{weight:g}" for folder, weight in weights.items()]


def find_shards(path: str) -> str:
    """Return the folder of token shards for the prefix of a .bin/.idx pair in it; other paths unchanged."""
    if not os.path.isfile(f"{path}.idx"):
        return path
    artifacts = (folder for folder in Path(path).parents if os.path.isfile(folder / "manifest.json"))
    return str(next(artifacts, path))


def find_word(key: str) -> str:
    """Return the word in `words.yaml` for a dotted key, by its last two parts (torchtune's
    checkpointer.checkpoint_dir, DeepSpeed's zero_optimization.stage) or its last part; "": none."""
    pair = ".".join(key.split(".")[-2:])
    words = (pair, pair.replace(".", "_"), get_last_part(key))
    return next((word for word in words if word in index_words("options") or (
        "." not in word and translate_to_settings(word))), "")


def _parse_file(file: Path) -> Any:
    import yaml  # not at the top: `--help` of a program reads no YAML

    try:
        # only regular files: the command itself reads a pipe
        if not os.path.isfile(file) or file.stat().st_size > MAX_BYTES:
            return None
        text = file.read_text(encoding="utf-8")
        # a bracket opens a list or mapping: YAML takes seconds to parse deep nesting
        if text.count("[") + text.count("{") > MAX_KEYS:
            return None
        return tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # the command's reader reports the fault
        return None


def _iter_leaves(value: Any, key: str) -> Iterator[tuple[str, list[str] | None]]:
    """Yield (dotted key, values); None for sections and nulls, which count towards `MAX_KEYS` too."""
    if isinstance(value, Mapping):
        yield key, None
        for name, inner in value.items():
            inner_key = f"{key}.{name}" if key else str(name).lstrip(".")
            if key and name == "enabled":  # DeepSpeed: {bf16: {enabled: true}} is the switch bf16
                inner_key = key
            yield from _iter_leaves(inner, inner_key)
    elif isinstance(value, list):
        # a section stands for its path or name: datasets: [{path: FILE, type: ...}] -> FILE
        items = [item.get("path", item.get("name")) if isinstance(item, Mapping) else item
                 for item in value[:MAX_KEYS]]
        scalars = [item for item in items if item is not None and not isinstance(item, (Mapping, list))]
        yield key, list(map(_format_scalar, scalars))
    elif key:
        yield key, None if value is None else [_format_scalar(value)]


def _format_scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
