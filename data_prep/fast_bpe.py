"""Byte-level BPE by tiktoken, several times faster than `tokenizers`, and the proof that it
gives the same ids.

tiktoken merges by the rank of the result, `tokenizers` by the list of merges; their regular expressions and
Unicode tables are different ones too.  So nothing is taken on trust: the fast encoder is used only where the
tokenizer has the form that it can express and a self-check on the very input, on every token of the
vocabulary and on adversarial text finds no difference.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer

from megatron_sov.byte_bpe import NotByteBpe, adversarial_texts, ranks, split_pattern
from megatron_sov.errors import UserError

LONGEST_WHITESPACE_CHARS = 10_000
"""tiktoken's regular expression overflows its stack on a far longer run;
such text is left to `tokenizers`."""
_LONG_WHITESPACE = re.compile(rf"\s{{{LONGEST_WHITESPACE_CHARS}}}")


class FastBpe:
    """A tokenizer.json in tiktoken's form."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        """Build it; `tokenizer` is the same file, opened with special tokens as ordinary text.

        Raises:
            NotByteBpe: the tokenizer uses something that tiktoken has no form for.
        """
        raw = json.loads(file.read_text(encoding="utf-8"))
        self._tokenizer = tokenizer
        self._normalizer = _normalizer(raw, tokenizer)
        if plain := [t["content"] for t in raw["added_tokens"] if not t["special"]]:
            raise NotByteBpe(f"its added token {plain[0]!r} is matched in ordinary text")
        self._encoding = tiktoken.Encoding(str(file), pat_str=split_pattern(raw), mergeable_ranks=ranks(raw),
                                           special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text, as `tokenizers` gives them."""
        if _LONG_WHITESPACE.search(text):
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
        return self._encoding.encode_ordinary(text)

    def difference(self, texts: list[str]) -> str | None:
        """Return the first text, shortened, whose ids are not those of `tokenizers`; None where all are."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return next((repr(text[:80]) for text, e in zip(texts, encodings, strict=True)
                     if self.encode(text) != e.ids), None)


def _normalizer(raw: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """Return the tokenizer's own normalizer, which must leave ASCII as it is."""
    kind = (raw.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC", "NFKC", "NFD", "NFKD"):
        raise NotByteBpe(f"its normalizer is {kind}")
    return tokenizer.normalizer


def load_fast(file: Path, tokenizer: Tokenizer, samples: list[str]) -> tuple[FastBpe | None, str]:
    """Return the fast encoder where it is proven equal on `samples` and adversarial text,
    and a sentence about it."""
    try:
        fast = FastBpe(file, tokenizer)
    except NotByteBpe as e:
        return None, f"encoding with tokenizers, because {e}"
    except ValueError as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e}); make it again or restore "
                        "it from a copy") from None
    texts = [*samples, *adversarial_texts(json.loads(file.read_text(encoding="utf-8")))]
    if difference := fast.difference([*texts, *(unicodedata.normalize("NFD", t) for t in samples)]):
        return None, f"encoding with tokenizers, because tiktoken differs on {difference}"
    num_bytes = sum(len(t.encode()) for t in texts)
    return (fast, f"encoding with tiktoken: the same ids as tokenizers on {num_bytes / 1e6:.1f} MB, "
                  "a sample of the input among it")
