"""Texts on which two forms of a tokenizer must give the same ids: built-in texts and the user's files."""

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
"""Maximum text per path of --text."""

SENTENCES: tuple[str, ...] = tuple(
    json.loads(Path(__file__).with_name("sample_texts.json").read_text(encoding="utf-8")))
"""Scripts of large languages, digits, white space, emoji, code, composed and decomposed forms, names of
special tokens."""


def iter_builtin_texts(raw: dict[str, Any]) -> Iterator[str]:
    """Yield the built-in texts and the tokens of a tokenizer.json.

    For a byte-level tokenizer.json yield adversarial texts with characters of every Unicode block instead of
    tokens."""
    yield from SENTENCES
    yield "\n".join(SENTENCES)
    if (raw.get("decoder") or {}).get("type") == "ByteLevel":
        yield from iter_adversarial_texts(raw)
        return
    vocab = raw["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
    tokens = [str(piece).replace("▁", " ") for piece in pieces]
    for start in range(0, len(tokens), TOKENS_PER_TEXT):
        yield from (separator.join(tokens[start:start + TOKENS_PER_TEXT]) for separator in ("", " "))


def iter_user_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the text of files and folders in pieces, at most `BYTES_PER_FILE` per path. Raises `UserError`: a
    file cannot be read."""
    for path in paths:
        num_bytes = 0
        for document in read_documents(list_files(path, print)):
            for piece in (piece for text in document.texts() for piece in cut_text(text, CHUNK_BYTES)):
                if num_bytes >= BYTES_PER_FILE:
                    break
                num_bytes += len(piece.encode())
                yield piece


def find_first_difference(texts: Iterable[str], encode: Encode, reference: Encode) -> str | None:
    """Describe the first text to which two encoders give different ids; None if all ids are equal."""
    for text in texts:
        ids, expected = encode(text), reference(text)
        if ids != expected:
            shorter = min(len(ids), len(expected))
            at = next((i for i in range(shorter) if ids[i] != expected[i]), shorter)
            return f"{text[:60]!r} (ids {ids[at:at + 3]} and {expected[at:at + 3]} from token {at} on)"
    return None
