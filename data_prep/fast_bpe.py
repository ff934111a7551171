"""Byte-level BPE by tiktoken, several times faster than `tokenizers`, and the proof that it gives the same ids.

tiktoken merges by the rank of the result, `tokenizers` by the list of merges; their regular expressions and Unicode tables
are different ones too.  So nothing is taken on trust: the fast encoder is used only where the tokenizer has the form that
it can express and a self-check on the very input, on every token of the vocabulary and on adversarial text finds no
difference.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer

from megatron_sov.errors import UserError

LONGEST_WHITESPACE_CHARS = 10_000
"""tiktoken's regular expression overflows its stack on a far longer run; such text is left to `tokenizers`."""
_LONG_WHITESPACE = re.compile(rf"\s{{{LONGEST_WHITESPACE_CHARS}}}")
_LAST_PLANES_STEP = 7


class NoFastForm(Exception):
    """Why a tokenizer cannot be expressed."""


class FastBpe:
    """A tokenizer.json in tiktoken's form."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        """Build it; `tokenizer` is the same file, opened with special tokens as ordinary text.

        Raises:
            NoFastForm: the tokenizer uses something that tiktoken has no form for.
        """
        raw = json.loads(file.read_text(encoding="utf-8"))
        self._tokenizer = tokenizer
        self._normalizer = _normalizer(raw, tokenizer)
        self._encoding = tiktoken.Encoding(str(file), pat_str=_split_pattern(raw), mergeable_ranks=_ranks(raw), special_tokens={})

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
        return next((repr(text[:80]) for text, e in zip(texts, encodings, strict=True) if self.encode(text) != e.ids), None)


def _normalizer(raw: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """Return the tokenizer's own normalizer, which must leave ASCII as it is."""
    kind = (raw.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC", "NFKC", "NFD", "NFKD"):
        raise NoFastForm(f"its normalizer is {kind}")
    return tokenizer.normalizer


def _split_pattern(raw: dict[str, Any]) -> str:
    parts = raw["pre_tokenizer"].get("pretokenizers") if raw.get("pre_tokenizer") else None
    if not parts or [p["type"] for p in parts] != ["Split", "ByteLevel"]:
        raise NoFastForm("its pre-tokenizer is not a split followed by bytes")
    split, bytes_ = parts
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise NoFastForm("its split is not a regular expression that isolates")
    if bytes_["use_regex"] or bytes_["add_prefix_space"]:
        raise NoFastForm("its bytes are split once more, or prefixed")
    return str(split["pattern"]["Regex"])


def _ranks(raw: dict[str, Any]) -> dict[bytes, int]:
    """Return bytes -> id, where ids rise with the merges, so that they serve as ranks."""
    model, added = raw["model"], raw["added_tokens"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback") or model.get("unk_token") \
            or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NoFastForm("its model is not plain byte-level BPE")
    if plain := [t["content"] for t in added if not t["special"]]:
        raise NoFastForm(f"its added token {plain[0]!r} is matched in ordinary text")
    vocab = model["vocab"]
    products = [vocab["".join(m.split(" ", 1) if isinstance(m, str) else m)] for m in model["merges"]]
    if products != sorted(set(products)):
        raise NoFastForm("its ids do not rise with its merges")
    special = {t["content"] for t in added}
    characters = byte_characters()
    try:
        ranks = {bytes(characters[c] for c in token): id_ for token, id_ in vocab.items() if token not in special}
    except KeyError:
        raise NoFastForm("its vocabulary is not spelled in bytes") from None
    if len(set(products)) + 256 != len(ranks):
        raise NoFastForm("its vocabulary is not 256 bytes and one token for each merge")
    return ranks


def byte_characters() -> dict[str, int]:
    """Return character -> byte of the byte-level alphabet (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def adversarial_texts(file: Path) -> Iterator[str]:
    """Yield text on which two encoders of one tokenizer would part: every token, every kind of character, long runs."""
    vocab = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    characters = byte_characters()
    tokens = (bytes(characters[c] for c in token if c in characters) for token in vocab)
    spelled = [t.decode("utf-8", errors="ignore") for t in tokens]
    yield from (separator.join(spelled) for separator in ("", " "))
    for separator in ("a", " "):
        yield separator.join(_characters())
    for unit in (" ", "\n", "\t", " \n", "\r\n", "a", "가", "1", "!", "\u3000", "e\u0301", "\u1100\u1161", "'s", "'S", "\u017f",
                 "\ufeff"):
        yield from (f"x{unit * n}y" for n in (1, 2, 3, 31, 1000))
    endings = ("s", "S", "\u017f", "re", "RE", "ll", "lL", "d\u0301")
    yield "".join(f" {quote}{letters}" for quote in "'\u2019" for letters in endings)


def _characters() -> Iterator[str]:
    """Yield characters of every Unicode block: all but the large uniform ones, of those some."""
    for code in range(0x20000):
        uniform = 0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD7A4 or 0xE000 <= code < 0xF900 or 0x17000 <= code < 0x18D00
        if not 0xD800 <= code < 0xE000 and (not uniform or code % 64 == 0):
            yield chr(code)
    yield from map(chr, range(0x20000, 0x33480, _LAST_PLANES_STEP))
    yield from map(chr, range(0xE0000, 0xE01F0))


def load_fast(file: Path, tokenizer: Tokenizer, samples: list[str]) -> tuple[FastBpe | None, str]:
    """Return the fast encoder where it is proven equal on `samples` and adversarial text, and a sentence about it."""
    try:
        fast = FastBpe(file, tokenizer)
    except NoFastForm as e:
        return None, f"encoding with tokenizers, because {e}"
    except ValueError as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e}); make it again or restore it from a copy") from None
    texts = [*samples, *adversarial_texts(file)]
    if difference := fast.difference([*texts, *(unicodedata.normalize("NFD", t) for t in samples)]):
        return None, f"encoding with tokenizers, because tiktoken differs on {difference}"
    num_bytes = sum(len(t.encode()) for t in texts)
    return fast, f"encoding with tiktoken: the same ids as tokenizers on {num_bytes / 1e6:.1f} MB, a sample of the input among it"
