"""Who recognises what a model drew or said: code of your own, or a program."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sov.errors import UserError
from megatron_sov.plugins.loading import calling, load

Judge = Callable[[Sequence[Path], Sequence[Sequence[str]]], Sequence[str]]
"""Files and the labels of each to choose from -> what is recognised in each, "" where nothing is."""
JUDGE_LIMIT_S = 3600.0


def judge_of(said: str) -> Judge:
    """Return a judge: FILE.py:NAME is a function (files, labels) -> texts; anything else is a command that
    reads a JSON line {"file", "labels"} for each file and prints a JSON string for each.

    Raises:
        UserError: there is no such code, or the command is none.
    """
    file, _, name = said.rpartition(":")
    if file.endswith(".py") and name.isidentifier():
        loaded = load(said)
        if not callable(loaded.value):
            raise UserError(f"--judge {said}: is {loaded.value!r}; a judge is a function of files and labels")
        return lambda files, labels: _checked(
            said, calling(said, lambda: loaded.value(files, labels)), len(files))
    try:
        words = shlex.split(said)
    except ValueError as e:
        raise UserError(f"--judge {said!r}: is no command ({e})") from None
    if not words:
        raise UserError("--judge '': name code of your own, FILE.py:NAME, or a command")
    return lambda files, labels: _checked(said, _asked(words, files, labels), len(files))


def _asked(words: list[str], files: Sequence[Path], labels: Sequence[Sequence[str]]) -> list[object]:
    lines = "".join(json.dumps({"file": str(file), "labels": list(of)}, ensure_ascii=False) + "\n"
                    for file, of in zip(files, labels, strict=True))
    try:
        done = subprocess.run(words, input=lines, capture_output=True, encoding="utf-8",
                              timeout=JUDGE_LIMIT_S)
        if done.returncode:
            raise UserError(f"--judge {shlex.join(words)}: ended with code {done.returncode}: "
                            f"{done.stderr.strip()[-300:]}")
        return [json.loads(line) for line in done.stdout.split("\n") if line.strip()]
    except (OSError, subprocess.TimeoutExpired, ValueError) as e:
        raise UserError(f"--judge {shlex.join(words)}: {e}; it reads JSON lines and prints a JSON string for "
                        "each") from None


def _checked(said: str, found: object, count: int) -> list[str]:
    if not isinstance(found, (list, tuple)) or len(found) != count \
            or not all(isinstance(text, str) for text in found):
        raise UserError(f"--judge {said}: gave {str(found)[:200]} for {count} files; one text is needed for "
                        "each")
    return list(found)
