"""Generate replies with pictures and speech, split them into parts, and write their media as files.

In a reply's token ids, codebook entries stand between marks (`chat/media_tokens.py`). A picture is its start
mark, its aspect ratio, `grid` rows of `grid` entries with an end-of-line mark each, an end-of-frame mark and
its end mark. Speech is entries between a start and an end mark. Speech and text may alternate; all speech of
a reply becomes a single sound, as in the authors' serving code (OmniServe, `extract_audio_info`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.chat import media_tokens
from megatron_sov.chat.media_tokens import AUDIO, DISCRETE_AUDIO, DISCRETE_IMAGE, IMAGE, VocabularyBlock
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.prompts import check_length
from megatron_sov.infer.request import Batching, Sampling, StopRule
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.generation.prompts import (
    PromptMediaEncoder, PromptParts, check_known_kinds, encode_media_prompts, get_vocabulary_blocks)
from megatron_sov.omni.generation.reconstruction import encode_png, encode_wav

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target

DECODER_OPTIONS = {IMAGE: "--image-decoder", AUDIO: "--vocoder"}
DECODER_KINDS = {IMAGE: "vqmodel", AUDIO: "mimi or dac"}  # kinds of codecs, for messages
BLOCK_MARKS = {IMAGE: DISCRETE_IMAGE, AUDIO: DISCRETE_AUDIO}
"""Kind -> start and end mark around a block of codebook entries."""


@dataclass(frozen=True)
class MediaGeneration:
    """Settings for generating replies."""

    media: PromptMediaEncoder
    decoders: MediaDecoders
    """Decode media in replies."""
    output_folders: dict[str, Path]
    """`IMAGE` or `AUDIO` -> output folder; kinds without a folder are not generated."""
    sampling: Sampling
    """Sampling settings."""
    chat: bool = True
    """Apply the chat template."""
    max_audio_tokens: int = 0
    """Longest block of speech, in codebook entries; 0: no limit."""
    batching: Batching = Batching()
    """Batch sizes, which bound memory."""
    with_features: bool = True
    """Pass the features of media encoders to the model, if it was trained on them."""


@dataclass(frozen=True)
class MediaReply:
    """Reply to a prompt."""

    text: str
    """Text without media."""
    media: DecodedMediaReply


def generate_replies(target: Target, prompts: Sequence[PromptParts], generation: MediaGeneration, *,
                     settings: Sequence[str] = (), nproc: int | None = None) -> list[MediaReply] | None:
    """Generate a reply to each prompt and write its pictures and speech.

    Args:
        target: model.
        prompts: parts per prompt.
        generation: settings; file names contain the prompt's index.
        settings: `key=value` changes to layout and precision.
        nproc: local processes.

    Returns:
        Replies; None on ranks after the first in a torchrun or Slurm job.

    Raises:
        UserError: the model has no tokens for a kind of media, a codec differs from the codec of the training
            data, or a media file cannot be read.
    """
    blocks = get_vocabulary_blocks(target)
    check_known_kinds(target, generation.output_folders)
    encoded = encode_media_prompts(target, prompts, generation.media, chat=generation.chat,
                                   with_features=generation.with_features)
    generation.decoders.check_codebooks(blocks)
    encoder, ids = encoded.encoder, encoded.ids
    rules = BlockRules.from_vocabulary(
        target.vocab_size, blocks, encoder.find_token_id, speaks=AUDIO in generation.output_folders,
        grid=generation.decoders.grid if IMAGE in generation.output_folders else 0,
        max_audio_tokens=generation.max_audio_tokens)
    sampling = replace(generation.sampling, rules=rules)
    max_tokens = max(map(len, ids)) + sampling.max_new_tokens
    check_length(target, max_tokens, "prompt and --max-new-tokens", "shorten one of them")
    stop = StopRule(encoder.end_ids)

    def generate(loaded: LoadedModel) -> list[list[int]]:
        engine = MegatronEngine(loaded.policy, generation.batching)
        return engine.generate(ids, sampling, stop=stop, encoder_inputs=encoded.encoder_inputs).continuations

    continuations: list[list[int]] | None = run_forward_model(target, list(settings), nproc, generate)
    if continuations is None:
        return None
    marks = MarkIds.from_vocabulary(encoder.find_token_id)
    replies = []
    for number, continuation in enumerate(continuations):
        media = generation.decoders.write_media(continuation, list(blocks.values()), marks, f"{number:05d}",
                                                generation.output_folders)
        replies.append(MediaReply(encoder.decode(media.text_ids).strip(), media))
    return replies


@dataclass(frozen=True)
class DecodedMediaReply:
    """Text and media files of a reply."""

    text_ids: list[int]
    pictures: list[Path]
    """Picture files in order."""
    sounds: list[Path]
    """Sound file, if the reply contains speech."""
    num_broken: int = 0
    """Number of incomplete pictures, which are not decoded."""
    tokens: dict[str, list[list[int]]] | None = None
    """Kind -> codebook entries per file."""


@dataclass(frozen=True)
class MediaDecoders:
    """Codecs for decoding replies."""

    folders: dict[str, Path]
    """`IMAGE` or `AUDIO` -> codec folder."""

    @cached_property
    def codecs(self) -> dict[str, Any]:
        """Kind -> opened codec. Raises `UserError`: a codec is of another kind or cannot decode."""
        codecs = {}
        for kind, folder in self.folders.items():
            codec = open_codec(folder)
            if hasattr(codec, "side_pixels") != (kind == IMAGE) or not hasattr(codec, "decode"):
                raise UserError(f"{DECODER_OPTIONS[kind]} {folder}: is not a codec that decodes media of "
                                f"kind {kind} ({type(codec).__name__}); pass a codec of kind "
                                f"{DECODER_KINDS[kind]}")
            codecs[kind] = codec
        return codecs

    @property
    def grid(self) -> int:
        """Codebook entries per picture row; 0 without a picture decoder."""
        codec = self.codecs.get(IMAGE)
        return 0 if codec is None else int(codec.grid)

    def check_codebooks(self, blocks: dict[str, VocabularyBlock]) -> None:
        """Raise `UserError` if a codec's codebook and the model's codebook ids differ in size."""
        for kind, codec in self.codecs.items():
            size = int(codec.codebook_size)
            if kind in blocks and blocks[kind].size != size:
                raise UserError(f"{DECODER_OPTIONS[kind]} {self.folders[kind]}: decodes a codebook of "
                                f"{size:,}, and the model has {blocks[kind].size:,} tokens of kind {kind}; "
                                "pass the codec of its training data")

    def write_media(self, ids: Sequence[int], blocks: Sequence[VocabularyBlock], marks: MarkIds, stem: str,
                    output_folders: dict[str, Path]) -> DecodedMediaReply:
        """Write a reply's pictures and speech as files.

        Args:
            ids: token ids of the reply, without the prompt.
            blocks: codebook ids of the vocabulary.
            marks: marks of the vocabulary.
            stem: start of file names.
            output_folders: kind -> folder.
        """
        parts = split_reply(ids, blocks, marks)
        text_ids = [token for part in parts if isinstance(part, TextPart) for token in part.ids]
        drawn = [part for part in parts if isinstance(part, ImagePart)]
        spoken = [token for part in parts if isinstance(part, AudioPart) for token in part.tokens]
        # The decoder needs a full grid.
        num_tokens = self.grid ** 2
        complete = [part for part in drawn if part.complete and len(part.tokens) == num_tokens]
        pictures, sounds = list[Path](), list[Path]()
        if IMAGE in output_folders:
            for number, part in enumerate(complete):
                picture = self.codecs[IMAGE].decode(torch.tensor([part.tokens]))[0]
                pictures.append(output_folders[IMAGE] / f"{stem}-{number}.png")
                write_output(pictures[-1], encode_png(picture))
        if AUDIO in output_folders and spoken:
            codec = self.codecs[AUDIO]
            sounds.append(output_folders[AUDIO] / f"{stem}.wav")
            write_output(sounds[-1], encode_wav(codec.decode(torch.tensor(spoken)), codec.sample_rate_hz))
        return DecodedMediaReply(text_ids, pictures, sounds, len(drawn) - len(complete), {
            IMAGE: [list(part.tokens) for part in complete], AUDIO: [spoken] if spoken else []})


@dataclass(frozen=True)
class TextPart:
    """Text in a reply."""

    ids: tuple[int, ...]
    """Token ids without marks."""


@dataclass(frozen=True)
class AudioPart:
    """Speech in a reply."""

    tokens: tuple[int, ...]
    """Audio codebook entries."""


@dataclass(frozen=True)
class ImagePart:
    """Picture in a reply."""

    tokens: tuple[int, ...]
    """Image codebook entries, row by row."""
    complete: bool = True
    """Whether the end mark followed the entries."""


ReplyPart = TextPart | AudioPart | ImagePart


@dataclass(frozen=True)
class MarkIds:
    """Media mark ids; in a vocabulary without marks, codebook entries alone delimit media."""

    image: tuple[int | None, ...] = (None, None)
    """Start and end mark around discrete pictures; None: missing from the vocabulary."""
    audio: tuple[int | None, ...] = (None, None)
    """Start and end mark around discrete speech; None: missing from the vocabulary."""
    in_image: frozenset[int] = frozenset()
    """Aspect ratios, end-of-line and end-of-frame marks."""

    @staticmethod
    def from_vocabulary(find_token_id: Callable[[str], int | None]) -> MarkIds:
        """Look up the ids of the marks in `chat/media_tokens.py`.

        Args:
            find_token_id: function from a token to its id; None for unknown tokens.
        """
        ratios = [media_tokens.ratio_token(width, height) for width, height in media_tokens.RATIOS]
        in_image = map(find_token_id, (*ratios, media_tokens.END_OF_LINE, media_tokens.END_OF_FRAME))
        return MarkIds(tuple(map(find_token_id, DISCRETE_IMAGE)), tuple(map(find_token_id, DISCRETE_AUDIO)),
                       frozenset(mark for mark in in_image if mark is not None))


def split_reply(ids: Iterable[int], blocks: Sequence[VocabularyBlock], marks: MarkIds) -> list[ReplyPart]:
    """Split a reply into text, pictures and speech; adjacent texts, and adjacent speech, are joined.

    Args:
        ids: token ids of the reply, without the prompt.
        blocks: codebook ids of the vocabulary.
        marks: marks of the vocabulary.
    """
    block_by_kind = {block.kind: block for block in blocks}

    def find_entry(kind: str, token_id: int) -> int | None:
        block = block_by_kind.get(kind)
        return token_id - block.first if block is not None and block.first <= token_id < block.end else None

    parts = list[ReplyPart]()
    start, end = marks.image
    picture: list[int] | None = None
    run_part: type[TextPart] | type[AudioPart] = TextPart  # kind of part that `run` becomes
    run = list[int]()  # tokens of the current text or speech

    def end_run() -> None:
        if run:
            parts.append(run_part(tuple(run)))
            run.clear()

    def end_picture(complete: bool) -> None:
        nonlocal picture
        if picture is not None:
            end_run()
            parts.append(ImagePart(tuple(picture), complete))
        picture = None

    for token_id in ids:
        # An entry without start mark opens a picture too, because a vocabulary may have no marks.
        if (entry := find_entry(IMAGE, token_id)) is not None:
            picture = [] if picture is None else picture
            picture.append(entry)
            continue
        if token_id == start:
            end_picture(complete=False)
            picture = []
            continue
        if picture is not None and token_id in marks.in_image:
            continue
        # Any other token ends an open picture, which only the end mark makes complete.
        end_picture(complete=token_id == end)
        if token_id in (*marks.image, *marks.audio):
            continue
        entry = find_entry(AUDIO, token_id)
        part: type[TextPart] | type[AudioPart] = TextPart if entry is None else AudioPart
        if part is not run_part:
            end_run()
        run_part = part
        run.append(token_id if entry is None else entry)
    end_picture(complete=False)
    end_run()
    return parts


@dataclass(frozen=True)
class BlockRules:
    """Token rules (`infer.request.TokenRules`) that keep blocks of media complete."""

    vocab_size: int
    """The model's vocabulary size."""
    blocks: dict[str, VocabularyBlock]
    """Kind -> codebook ids."""
    mark_ids: dict[str, int]
    """Mark -> token id, for marks in the tokenizer."""
    grid: int = 0
    """Entries per picture row and column; 0: no pictures."""
    speaks: bool = False
    """Allow speech."""
    max_audio_tokens: int = 0
    """Longest block of speech, in entries; 0: no limit."""

    @staticmethod
    def from_vocabulary(vocab_size: int, blocks: dict[str, VocabularyBlock],
                        find_token_id: Callable[[str], int | None], *, grid: int = 0, speaks: bool = False,
                        max_audio_tokens: int = 0) -> BlockRules:
        """Look up the marks and return the rules.

        Args:
            vocab_size: size of the model's vocabulary.
            blocks: kind -> codebook ids.
            find_token_id: function from a token to its id; None for unknown tokens.
            grid: entries per picture row and column; 0: no pictures.
            speaks: allow speech.
            max_audio_tokens: longest block of speech, in entries; 0: no limit.

        Raises:
            UserError: the vocabulary lacks the block or the marks of a generated kind.
        """
        needed = {IMAGE: grid > 0, AUDIO: speaks}
        for kind, names in BLOCK_MARKS.items():
            if needed[kind] and (kind not in blocks or None in map(find_token_id, names)):
                raise UserError(f"the model has no discrete tokens of kind {kind}, or its tokenizer no marks "
                                "for them; train one whose tokenizer `sov-tokenizer media` wrote, with "
                                f"model.{kind}_tokens set")
        mark_ids = {name: token_id for name in media_tokens.MARKS
                    if (token_id := find_token_id(name)) is not None}
        return BlockRules(vocab_size, blocks, mark_ids, grid, speaks, max_audio_tokens)

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Return bool [vocab_size]: the ids that may follow the written ids."""
        kind, entries = self._find_open_block(written)
        if kind == IMAGE:
            mask = np.zeros(self.vocab_size, bool)
            mask[self._list_picture_ids(entries)] = True
            return mask
        if kind == AUDIO:
            return self._mask_speech(entries)
        mask = np.ones(self.vocab_size, bool)
        for block in self.blocks.values():
            mask[block.first:block.end] = False
        mask[list(self.mark_ids.values())] = False
        if self.grid:
            mask[self.mark_ids[DISCRETE_IMAGE[0]]] = True
        if self.speaks:
            mask[self.mark_ids[DISCRETE_AUDIO[0]]] = True
        return mask

    def _find_open_block(self, written: Sequence[int]) -> tuple[str, Sequence[int]]:
        """Return the kind of the open block and the ids after its start mark; ("", ()) outside blocks."""
        kind_by_start = {self.mark_ids.get(names[0]): kind for kind, names in BLOCK_MARKS.items()}
        ends = {self.mark_ids.get(names[1]) for names in BLOCK_MARKS.values()} - {None}
        # Search backwards to the nearest mark, so that the cost does not grow with earlier pictures.
        for i in range(len(written) - 1, -1, -1):
            if written[i] in ends:
                break
            if written[i] in kind_by_start:
                return kind_by_start[written[i]], written[i + 1:]
        return "", ()

    def _list_picture_ids(self, written: Sequence[int]) -> list[int]:
        """Return the ids that may follow `written`, the ids after the start mark of an open picture."""
        names = [media_tokens.ratio_token(width, height) for width, height in media_tokens.RATIOS]
        ratio_ids = [self.mark_ids[name] for name in names if name in self.mark_ids]
        if ratio_ids and not written:
            return ratio_ids
        # The ratio precedes the first row and an end of line follows each row, if the vocabulary has marks.
        place, row_tokens = len(written), self.grid
        if ratio_ids:
            place -= 1
        if media_tokens.END_OF_LINE in self.mark_ids:
            row_tokens += 1
        if place < row_tokens * self.grid:
            if place % row_tokens == self.grid:
                return [self.mark_ids[media_tokens.END_OF_LINE]]
            block = self.blocks[IMAGE]
            return list(range(block.first, block.end))
        if place == row_tokens * self.grid and media_tokens.END_OF_FRAME in self.mark_ids:
            return [self.mark_ids[media_tokens.END_OF_FRAME]]
        return [self.mark_ids[DISCRETE_IMAGE[1]]]

    def _mask_speech(self, entries: Sequence[int]) -> np.ndarray:
        """Return bool [vocab_size]: the ids that may follow `entries` in an open block of speech."""
        mask, block = np.zeros(self.vocab_size, bool), self.blocks[AUDIO]
        if not self.max_audio_tokens or len(entries) < self.max_audio_tokens:
            mask[block.first:block.end] = True
        # Speech must not be empty.
        if entries:
            mask[self.mark_ids[DISCRETE_AUDIO[1]]] = True
        return mask
