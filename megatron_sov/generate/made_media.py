"""What a model draws and says, as files: its tokens by a decoder, or by a tokenizer's own plain one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import write_output
from megatron_sov.errors import UserError
from megatron_sov.generate.spoken import Audio, Image, MarkIds, Text, parts_of
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block

OPTIONS = {IMAGE: "--image-decoder", AUDIO: "--vocoder"}


@dataclass(frozen=True)
class Made:
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
        from megatron_sov.codecs.folder import open_codec

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

    def check(self, blocks: dict[str, Block]) -> None:
        """Raise `UserError` where a codec's codebook is not the model's."""
        for kind, codec in self.codecs.items():
            size = int(getattr(codec, "codebook_size", 0) or codec.settings.codebook_size)
            if kind in blocks and blocks[kind].size != size:
                raise UserError(f"{OPTIONS[kind]} {self.folders[kind]}: decodes a codebook of {size:,}, and "
                                f"the model has {blocks[kind].size:,} tokens of kind {kind}; pass the codec "
                                "that its data were encoded with")

    def write(self, ids: Sequence[int], blocks: Sequence[Block], marks: MarkIds, stem: str,
              out: dict[str, Path]) -> Made:
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
        return Made(text, pictures, sounds, len(drawn) - len(whole),
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
