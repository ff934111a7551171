"""Commands, options, settings and folders of earlier versions that this one has no part for.

Each is refused by its name, with what serves in its place. An entry of `removed.json` stays for one release.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError

_TABLES: Mapping[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COMMANDS: dict[str, str] = _TABLES["commands"]
"""Program and command -> what to use in its place."""
OPTIONS: dict[str, str] = _TABLES["options"]
"""Program, command and option -> what to use in its place."""
SETTINGS: dict[str, tuple[Any, str]] = {
    name: (default, instead) for name, (default, instead) in _TABLES["settings"].items()}
"""Setting of a run -> its default, and what to use in its place."""
VALUES: dict[str, str] = _TABLES["values"]
"""Value of an option or setting, such as an engine, recipe or model family -> what to use in its place."""
PIPELINE: dict[str, str] = _TABLES["pipeline"]
"""Format, step, or FORMAT.option or STEP.setting of a pipeline file -> what to use in its place."""
KINDS: dict[str, str] = _TABLES["kinds"]
"""Kind of artifact -> what to use in its place."""
FOLDERS: dict[str, tuple[str, str]] = _TABLES["folders"]
"""File that a folder of a removed command holds -> what made the folder, and what to use in its place."""


def check_command(program: str, words: Sequence[str]) -> None:
    """Refuse a command line of a removed command or option.

    Args:
        program: e.g. "megatron-sov".
        words: the words after it, as they were typed.

    Raises:
        UserError: the command or option was removed; the message says what serves in its place.
    """
    for count in (3, 2, 1):
        typed = " ".join([program, *words[:count]])
        if instead := COMMANDS.get(typed):
            raise UserError(f"{typed}: was removed in this version; {instead}")
        for word in words[count:]:
            option = word.partition("=")[0]
            # next to an endpoint it named the model there; else it is a word of lm-eval, which `words` reads
            if option == "--model" and any(one.startswith(("http://", "https://")) for one in words):
                option = "--key-env"
            if instead := OPTIONS.get(f"{typed} {option}"):
                raise UserError(f"{typed} {word.partition('=')[0]}: was removed in this version; {instead}")


def without_removed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of saved settings of a run without removed settings that have their default: the run
    did not use them."""
    kept = copy.deepcopy(dict(raw))
    for code in kept.get("code") or ():
        if isinstance(code, dict):
            code.pop("package", None)
    for name, (default, _) in SETTINGS.items():
        *groups, last = name.split(".")
        block: Any = kept
        for group in groups:
            block = block.get(group) if isinstance(block, dict) else None
        if isinstance(block, dict) and last in block and block[last] == default:
            del block[last]
    return kept


def check_folder(path: Path) -> None:
    """Refuse a folder that a removed command wrote.

    Raises:
        UserError: it is one; the message says what serves in its place.
    """
    for name, (maker, instead) in FOLDERS.items():
        if (path / name).is_file():
            raise UserError(f"{path}: holds {name} of {maker}, which was removed in this version; {instead}")


def check_kind(path: str | Path, kind: str) -> None:
    """Refuse an artifact of a kind that only a removed command made.

    Raises:
        UserError: it is one; the message says what serves in its place.
    """
    if instead := KINDS.get(kind):
        raise UserError(f"{path}: is a '{kind}' artifact, which this version cannot read; {instead}")


def was_removed(value: str, table: Mapping[str, str] = VALUES) -> str:
    """Return the end of a sentence about a value that an earlier version took; "" for others."""
    return f"; it was removed in this version: {table[value]}" if value in table else ""
