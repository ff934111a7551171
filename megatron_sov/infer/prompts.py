"""Prompts from the command line and from files, and the file of what a model wrote to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.documents.files import refuse_tables
from megatron_sov.base.errors import UserError
from megatron_sov.infer.request import Generated


@dataclass(frozen=True)
class ModelPrompt:
    """What a model is asked."""

    text: str
    """What it continues, or with a chat template answers."""
    target: str | None = None
    """The answer that a reader will compare with, if there is one."""
    record: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The fields of its line, which go with the responses: what a reward needs."""


def read_prompts(given: Sequence[str], file: Path | None) -> list[ModelPrompt]:
    """Return the prompts given as texts, then those of a JSONL file with fields "prompt" and,
    if wanted, "target".

    Raises:
        UserError: there is none, one is empty, or a line of the file is malformed (named by number).
    """
    prompts = [ModelPrompt(text) for text in given] + (_read_file(file) if file is not None else [])
    if not prompts and file is not None:
        raise UserError(f"--prompts {file}: is empty; pass a JSONL file with a prompt on each line")
    if not prompts:
        raise UserError("there is nothing to continue: pass --prompt TEXT or --prompts FILE.jsonl")
    texts = [p.text for p in prompts]
    if "" in texts:
        raise UserError(f"prompt {texts.index('') + 1} is empty: pass at least one character of text")
    return prompts


def response_lines(prompts: Sequence[ModelPrompt], texts: Sequence[str], found: Generated) -> str:
    """Return JSON lines as `megatron-sov score` reads them: a prompt's own fields, `response`, `num_tokens`
    and `finish_reason`."""
    return "".join(json.dumps({
        **prompt.record, "prompt": prompt.text, "response": text, "num_tokens": len(tokens),
        "finish_reason": reason}, ensure_ascii=False) + "\n"
        for prompt, text, tokens, reason in zip(prompts, texts, found.continuations, found.finish_reasons,
                                                strict=True))


def _read_file(file: Path) -> list[ModelPrompt]:
    refuse_tables(file, "--prompts")
    try:
        # at "\n" alone: `splitlines` also cuts at characters that may stand inside a JSON string
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else f"no UTF-8 at byte {e.start}"
        raise UserError(f"--prompts {file}: cannot be read ({reason}); pass a JSONL file in UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            # NaN or half of a surrogate pair could not be written with its answer
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is not valid JSON ({e}); "
                            "every line must be one JSON object") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) \
                or not isinstance(record.get("target", ""), str):
            raise UserError(f'{file}:{number}: must be an object with "prompt" and, if wanted, '
                            '"target", both strings')
        prompts.append(ModelPrompt(record["prompt"], record.get("target"), record))
    return prompts
