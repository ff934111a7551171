"""A model that is shown pictures and sounds, and that draws and speaks: from its ids to parts, and from parts
to files.

Codebook entries stand between marks (`chat/media_tokens.py`) among the ids of a text.  Speech and text
may alternate; all audio tokens of a reply are one sound, as in the authors' serving code (OmniServe,
`extract_audio_info`).

Blocks of media that it writes are whole.  A picture is its start, its ratio, `grid` rows of `grid` entries
with an end of line behind each, an end of frame, and its end; speech is entries between a start and an end.
Outside of blocks there are no entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.chat import media_tokens as spelling
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock
from megatron_sov.infer.prompts import check_length
from megatron_sov.infer.request import Batching, Sampling, StopRule
from megatron_sov.omni.generation.prompts import (
    Parts, ShownMedia, blocks_of, prompts_of, refuse_unknown_kinds)

if TYPE_CHECKING:
    from megatron_sov.infer.engines.load import LoadedModel
    from megatron_sov.infer.engines.target import Target


@dataclass(frozen=True)
class Text:
    """Ids of text, marks of media taken out."""

    ids: tuple[int, ...]
    """In order."""


@dataclass(frozen=True)
class Audio:
    """Speech."""

    tokens: tuple[int, ...]
    """Entries of the audio codebook, from 0."""


@dataclass(frozen=True)
class Image:
    """A picture."""

    tokens: tuple[int, ...]
    """Entries of the image codebook, from 0, row by row."""
    ratio: tuple[int, int] = (1, 1)
    """Width : height."""
    complete: bool = True
    """Whether its end mark came; False: the reply broke off, or went on with something else."""


Part = Text | Audio | Image


@dataclass(frozen=True)
class MarkIds:
    """Ids of the marks in one vocabulary; without any, codebook entries alone say where a medium is."""

    image: tuple[int, ...] = ()
    """Start and end of a discrete picture."""
    audio: tuple[int, ...] = ()
    """Start and end of discrete speech."""
    in_image: frozenset[int] = frozenset()
    """Ends of rows and of the picture."""
    ratios: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Id -> width : height."""

    @staticmethod
    def of(id_of: Callable[[str], int | None]) -> MarkIds:
        """Return the ids of the published marks.

        Args:
            id_of: a token's id; None where the vocabulary has no such token.
        """
        def known(names: Iterable[str]) -> tuple[int, ...]:
            return tuple(found for found in map(id_of, names) if found is not None)

        ratios = {found: ratio for ratio in spelling.RATIOS
                  if (found := id_of(spelling.ratio_token(*ratio))) is not None}
        return MarkIds(known(spelling.DISCRETE_IMAGE), known(spelling.DISCRETE_AUDIO),
                       frozenset(known((spelling.END_OF_LINE, spelling.END_OF_FRAME))), ratios)


def parts_of(ids: Iterable[int], blocks: Sequence[VocabularyBlock], marks: MarkIds) -> list[Part]:
    """Return a whole reply's parts in order; neighbours of text, and of speech, are one part.

    Args:
        ids: of the reply, without the prompt.
        blocks: of the vocabulary's codebooks.
        marks: of the vocabulary.
    """
    by_kind = {block.kind: block for block in blocks}

    def entry_of(kind: str, token_id: int) -> int | None:
        block = by_kind.get(kind)
        return token_id - block.first if block is not None and block.first <= token_id < block.end else None

    parts = list[Part]()
    picture: list[int] | None = None
    ratio = (1, 1)

    def end_picture(complete: bool) -> None:
        nonlocal picture, ratio
        if picture is not None:
            parts.append(Image(tuple(picture), ratio, complete))
        picture, ratio = None, (1, 1)

    for token_id in ids:
        # An entry without a start mark opens a picture as well: a vocabulary may have no marks.
        if (entry := entry_of(IMAGE, token_id)) is not None:
            picture = [] if picture is None else picture
            picture.append(entry)
            continue
        if token_id in marks.image[:1]:
            end_picture(complete=False)
            picture = []
            continue
        if picture is not None and (token_id in marks.in_image or token_id in marks.ratios):
            ratio = marks.ratios.get(token_id, ratio)
            continue
        # Anything else ends an open picture, whole only by its own end mark.
        end_picture(complete=token_id in marks.image[1:])
        if token_id in (*marks.image, *marks.audio):
            continue
        last = parts[-1] if parts else None
        if (entry := entry_of(AUDIO, token_id)) is not None:
            if isinstance(last, Audio):
                parts[-1] = Audio((*last.tokens, entry))
            else:
                parts.append(Audio((entry,)))
        elif isinstance(last, Text):
            parts[-1] = Text((*last.ids, token_id))
        else:
            parts.append(Text((token_id,)))
    end_picture(complete=False)
    return parts


# What a model draws and says, as files that a codec makes of its tokens.

OPTIONS = {IMAGE: "--image-decoder", AUDIO: "--vocoder"}
DECODING = {IMAGE: "vqmodel or janus-vq", AUDIO: "mimi or dac"}
"""Kinds of codecs that decode."""


@dataclass(frozen=True)
class MadeReply:
    """A reply's parts."""

    text: list[int]
    """Ids of its text."""
    pictures: list[Path]
    """Files, in order."""
    sounds: list[Path]
    """Files, in order: all speech of a reply is one."""
    num_broken: int = 0
    """Pictures that broke off, which are not decoded."""
    tokens: dict[str, list[list[int]]] | None = None
    """Kind -> codebook entries of each file."""


@dataclass(frozen=True)
class MediaDecoders:
    """Codecs that draw and speak."""

    folders: dict[str, Path]
    """`IMAGE` or `AUDIO` -> folder of a codec that decodes."""

    @cached_property
    def codecs(self) -> dict[str, Any]:
        """The opened codecs, by kind.

        Raises:
            UserError: one is of another kind.
        """
        from megatron_sov.omni.codecs.folder import open_codec

        found = {}
        for kind, folder in self.folders.items():
            codec = open_codec(folder)
            if hasattr(codec, "side_pixels") != (kind == IMAGE) or not hasattr(codec, "decode"):
                raise UserError(f"{OPTIONS[kind]} {folder}: is no codec that makes media of kind {kind} "
                                f"({type(codec).__name__}); pass one of kind {DECODING[kind]}")
            found[kind] = codec
        return found

    @property
    def grid(self) -> int:
        """Entries of a picture's row; 0: it draws none."""
        codec = self.codecs.get(IMAGE)
        return 0 if codec is None else int(codec.grid)

    def check(self, blocks: dict[str, VocabularyBlock]) -> None:
        """Raise `UserError` where a codec's codebook is not the model's."""
        for kind, codec in self.codecs.items():
            size = int(codec.codebook_size)
            if kind in blocks and blocks[kind].size != size:
                raise UserError(f"{OPTIONS[kind]} {self.folders[kind]}: decodes a codebook of {size:,}, and "
                                f"the model has {blocks[kind].size:,} tokens of kind {kind}; pass the codec "
                                "that its data were encoded with")

    def write(self, ids: Sequence[int], blocks: Sequence[VocabularyBlock], marks: MarkIds, stem: str,
              out: dict[str, Path]) -> MadeReply:
        """Write the pictures and the speech of a reply.

        Args:
            ids: of the reply, without the prompt.
            blocks: of the vocabulary.
            marks: of the vocabulary.
            stem: what files are called, without their number and ending.
            out: kind -> folder.
        """
        parts = parts_of(ids, blocks, marks)
        text = [i for part in parts if isinstance(part, Text) for i in part.ids]
        drawn = [part for part in parts if isinstance(part, Image)]
        said = [token for part in parts if isinstance(part, Audio) for token in part.tokens]
        tokens = self.grid ** 2
        pictures = list[Path]()
        # A decoder needs all entries of the grid.
        whole = [part for part in drawn if part.complete and len(part.tokens) == tokens]
        if IMAGE in out:
            for number, part in enumerate(whole):
                pictures.append(out[IMAGE] / f"{stem}-{number}.png")
                write_output(pictures[-1], self._png(part))
        sounds = list[Path]()
        if AUDIO in out and said:
            sounds.append(out[AUDIO] / f"{stem}.wav")
            write_output(sounds[-1], self._wav(said))
        return MadeReply(text, pictures, sounds, len(drawn) - len(whole),
                         {IMAGE: [list(part.tokens) for part in whole], AUDIO: [said] if said else []})

    def _png(self, part: Image) -> bytes:
        import torch

        from megatron_sov.omni.generation.reconstruction import png_of

        return png_of(self.codecs[IMAGE].decode(torch.tensor([part.tokens]))[0])

    def _wav(self, tokens: list[int]) -> bytes:
        import torch

        from megatron_sov.omni.generation.reconstruction import wav_of

        codec = self.codecs[AUDIO]
        return wav_of(codec.decode(torch.tensor(tokens)), codec.sample_rate_hz)


@dataclass(frozen=True)
class Asking:
    """How a model is asked, and where what it makes is written."""

    shown: ShownMedia
    """What sees and hears."""
    decoders: MediaDecoders
    """What draws and speaks."""
    out: dict[str, Path]
    """`IMAGE` or `AUDIO` -> folder for files; a kind without one is not made."""
    sampling: Sampling
    """How tokens are chosen."""
    chat: bool = True
    """Whether prompts are framed by the chat template."""
    max_audio_tokens: int = 0
    """Longest speech; 0: as long as the reply may be."""
    batching: Batching = Batching()
    """What bounds memory."""
    with_features: bool = True
    """Whether encoders see what is shown, where the model has learned from their features."""


@dataclass(frozen=True)
class Replied:
    """What a model made of one prompt."""

    text: str
    """What it wrote."""
    made: MadeReply
    """What it drew and said."""


def replies(target: Target, prompts: Sequence[Parts], asking: Asking, *, settings: Sequence[str] = (),
            nproc: int | None = None) -> list[Replied] | None:
    """Ask a model, and write what it draws and says.

    Args:
        target: the model.
        prompts: of each, what a user shows and says.
        asking: how, and where files go: they are called by the prompt's number.
        settings: `key=value` changes of layout and precision.
        nproc: local processes.

    Returns:
        The replies; None on other processes than the first of a torchrun or Slurm job.

    Raises:
        UserError: the model has no tokens of such media, a codec is another one than that of its data, or a
            medium cannot be read.
    """
    blocks = blocks_of(target)
    refuse_unknown_kinds(target, asking.out)
    asked = prompts_of(target, prompts, asking.shown, chat=asking.chat, with_features=asking.with_features)
    asking.decoders.check(blocks)
    asker, ids = asked.asker, asked.ids
    rules = BlockRules.of(target.vocab_size, blocks, asker.find_token_id, says=AUDIO in asking.out,
                          grid=asking.decoders.grid if IMAGE in asking.out else 0,
                          max_audio_tokens=asking.max_audio_tokens)
    sampling = replace(asking.sampling, rules=rules)
    longest = max(map(len, ids)) + sampling.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    stop = StopRule(asker.end_ids)

    def work(loaded: LoadedModel) -> list[list[int]]:
        from megatron_sov.infer.decoder.generator import MegatronEngine

        engine = MegatronEngine(loaded.policy, asking.batching)
        return engine.generate(ids, sampling, stop=stop, encoder_inputs=asked.encoder_inputs).continuations

    from megatron_sov.infer.engines.load import run_forward_model

    found: list[list[int]] | None = run_forward_model(target, list(settings), nproc, work)
    if found is None:
        return None
    marks = MarkIds.of(asker.find_token_id)
    told = []
    for number, reply in enumerate(found):
        made = asking.decoders.write(reply, list(blocks.values()), marks, f"{number:05d}", asking.out)
        told.append(Replied(asker.decode(made.text).strip(), made))
    return told


@dataclass(frozen=True)
class BlockRules:
    """What is known of a vocabulary's blocks; a function of the tokens that were written."""

    vocab_size: int
    """Ids of the model."""
    blocks: dict[str, VocabularyBlock]
    """Kind -> its codebook's ids."""
    ids: dict[str, int]
    """Mark -> its id; the marks that the tokenizer has."""
    grid: int = 0
    """Entries of a picture's row and column; 0: it draws none."""
    says: bool = False
    """Whether it may speak."""
    max_audio_tokens: int = 0
    """Longest speech, in entries; 0: any."""

    @staticmethod
    def of(vocab_size: int, blocks: dict[str, VocabularyBlock], id_of: Callable[[str], int | None], *,
           grid: int = 0, says: bool = False, max_audio_tokens: int = 0) -> BlockRules:
        """Return the rules of a vocabulary.

        Args:
            vocab_size: ids of the model.
            blocks: of its codebooks.
            id_of: a token's id; None where there is no such token.
            grid: of pictures that it may draw; 0: none.
            says: whether it may speak.
            max_audio_tokens: longest speech; 0: any.

        Raises:
            UserError: the vocabulary lacks what is needed for what it is to draw or say.
        """
        needed = {IMAGE: grid > 0, AUDIO: says}
        for kind, names in ((IMAGE, spelling.DISCRETE_IMAGE), (AUDIO, spelling.DISCRETE_AUDIO)):
            if needed[kind] and (kind not in blocks or None in map(id_of, names)):
                raise UserError(f"the model has no discrete tokens of kind {kind}, or its tokenizer no marks "
                                "for them; train one whose tokenizer `sov-tokenizer media` wrote, with "
                                f"model.{kind}_tokens set")
        known = {name: found for name in spelling.MARKS if (found := id_of(name)) is not None}
        return BlockRules(vocab_size, blocks, known, grid, says, max_audio_tokens)

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Return whether each id may stand behind what was written, [vocab_size] bool."""
        kind, inside = self._open(written)
        if kind == IMAGE:
            return self._only(self._in_picture(inside))
        if kind == AUDIO:
            return self._in_speech(inside)
        found = np.ones(self.vocab_size, bool)
        for block in self.blocks.values():
            found[block.first:block.end] = False
        # Marks stand around blocks only; a start is allowed again below.
        found[list(self.ids.values())] = False
        starts = [self._start(kind) for kind, may in ((IMAGE, self.grid), (AUDIO, self.says)) if may]
        found[starts] = True
        return found

    def _open(self, written: Sequence[int]) -> tuple[str, Sequence[int]]:
        """Return the kind of the block that has not ended, and what stands in it; "": none."""
        blocks = {IMAGE: spelling.DISCRETE_IMAGE, AUDIO: spelling.DISCRETE_AUDIO}
        starts = {self.ids.get(names[0]): kind for kind, names in blocks.items()}
        ends = {self.ids.get(names[1]) for names in blocks.values()} - {None}
        # Backwards to the nearest mark, so that long replies with many pictures cost no more.
        for place in range(len(written) - 1, -1, -1):
            if written[place] in ends:
                break
            if written[place] in starts:
                return starts[written[place]], written[place + 1:]
        return "", ()

    def _in_picture(self, inside: Sequence[int]) -> list[int]:
        names = [spelling.ratio_token(width, height) for width, height in spelling.RATIOS]
        ratios = [self.ids[name] for name in names if name in self.ids]
        if ratios and not inside:
            return ratios
        # The ratio comes before the first row; each row ends with its own mark, where the vocabulary has one.
        place, row = len(inside), self.grid
        if ratios:
            place -= 1
        if spelling.END_OF_LINE in self.ids:
            row += 1
        if place < row * self.grid:
            if place % row == self.grid:
                return [self.ids[spelling.END_OF_LINE]]
            block = self.blocks[IMAGE]
            return list(range(block.first, block.end))
        if place == row * self.grid and spelling.END_OF_FRAME in self.ids:
            return [self.ids[spelling.END_OF_FRAME]]
        return [self.ids[spelling.DISCRETE_IMAGE[1]]]

    def _in_speech(self, inside: Sequence[int]) -> np.ndarray:
        found, block = np.zeros(self.vocab_size, bool), self.blocks[AUDIO]
        if not self.max_audio_tokens or len(inside) < self.max_audio_tokens:
            found[block.first:block.end] = True
        # Speech has one entry at least.
        if inside:
            found[self.ids[spelling.DISCRETE_AUDIO[1]]] = True
        return found

    def _start(self, kind: str) -> int:
        return self.ids[{IMAGE: spelling.DISCRETE_IMAGE, AUDIO: spelling.DISCRETE_AUDIO}[kind][0]]

    def _only(self, ids: Sequence[int]) -> np.ndarray:
        found = np.zeros(self.vocab_size, bool)
        found[list(ids)] = True
        return found
