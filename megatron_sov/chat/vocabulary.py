"""What token ids mean: the vocabulary of a tokenizer.json, its identity, and whether two of them agree.

The identity covers all that decides which ids a text has and which text ids have: vocabulary, added tokens
with their flags, merges and the rest of the model, normalizer, pre-tokenizer, decoder. It does not cover the
layout of the file, `padding` and `truncation`, or the form of prompts: post-processor and chat template.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import SHA256, file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.folder import TOKENIZER_JSON, read_chat_fields

CANONICAL = "tokenizer-v1"
"""Prefix of the digest of a tokenizer's canonical form."""
IMPLIED_FIELDS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"use_regex": True}, "Metaspace": {"prepend_scheme": "always", "split": True},
    "Punctuation": {"behavior": "Isolated"}}
"""Type of a step -> fields that older files leave out, with the values that `tokenizers` assumes."""
FALSE_IS_NOT_NULL = ("strip_accents",)
"""Fields whose null has `tokenizers` decide by another field: null strips accents of a text in lower case."""
INEFFECTIVE_FIELDS = {"ByteLevel": {"trim_offsets"}, "Metaspace": {"str_rep", "add_prefix_space"}}
"""Type of a step -> fields that change no id: they move offsets, or repeat another field."""
INEFFECTIVE_DECODER_FIELDS = INEFFECTIVE_FIELDS | {"ByteLevel": {"trim_offsets", "add_prefix_space", "use_regex"}}


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a tokenizer.json, with one spelling for files that mean the same."""

    ordinary: dict[int, str]
    """Id -> token; added tokens, special ones among them, are left out."""
    added: dict[int, dict[str, Any]]
    """Id -> text ("content") and the flags that are on, of an added token; special ones stand for no text."""
    parts: list[dict[str, Any]]
    """Pre-tokenizers and decoders as they stand in the file, those inside of a sequence one by one."""
    splitting: dict[str, Any]
    """Fields of the model, normalizer and pre-tokenizer, which split a text into tokens."""
    decoder: Any
    """Step from tokens to text."""


def read_tokenizer(tokenizer: Path) -> TokenizerFile:
    """Read the tokenizer.json of a folder; `UserError` if it cannot be read."""
    file = tokenizer / TOKENIZER_JSON
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = raw["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: the id of a piece is its index
            names = dict(enumerate(piece for piece, _ in vocabulary))
        else:
            names = {token: name for name, token in vocabulary.items()}
        added = {token["id"]: _canonicalize(token) for token in raw.get("added_tokens") or []}
        texts = [*names.items(), *((id_, token["content"]) for id_, token in added.items())]
        if not all(type(token) is int and isinstance(text, str) for token, text in texts):
            raise ValueError("an id is no number, or a token is no text")
        return TokenizerFile({token: name for token, name in names.items() if token not in added}, added,
                             [*_flatten_steps(raw.get("pre_tokenizer")), *_flatten_steps(raw.get("decoder"))],
                             _canonical_fields(raw), _canonicalize(raw.get("decoder"), INEFFECTIVE_DECODER_FIELDS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, struct.error,
            RecursionError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e!r}); restore it from its "
                        "source") from None


def _flatten_steps(part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    inner = [*(part.get("pretokenizers") or []), *(part.get("decoders") or [])]
    return [part, *(step for one in inner for step in _flatten_steps(one))]


def _canonical_fields(raw: dict[str, Any]) -> dict[str, Any]:
    model = _canonicalize({"type": "BPE", **raw["model"], "vocab": None})
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram
        # in the precision that sentencepiece has: `tokenizers` may write a double with another last digit
        scores = [float(score) for _, score in vocabulary]
        model["scores"] = list(struct.unpack(f"{len(scores)}f", struct.pack(f"{len(scores)}f", *scores)))
    if "merges" in model:  # older files join the two tokens by a space
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    steps = {name: _canonicalize(raw.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return model | {name: step for name, step in steps.items() if step}


def _canonicalize(value: Any, idle: dict[str, set[str]] = INEFFECTIVE_FIELDS) -> Any:
    """Return a part of a tokenizer.json without fields that are idle, empty or off, which some writers leave
    out, and with those that older files imply."""
    if isinstance(value, list):
        return [_canonicalize(part, idle) for part in value]
    if not isinstance(value, dict):
        return value
    kind = str(value.get("type"))
    found = {name: _canonicalize(part, idle) for name, part in (IMPLIED_FIELDS.get(kind, {}) | value).items()
             if name not in idle.get(kind, ())}
    return {name: part for name, part in found.items()
            if not (part is None or part in ("", [], {})
                    or (part is False and name not in FALSE_IS_NOT_NULL))}


def tokenizer_digest(tokenizer: Path) -> str:
    """Return the identity of a folder's tokenizer, the digest of its canonical form; raises as
    `read_tokenizer`."""
    return _canonical_digest(tokenizer, hash_tokenizer_file(tokenizer))


def hash_tokenizer_file(tokenizer: Path) -> str:
    """Return the digest of a tokenizer.json as it lies on the disk."""
    if not (tokenizer / TOKENIZER_JSON).is_file():
        raise UserError(f"{tokenizer / TOKENIZER_JSON}: cannot be read as a tokenizer: it is not there")
    return file_digest(tokenizer / TOKENIZER_JSON, SHA256)


@lru_cache(maxsize=16)
def _canonical_digest(tokenizer: Path, content: str) -> str:
    """Return `tokenizer_digest` of a file whose bytes have the digest `content`."""
    read = read_tokenizer(tokenizer)
    form = [sorted(read.ordinary.items()), sorted(read.added.items()), read.splitting, read.decoder]
    return f"{CANONICAL}:{hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()}"


def find_difference(folder: Path, other: Path) -> str | None:
    """Return the first difference between two folders' tokenizers, in words; None: they have one identity."""
    for file in (folder / TOKENIZER_JSON, other / TOKENIZER_JSON):
        if not file.is_file():
            return f"{file} is not there"
    if any(digest(folder) == digest(other) for digest in (hash_tokenizer_file, tokenizer_digest)):
        return None
    ours, theirs = read_tokenizer(folder), read_tokenizer(other)
    differing = list(dict(ours.ordinary.items() ^ theirs.ordinary.items()))
    beside = [{"added_tokens": file.added, "decoder": file.decoder} for file in (ours, theirs)]
    return _describe_id_difference(folder, other, differing, ours, theirs) or _describe_field_difference(
        folder, other, ours.splitting | beside[0], theirs.splitting | beside[1])


def check_same_tokens(data: Path | None, weights: Path) -> None:
    """Raise `UserError` where ids of data mean other tokens than those that a checkpoint's embeddings were
    trained on, or where the text was cut into tokens otherwise.

    Ordinary tokens are compared; added ones may be renamed, as a chat template does with reserved ids, and
    one side may have more. Both are tokenizer folders; without a tokenizer.json nothing can be compared.
    """
    if data is None or not (weights / TOKENIZER_JSON).is_file():
        return
    ours, theirs = read_tokenizer(data), read_tokenizer(weights)
    # an id that one side lacks is no contradiction: it may have a longer vocabulary
    differing = [i for i, name in ours.ordinary.items() if theirs.ordinary.get(i, name) != name]
    if problem := _describe_id_difference(data, weights, differing, ours, theirs) or _describe_field_difference(
            data, weights, ours.splitting, theirs.splitting):
        raise UserError(f"{problem}; pack the data with the checkpoint's tokenizer")


def check_same_tokenizer(one: Path, other: Path, remedy: str) -> None:
    """Raise `UserError` where the tokenizer or the form of chats of `other` is not that of `one`; the message
    names the field, and ends with `remedy`. Without a tokenizer.json nothing can be compared."""
    if not all((folder / TOKENIZER_JSON).is_file() for folder in (one, other)):
        return
    problem = find_difference(other, one)
    if problem is None:
        its = read_chat_fields(one)
        differing = [name for name, value in read_chat_fields(other).items() if its[name] != value]
        if not differing:
            return
        problem = f"{other}: {differing[0]} differs from that of {one}"
    raise UserError(f"{problem}; {remedy}")


def _describe_id_difference(folder: Path, other: Path, differing: list[int], ours: TokenizerFile,
                       theirs: TokenizerFile) -> str | None:
    if not differing:
        return None
    token = min(differing)
    return (f"{folder}: {len(differing)} ids mean other tokens than in {other} (e.g. {token}: "
            f"{ours.ordinary.get(token)!r} here, {theirs.ordinary.get(token)!r} there)")


def _describe_field_difference(folder: Path, other: Path, ours: dict[str, Any], theirs: dict[str, Any]
                          ) -> str | None:
    for name in {**ours, **theirs}:
        if (left := ours.get(name)) != (right := theirs.get(name)):
            effect = "ids have another text" if name == "decoder" else "the same text has other ids"
            return (f"{folder / TOKENIZER_JSON}: its {name} differs from that of {other} "
                    f"({_describe_first_difference(left, right)}), so {effect}")
    return None


def _describe_first_difference(left: Any, right: Any, place: str = "") -> str:
    """Return where two JSON values first differ, and the two values there."""
    if isinstance(left, list) and isinstance(right, list):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if not isinstance(left, dict) or not isinstance(right, dict):
        return f"{place}{left!r:.80} here, {right!r:.80} there"
    key = next(key for key in {**left, **right} if left.get(key) != right.get(key))
    return _describe_first_difference(left.get(key), right.get(key), f"{place}{key}: ")
