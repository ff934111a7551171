"""Pictures, sounds and videos that a model is shown: files as items of a prompt's text, and as records of its
encoders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE, VIDEO, spelled
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError
from megatron_sov.infer.media.shown_features import Encoders
from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.omni.media.banks import PICTURES, SOUNDS, BankShape
from megatron_sov.omni.media.items import MediaItem, discrete_audio, discrete_image
from megatron_sov.omni.media.reading.kinds import VideoFrames
from megatron_sov.omni.media.reading.reader import MediaReader
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, Spectrograms

OPTIONS = {IMAGE: "--image-tokenizer", AUDIO: "--audio-tokenizer"}
BANK_OF = {IMAGE: PICTURES, VIDEO: PICTURES, AUDIO: SOUNDS}
"""Kind of a medium -> the bank whose encoder sees it."""


@dataclass
class PromptMedia:
    """What a user shows and says."""

    text: str
    """As `sov-data encode-media` writes it."""
    records: dict[str, list[tuple[np.ndarray, int]]] = field(default_factory=dict)
    """Kind of bank -> records in the order of their placeholders, and how many slots of each are used."""


@dataclass(frozen=True)
class ShownMedia:
    """The folder of media, and what sees and hears them."""

    root: Path
    """Nothing outside of it is read."""
    tokenizers: Mapping[str, Path]
    """`IMAGE` or `AUDIO` -> folder of a codec, whose discrete tokens come first."""
    encoders: Encoders = field(default_factory=dict)
    """Kind of bank -> encoder of the model, whose features come behind them."""

    def shown(self, parts: Sequence[Mapping[str, Any]], reader: MediaReader, where: str) -> PromptMedia:
        """Return what a user shows and says.

        Args:
            parts: {"type": "text", "text": ...}, {"type": "image", "audio" or "video", "path": ...}.
            reader: of the media below `root`.
            where: names the parts in a message.

        Raises:
            UserError: a part is none, nothing sees or hears it, or it cannot be read.
        """
        said, numbers, found = list[str](), Counter[str](), PromptMedia("")
        for part in parts:
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                if mark := spelled(part["text"]):
                    raise UserError(f"{where}: its text spells {mark!r}, which is a token of media; remove "
                                    "it: media are named by their paths alone")
                said.append(part["text"])
            elif kind in BANK_OF and isinstance(part.get("path"), str):
                said.append(self._item(kind, part["path"], numbers[kind], reader, where, found))
                numbers[kind] += 1
            else:
                raise UserError(f"{where}: {str(part)[:80]} is no part; write "
                                '{"type": "text", "text": ...} or {"type": "image" | "audio" | "video", '
                                '"path": ...}')
        found.text = "\n".join(said)
        return found

    def _item(self, kind: str, path: str, number: int, reader: MediaReader, where: str,
              found: PromptMedia) -> str:
        """Return the item of a medium; its records join those that were found."""
        encoder = self.encoders.get(BANK_OF[kind])
        if kind == VIDEO and encoder is None:
            raise UserError(f"{where}: {path} is a video, whose frames an encoder of pictures sees; ask a "
                            "model that has learned from its features (model.vision)")
        if kind not in self.tokenizers and encoder is None:
            raise UserError(f"{where}: {path} is of kind {kind}, which needs {OPTIONS[kind]} CODEC")
        reads = {IMAGE: self._picture, AUDIO: self._sound, VIDEO: self._video}[kind]
        try:
            item, records = reads(path, reader)
        except BadRecord as e:
            raise UserError(f"{where}: {path} {e}") from None
        if records:
            found.records.setdefault(BANK_OF[kind], []).extend(records)
        return MediaItem(kind, number, filename=PurePosixPath(path).name, **item,
                         num_placeholders=sum(used for _, used in records)).text()

    def _picture(self, path: str, reader: MediaReader) -> tuple[dict[str, Any], list[tuple[np.ndarray, int]]]:
        codec, encoder = self._codecs.get(IMAGE), self._vision
        sides = [*([codec.side_pixels] if codec is not None else []),
                 *([encoder.image_size] if encoder is not None else [])]
        read, block = reader.picture(path, tuple(sides)), ""
        if codec is not None:
            import torch

            picture = torch.from_numpy(read.arrays[0].astype(np.float32) / 255)
            block = discrete_image(codec.encode(picture[None])[0].tolist(), codec.grid, read.width,
                                   read.height)
        records = [(read.arrays[-1], encoder.slots)] if encoder is not None else []
        return {"mime_type": read.mime_type, "discrete": block}, records

    def _sound(self, path: str, reader: MediaReader) -> tuple[dict[str, Any], list[tuple[np.ndarray, int]]]:
        codec, encoder = self._codecs.get(AUDIO), self._audio
        rates = [*([codec.sample_rate_hz] if codec is not None else []),
                 *([SAMPLE_RATE_HZ] if encoder is not None else [])]
        reads = {rate: reader.sound(path, rate) for rate in rates}
        block, records = "", list[tuple[np.ndarray, int]]()
        if codec is not None:
            import torch

            piece = int(codec.max_piece_s * codec.sample_rate_hz)
            samples = torch.from_numpy(reads[codec.sample_rate_hz].arrays[0].copy())
            block = discrete_audio([i for part in samples.split(piece) for i in codec.encode(part).tolist()])
        if encoder is not None:
            bank = BankShape(SOUNDS, encoder.record_shape, encoder.slots)
            pieces, frames = self._spectrograms.pieces(reads[SAMPLE_RATE_HZ].arrays[0])
            records = [(piece, bank.slots_of(used)) for piece, used in zip(pieces, frames, strict=True)]
        first = reads[rates[0]]
        return {"mime_type": first.mime_type, "duration_s": first.duration_s, "discrete": block}, records

    def _video(self, path: str, reader: MediaReader) -> tuple[dict[str, Any], list[tuple[np.ndarray, int]]]:
        assert self._vision is not None, "looked at before"
        read = reader.video(path, VideoFrames(self._vision.image_size))
        return ({"mime_type": read.mime_type, "duration_s": read.duration_s},
                [(frame, self._vision.slots) for frame in read.arrays[0]])

    @property
    def _vision(self) -> VisionEncoderConfig | None:
        encoder = self.encoders.get(PICTURES)
        return encoder if isinstance(encoder, VisionEncoderConfig) else None

    @property
    def _audio(self) -> AudioEncoderConfig | None:
        encoder = self.encoders.get(SOUNDS)
        return encoder if isinstance(encoder, AudioEncoderConfig) else None

    @cached_property
    def _spectrograms(self) -> Spectrograms:
        assert self._audio is not None, "looked at before"
        seconds, rest = divmod(self._audio.num_frames * HOP_SAMPLES, SAMPLE_RATE_HZ)
        if rest:
            raise UserError(f"model.audio.num_frames = {self._audio.num_frames}: pieces of sounds are cut "
                            "in whole seconds of 100 frames; ask with sounds a model of such pieces")
        return Spectrograms(self._audio.num_mels, seconds)

    @cached_property
    def _codecs(self) -> dict[str, Any]:
        from megatron_sov.omni.codecs.folder import open_codec

        found = {}
        for kind, folder in self.tokenizers.items():
            codec = open_codec(folder)
            if not hasattr(codec, "side_pixels" if kind == IMAGE else "samples_per_token") \
                    or not hasattr(codec, "encode"):
                raise UserError(f"{OPTIONS[kind]} {folder}: is a codec of another kind "
                                f"({type(codec).__name__}); pass a tokenizer")
            found[kind] = codec
        return found
