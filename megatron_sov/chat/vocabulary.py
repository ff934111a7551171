"""Read tokenizer vocabularies, compute tokenizer identities, and compare two tokenizers.

The identity covers everything that maps text to ids and back: vocabulary, added tokens with flags, merges and
other model fields, normalizer, pre-tokenizer, decoder. It ignores file layout, `padding`, `truncation`,
post-processor and chat template.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import SHA256, hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.chat.folder import TOKENIZER_JSON, read_chat_fields

CANONICAL = "tokenizer-v1"
"""Prefix of the digests that `tokenizer_digest` returns."""
IMPLIED_FIELDS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"use_regex": True}, "Metaspace": {"prepend_scheme": "always", "split": True},
    "Punctuation": {"behavior": "Isolated"}}
"""Step type -> fields missing in older files, with the defaults of `tokenizers`."""
FALSE_IS_NOT_NULL = ("strip_accents",)
"""Fields in which null differs from false: for null, `tokenizers` decides by the `lowercase` field."""
INEFFECTIVE_FIELDS = {"ByteLevel": {"trim_offsets"}, "Metaspace": {"str_rep", "add_prefix_space"}}
"""Step type -> fields without effect on ids: offsets only, or copies of other fields."""
# in a decoder, ByteLevel has no effective field at all
INEFFECTIVE_DECODER_FIELDS = INEFFECTIVE_FIELDS | {"ByteLevel": {"trim_offsets", "add_prefix_space",
                                                                 "use_regex"}}


@dataclass(frozen=True)
class TokenizerFile:
    """Content of a `tokenizer.json` in canonical form."""

    ordinary: dict[int, str]
    """Id -> token, without added tokens."""
    added: dict[int, dict[str, Any]]
    """Id -> fields of an added token: its text ("content") and the flags that are true."""
    parts: list[dict[str, Any]]
    """Pre-tokenizer and decoder steps as in the file; a sequence is followed by its steps."""
    splitting: dict[str, Any]
    """Canonical fields of model, normalizer and pre-tokenizer."""
    decoder: Any
    """Canonical decoder."""


def read_tokenizer(tokenizer: Path) -> TokenizerFile:
    """Read the `tokenizer.json` of a folder; raises `UserError` if invalid."""
    file = tokenizer / TOKENIZER_JSON
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = raw["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: a piece's id is its index
            names = dict(enumerate(piece for piece, _ in vocabulary))
        else:
            names = {id_: text for text, id_ in vocabulary.items()}
        added = {token["id"]: _canonicalize(token) for token in raw.get("added_tokens") or []}
        texts = [*names.items(), *((id_, token["content"]) for id_, token in added.items())]
        if not all(type(id_) is int and isinstance(text, str) for id_, text in texts):
            raise ValueError("ids must be integers and tokens must be strings")
        return TokenizerFile({id_: text for id_, text in names.items() if id_ not in added}, added,
                             [*_flatten_steps(raw.get("pre_tokenizer")), *_flatten_steps(raw.get("decoder"))],
                             _canonical_fields(raw),
                             _canonicalize(raw.get("decoder"), INEFFECTIVE_DECODER_FIELDS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, struct.error,
            RecursionError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e!r}); restore it from its "
                        "source") from None


def _flatten_steps(part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    inner = [*(part.get("pretokenizers") or []), *(part.get("decoders") or [])]
    return [part, *(step for inner_step in inner for step in _flatten_steps(inner_step))]


def _canonical_fields(raw: dict[str, Any]) -> dict[str, Any]:
    model = _canonicalize({"type": "BPE", **raw["model"], "vocab": None})
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram
        # rounded to float32 as in sentencepiece: `tokenizers` may write doubles whose last digits differ
        scores = [float(score) for _, score in vocabulary]
        model["scores"] = list(struct.unpack(f"{len(scores)}f", struct.pack(f"{len(scores)}f", *scores)))
    if "merges" in model:  # older files join the pair with a space
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    steps = {name: _canonicalize(raw.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return model | {name: step for name, step in steps.items() if step}


def _canonicalize(value: Any, idle: dict[str, set[str]] = INEFFECTIVE_FIELDS) -> Any:
    """Normalize a part of a `tokenizer.json`: add implied defaults, and drop empty and `idle` fields (step
    type -> fields without effect)."""
    if isinstance(value, list):
        return [_canonicalize(part, idle) for part in value]
    if not isinstance(value, dict):
        return value
    kind = str(value.get("type"))
    fields = {name: _canonicalize(part, idle) for name, part in (IMPLIED_FIELDS.get(kind, {}) | value).items()
              if name not in idle.get(kind, ())}

    def is_empty(name: str, part: Any) -> bool:
        return part is None or part in ("", [], {}) or (part is False and name not in FALSE_IS_NOT_NULL)

    return {name: part for name, part in fields.items() if not is_empty(name, part)}


def tokenizer_digest(tokenizer: Path) -> str:
    """Return the digest of a tokenizer's canonical form; raises like `read_tokenizer`."""
    return _canonical_digest(tokenizer, hash_tokenizer_file(tokenizer))


def hash_tokenizer_file(tokenizer: Path) -> str:
    """Return the SHA-256 of a folder's `tokenizer.json`. Raises `UserError`: the file does not exist."""
    if not (tokenizer / TOKENIZER_JSON).is_file():
        raise UserError(f"{tokenizer / TOKENIZER_JSON}: cannot be read as a tokenizer: it is not there")
    return hash_file(tokenizer / TOKENIZER_JSON, SHA256)


@lru_cache(maxsize=16)
def _canonical_digest(tokenizer: Path, content: str) -> str:
    """Return `tokenizer_digest`, cached by the file's digest `content`."""
    tokenizer_file = read_tokenizer(tokenizer)
    form = [sorted(tokenizer_file.ordinary.items()), sorted(tokenizer_file.added.items()),
            tokenizer_file.splitting, tokenizer_file.decoder]
    return f"{CANONICAL}:{hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()}"


def find_difference(folder: Path, other: Path) -> str | None:
    """Describe the first difference between two tokenizers, or return None for equal identities."""
    for file in (folder / TOKENIZER_JSON, other / TOKENIZER_JSON):
        if not file.is_file():
            return f"{file} is not there"
    # equal files have equal identities, and need not be parsed
    if any(digest(folder) == digest(other) for digest in (hash_tokenizer_file, tokenizer_digest)):
        return None
    first, second = read_tokenizer(folder), read_tokenizer(other)
    # ids that have another token in the other file, or none
    differing = list(dict(first.ordinary.items() ^ second.ordinary.items()))
    further_fields = [{"added_tokens": file.added, "decoder": file.decoder} for file in (first, second)]
    return _describe_id_difference(folder, other, differing, first, second) or _describe_field_difference(
        folder, other, first.splitting | further_fields[0], second.splitting | further_fields[1])


def check_same_tokens(data: Path | None, weights: Path) -> None:
    """Raise `UserError` if ids of the data mean other tokens to a checkpoint, or its tokenizer splits text
    differently.

    Compares ordinary tokens; added tokens may be renamed (reserved ids in chat templates), and either side
    may have more. Both paths are tokenizer folders; nothing is compared if `data` is None or `weights` has no
    `tokenizer.json`.
    """
    if data is None or not (weights / TOKENIZER_JSON).is_file():
        return
    data_file, weights_file = read_tokenizer(data), read_tokenizer(weights)
    # ignore missing ids: vocabularies may differ in length
    differing = [i for i, name in data_file.ordinary.items() if weights_file.ordinary.get(i, name) != name]
    problem = _describe_id_difference(data, weights, differing, data_file, weights_file)
    problem = problem or _describe_field_difference(data, weights, data_file.splitting,
                                                    weights_file.splitting)
    if problem:
        raise UserError(f"{problem}; pack the data with the checkpoint's tokenizer")


def check_same_tokenizer(first: Path, other: Path, remedy: str) -> None:
    """Raise `UserError` if two folders differ in tokenizer or chat format; the message ends with `remedy`.

    Without `tokenizer.json` nothing is compared.
    """
    if not all((folder / TOKENIZER_JSON).is_file() for folder in (first, other)):
        return
    problem = find_difference(other, first)
    if problem is None:
        chat_fields = read_chat_fields(first)
        differing = [name for name, value in read_chat_fields(other).items() if chat_fields[name] != value]
        if not differing:
            return
        problem = f"{other}: {differing[0]} differs from that of {first}"
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
        if (our_value := ours.get(name)) != (their_value := theirs.get(name)):
            effect = "ids have another text" if name == "decoder" else "the same text has other ids"
            return (f"{folder / TOKENIZER_JSON}: its {name} differs from that of {other} "
                    f"({_describe_first_difference(our_value, their_value)}), so {effect}")
    return None


def _describe_first_difference(ours: Any, theirs: Any, path: str = "") -> str:
    """Return the path and values of the first difference between two JSON values."""
    if isinstance(ours, list) and isinstance(theirs, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return f"{path}{ours!r:.80} here, {theirs!r:.80} there"
    key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
    return _describe_first_difference(ours.get(key), theirs.get(key), f"{path}{key}: ")
