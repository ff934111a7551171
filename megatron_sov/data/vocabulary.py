"""What token ids mean: the vocabulary of a tokenizer.json, and whether two of them agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError

TOKENIZER_JSON = "tokenizer.json"


def read_vocabulary(tokenizer: Path) -> dict[int, str]:
    """Return id -> token of a tokenizer folder, special and other added tokens left out.

    Raises:
        UserError: its tokenizer.json cannot be read.
    """
    vocabulary, added = _read(tokenizer)
    taken = {token["id"] for token in added}
    return {token: name for name, token in vocabulary.items() if token not in taken}


def read_added_texts(tokenizer: Path) -> dict[int, str]:
    """Return id -> text of the added tokens that stand for text: those that are not special.

    Raises:
        UserError: its tokenizer.json cannot be read.
    """
    return {token["id"]: token["content"] for token in _read(tokenizer)[1] if not token["special"]}


def _read(tokenizer: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    file = tokenizer / TOKENIZER_JSON
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return dict(raw["model"]["vocab"]), list(raw.get("added_tokens", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e!r})") from None


def refuse_other_tokens(data: Path | None, weights: Path) -> None:
    """Refuse data whose ids mean other tokens than those that a checkpoint's embeddings were trained on.

    Ordinary tokens are compared; added ones may be renamed, as a chat template does with reserved ids.  Where
    one side carries no tokenizer.json nothing can be compared.

    Args:
        data: the tokenizer folder that travels with the token shards.
        weights: the tokenizer folder of the checkpoint.

    Raises:
        UserError: some id means two things.
    """
    if data is None or not (weights / TOKENIZER_JSON).is_file():
        return
    ours, theirs = read_vocabulary(data), read_vocabulary(weights)
    differing = [token for token, name in ours.items() if theirs.get(token, name) != name]
    if differing:
        token = min(differing)
        raise UserError(f"{data}: {len(differing)} ids mean other tokens than in {weights} (e.g. "
                        f"{token}: {ours[token]!r} here, {theirs[token]!r} there); "
                        "pack the data with the checkpoint's tokenizer")
