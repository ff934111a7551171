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
    return {token: name for token, name in vocabulary.items() if token not in taken}


def read_added_texts(tokenizer: Path) -> dict[int, str]:
    """Return id -> text of the added tokens that stand for text: those that are not special.

    Raises:
        UserError: its tokenizer.json cannot be read.
    """
    return {token["id"]: token["content"] for token in _read(tokenizer)[1] if not token["special"]}


def read_parts(tokenizer: Path) -> list[dict[str, Any]]:
    """Return the steps between text and tokens: pre-tokenizers and decoders, those in a sequence one by one.

    Raises:
        UserError: its tokenizer.json cannot be read.
    """
    def steps(part: Any) -> list[dict[str, Any]]:
        if not isinstance(part, dict):
            return []
        inner = [*(part.get("pretokenizers") or []), *(part.get("decoders") or [])]
        return [part, *(step for one in inner for step in steps(one))]

    raw = _load(tokenizer)
    return [*steps(raw.get("pre_tokenizer")), *steps(raw.get("decoder"))]


def _load(tokenizer: Path) -> dict[str, Any]:
    file = tokenizer / TOKENIZER_JSON
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return {**raw, "model": dict(raw["model"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e!r})") from None


def _read(tokenizer: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Return id -> token, and the added tokens."""
    raw = _load(tokenizer)
    try:
        vocabulary = raw["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: a piece's id is its place
            names = dict(enumerate(piece for piece, _ in vocabulary))
        else:
            names = {token: name for name, token in vocabulary.items()}
        added = [{key: token[key] for key in ("id", "content", "special")}
                 for token in raw.get("added_tokens") or []]
        if not all(type(token) is int and isinstance(name, str)
                   for token, name in [*names.items(), *((a["id"], a["content"]) for a in added)]):
            raise ValueError("an id is no number, or a token is no text")
        return names, added
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{tokenizer / TOKENIZER_JSON}: cannot be read as a tokenizer ({e!r})") from None


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
