"""What a tokenizer.json of byte-level BPE says in other words: its split pattern, the rank of each token's
bytes, its alphabet.

tiktoken merges by the rank of the result, `tokenizers` by the list of merges; their regular expressions and
Unicode tables are different ones too.  So nothing is taken on trust: `adversarial_texts` are what two
encoders of one tokenizer are compared on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer ByteLevel splits by where it is not told to leave that to others
(tokenizers: byte_level.rs)."""
_LAST_PLANES_STEP = 7


class NotByteBpe(Exception):
    """Why a tokenizer cannot be expressed as a split pattern and ranks of bytes;
    the message begins with "its"."""


def split_pattern(raw: dict[str, Any]) -> str:
    """Return the one regular expression by which a tokenizer.json splits text.

    Raises:
        NotByteBpe: it splits by other means.
    """
    steps = raw.get("pre_tokenizer") or {}
    if steps.get("type") == "ByteLevel" and steps.get("use_regex", True) and not steps["add_prefix_space"]:
        return GPT2_PATTERN
    parts = steps.get("pretokenizers")
    if not parts or [p["type"] for p in parts] != ["Split", "ByteLevel"]:
        raise NotByteBpe("its pre-tokenizer is not a split followed by bytes")
    split, bytes_ = parts
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise NotByteBpe("its split is not a regular expression that isolates")
    if bytes_.get("use_regex", True) or bytes_["add_prefix_space"]:
        raise NotByteBpe("its bytes are split once more, or prefixed")
    return str(split["pattern"]["Regex"])


def ranks(raw: dict[str, Any]) -> dict[bytes, int]:
    """Return bytes -> id of all tokens but the added ones, where ids rise with the merges,
    so that they serve as ranks.

    Raises:
        NotByteBpe: the model is another one, or its ids are no ranks.
    """
    model, added = raw["model"], raw["added_tokens"]
    if (model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback") or model.get("unk_token")
            or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        raise NotByteBpe("its model is not plain byte-level BPE")
    vocab = model["vocab"]
    products = [vocab["".join(merge)] for merge in merges(raw)]
    # tiktoken merges the pair with the lowest id first; that is the order of merges only if ids rise with
    # them
    if products != sorted(set(products)):
        raise NotByteBpe("its ids do not rise with its merges")
    contents = {t["content"] for t in added}
    characters = byte_characters()
    found: dict[bytes, int] = {}
    try:
        for token, id_ in vocab.items():
            if token not in contents:
                found[bytes(characters[c] for c in token)] = id_
    except KeyError:
        raise NotByteBpe("its vocabulary is not spelled in bytes") from None
    # all 256 bytes, so that every text can be encoded; and no token without a merge, which ranks alone would
    # make
    num_bytes = sum(len(token) == 1 for token in found)
    if num_bytes != 256 or (len(set(products)) + num_bytes != len(found) and not model.get("ignore_merges")):
        raise NotByteBpe("its vocabulary is not 256 bytes and one token for each merge")
    return found


def merges(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json in order; older files write them as one string with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
    return [(left, right) for left, right in pairs]


@cache
def byte_characters() -> dict[str, int]:
    """Return character -> byte of the byte-level alphabet (GPT-2's `bytes_to_unicode`)."""
    # bytes that print keep their code point, the others take code points from 256 on, in order
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def adversarial_texts(raw: dict[str, Any]) -> Iterator[str]:
    """Yield text on which two encoders of one tokenizer would part: every token,
    every kind of character, long runs."""
    characters = byte_characters()
    spelled = []
    for token in raw["model"]["vocab"]:
        content = bytes(characters[c] for c in token if c in characters)
        spelled.append(content.decode("utf-8", errors="ignore"))
    # without a blank tokens meet, with one they begin words
    yield from (separator.join(spelled) for separator in ("", " "))
    for separator in ("a", " "):
        yield separator.join(_characters())
    for unit in (" ", "\n", "\t", " \n", "\r\n", "a", "가", "1", "!", "\u3000", "e\u0301", "\u1100\u1161",
                 "'s", "'S", "\u017f", "\ufeff"):
        yield from (f"x{unit * n}y" for n in (1, 2, 3, 31, 1000))
    endings = ("s", "S", "\u017f", "re", "RE", "ll", "lL", "d\u0301")
    yield "".join(f" {quote}{letters}" for quote in "'\u2019" for letters in endings)


def _characters() -> Iterator[str]:
    """Yield characters of every Unicode block: all but the large uniform ones, of those some."""
    for code in range(0x20000):
        # Han, Hangul, private use, Tangut: blocks whose characters are all of one kind
        uniform = (0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD7A4 or 0xE000 <= code < 0xF900
                   or 0x17000 <= code < 0x18D00)
        if not 0xD800 <= code < 0xE000 and (not uniform or code % 64 == 0):
            yield chr(code)
    yield from map(chr, range(0x20000, 0x33480, _LAST_PLANES_STEP))
    yield from map(chr, range(0xE0000, 0xE01F0))


