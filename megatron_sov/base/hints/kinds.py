"""Guess what a word on a command line means (model, data, text, ...), by its spelling and files on disk."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's file with the newest iteration of a checkpoint folder."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv", ".gz", ".zst", ".arrow", ".md")
MAX_MODELS = 8
"""Largest number of models that a message lists."""
_FOLDER_KINDS = {"run": "model", "checkpoint": "model", "hf": "model", "peft": "model", "tokens": "tokens",
                 "tokenizer": "tokenizer"}
"""Result of `classify_folder` -> kind of a word."""
_HUB_NAME = re.compile(r"[A-Za-z][\w.-]*/[\w.-]*\d[\w.-]*")
_WEIGHT = re.compile(r"(?<=.):[\d.]+$")


def classify_word(word: str) -> str:
    """Return the kind of a word without an option, a key of the table `kind_options`."""
    path = Path(_WEIGHT.sub("", word))
    if os.path.isdir(path):
        return _FOLDER_KINDS.get(classify_folder(path), "folder")
    if os.path.isfile(path):
        return "config" if find_recipe_option(path) == "--config" else "data"
    if ".py:" in word:
        return "code"
    if re.search(r"\s|[?!]$", word):
        return "text"
    if path.suffix in DATA_SUFFIXES:
        return "data"
    if _HUB_NAME.fullmatch(word) and not os.path.exists(path.parent):
        return "hub"
    return "absent" if "/" in word or not re.search(r"\d|-", word) else "recipe"


def classify_kind(word: str) -> str:
    """Return run, hf or checkpoint for model folders, otherwise the kind of word (`classify_word`)."""
    kind = classify_folder(Path(word))
    return kind if kind in ("run", "hf", "checkpoint") else classify_word(word)


def find_recipe_option(path: Path) -> str:
    """Return the option that takes a configuration file or model folder in place of a recipe; "": none."""
    if path.suffix in (".yaml", ".yml", ".json", ".toml") and os.path.isfile(path):
        with path.open("rb") as file:
            has_records = path.suffix == ".json" and file.read(64).lstrip()[:1] == b"["
        return "" if has_records else "--config"
    is_model = any(os.path.exists(path / name) for name in ("config.json", "checkpoints"))
    return "--from" if is_model or classify_folder(path) == "checkpoint" else ""


def find_only_folder(kind: str) -> str:
    """Return the only folder of a kind in the current folder; "": none or several."""
    names = [path.name for path in Path().iterdir() if os.path.isdir(path) and classify_folder(path) == kind]
    return names[0] if len(names) == 1 else ""


def list_models(kinds: Collection[str] = ("hf", "run", "checkpoint")) -> list[str]:
    """Return the folders of `kinds` (`classify_folder`) in the current folder and its folder runs."""
    return [str(path) for path in sorted([*Path().iterdir(), *Path("runs").glob("*")])
            if classify_folder(path) in kinds]


def suggest_models(kinds: Collection[str]) -> str:
    """Return the end of a message with the first models near the current folder; "": none. `kinds`: as in
    `runs.checkpoints`, where a Hugging Face folder is hf_model and an adapter peft_adapter."""
    models = list_models([kind.partition("_")[0] for kind in kinds])
    return f"; models here: {', '.join(models[:MAX_MODELS])}" if models else ""


def list_run_tokenizers(run: Path) -> list[Path]:
    """List the tokenizer folders in a run's checkpoints, oldest step first."""
    folders = [path for path in run.glob("checkpoints/step-*/tokenizer") if path.parent.name[5:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.parent.name[5:]))


def classify_folder(path: Path) -> str:
    """Return run, hf, peft, megatron, dcp_checkpoint, tokenizer, other, or the kind in the manifest."""
    try:
        names = set(os.listdir(path))
    except OSError:
        return "other"
    if "events.jsonl" in names:
        return "run"
    if "adapter_config.json" in names:
        return "peft"
    if TRACKER in names or any(name.startswith("iter_") for name in names):
        return "megatron"
    if ".metadata" in names:  # of torch.distributed; metadata.json is Megatron-Core's
        return "megatron" if "metadata.json" in names else "dcp_checkpoint"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "hf"
    # opening a named pipe would wait for its writer
    if os.path.isfile(path / "manifest.json"):
        try:
            return str(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["kind"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return "other"
    return "tokenizer" if "tokenizer.json" in names else "other"
