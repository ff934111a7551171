"""A model that is shown pictures and sounds, and that draws and speaks: from parts to files.

Blocks of media that it writes are whole.  A picture is its start, its ratio, `grid` rows of `grid` entries
with an end of line behind each, an end of frame, and its end; speech is entries between a start and an
end.  Outside of blocks there are no entries.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.chat import media_tokens as marks
from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock
from megatron_sov.base.errors import UserError
from megatron_sov.infer.asking import check_length
from megatron_sov.infer.media.media_prompts import Parts, blocks_of, prompts_of, refuse_unknown_kinds
from megatron_sov.infer.media.shown_media import ShownMedia
from megatron_sov.infer.media.spoken import Audio, Image, MarkIds, Text, parts_of
from megatron_sov.infer.request import Batching, Sampling, StopRule

if TYPE_CHECKING:
    from megatron_sov.infer.engines.load import Loaded
    from megatron_sov.infer.engines.target import Target


# What a model draws and says, as files: its tokens by a decoder, or by a tokenizer's own plain one.

OPTIONS = {IMAGE: "--image-decoder", AUDIO: "--vocoder"}


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
    """`IMAGE` or `AUDIO` -> folder of a decoder, or of a tokenizer that has a plain one."""
    speaker: str = ""
    """Voice of a vocoder; "": its first."""
    seed: int = 0
    """Of an image decoder's noise."""

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
            fits = hasattr(codec, "side_pixels") or hasattr(codec.settings, "side_pixels")
            if fits != (kind == IMAGE) or not (hasattr(codec, "decode") or hasattr(codec, "reconstruct")):
                raise UserError(f"{OPTIONS[kind]} {folder}: is no codec that makes media of kind {kind} "
                                f"({type(codec).__name__}); pass a decoder, or a tokenizer trained here")
            if kind == AUDIO and self.speaker and self.speaker not in getattr(codec, "speakers", ()):
                voices = ", ".join(getattr(codec, "speakers", ())) or "none to choose from"
                raise UserError(f"--speaker {self.speaker}: {folder} has the voices {voices}")
            found[kind] = codec
        return found

    @property
    def grid(self) -> int:
        """Entries of a picture's row; 0: it draws none."""
        codec = self.codecs.get(IMAGE)
        return 0 if codec is None else int(getattr(codec, "grid", 0) or codec.settings.grid)

    def check(self, blocks: dict[str, VocabularyBlock]) -> None:
        """Raise `UserError` where a codec's codebook is not the model's."""
        for kind, codec in self.codecs.items():
            size = int(getattr(codec, "codebook_size", 0) or codec.settings.codebook_size)
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
        from PIL import Image as Picture

        codec, ids = self.codecs[IMAGE], torch.tensor([part.tokens])
        pixels = (codec.decode(ids, seed=self.seed, ratio=part.ratio) if hasattr(codec, "decode")
                  else codec.reconstruct(ids))[0]
        written = io.BytesIO()
        Picture.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(
            written, "PNG")
        return written.getvalue()

    def _wav(self, tokens: list[int]) -> bytes:
        import soundfile
        import torch

        codec, ids = self.codecs[AUDIO], torch.tensor(tokens)
        sound = (codec.decode(ids, self.speaker or codec.speakers[0]) if hasattr(codec, "decode")
                 else codec.reconstruct(ids))
        written = io.BytesIO()
        soundfile.write(written, sound.clamp(-1, 1).numpy(), codec.sample_rate_hz, subtype="PCM_16",
                        format="WAV")
        return written.getvalue()


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
    rules = BlockRules.of(target.vocab_size, blocks, asker.id_of, says=AUDIO in asking.out,
                          grid=asking.decoders.grid if IMAGE in asking.out else 0,
                          max_audio_tokens=asking.max_audio_tokens)
    sampling = replace(asking.sampling, rules=rules)
    longest = max(map(len, ids)) + sampling.max_new_tokens
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    stop = StopRule(asker.end_ids)

    def work(loaded: Loaded) -> list[list[int]]:
        from megatron_sov.infer.decoder.generator import MegatronEngine

        engine = MegatronEngine(loaded.policy, asking.batching)
        return engine.generate(ids, sampling, stop=stop, media=asked.media).continuations

    from megatron_sov.infer.engines.load import run_forward_model

    found: list[list[int]] | None = run_forward_model(target, list(settings), nproc, work)
    if found is None:
        return None
    marks = MarkIds.of(asker.id_of)
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
        for kind, names in ((IMAGE, marks.DISCRETE_IMAGE), (AUDIO, marks.DISCRETE_AUDIO)):
            if needed[kind] and (kind not in blocks or None in map(id_of, names)):
                raise UserError(f"the model has no discrete tokens of kind {kind}, or its tokenizer no marks "
                                "for them; train one whose tokenizer `sov-tokenizer media` wrote, with "
                                f"model.{kind}_tokens set")
        known = {name: found for name in marks.MARKS if (found := id_of(name)) is not None}
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
        found[list(self.ids.values())] = False
        starts = [self._start(kind) for kind, may in ((IMAGE, self.grid), (AUDIO, self.says)) if may]
        found[starts] = True
        return found

    def _open(self, written: Sequence[int]) -> tuple[str, Sequence[int]]:
        """Return the kind of the block that has not ended, and what stands in it; "": none."""
        ends = {self.ids.get(name) for name in (marks.DISCRETE_IMAGE[1], marks.DISCRETE_AUDIO[1])} - {None}
        starts = {self.ids.get(names[0]): kind for kind, names in (
            (IMAGE, marks.DISCRETE_IMAGE), (AUDIO, marks.DISCRETE_AUDIO))}
        for place in range(len(written) - 1, -1, -1):
            if written[place] in ends:
                break
            if written[place] in starts:
                return starts[written[place]], written[place + 1:]
        return "", ()

    def _in_picture(self, inside: Sequence[int]) -> list[int]:
        """Return the ids that may stand next in a picture."""
        ratios = [self.ids[name] for name in (marks.ratio(w, h) for w, h in marks.RATIOS) if name in self.ids]
        if ratios and not inside:
            return ratios
        place, row = len(inside) - bool(ratios), self.grid + (marks.END_OF_LINE in self.ids)
        if place < row * self.grid:
            if place % row == self.grid:
                return [self.ids[marks.END_OF_LINE]]
            block = self.blocks[IMAGE]
            return list(range(block.first, block.end))
        if place == row * self.grid and marks.END_OF_FRAME in self.ids:
            return [self.ids[marks.END_OF_FRAME]]
        return [self.ids[marks.DISCRETE_IMAGE[1]]]

    def _in_speech(self, inside: Sequence[int]) -> np.ndarray:
        found, block = np.zeros(self.vocab_size, bool), self.blocks[AUDIO]
        if not self.max_audio_tokens or len(inside) < self.max_audio_tokens:
            found[block.first:block.end] = True
        if inside:
            found[self.ids[marks.DISCRETE_AUDIO[1]]] = True
        return found

    def _start(self, kind: str) -> int:
        return self.ids[{IMAGE: marks.DISCRETE_IMAGE, AUDIO: marks.DISCRETE_AUDIO}[kind][0]]

    def _only(self, ids: Sequence[int]) -> np.ndarray:
        found = np.zeros(self.vocab_size, bool)
        found[list(ids)] = True
        return found
