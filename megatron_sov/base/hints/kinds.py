"""Kinds of words, files and folders, and the options of a command line that each kind belongs to."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

OPTIONS_OF_KIND = {
    "model": ("--from", "--tokenizer"), "hub": ("--from", "--tokenizer", "--data"),
    "tokenizer": ("--tokenizer",), "config": ("--config",), "tokens": ("--data",),
    "data": ("--prompts", "--data", "--input", "--text"),
    "absent": ("--run", "--prompt", "--output"),
    "folder": ("--input", "--data", "--run"), "text": ("--prompt",),
    "code": (), "recipe": ()}
"""Kind of a word without an option -> the options that it may belong to, the likeliest first."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv", ".gz", ".zst", ".arrow", ".md")
_HUB = re.compile(r"[A-Za-z][\w.-]*/[\w.-]*\d[\w.-]*")


def kind_of_word(word: str) -> str:
    """Return the kind of a word without an option, a key of `OPTIONS_OF_KIND`."""
    path = Path(re.sub(r"(?<=.):[\d.]+$", "", word))
    if path.is_dir():
        kinds = {"run": "model", "checkpoint": "model", "hf": "model", "peft": "model", "tokens": "tokens",
                 "tokenizer": "tokenizer"}
        return kinds.get(kind_of_folder(path), "folder")
    if path.is_file():
        return "config" if option_of_path(path) == "--config" else "data"
    if ".py:" in word:
        return "code"
    if re.search(r"\s|[?!]$", word):
        return "text"
    if path.suffix in DATA_SUFFIXES:
        return "data"
    if _HUB.fullmatch(word) and not path.parent.exists():
        return "hub"
    return "absent" if "/" in word or not re.search(r"\d|-", word) else "recipe"


def option_of_path(path: Path) -> str:
    """Return the option of a configuration file or a model's folder that stands for a recipe; "": neither."""
    if path.suffix in (".yaml", ".yml", ".json", ".toml") and path.is_file():
        with path.open("rb") as file:
            if path.suffix == ".json" and file.read(64).lstrip()[:1] == b"[":
                return ""  # records
        return "--config"
    is_model = path.is_dir() and any((path / name).exists() for name in ("config.json", "checkpoints"))
    return "--from" if is_model or kind_of_folder(path) == "checkpoint" else ""


def kind_of_folder(path: Path) -> str:
    """Return what a folder holds, by the names of its files: run, checkpoint, hf, peft, tokens, tokenizer,
    megatron or other."""
    names = set(os.listdir(path)) if path.is_dir() else set()
    if "events.jsonl" in names:
        return "run"
    if "adapter_config.json" in names:
        return "peft"
    if "latest_checkpointed_iteration.txt" in names or any(name.startswith("iter_") for name in names):
        return "megatron"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "hf"
    if "manifest.json" in names:
        try:
            kind = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["kind"]
        except (OSError, ValueError, TypeError, KeyError):
            kind = "other"
        return str(kind)
    return "tokenizer" if "tokenizer.json" in names else "other"
