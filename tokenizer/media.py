"""Declare and run `sov-tokenizer media`, which appends tokens for images and sounds to a tokenizer."""

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
from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, build_special_token, get_token_ids
from tokenizer.formats.reader import build_text_encoder, find_file, load_tokenizer, open_hf
from tokenizer.formats.sample_texts import find_first_difference, iter_builtin_texts

FILLER = "<|reserved_media_{}|>"
"""Reserved token on an id before a block with --audio-first or --image-first."""
MAX_GAP = 1 << 20
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class MediaTokens:
    """Codebooks of sounds and pictures."""

    audio_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[AUDIO])] = 0
    """Codebook entries for sounds (HyperCLOVA X 8B Omni: 6561; default: none)."""
    image_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[IMAGE])] = 0
    """Codebook entries for pictures (HyperCLOVA X 8B Omni: 65536; default: none)."""
    audio_first: Annotated[int | None, Flag(value="ID"), requires_field("audio_tokens")] = None
    """First sound id; unused ids before the block become reserved tokens (default: the next id)."""
    image_first: Annotated[int | None, Flag(value="ID"), requires_field("image_tokens")] = None
    """First picture id, likewise."""

    def problems(self) -> list[SettingsProblem]:
        if self.audio_tokens or self.image_tokens:
            return []
        return [SettingsProblem(ProblemCode.RULE, "audio_tokens", "adds nothing, and no --image-tokens do",
                                0)]


def assign_media_ids(media_tokens: MediaTokens, existing_tokens: Collection[str],
                     num_ids: int) -> tuple[list[str], list[VocabularyBlock]]:
    """Return the tokens to append after `num_ids` ids, in order, and their blocks.

    The order is marks, sounds, pictures, as in HyperCLOVA X 8B Omni; the marks end right before the first
    `VocabularyBlock`.  Existing marks keep their ids. Raises `UserError`: the tokenizer has media tokens
    already, or a first id is taken or too large.
    """
    first_tokens = (codebook_token(kind, 0) for kind in (AUDIO, IMAGE))
    if taken := next((token for token in first_tokens if token in existing_tokens), None):
        raise UserError(f"{taken} is a token already: this tokenizer has media tokens; pass the tokenizer "
                        "without them")
    words = [mark for mark in MARKS if mark not in existing_tokens]
    blocks: list[VocabularyBlock] = []
    num_fillers = 0
    for kind, size, first in ((AUDIO, media_tokens.audio_tokens, media_tokens.audio_first),
                              (IMAGE, media_tokens.image_tokens, media_tokens.image_first)):
        free = num_ids + len(words)
        if not size:
            continue
        if first is not None and not free <= first <= free + MAX_GAP:
            raise UserError(f"--{kind}-first {first}: the ids up to {free - 1} are taken, and no more than "
                            f"{MAX_GAP} may be left free; take {free} or a little more")
        gap = (first or free) - free
        fillers = [FILLER.format(num_fillers + i) for i in range(gap)]
        # recipes look for the marks right before the first block
        words = [*words, *fillers] if blocks else [*fillers, *words]
        num_fillers += gap
        blocks.append(VocabularyBlock(kind, num_ids + len(words), size))
        words += [codebook_token(kind, i) for i in range(size)]
    return words, blocks


@dataclass(frozen=True, kw_only=True)
class TokenizerMediaOptions:
    """Add a token for each codebook entry of sounds and pictures, and the marks around them in a text.

    The new tokens follow all other tokens: marks, sounds, pictures. The ids of text do not change.
    TOKENIZER is a folder that `sov-tokenizer train` or `import` wrote."""

    tokenizer: Annotated[Path, Flag("TOKENIZER")]
    """Folder of a tokenizer."""
    media: MediaTokens = field(default_factory=MediaTokens)
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    overwrite: bool = False
    """Replace an existing tokenizer."""


def run_media(args: TokenizerMediaOptions) -> None:
    if (args.tokenizer / CONFIG).is_file():
        raise UserError(f"{args.tokenizer}: is a model; pass the tokenizer that `sov-tokenizer import` makes "
                        "of it, and resize the model with transformers' `resize_token_embeddings`")
    add_media(args.tokenizer, args.output, args.media, overwrite=args.overwrite)


@dataclass(frozen=True)
class _ExtendedTokenizer:
    """A tokenizer.json with media tokens appended."""

    raw: dict[str, Any]
    words: Sequence[str]
    """New tokens, sorted by id."""
    first_id: int
    """First new id."""
    blocks: Sequence[VocabularyBlock]

    @property
    def num_ids(self) -> int:
        return self.first_id + len(self.words)


def _extend_tokenizer(source: Any, media_tokens: MediaTokens) -> _ExtendedTokenizer:
    """Append media tokens to a copied tokenizer.json. Raises `UserError`: see `assign_media_ids`; or the
    tokenizer's ids have gaps."""
    ids = dict(get_token_ids(source.raw))
    first = max(ids.values()) + 1
    words, blocks = assign_media_ids(media_tokens, ids.keys(), first)
    raw = copy.deepcopy(source.raw)
    raw["added_tokens"] += [build_special_token(first + i, word) for i, word in enumerate(words)]
    ids |= {word: first + i for i, word in enumerate(words)}
    tokenizer = load_tokenizer(raw, source.file)
    moved = [token for token, id_ in ids.items() if tokenizer.token_to_id(token) != id_]
    if moved and raw["model"]["type"] == "BPE":
        # `tokenizers` renumbers added tokens unless the vocabulary contains them
        raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}
        tokenizer = load_tokenizer(raw, source.file)
    if wrong := next((token for token, id_ in ids.items() if tokenizer.token_to_id(token) != id_), None):
        raise UserError(f"{source.file}: {wrong!r} cannot have id {ids[wrong]} in it, because its ids have "
                        "gaps")
    return _ExtendedTokenizer(raw, words, first, blocks)


def add_media(tokenizer: Path, output: Path, media_tokens: MediaTokens, *, overwrite: bool = False) -> None:
    """Append media tokens to the tokenizer artifact in a folder and write a new artifact. Raises `UserError`:
    no tokenizer artifact, a damaged artifact, existing media tokens, or text would get other ids; no output
    is written then."""
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


def _check_ids(folder: Path, source: Any, extended: _ExtendedTokenizer) -> str:
    """Compare the ids of texts with the source's, encode each new token's text, and return a sentence. Raises
    `UserError`: a text has other ids, or a new token is not recognized."""
    encode = build_text_encoder(load_tokenizer(read_json(folder / TOKENIZER_JSON), folder))
    texts = list(iter_builtin_texts(source.raw))
    if difference := find_first_difference(texts, encode, source.encode):
        raise UserError(f"{source.file}: text would get other ids with media tokens in its vocabulary, "
                        f"{difference}; so they cannot be added to this tokenizer")
    special = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    ids = special.encode("".join(extended.words), add_special_tokens=False).ids
    if ids != list(range(extended.first_id, extended.num_ids)):
        raise UserError(f"{source.file}: its new tokens are not recognized in text, so it cannot have "
                        "media tokens")
    return f"each media token is recognized in text, and {len(texts)} texts keep their ids"


def _print_blocks(extended: _ExtendedTokenizer, checked: str, output: Path) -> None:
    for block in extended.blocks:
        print(f"{block.kind}: ids {block.first:,} to {block.end - 1:,}; set model.{block.kind}_tokens.first="
              f"{block.first} and model.{block.kind}_tokens.size={block.size}")
    print(f"vocabulary of {extended.num_ids:,}; {checked}")
    print(f"wrote {output}")


COMMAND = DeclaredCommand(TokenizerMediaOptions, run_media)
