"""Faults of paths in a command line that show without running it: missing files, and files or folders of the
wrong kind."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, choose_free_path, fix_missing
from megatron_sov.base.hints.kinds import DATA_SUFFIXES, classify_folder, find_only_folder
from megatron_sov.base.hints.table import load_table
from megatron_sov.base.hints.values import find_value

DATA_OPTIONS = ("--data", "--prompts", "--input", "--validation")
INPUT_OPTIONS = (*DATA_OPTIONS, "--from", "--tokenizer", "--teacher", "--reference", "--base")
_PACKING = {"sft": "--format chat ", "prefer": "--format preference ", "eval": "--heldout 0.5 "}
"""Command -> options of `sov-data pack` for its data."""
_PLACEHOLDER = re.compile(r"[A-Z]+(?:_[A-Z]+)*(?:\.[a-z]+)?")


def find_path_faults(program: str, line: Sequence[str]) -> Iterator[tuple[str, UserError]]:
    """Yield (path as typed, its fault) for the paths of a command line."""
    words = [part for word in line for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    for option, value in pairwise(words):
        path = re.sub(r"(?<=.):[\d.]+\Z", "", value)
        if "=" in path and not Path(path).exists():
            path = path.partition("=")[2]
        if value.startswith("-") or _PLACEHOLDER.fullmatch(path):
            continue
        fault = None
        if option in INPUT_OPTIONS:
            fault = _find_input_fault(program, line, option, path)
        elif option == "--run" and program == "megatron-sov":
            fault = _find_output_fault(path)
        if fault is not None:
            yield path, fault


def _find_input_fault(program: str, line: Sequence[str], option: str, path: str) -> UserError | None:
    place = Path(path)
    if not place.exists():
        fix = fix_missing(path, is_data=option in DATA_OPTIONS)
        hint = "download it first" if fix and fix.before else "take the one of a similar name"
        return UserError(f"{option} {path}: does not exist; {hint}", fix) if fix else None
    if option != "--data" or program != "megatron-sov":
        return None
    if place.name == "manifest.json" and classify_folder(place.parent) == "tokens":
        return UserError(f"--data {path}: is the manifest of token shards; pass their folder",
                         Fix(words={path: str(place.parent)}))
    kind, kinds = classify_folder(place), load_table()["kinds"]
    if kind in kinds and kind != "tokens":
        return UserError(f"--data {path}: is {kinds[kind]}; pass token shards or a file of records",
                         Fix(options=("--data", find_only_folder("tokens") or "DIR")))
    is_text = place.is_dir() and any(
        name.endswith(DATA_SUFFIXES) for name in os.listdir(place) if name != "manifest.json")
    # `eval media` reads rows, not shards
    is_file = (place.is_file() and place.name.endswith(DATA_SUFFIXES)
               and line[0] == "eval" and "media" not in line[:2])
    if kind == "tokens" or not (is_text or is_file):
        return None
    tokenizer, before = _choose_tokenizer(line)
    shards = choose_free_path(f"{place.name.partition('.')[0]}-tokens")
    form = _PACKING.get(line[0], "")
    pack = f"sov-data pack --tokenizer {tokenizer} {form}" + shlex.join(["--input", path, "--output", shards])
    return UserError(f"--data {path}: is {'a file' if is_file else 'a folder of text'}; pack it first",
                     Fix(words={path: shards}, before=(*before, pack)))


def _choose_tokenizer(line: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return a tokenizer folder for packing, from --from or the current folder, and the commands that
    create the folder."""
    model = next((word for word in (find_value(line, "--from"), *line[:3])
                  if (Path(word) / "tokenizer.json").is_file()), "")
    if model:
        output = choose_free_path(f"{Path(model).name}-tokenizer")
        return output, (shlex.join(["sov-tokenizer", "import", model, "--output", output]),)
    return find_only_folder("tokenizer") or "DIR", ()


def _find_output_fault(path: str) -> UserError | None:
    """Return the fault of a `--run` folder with other contents than a run."""
    place, kinds = Path(path), load_table()["kinds"]
    content = "a file" if place.is_file() else kinds.get(classify_folder(place), "")
    if content in ("", kinds["run"]):
        return None
    return UserError(f"--run {path}: is {content}; name a new folder",
                     Fix(options=("--run", choose_free_path(f"{place.with_suffix('')}-run"))))
