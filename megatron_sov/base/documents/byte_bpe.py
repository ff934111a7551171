"""Byte-level BPE in a tokenizer.json: split pattern, rank per token's bytes, and alphabet.

tiktoken merges by the rank of the result, `tokenizers` by its list of merges, and their regular expressions
and Unicode tables differ. `iter_adversarial_texts` yields inputs on which to compare two encoders of one
tokenizer.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Split pattern of the pre-tokenizer ByteLevel with `use_regex` (tokenizers: byte_level.rs)."""
_LAST_PLANES_STEP = 7  # `_iter_characters` yields every 7th character of Unicode planes 2 and 3


class NotByteBpe(Exception):
    """A tokenizer that split pattern and byte ranks cannot express; the message begins with "its"."""


def parse_split_pattern(raw: dict[str, Any]) -> str:
    """Return a tokenizer.json's split pattern. Raises `NotByteBpe`: it splits in another way."""
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


def build_ranks(raw: dict[str, Any]) -> dict[bytes, int]:
    """Return bytes -> id for every token that was not added later; ids rise with the merges and serve as
    ranks. Raises `NotByteBpe`: the model is not byte-level BPE, or its ids are not ranks."""
    model, added = raw["model"], raw["added_tokens"]
    if (model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback") or model.get("unk_token")
            or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        raise NotByteBpe("its model is not plain byte-level BPE")
    vocab = model["vocab"]
    products = [vocab["".join(merge)] for merge in parse_merges(raw)]
    # tiktoken merges the pair with the lowest id first, which follows the merges only if the ids rise with
    # the merges
    if products != sorted(set(products)):
        raise NotByteBpe("its ids do not rise with its merges")
    contents = {t["content"] for t in added}
    characters = byte_alphabet()
    ranks_by_bytes: dict[bytes, int] = {}
    try:
        for token, id_ in vocab.items():
            if token not in contents:
                ranks_by_bytes[bytes(characters[c] for c in token)] = id_
    except KeyError:
        raise NotByteBpe("its vocabulary is not spelled in bytes") from None
    # with all 256 bytes every text can be encoded; a token without a merge would be created by ranks alone
    num_bytes = sum(len(token) == 1 for token in ranks_by_bytes)
    num_expected = num_bytes + len(products)
    if num_bytes != 256 or (num_expected != len(ranks_by_bytes) and not model.get("ignore_merges")):
        raise NotByteBpe("its vocabulary is not 256 bytes and one token for each merge")
    return ranks_by_bytes


def parse_merges(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a tokenizer.json's merges in order; old files store a merge as a string with a blank."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
    return [(left, right) for left, right in pairs]


@cache
def byte_alphabet() -> dict[str, int]:
    """Return character -> byte in GPT-2's byte-level alphabet (`bytes_to_unicode`)."""
    # printable bytes keep their code points, other bytes get code points from 256 on
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(unprintable)}


def iter_adversarial_texts(raw: dict[str, Any]) -> Iterator[str]:
    """Yield texts on which two encoders may differ: every token, character kinds, long runs."""
    characters = byte_alphabet()
    spelled = []
    for token in raw["model"]["vocab"]:
        content = bytes(characters[c] for c in token if c in characters)
        spelled.append(content.decode("utf-8", errors="ignore"))
    # tokens next to each other, and tokens at the beginning of words
    yield from (separator.join(spelled) for separator in ("", " "))
    for separator in ("a", " "):
        yield separator.join(_iter_characters())
    for unit in (" ", "\n", "\t", " \n", "\r\n", "a", "가", "1", "!", "\u3000", "e\u0301", "\u1100\u1161",
                 "'s", "'S", "\u017f", "\ufeff"):
        yield from (f"x{unit * n}y" for n in (1, 2, 3, 31, 1000))
    endings = ("s", "S", "\u017f", "re", "RE", "ll", "lL", "d\u0301")
    yield "".join(f" {quote}{letters}" for quote in "'\u2019" for letters in endings)


def _iter_characters() -> Iterator[str]:
    """Yield characters from every Unicode block; from large uniform blocks only samples."""
    for code in range(0x20000):
        # Han, Hangul, private use, Tangut: blocks of uniform characters
        uniform = (0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD7A4 or 0xE000 <= code < 0xF900
                   or 0x17000 <= code < 0x18D00)
        if not 0xD800 <= code < 0xE000 and (not uniform or code % 64 == 0):
            yield chr(code)
    yield from map(chr, range(0x20000, 0x33480, _LAST_PLANES_STEP))
    yield from map(chr, range(0xE0000, 0xE01F0))


