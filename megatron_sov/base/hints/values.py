"""Values of options and settings of other programs, as ours: what follows from several of theirs, GPUs as
nodes, a GPU's name as a profile."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from megatron_sov.base.hints.foreign import shards_of
from megatron_sov.base.hints.table import last_part, settings_called, table

SWITCHED = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False,
            "off": False, "none": False, "full": False}
GPUS_OF_A_NODE = 8
FindSetting = Callable[[str], str]
"""Word or setting, without a value -> the setting that it means; "": it exists, or nothing is known."""


def setting_with_value(word: str, values: list[str], find: FindSetting, typed: Sequence[str]) -> str:
    """Return `name=value` for a word of another program and its values; "": no setting is known."""
    last = last_part(word)
    given = values[0] if values else ""
    by_value = table()["values"].get(last, {})
    known = by_value.get(given.lower()) if given else None
    if known and "=" in str(known):
        return str(known)
    name = find(word)
    if not name:
        return ""
    fixed = next((one for one in settings_called(last) if one.startswith(f"{name}=")), "")
    # finetuning_type: lora; a number is a value of the setting itself
    is_word = bool(re.fullmatch(r"[A-Za-z]*", given))
    if fixed and (is_word or given == "1") and SWITCHED.get(given.lower(), True):
        return fixed
    if last in table()["computed"]:
        return f"{name}={_compute_value(last, given, typed)}"
    if name == "lora.targets" and "," in given and given[0] != "[":
        values = [part.strip() for part in given.split(",")]
    if len(values) > 1:
        return f"{name}={json.dumps(values)}"
    known = known or table()["values"].get(name, {}).get(given.lower(), given or "VALUE")
    if "=" in str(known):  # of another setting
        return str(known)
    return f"{name}={known}"


def value_of_option(word: str, option: str, value: str) -> str:
    """Return the value that an option of ours takes for one of theirs."""
    if word == "model_args":  # lm-eval: pretrained=FOLDER,dtype=bfloat16
        return next((part.partition("=")[2] for part in value.split(",") if part.startswith("pretrained=")),
                    value)
    if option == "--nproc" and re.fullmatch(r"\d+(,\d+)+", value):
        return str(value.count(",") + 1)  # GPUs by their numbers
    if option == "--data":
        return shards_of(value)
    if option == "--nodes" and ("gpu" in word or word == "world_size") and value.isdigit():
        return str(-(-int(value) // GPUS_OF_A_NODE))
    values = table()["values"]
    return str({**values.get(option, {}), **values.get(word, {})}.get(value.lower(), value))


def _compute_value(word: str, given: str, typed: Sequence[str]) -> str:
    """Return the value of a setting that follows from several of theirs; a letter if a number is missing."""
    def number(*names: str) -> float | None:
        words = [word for text in typed for word in text.split("=") if word and word != "--set"]
        for name, value in pairwise(words):
            if last_part(name) in names and re.fullmatch(r"[\d.]+(e\d+)?", value):
                return float(value)
        return None

    if word == "warmup_ratio" or word == "lr_warmup_fraction":
        steps = number("max_steps", "train_iters", "steps", "num_steps", "num_iterations")
        return str(round(float(given) * steps)) if steps and re.fullmatch(r"[\d.]+", given) else "STEPS"
    micro = number("per_device_train_batch_size", "micro_batch_size") or 1
    processes = number("nproc", "nproc_per_node", "num_processes") or 1
    return str(round(int(given) * micro * processes)) if given.isdigit() else "SAMPLES"


def value_after(words: Sequence[str], *options: str) -> str:
    """Return the value of the first option of some that was typed; "": none was."""
    given = [part for word in words for part in word.split("=", 1)]
    return next((value for word, value in pairwise(given) if word in options), "")


def name_cluster(name: str) -> str:
    """Return the profile of a GPU that others name e.g. NVIDIA-A100-80GB."""
    found = re.search(r"gb200|gb300|[abhv]\d{3}", name.lower())
    return found.group() if found else name.lower()
