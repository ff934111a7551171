"""`sov-tokenizer media`: tokens of pictures and sounds after those of a tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Le
from tokenizers import Tokenizer

from megatron_sov.base.artifacts import (
    check_output_folder, create_artifact, find_damaged_files, format_json, read_manifest, sha256_file)
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    DeclaredCommand, Flag, NotNegativeInt, ProblemCode, SettingsProblem, requires_field)
from megatron_sov.chat.media_tokens import (
    AUDIO, DIGITS, IMAGE, MARKS, MEDIA, VocabularyBlock, codebook_token, describe_blocks)
from megatron_sov.model.pretrained import CONFIG, read_json
from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, build_special_token
from tokenizer.formats.reader import build_text_encoder, find_file, get_token_ids, load_tokenizer, open_hf
from tokenizer.formats.sample_texts import find_first_difference, iter_builtin_texts

FILLER = "<|reserved_media_{}|>"
"""What stands on ids between blocks whose first ids were asked for."""
TOKENIZER = "tokenizer"


# Which ids the tokens of media get: marks, then sounds, then pictures, as in HyperCLOVA X 8B Omni.


@dataclass(frozen=True)
class MediaTokens:
    """Tokens of media."""

    audio_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[AUDIO])] = 0
    """Entries of the codebook of sounds (HyperCLOVA X 8B Omni: 6561; default: none)."""
    image_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[IMAGE])] = 0
    """Entries of the codebook of pictures (HyperCLOVA X 8B Omni: 65536; default: none)."""
    audio_first: Annotated[int | None, Flag(value="ID"), requires_field("audio_tokens")] = None
    """Id of the first sound; ids left free before it become reserved tokens (default: the next id)."""
    image_first: Annotated[int | None, Flag(value="ID"), requires_field("image_tokens")] = None
    """Id of the first picture, likewise."""

    def problems(self) -> list[SettingsProblem]:
        return [] if self.audio_tokens or self.image_tokens else [
            SettingsProblem(ProblemCode.RULE, "audio_tokens", "adds nothing, and no --image-tokens do", 0)]


def assign_media_ids(media_tokens: MediaTokens, existing_tokens: Collection[str],
                     num_ids: int) -> tuple[list[str],
                                                                                list[VocabularyBlock]]:
    """Return the tokens to add behind `num_ids` ids, in order, and the blocks that they make: marks end where
    the first block begins.

    Args:
        media_tokens: sizes and first ids.
        existing_tokens: tokens that are there; marks among them stay where they are.
        num_ids: ids that are taken.

    Raises:
        UserError: there are codebook entries already, or an id that was asked for is taken.
    """
    first_tokens = (codebook_token(kind, 0) for kind in (AUDIO, IMAGE))
    if taken := next((token for token in first_tokens if token in existing_tokens), None):
        raise UserError(f"{taken} is a token already: this tokenizer has tokens of media; take the one "
                        "that it was made of")
    words = [mark for mark in MARKS if mark not in existing_tokens]
    blocks: list[VocabularyBlock] = []
    num_fillers = 0
    for kind, size, first in ((AUDIO, media_tokens.audio_tokens, media_tokens.audio_first),
                              (IMAGE, media_tokens.image_tokens, media_tokens.image_first)):
        free = num_ids + len(words)
        if not size:
            continue
        if first is not None and not free <= first <= free + (1 << 20):
            raise UserError(f"--{kind}-first {first}: the ids up to {free - 1} are taken, and no more than "
                            f"{1 << 20} may be left free; take {free} or a little more")
        gap = (first or free) - free
        fillers = [FILLER.format(num_fillers + i) for i in range(gap)]
        # marks stand right before the first block, where recipes look for placeholders
        words = [*words, *fillers] if blocks else [*fillers, *words]
        num_fillers += gap
        blocks.append(VocabularyBlock(kind, num_ids + len(words), size))
        words += [codebook_token(kind, i) for i in range(size)]
    return words, blocks


@dataclass(frozen=True, kw_only=True)
class TokenizerMediaOptions:
    """Add a token for each entry of the codebooks of sounds and pictures, and the marks around them in a
    text. They follow all other tokens: marks, sounds, pictures. Ids of text stay as they are.

    TOKENIZER is a folder that `sov-tokenizer train` or `import` wrote."""

    tokenizer: Annotated[Path, Flag("TOKENIZER")]
    """Folder of a tokenizer."""
    media: MediaTokens = field(default_factory=MediaTokens)
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    overwrite: bool = False
    """Replace what is already there."""


def run_media(args: TokenizerMediaOptions) -> int:
    if (args.tokenizer / CONFIG).is_file():
        raise UserError(f"{args.tokenizer}: is a model; pass the tokenizer that `sov-tokenizer import` makes "
                        "of it, and resize the model with transformers' `resize_token_embeddings`")
    add_media(args.tokenizer, args.output, args.media, overwrite=args.overwrite)
    return 0


@dataclass(frozen=True)
class _ExtendedTokenizer:
    """A tokenizer.json with more special tokens than the one that it was made of."""

    raw: dict[str, Any]
    words: Sequence[str]
    """The new tokens, in the order of their ids."""
    first_id: int
    """Of the first new token."""
    blocks: Sequence[VocabularyBlock]

    @property
    def num_ids(self) -> int:
        return self.first_id + len(self.words)


def _extend_tokenizer(source: Any, media_tokens: MediaTokens) -> _ExtendedTokenizer:
    """Add special tokens after all others; the source is not changed.

    Raises:
        UserError: see `laid_out`; or the tokenizer's ids have gaps.
    """
    ids = dict(get_token_ids(source.raw))
    first = max(ids.values()) + 1
    words, blocks = assign_media_ids(media_tokens, ids.keys(), first)
    raw = copy.deepcopy(source.raw)
    raw["added_tokens"] += [build_special_token(first + i, word) for i, word in enumerate(words)]
    ids |= {word: first + i for i, word in enumerate(words)}
    tokenizer = load_tokenizer(raw, source.file)
    moved = [token for token, id_ in ids.items() if tokenizer.token_to_id(token) != id_]
    if moved and raw["model"]["type"] == "BPE":
        # `tokenizers` gives added tokens ids of its own unless the vocabulary has them
        raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}
        tokenizer = load_tokenizer(raw, source.file)
    if wrong := next((token for token, id_ in ids.items() if tokenizer.token_to_id(token) != id_), None):
        raise UserError(f"{source.file}: {wrong!r} cannot have id {ids[wrong]} in it, because its ids have "
                        "gaps")
    return _ExtendedTokenizer(raw, words, first, blocks)


def add_media(tokenizer: Path, output: Path, media_tokens: MediaTokens, *, overwrite: bool = False) -> None:
    """Write a tokenizer with tokens of media as an artifact of kind "tokenizer".

    Args:
        tokenizer: artifact of kind "tokenizer".
        output: the folder to write.
        media_tokens: which tokens.
        overwrite: replace a tokenizer that is already there.

    Raises:
        UserError: there is no such tokenizer, it has tokens of media, or text would get other ids.
    """
    check_output_folder(output, TOKENIZER, overwrite)
    manifest = read_manifest(tokenizer, TOKENIZER)
    if problems := find_damaged_files(tokenizer):
        raise UserError(f"{problems[0]}; train the tokenizer again or restore it from a copy")
    source = open_hf(find_file(tokenizer))
    extended = _extend_tokenizer(source, media_tokens)
    config = read_json(tokenizer / CONFIG_JSON)
    with create_artifact(output, TOKENIZER, overwrite=overwrite) as artifact:
        text = load_tokenizer(extended.raw, tokenizer).to_str()
        (artifact.path / TOKENIZER_JSON).write_text(text, encoding="utf-8")
        (artifact.path / CONFIG_JSON).write_text(format_json(config), encoding="utf-8")
        checked = _check_ids(artifact.path, source, extended)
        artifact.add_input(tokenizer, for_export=True)
        artifact.content = {**manifest.content,
                            "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
                            "vocab_size": extended.num_ids, "checked": checked,
                            MEDIA: describe_blocks(extended.blocks)}
        artifact.settings = {"tokenizer": tokenizer.resolve().name, "asked": media_tokens}
    _print_blocks(extended, checked, output)


def _load_written_tokenizer(folder: Path) -> Any:
    return load_tokenizer(read_json(folder / TOKENIZER_JSON), folder)


def _check_ids(folder: Path, source: Any, extended: _ExtendedTokenizer) -> str:
    """Compare ids of text before and after, and look for each new token in its own text; return a sentence.

    Raises:
        UserError: text has other ids, or a token is not found.
    """
    encode = build_text_encoder(_load_written_tokenizer(folder))
    texts = list(iter_builtin_texts(source.raw))
    if difference := find_first_difference(texts, encode, source.encode):
        raise UserError(f"{source.file}: text would get other ids with tokens of media in its vocabulary, "
                        f"{difference}; so they cannot be added to this tokenizer")
    special = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    together = special.encode("".join(extended.words), add_special_tokens=False).ids
    if together != list(range(extended.first_id, extended.num_ids)):
        raise UserError(f"{source.file}: its new tokens are not found in their own text; it cannot have "
                        "tokens of media")
    return f"each token of media is found in its own text, and {len(texts)} texts keep their ids"


def _print_blocks(extended: _ExtendedTokenizer, checked: str, output: Path) -> None:
    for block in extended.blocks:
        print(f"{block.kind}: ids {block.first:,} to {block.end - 1:,}; set model.{block.kind}_tokens.first="
              f"{block.first} and model.{block.kind}_tokens.size={block.size}")
    print(f"vocabulary of {extended.num_ids:,}; {checked}")
    print(f"wrote {output}")


COMMAND = DeclaredCommand(TokenizerMediaOptions, run_media)
