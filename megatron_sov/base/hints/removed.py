"""Removed commands, options, settings, values and artifacts, refused with a message that names the successor.

Entries in `removed.json` stay for one release.
"""

import copy
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.hints.commands import build_note_error
from megatron_sov.base.hints.values import find_value

_TABLES: Mapping[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COMMANDS: dict[str, str] = _TABLES["commands"]
"""Program and command -> successor."""
OPTIONS: dict[str, str] = _TABLES["options"]
"""Program, command and option -> successor."""
SETTINGS: dict[str, tuple[Any, str]] = {name: tuple(row) for name, row in _TABLES["settings"].items()}
"""Setting of a run -> (default, successor)."""
RENAMED: dict[str, str] = _TABLES["renamed"]
"""Setting of an earlier version -> its current name, in the same block and with the same values."""
VALUES: dict[str, str] = _TABLES["values"]
"""Value of an option or setting, such as an engine, recipe or model family -> successor."""
PIPELINE: dict[str, str] = _TABLES["pipeline"]
"""Format, step, or FORMAT.option or STEP.setting of a pipeline file -> successor."""
KINDS: dict[str, str] = _TABLES["kinds"]
"""Kind of artifact -> successor."""
FOLDERS: dict[str, tuple[str, str]] = _TABLES["folders"]
"""File in a folder that a removed command wrote -> (the removed command, successor)."""


def check_command(program: str, words: Sequence[str]) -> None:
    """Refuse a command line with a removed command or option. Raises `UserError`: names the successor."""
    has_endpoint = any(word.startswith(("http://", "https://")) for word in words)
    for count in (3, 2, 1):
        command = " ".join([program, *words[:count]])
        if successor := COMMANDS.get(command):
            begin = f"{command}: was removed in this version"
            if "{first}" in successor:
                raise build_note_error(begin, successor, words[count:])
            raise UserError(f"{begin}; {successor}", build_note_error(begin, successor, words[count:]).fix)
        for word in words[count:]:
            option = word.partition("=")[0]
            # --model named the model at an endpoint; without endpoint it is an lm-eval option (`words.py`)
            key = "--key-env" if option == "--model" and has_endpoint else option
            if successor := OPTIONS.get(f"{command} {key}"):
                begin = f"{command} {option}: was removed in this version"
                if successor.startswith("use `megatron-sov"):
                    # `--method dpo` names the preference method, not the RL method
                    typed = re.sub("--method[ =]", "--set preference.method=", shlex.join(words[count:]))
                    raise build_note_error(begin, successor, shlex.split(typed))
                raise UserError(f"{begin}; {successor}", _find_fix(program, successor, option, words, count))


def _find_fix(program: str, successor: str, option: str, words: Sequence[str], count: int) -> Fix:
    """Return the fix for a removed option, or second word of a command of `count` words: the option or the
    filter that the successor names, the command for the words after it, or the line without the option."""
    if not option.startswith("-"):
        return build_note_error("", successor, words[2:]).fix or Fix()
    value = find_value(words, option)
    index = next(n for n, word in enumerate(words) if word.partition("=")[0] == option)
    # the word after a switch may be a positional argument, unless one precedes the switch
    has_positional = any(not word.startswith("-") for word in words[count:index])
    has_value = value and not value.startswith("-") and has_positional
    if has_value and "| grep" in successor:
        remaining = [*words[:index], *words[index + 2:]]
        return Fix(f"{program} {shlex.join(remaining)} | grep {shlex.quote(value)}")
    left_out = (f"{option} {value}" if has_value else option, f"{option}={value}")
    renamed = re.search(r"(?:; |pass )(--[\w-]+) [A-Z]{2,}", successor)
    return Fix(options=(renamed[1], value) if renamed and value else (), left_out=left_out)


def update_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of saved settings with current names, without removed settings at their defaults."""
    settings = copy.deepcopy(dict(raw))
    for code in settings.get("code") or ():
        if isinstance(code, dict):
            code.pop("package", None)
    for name, (default, _) in SETTINGS.items():
        block, last = _find_block(settings, name)
        if last in block and block[last] == default:
            del block[last]
    for old, new in RENAMED.items():
        block, last = _find_block(settings, old)
        current = new.rpartition(".")[2]
        if last in block and current not in block:
            block[current] = block.pop(last)
    return settings


def _find_block(settings: Mapping[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Split a setting name into its block of the saved settings ({} if absent) and its last part."""
    *groups, last = name.split(".")
    block: Any = settings
    for group in groups:
        block = block.get(group) if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}, last


def check_folder(path: Path) -> None:
    """Refuse a folder that a removed command wrote. Raises `UserError`: names the successor."""
    for name, (command, successor) in FOLDERS.items():
        if os.path.isfile(path / name):
            raise UserError(f"{path}: holds {name} of {command}, which was removed in this version; "
                            f"{successor}")


def check_kind(path: str | Path, kind: str) -> None:
    """Raise `UserError` for an artifact of a removed command, with the kind and its successor."""
    if successor := KINDS.get(kind):
        raise UserError(f"{path}: is a '{kind}' artifact, which this version cannot read; {successor}")


def suggest_successor(value: str, table: Mapping[str, str] = VALUES) -> str:
    """Return the end of a sentence about a removed value; "" for other values."""
    return f"; it was removed in this version: {table[value]}" if value in table else ""
