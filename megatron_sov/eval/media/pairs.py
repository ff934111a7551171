"""Pairs of modalities, the rows that ask for them, and figures of what was recognised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError
from megatron_sov.eval.intervals import mean_interval, wilson_interval

TEXT, IMAGE, AUDIO = "text", "image", "audio"
PAIRS = {f"{a}-{b}": (a, b) for a in (IMAGE, TEXT, AUDIO) for b in (TEXT, IMAGE, AUDIO)
         if (a, b) not in ((TEXT, TEXT), (IMAGE, IMAGE))}
"""Name -> what is shown, and what is asked for."""
RETRIEVAL = {f"{kind}-{TEXT}": (f"{kind}-{TEXT}", f"{TEXT}-{kind}") for kind in (IMAGE, AUDIO)}
"""Pair of rows whose texts are ranked behind media -> that, and media ranked for texts."""


@dataclass(frozen=True)
class Row:
    """A prompt with what is to be recognised in the reply."""

    content: list[dict[str, Any]]
    """Parts, as `generate.media_prompts.Parts`."""
    answer: str
    """What a text is to be, or what a judge is to recognise."""
    labels: tuple[str, ...] = ()
    """What a judge chooses from; (): anything."""


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a JSONL file: `content`, `answer`, and `labels` where a judge chooses.

    Raises:
        UserError: it cannot be read, has no row, or one is malformed (named by number).
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--data {file}: cannot be read ({e}); pass a JSONL file in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            content, answer, labels = row["content"], row["answer"], row.get("labels", [])
            if not (isinstance(content, list) and content and all(isinstance(p, dict) for p in content)
                    and isinstance(answer, str) and answer and isinstance(labels, list)
                    and all(isinstance(label, str) for label in labels)):
                raise TypeError("content is a list of parts, answer a text that is not empty, labels texts")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is no row ({type(e).__name__}: {e}); write "
                            '{"content": [parts], "answer": "..."}') from None
        found.append(Row(content, answer, tuple(labels)))
    if not found:
        raise UserError(f"--data {file}: has no row")
    return found


def normalised(text: str) -> str:
    """Return a text as words are counted: lower case, punctuation as space, one space between words."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.casefold())
    return " ".join(kept.split())


def figures(rows: Sequence[Row], heard: Sequence[str]) -> dict[str, Any]:
    """Return what was recognised against what was asked for.

    `accuracy` is the share of exact matches of normalised texts with Wilson's interval; `wer` and `cer` are
    errors of words and characters (jiwer) over all rows, `cer_interval` of the rows' own shares, each at most
    1; `chance` is the mean of 1 / labels where every row has some.
    """
    import jiwer

    wanted, got = [normalised(row.answer) for row in rows], [normalised(text) for text in heard]
    right = [a == b for a, b in zip(wanted, got, strict=True)]
    told: dict[str, Any] = {
        "num_rows": len(rows), "accuracy": sum(right) / len(right),
        "accuracy_interval": list(wilson_interval(sum(right), len(right)))}
    if all(wanted):
        shares = [min(1.0, float(jiwer.cer(a, b))) for a, b in zip(wanted, got, strict=True)]
        told |= {"wer": float(jiwer.wer(wanted, got)), "cer": float(jiwer.cer(wanted, got)),
                 "cer_interval": list(mean_interval(shares))}
    if all(row.labels for row in rows):
        told["chance"] = sum(1 / len(row.labels) for row in rows) / len(rows)
    return told
