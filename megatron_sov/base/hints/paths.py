"""Faults of paths in a command line that show without running it: missing files, and files or folders of the
wrong kind."""

from __future__ import annotations

import contextlib
import glob
import json
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
_PACK_OPTIONS = {"sft": "--format chat ", "prefer": "--format preference ", "eval": "--heldout 0.5 "}
"""Command -> options of `sov-data pack` for its data, with a blank at the end."""
MAX_LINE_CHARS = 1 << 20
"""Characters of a file's first line that are parsed to find its format."""
_PLACEHOLDER = re.compile(r"[A-Z]+(?:_[A-Z]+)*(?:\.[a-z]+)?")


def find_path_faults(program: str, line: Sequence[str]) -> Iterator[tuple[str, UserError]]:
    """Yield (path as typed, its fault) for the paths of a command line."""
    words: list[str] = []
    for word in line:  # --option=value -> --option value
        words += word.split("=", 1) if word.startswith("--") else [word]
    for option, value in pairwise(words):
        path = re.sub(r"(?<=.):[\d.]+\Z", "", value)  # FOLDER:WEIGHT -> FOLDER; ":1" alone stays
        if "=" in path and not Path(path).exists():
            path = path.partition("=")[2]  # NAME=FOLDER -> FOLDER
        # another option, or a placeholder copied from the documentation: RUN, DATA_DIR, FILE.jsonl
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
    source = Path(path)
    if not source.exists():
        if glob.glob(path):
            return UserError(f"{option} {path}: is a pattern in quotes; leave them off")
        fix = fix_missing(path, is_data=option in DATA_OPTIONS)
        if fix is None:
            return None
        # a fix with commands downloads the data set; any other fix names a similar path that exists
        hint = "download it first" if fix.before else "take the one of a similar name"
        return UserError(f"{option} {path}: does not exist; {hint}", fix)
    if option != "--data" or program != "megatron-sov":
        return None
    if source.name == "manifest.json" and classify_folder(source.parent) == "tokens":
        return UserError(f"--data {path}: is the manifest of token shards; pass their folder",
                         Fix(words={path: str(source.parent)}))
    kind, descriptions = classify_folder(source), load_table()["kinds"]
    if kind == "tokens":
        return None
    if kind in descriptions:
        return UserError(f"--data {path}: is {descriptions[kind]}; pass token shards or a file of records",
                         Fix(options=("--data", find_only_folder("tokens") or "DIR")))
    is_text_folder = source.is_dir() and any(
        name.endswith(DATA_SUFFIXES) for name in os.listdir(source) if name != "manifest.json")
    # training commands pack a file themselves; `eval` and `plan` need token shards, `eval media` reads rows
    needs_shards = line[0] in ("eval", "plan") and "media" not in line[:2]
    is_unpacked_file = needs_shards and source.is_file() and source.name.endswith(DATA_SUFFIXES)
    if not is_text_folder and not is_unpacked_file:
        return None
    tokenizer, import_commands = _choose_tokenizer(line)
    shards = choose_free_path(f"{source.name.partition('.')[0]}-tokens")
    options = _PACK_OPTIONS.get(line[0], "") + (_choose_format(source) if is_unpacked_file else "")
    pack_command = (f"sov-data pack --tokenizer {tokenizer} {options}"
                    + shlex.join(["--input", path, "--output", shards]))
    what = "a file" if is_unpacked_file else "a folder of text"
    return UserError(f"--data {path}: is {what}; pack it first",
                     Fix(words={path: shards}, before=(*import_commands, pack_command)))


def _choose_format(file: Path) -> str:
    """Return the `--format` option for packing a file of JSON lines, by the fields of its first record."""
    with contextlib.suppress(OSError, ValueError, AttributeError), file.open(encoding="utf-8") as lines:
        fields = json.loads(lines.readline(MAX_LINE_CHARS)).keys()
        if "chosen" in fields:
            return "--format preference "
        if fields & {"messages", "conversations"}:
            return "--format chat "
    return ""


def _choose_tokenizer(line: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return a tokenizer folder for packing and the commands that create it: from the command's model, else
    one in the current folder, else the placeholder DIR."""
    # `--from MODEL`, or a positional argument as in `eval lm MODEL`
    words = [word for word in (find_value(line, "--from"), *line[:3]) if word]
    of_runs = [folder for word in words for folder in sorted(Path(word).glob("checkpoints/*/tokenizer"))]
    if of_runs:
        return str(of_runs[-1]), ()
    model = next((word for word in words if (Path(word) / "tokenizer.json").is_file()), "")
    if model:
        output = choose_free_path(f"{Path(model).name}-tokenizer")
        return output, (shlex.join(["sov-tokenizer", "import", model, "--output", output]),)
    return find_only_folder("tokenizer") or "DIR", ()


def _find_output_fault(path: str) -> UserError | None:
    """Return the fault of a `--run` folder with other contents than a run."""
    folder, kinds = Path(path), load_table()["kinds"]
    content = "a file" if folder.is_file() else kinds.get(classify_folder(folder), "")
    if content in ("", kinds["run"]):
        return None
    return UserError(f"--run {path}: is {content}; name a new folder",
                     Fix(options=("--run", choose_free_path(f"{folder.with_suffix('')}-run"))))
