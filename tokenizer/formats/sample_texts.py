"""The texts on which two forms of one tokenizer must give the same ids, and the user's own beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.documents import cut_text, list_files, read_documents
from megatron_sov.base.documents.byte_bpe import iter_adversarial_texts

Encode = Callable[[str], list[int]]
CHUNK_BYTES = 20_000
TOKENS_PER_TEXT = 500
BYTES_PER_FILE = 2_000_000
"""Text of each of the user's files that is looked at, at most."""

SENTENCES: tuple[str, ...] = tuple(
    json.loads(Path(__file__).with_name("sample_texts.json").read_text(encoding="utf-8")))
"""All scripts of large languages, digits, white space, emoji, code, composed and decomposed forms,
names of special tokens."""

DISORDERED_MARKS = "a\u030a\u0323 o\u0302\u0323"
"""Marks in another order than Unicode's canonical one: the only text on which conversions of one kind
are known to differ."""


def iter_builtin_texts(raw: dict[str, Any]) -> Iterator[str]:
    """Yield the built-in texts and a tokenizer.json's own tokens; if it is byte-level, characters of every
    Unicode block too."""
    yield from SENTENCES
    yield "\n".join(SENTENCES)
    if (raw.get("decoder") or {}).get("type") == "ByteLevel":
        yield from iter_adversarial_texts(raw)
        return
    vocab = raw["model"]["vocab"]
    tokens = [str(token).replace("▁", " ")
              for token in (vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab))]
    for start in range(0, len(tokens), TOKENS_PER_TEXT):
        yield from (separator.join(tokens[start:start + TOKENS_PER_TEXT]) for separator in ("", " "))


def iter_user_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the text of files and folders in pieces, `BYTES_PER_FILE` of each at most.

    Raises:
        UserError: one cannot be read.
    """
    for path in paths:
        left = BYTES_PER_FILE
        texts = (text for document in read_documents(list_files(path, print)) for text in document.texts())
        for piece in (piece for text in texts for piece in cut_text(text, CHUNK_BYTES)):
            if left <= 0:
                break
            left -= len(piece.encode())
            yield piece


def find_first_difference(texts: Iterable[str], one: Encode, other: Encode) -> str | None:
    """Return the first text, shortened, to which two encoders give different ids;
    None where all are the same."""
    for text in texts:
        if (found := one(text)) != (expected := other(text)):
            shorter = min(len(found), len(expected))
            at = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
            return f"{text[:60]!r} (ids {found[at:at + 3]} and {expected[at:at + 3]} from token {at} on)"
    return None
