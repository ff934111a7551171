"""Faults of paths in a command line that can be seen without running it: nothing is there, or another kind of
file or folder than the option takes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path

from megatron_sov.base.errors import Fix, UserError, fix_missing
from megatron_sov.base.hints.kinds import DATA_SUFFIXES, kind_of_folder
from megatron_sov.base.hints.table import table
from megatron_sov.base.hints.values import value_after

DATA_OPTIONS = ("--data", "--prompts", "--input", "--validation")
INPUTS = (*DATA_OPTIONS, "--from", "--tokenizer", "--teacher", "--reference", "--base")


def find_path_faults(program: str, line: Sequence[str]) -> Iterator[tuple[str, UserError]]:
    """Yield (path as typed, its fault) for the paths of a command line."""
    words = [part for word in line for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    for option, value in pairwise(words):
        path = re.sub(r"(?<=.):[\d.]+\Z", "", value)
        if "=" in path and not Path(path).exists():
            path = path.partition("=")[2]
        if value.startswith("-") or re.fullmatch(r"[A-Z]+(?:_[A-Z]+)*(?:\.[a-z]+)?", path):  # e.g. DIR
            continue
        fault = _find_input_fault(program, line, option, path) if option in INPUTS else None
        if option == "--run" and program == "megatron-sov":
            fault = _find_output_fault(path)
        if fault is not None:
            yield path, fault


def name_free_path(name: str) -> str:
    """Return a name, or the first of NAME-2, NAME-3, ... at which nothing is."""
    return next(path for n in count(1) if not Path(path := f"{name}-{n}" if n > 1 else name).exists())


def _find_input_fault(program: str, line: Sequence[str], option: str, path: str) -> UserError | None:
    place = Path(path)
    if not place.exists():
        fix = fix_missing(path, is_data=option in DATA_OPTIONS)
        hint = "download it first" if fix and fix.before else "take the one of a similar name"
        return UserError(f"{option} {path}: does not exist; {hint}", fix) if fix else None
    if option != "--data" or program != "megatron-sov":
        return None
    if place.name == "manifest.json" and kind_of_folder(place.parent) == "tokens":
        return UserError(f"--data {path}: is the manifest of token shards; pass their folder",
                         Fix(words={path: str(place.parent)}))
    kind, kinds = kind_of_folder(place), table()["kinds"]
    if kind in kinds and kind != "tokens":
        return UserError(f"--data {path}: is {kinds[kind]}; pass token shards or a file of records",
                         Fix(options=("--data", _find_only("tokens") or "DIR")))
    if kind == "tokens" or not place.is_dir() or not any(
            name.endswith(DATA_SUFFIXES) for name in os.listdir(place) if name != "manifest.json"):
        return None
    tokenizer, before = _find_tokenizer(line)
    shards = name_free_path(f"{place.name}-tokens")
    form = {"sft": "--format chat ", "prefer": "--format preference "}.get(line[0], "")
    pack = f"sov-data pack --tokenizer {tokenizer} {form}" + shlex.join(["--input", path, "--output", shards])
    return UserError(f"--data {path}: is a folder of text; pack it first",
                     Fix(words={path: shards}, before=(*before, pack)))


def _find_tokenizer(line: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return a tokenizer to pack with, that of --from or the only one of the current folder, and the commands
    that make it."""
    start = value_after(line, "--from")
    if start and (Path(start) / "tokenizer.json").is_file():
        output = name_free_path(f"{Path(start).name}-tokenizer")
        return output, (shlex.join(["sov-tokenizer", "import", start, "--output", output]),)
    return _find_only("tokenizer") or "DIR", ()


def _find_only(kind: str) -> str:
    """Return the only folder of a kind in the current folder; "": none, or several."""
    found = [path.name for path in Path().iterdir() if path.is_dir() and kind_of_folder(path) == kind]
    return found[0] if len(found) == 1 else ""


def _find_output_fault(path: str) -> UserError | None:
    """Return the fault of a run's folder that holds something else."""
    place = Path(path)
    held = "a file" if place.is_file() else table()["kinds"].get(kind_of_folder(place), "")
    if held in ("", table()["kinds"]["run"]):
        return None
    return UserError(f"--run {path}: is {held}; name a new folder",
                     Fix(options=("--run", name_free_path(f"{place.with_suffix('')}-run"))))
