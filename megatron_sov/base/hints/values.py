"""Translate values of other programs' options into ours, e.g. GPUs into nodes, ratios into steps."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from megatron_sov.base.hints.foreign import find_shards
from megatron_sov.base.hints.table import find_our_value, get_last_part, load_table, translate_to_settings

SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False,
            "off": False, "none": False, "full": False}
GPUS_PER_NODE = 8  # assumed when GPUs are translated to nodes
FindSetting = Callable[[str], str]
"""Foreign word -> our setting of the same meaning; "": the word is already our setting, or none is known."""


def translate_setting(word: str, values: list[str], find: FindSetting, typed: Sequence[str]) -> str:
    """Return `name=value` for a foreign option or setting `word` with its values; "": no counterpart.

    `typed` has all words of the command line: some values are computed from several of its options.
    """
    last_part = get_last_part(word)
    value = values[0] if values else ""
    translated = find_our_value(value, last_part) if value else ""
    if "=" in translated:  # the table gives a whole setting for this value
        return translated
    name = find(word)
    if not name:
        return ""
    typed_parts = {get_last_part(text.partition("=")[0]) for text in typed}
    if last_part == "batch_size" and typed_parts & {*load_table()["computed"]}:
        name = "train.micro_batch_size"  # another option gives the global batch
    settings = translate_to_settings(last_part)
    switch = next((setting for setting in settings if setting.startswith(f"{name}=")), "")
    # a word ("finetuning_type: lora") or 1 turns the setting on; another number is the setting's value
    is_switch = value == "1" or bool(re.fullmatch(r"[A-Za-z]*", value))
    if switch and is_switch and SWITCHES.get(value.lower(), True):
        return switch
    if last_part in load_table()["computed"]:
        computed = _compute_value(last_part, value, typed)
        return computed and f"{name}={computed}"
    if name == "lora.targets" and "," in value and value[0] != "[":
        values = [part.strip() for part in value.split(",")]
    if len(values) > 1:
        return f"{name}={json.dumps(values)}"
    translated = find_our_value(value, name) or translated or value or "VALUE"
    return translated if "=" in translated else f"{name}={translated}"


def translate_value(word: str, option: str, value: str) -> str:
    """Return the value of our `option` for the value of a foreign option `word`."""
    if word == "model_args":  # lm-eval: pretrained=FOLDER,dtype=bfloat16
        return next((part.partition("=")[2] for part in value.split(",") if part.startswith("pretrained=")),
                    value)
    if option == "--nproc" and re.fullmatch(r"\d+(,\d+)+", value):
        return str(value.count(",") + 1)  # GPU indices such as 0,1,2,3
    if option == "--data":
        return find_shards(value)
    if option == "--nodes" and ("gpu" in word or word == "world_size") and value.isdecimal():
        return str(-(-int(value) // GPUS_PER_NODE))
    return find_our_value(value, word, option) or value


def _compute_value(word: str, value: str, typed: Sequence[str]) -> str:
    """Compute a value from several foreign options; if numbers are missing: "", or "SAMPLES" for a batch."""
    def find_number(*names: str) -> float | None:
        pairs = pairwise(part for text in typed for part in text.split("=") if part and part != "--set")
        return next((float(number) for name, number in pairs
                     if get_last_part(name) in names and re.fullmatch(r"[\d.]+(e\d+)?", number)), None)

    if word in ("warmup_ratio", "lr_warmup_fraction"):
        num_steps = find_number("max_steps", "train_iters", "steps", "num_steps", "num_iterations")
        if not num_steps or not re.fullmatch(r"[\d.]+", value):
            return ""
        min_steps = 1 if float(value) > 0 else 0  # a small ratio still asks for a warm-up
        return str(max(min_steps, round(float(value) * num_steps)))
    rows = load_table()["settings"]
    # DeepSpeed's train_batch_size and ours include the accumulation
    global_batch = find_number("global_batch_size", *load_table()["whole_batches"])
    if global_batch:
        return str(round(global_batch))
    micro_batch = find_number("micro_batch_size", "batch_size", *rows["train.micro_batch_size"].split()) or 1
    processes = find_number("nproc", "nproc_per_node", "num_processes") or 1
    return str(round(int(value) * micro_batch * processes)) if value.isdecimal() else "SAMPLES"


def find_value(words: Sequence[str], *options: str) -> str:
    """Return the value of the first option in `words` that is in `options`; "": none."""
    return next((value for word, value in pair_words(words) if word in options), "")


def pair_words(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Return each word with the next word; `--option=value` counts as two words, `name=value` as one."""
    return pairwise(part for word in words for part in word.split("=", word.startswith("-")))


def compute_share(parts: str) -> str:
    """Return the validation share in Megatron-LM's --split: 969,30,1 -> 0.03; other texts unchanged."""
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)+", parts):
        return parts
    numbers = list(map(float, parts.split(",")))
    return f"{numbers[1] / (sum(numbers) or 1):g}"


def compute_odds(share: str) -> str:
    """Return (1 - share) / share for a share between 0 and 1: 0.25 -> 3; other texts unchanged."""
    number = float(share) if re.fullmatch(r"0?\.\d+", share) else 0.0
    return f"{(1 - number) / number:.4g}" if number else share


def parse_cluster(name: str) -> str:
    """Return the cluster profile for a GPU name: NVIDIA-A100-80GB -> a100."""
    match = re.search(r"gb200|gb300|[abhv]\d{3}", name.lower())
    return match.group() if match else name.lower()
