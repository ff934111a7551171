"""What token ids mean: the vocabulary of a tokenizer.json, and whether two of them agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import SHA256, file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.folder import chat_form

TOKENIZER_JSON = "tokenizer.json"


@dataclass(frozen=True)
class TokenizerFile:
    """What a tokenizer.json says of its ids."""

    ordinary: dict[int, str]
    """Id -> token, special and other added tokens left out."""
    added_texts: dict[int, str]
    """Id -> text of the added tokens that stand for text: those that are not special."""
    parts: list[dict[str, Any]]
    """The steps between text and tokens: pre-tokenizers and decoders, those in a sequence one by one."""
    cutting: dict[str, Any]
    """What else decides into which tokens a text is cut, by field; without what is empty or off."""
    beside: dict[str, Any]
    """What else it says, but for lengths: added tokens, decoder, post-processor."""


def read_tokenizer(tokenizer: Path) -> TokenizerFile:
    """Return what the tokenizer.json of a folder says.

    Raises:
        UserError: it cannot be read.
    """
    file = tokenizer / TOKENIZER_JSON
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = raw["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: a piece's id is its place
            names = dict(enumerate(piece for piece, _ in vocabulary))
        else:
            names = {token: name for name, token in vocabulary.items()}
        added = {token["id"]: (token["content"], token["special"]) for token in raw.get("added_tokens") or []}
        texts = [*names.items(), *((token, text) for token, (text, _) in added.items())]
        if not all(type(token) is int and isinstance(text, str) for token, text in texts):
            raise ValueError("an id is no number, or a token is no text")
        return TokenizerFile({token: name for token, name in names.items() if token not in added},
                             {token: text for token, (text, special) in added.items() if not special},
                             [*_steps(raw.get("pre_tokenizer")), *_steps(raw.get("decoder"))],
                             _cutting(raw),
                             {name: _without_defaults(raw.get(name)) for name in ("added_tokens", "decoder",
                                                                      "post_processor")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e!r})") from None


def _steps(part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    inner = [*(part.get("pretokenizers") or []), *(part.get("decoders") or [])]
    return [part, *(step for one in inner for step in _steps(one))]


def _cutting(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what decides into which tokens a text is cut, besides what the ids mean."""
    model = _without_defaults({"type": "BPE", **raw["model"]})
    vocabulary = model.pop("vocab", None)
    if isinstance(vocabulary, list):  # unigram
        model["scores"] = [score for _, score in raw["model"]["vocab"]]
    if "merges" in model:  # older files have them as texts
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    steps = {name: _without_defaults(raw.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return model | {name: step for name, step in steps.items() if step}


def _without_defaults(value: Any) -> Any:
    """Return a part of a tokenizer.json without fields that are empty or off, which older files leave out,
    and without what moves offsets alone."""
    if isinstance(value, dict):
        found = {name: _without_defaults(part) for name, part in value.items() if name != "trim_offsets"}
        return {name: part for name, part in found.items() if part not in (None, False, "", [], {})}
    return [_without_defaults(part) for part in value] if isinstance(value, list) else value


def tokenizer_digest(tokenizer: Path) -> str:
    """Return the digest that rollout stores know the tokenizer of a folder by."""
    return file_digest(tokenizer / TOKENIZER_JSON, SHA256)


def read_vocabulary(tokenizer: Path) -> dict[int, str]:
    """Return the `ordinary` tokens of `read_tokenizer`."""
    return read_tokenizer(tokenizer).ordinary


def refuse_other_tokens(data: Path | None, weights: Path) -> None:
    """Refuse data whose ids mean other tokens than those that a checkpoint's embeddings were trained on, or
    whose text was cut into tokens otherwise.

    Ordinary tokens are compared; added ones may be renamed, as a chat template does with reserved ids, and
    one side may have more.  Where one side carries no tokenizer.json nothing can be compared.

    Args:
        data: the tokenizer folder that travels with the token shards.
        weights: the tokenizer folder of the checkpoint.

    Raises:
        UserError: some id means two things, or a text has two forms.
    """
    if data is None or not (weights / TOKENIZER_JSON).is_file():
        return
    ours, theirs = read_tokenizer(data), read_tokenizer(weights)
    # an id that one side lacks is no contradiction: it may have a longer vocabulary
    differing = [i for i, name in ours.ordinary.items() if theirs.ordinary.get(i, name) != name]
    if problem := _difference_of_ids(data, weights, differing, ours, theirs) or _difference_of_cuts(
            data, weights, ours, theirs):
        raise UserError(f"{problem}; pack the data with the checkpoint's tokenizer")


def refuse_other_tokenizer(one: Path, other: Path, remedy: str) -> None:
    """Refuse a tokenizer folder that is not the same as another one: ids, added tokens, how text is cut and
    put together again, and the form of chats.  Where one side carries no tokenizer.json nothing can be
    compared.

    Raises:
        UserError: it differs; the sentence names the file and the field, and ends with `remedy`.
    """
    if not all((folder / TOKENIZER_JSON).is_file() for folder in (one, other)):
        return
    ours, theirs = read_tokenizer(other), read_tokenizer(one)
    problem = _difference_of_ids(other, one, sorted(dict(ours.ordinary.items() ^ theirs.ordinary.items())),
                                 ours, theirs) or _difference_of_cuts(other, one, ours, theirs)
    if problem is None:
        pairs = (({f"{TOKENIZER_JSON}: {name}": value for name, value in ours.beside.items()},
                  {f"{TOKENIZER_JSON}: {name}": value for name, value in theirs.beside.items()}),
                 (chat_form(other), chat_form(one)))
        differing = [name for mine, its in pairs for name, value in mine.items() if its[name] != value]
        if not differing:
            return
        problem = f"{other}: {differing[0]} differs from that of {one}"
    raise UserError(f"{problem}; {remedy}")


def _difference_of_ids(folder: Path, other: Path, differing: list[int], ours: TokenizerFile,
                       theirs: TokenizerFile) -> str | None:
    if not differing:
        return None
    token = min(differing)
    return (f"{folder}: {len(differing)} ids mean other tokens than in {other} (e.g. {token}: "
            f"{ours.ordinary.get(token)!r} here, {theirs.ordinary.get(token)!r} there)")


def _difference_of_cuts(folder: Path, other: Path, ours: TokenizerFile, theirs: TokenizerFile) -> str | None:
    differing = [name for name in {**ours.cutting, **theirs.cutting}
                 if ours.cutting.get(name) != theirs.cutting.get(name)]
    return (f"{folder / TOKENIZER_JSON}: its {differing[0]} differs from that of {other}, so the same text "
            "has other ids" if differing else None)
