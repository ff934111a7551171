"""Which codecs a model's data were encoded with, as other ones give its tokens another meaning, and which
features of encoders they had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.omni.media.banks import MEDIA

CORPUS = "media_corpus"


def codecs_of(data: Iterable[str | Path]) -> dict[str, set[str]]:
    """Return kind -> hashes of the codecs of token shards, as far as shards and corpora are still there.

    Args:
        data: folders of token shards.
    """
    found: dict[str, set[str]] = {}
    for folder in data:
        try:
            corpora = [record["path"] for record in read_manifest(Path(folder)).inputs
                       if record.get("kind") == CORPUS]
            for corpus in corpora:
                for kind, codec in read_manifest(Path(corpus), CORPUS).content["codecs"].items():
                    found.setdefault(kind, set()).add(codec["manifest_sha256"])
        except (UserError, KeyError, TypeError, AttributeError):
            continue  # moved or deleted: nothing is known of it
    return found


def banks_of(data: Iterable[str | Path]) -> set[str] | None:
    """Return the kinds of banks whose features a model has read; None where its data are not there.

    Args:
        data: folders of token shards.
    """
    found, folders = set[str](), list(data)
    try:
        for folder in folders:
            for source in read_manifest(Path(folder)).content["sources"]:
                found |= set(source.get(MEDIA) or {})
    except (UserError, KeyError, TypeError, AttributeError):
        return found or None
    return found if folders else None


def refuse_other_codecs(tokenizers: Mapping[str, Path], known: Mapping[str, set[str]], option: str) -> None:
    """Raise `UserError` where a tokenizer is not the one that a model's data were encoded with.

    Args:
        tokenizers: kind -> folder of a codec.
        known: what `codecs_of` returned; a kind of which nothing is known is not judged.
        option: gives them, as in "--{kind}-tokenizer".
    """
    for kind, folder in tokenizers.items():
        if known.get(kind) and (found := manifest_sha256(folder)) not in known[kind]:
            theirs = ", ".join(sorted(digest[:12] for digest in known[kind]))
            raise UserError(f"{option.format(kind=kind)} {folder}: is codec {found[:12]}, and the model's "
                            f"data were encoded with {theirs}; pass that one")
