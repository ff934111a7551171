"""Prompts from the command line and from files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    text: str
    """What it continues, or with a chat template answers."""
    target: str | None = None
    """The answer that a reader will compare with, if there is one."""


def read_prompts(texts: list[str], file: Path | None) -> list[Prompt]:
    """Return the prompts given as texts, then those of a JSONL file with fields "prompt" and,
    if wanted, "target".

    Raises:
        UserError: there is none, one is empty, or a line of the file is malformed (named by number).
    """
    prompts = [Prompt(text) for text in texts] + (_read_file(file) if file is not None else [])
    if not prompts:
        raise UserError("there is nothing to continue: pass --prompt TEXT or --prompts FILE.jsonl")
    texts = [p.text for p in prompts]
    if "" in texts:
        raise UserError(f"prompt {texts.index('') + 1} is empty: pass at least one character of text")
    return prompts


def _read_file(file: Path) -> list[Prompt]:
    try:
        # at "\n" alone: `splitlines` also cuts at characters that may stand inside a JSON string
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {file}: cannot be read ({e}); pass a JSONL file in UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is not valid JSON ({e}); "
                            "every line must be one JSON object") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) \
                or not isinstance(record.get("target", ""), str):
            raise UserError(f'{file}:{number}: must be an object with "prompt" and, if wanted, '
                            '"target", both strings')
        prompts.append(Prompt(record["prompt"], record.get("target")))
    return prompts
