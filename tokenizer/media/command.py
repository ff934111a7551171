"""`sov-tokenizer media`: tokens of pictures and sounds behind those of a text tokenizer or a model."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from annotated_types import Le

from megatron_sov.base.artifacts import (
    damaged_files, new_artifact, read_manifest, refuse_existing, sha256_file, to_json)
from megatron_sov.base.chat.media_marks import DIGITS, MARKS, entry
from megatron_sov.base.chat.media_vocabulary import AUDIO, IMAGE, MEDIA, VocabularyBlock, described
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    Flag, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem, add_options, only_with, read_options)

FILLER = "<|reserved_media_{}|>"
"""What stands on ids between blocks whose first ids were asked for."""
TOKENIZER = "tokenizer"
NOISE = 0.1
"""Standard deviations of each column (ours: the authors of the published model do not say how they began)."""


# Which ids the tokens of media get: marks, then sounds, then pictures, as in HyperCLOVA X 8B Omni.


@dataclass(frozen=True)
class MediaTokens:
    """Tokens of media."""

    audio_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[AUDIO])] = 0
    """Entries of the codebook of sounds (HyperCLOVA X 8B Omni: 6561; default: none)."""
    image_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[IMAGE])] = 0
    """Entries of the codebook of pictures (HyperCLOVA X 8B Omni: 65536; default: none)."""
    audio_first: Annotated[int | None, Flag(value="ID"), only_with("audio_tokens")] = None
    """Id of the first sound; ids left free before it become reserved tokens (default: the next id)."""
    image_first: Annotated[int | None, Flag(value="ID"), only_with("image_tokens")] = None
    """Id of the first picture, likewise."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together."""
        return [] if self.audio_tokens or self.image_tokens else [
            SettingsProblem(ProblemCode.RULE, "audio_tokens", "adds nothing, and no --image-tokens do", 0)]


def laid_out(asked: MediaTokens, known: Collection[str], num_ids: int) -> tuple[list[str],
                                                                                list[VocabularyBlock]]:
    """Return the tokens to add behind `num_ids` ids, in order, and the blocks that they make: marks end where
    the first block begins.

    Args:
        asked: sizes and first ids.
        known: tokens that are there; marks among them stay where they are.
        num_ids: ids that are taken.

    Raises:
        UserError: there are codebook entries already, or an id that was asked for is taken.
    """
    if taken := next((entry(kind, 0) for kind in (AUDIO, IMAGE) if entry(kind, 0) in known), None):
        raise UserError(f"{taken} is a token already: this tokenizer has tokens of media; take the one "
                        "that it was made of")
    words = [mark for mark in MARKS if mark not in known]
    blocks: list[VocabularyBlock] = []
    num_fillers = 0
    for kind, size, first in ((AUDIO, asked.audio_tokens, asked.audio_first),
                              (IMAGE, asked.image_tokens, asked.image_first)):
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
        words += [entry(kind, i) for i in range(size)]
    return words, blocks


@dataclass(frozen=True, kw_only=True)
class TokenizerMediaOptions:
    """Add a token for each entry of the codebooks of sounds and pictures, and the marks that stand
    around them in a text, behind all other tokens: marks, sounds, pictures. Ids of text stay as they are.

    TOKENIZER is a folder that `sov-tokenizer train` or `import` wrote, or a Hugging Face model's folder: its
    embedding and head then get rows too, the mean of all old rows with a little noise."""

    tokenizer: Annotated[Path, Flag("TOKENIZER")]
    """Folder of a tokenizer, or of a Hugging Face model."""
    media: MediaTokens = field(default_factory=MediaTokens)
    noise: Annotated[Annotated[NotNegative, Le(10)] | None, Flag(value="S")] = None
    """Of a model's new rows, in standard deviations of each column (default 0.1)."""
    seed: int = 0
    """Of the noise."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer, or the model."""
    overwrite: bool = False
    """Replace what is already there."""


def run_media(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer media`; returns 0."""
    args = read_options(TokenizerMediaOptions, typed)
    if (args.tokenizer / "config.json").is_file():
        noise = NOISE if args.noise is None else args.noise
        _grow_model(args.tokenizer, args.output, args.media, noise, args.seed, args.overwrite)
        return 0
    if args.noise is not None:
        raise UserError(f"--noise {args.noise}: {args.tokenizer} is no model, and a tokenizer alone "
                        "has no rows; leave it out")
    add_media(args.tokenizer, args.output, args.media, overwrite=args.overwrite)
    return 0


def add_media(tokenizer: Path, output: Path, asked: MediaTokens, *, overwrite: bool = False) -> None:
    """Write a tokenizer with tokens of media as an artifact of kind "tokenizer".

    Args:
        tokenizer: artifact of kind "tokenizer".
        output: the folder to write.
        asked: which tokens.
        overwrite: replace a tokenizer that is already there.

    Raises:
        UserError: there is no such tokenizer, it has tokens of media, or text would get other ids.
    """
    from megatron_sov.model.pretrained import read_json
    from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON
    from tokenizer.formats.reader import find_file, ids_of, open_hf, opened

    refuse_existing(output, TOKENIZER, overwrite)
    manifest = read_manifest(tokenizer, TOKENIZER)
    if problems := damaged_files(tokenizer):
        raise UserError(f"{problems[0]}; train the tokenizer again or restore it from a copy")
    source = open_hf(find_file(tokenizer))
    surgery, blocks = _operated(source, asked)
    config = read_json(tokenizer / CONFIG_JSON)
    with new_artifact(output, TOKENIZER, overwrite=overwrite) as artifact:
        text = opened(surgery.finished(), tokenizer).to_str()
        (artifact.path / TOKENIZER_JSON).write_text(text, encoding="utf-8")
        (artifact.path / CONFIG_JSON).write_text(to_json(config), encoding="utf-8")
        checked = _check_media(artifact.path, source, surgery)
        artifact.add_input(tokenizer, leaves=True)
        artifact.content = {**manifest.content,
                            "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
                            "vocab_size": max(ids_of(surgery.raw).values()) + 1, "checked": checked,
                            MEDIA: described(blocks)}
        artifact.settings = {"tokenizer": tokenizer.resolve().name, "asked": asked}
    _tell_blocks(blocks, artifact.content["vocab_size"], checked, output)


def _operated(source: Any, asked: MediaTokens) -> tuple[Any, list[Any]]:
    """Return the tokenizer with its new tokens, and their blocks."""
    from tokenizer.graft.vocabulary import Surgery

    surgery = Surgery(source.raw, str(source.file), set())
    words, blocks = _laid_out(source, asked)
    surgery.add_words(words, special=True)
    return surgery, blocks


def _laid_out(source: Any, asked: MediaTokens) -> tuple[list[str], list[Any]]:
    from tokenizer.formats.reader import ids_of

    ids = ids_of(source.raw)
    return laid_out(asked, ids.keys(), max(ids.values()) + 1)


def _check_media(folder: Path, source: Any, surgery: Any) -> str:
    """Compare ids of text before and after, and look for each new token in its own text; returns a sentence.

    Raises:
        UserError: text has other ids, or a token is not found.
    """
    from tokenizers import Tokenizer

    from megatron_sov.model.pretrained import read_json
    from tokenizer.formats.hf_files import TOKENIZER_JSON
    from tokenizer.formats.reader import opened, plain_ids
    from tokenizer.sample_texts import built_in, first_difference

    encode = plain_ids(opened(read_json(folder / TOKENIZER_JSON), folder))
    texts = list(built_in(source.raw))
    if difference := first_difference(texts, encode, source.encode):
        raise UserError(f"{source.file}: text would get other ids with tokens of media in its vocabulary, "
                        f"{difference}; so they cannot be added to this tokenizer")
    special = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    together = special.encode("".join(token.token for token in surgery.new), add_special_tokens=False).ids
    if together != [token.id for token in surgery.new]:
        raise UserError(f"{source.file}: its new tokens are not found in their own text; it cannot have "
                        "tokens of media")
    return f"each token of media is found in its own text, and {len(texts)} texts keep their ids"


def _grow_model(model: Path, output: Path, asked: MediaTokens, noise: float, seed: int,
                overwrite: bool) -> None:
    """Write a Hugging Face model with tokens of media and rows for them."""
    from tokenizer.formats.reader import find_file, open_hf
    from tokenizer.graft.command import Codebooks, graft

    words, blocks = _laid_out(open_hf(find_file(model)), asked)
    graft(model, output, add=[], overwrite=overwrite, codebooks=Codebooks(
        tuple(words), noise, seed, {MEDIA: described(blocks), "media_noise": noise}))
    _tell_blocks(blocks, 0, "", output)


def _tell_blocks(blocks: list[Any], vocab_size: int, checked: str, output: Path) -> None:
    for block in blocks:
        print(f"{block.kind}: ids {block.first:,} to {block.end - 1:,}; set model.{block.kind}_tokens.first="
              f"{block.first} and model.{block.kind}_tokens.size={block.size}")
    if checked:
        print(f"vocabulary of {vocab_size:,}; {checked}")
        print(f"wrote {output}")


MEDIA_COMMAND = SimpleNamespace(add_arguments=partial(add_options, cls=TokenizerMediaOptions), run=run_media)
