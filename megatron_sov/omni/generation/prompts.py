"""Prompts that show media, as a model reads them: files as items of a prompt's text and as records of its
encoders, which encoders see what, and the placeholders that their features replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO, VocabularyBlock, find_media_token
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.model.modality import (
    ENCODERS, PICTURES, SOUNDS, EncoderInputs, FeatureTokens, MediaEncoding, take_records)
from megatron_sov.omni.media.banks import BankShape, banks_of, codecs_of, refuse_other_codecs
from megatron_sov.omni.media.items import MediaItem, discrete_audio, discrete_image
from megatron_sov.omni.media.reading.kinds import VideoFrames
from megatron_sov.omni.media.reading.reader import MediaReader
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, Spectrograms

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target


Encoders = Mapping[str, VisionEncoderConfig | AudioEncoderConfig]
"""Kind of bank -> the encoder of its records."""
Records = Mapping[str, Sequence[tuple[np.ndarray, int]]]
"""Kind of bank -> records of a prompt in the order of their placeholders, and how many slots of each are
used."""


def encoders_of(target: Target, shown: set[str]) -> dict[str, VisionEncoderConfig | AudioEncoderConfig]:
    """Return the encoders that see what prompts show: those of whose features the model has learned.

    Where a model's data are gone, trained adapters tell that it has, and a warning tells what was taken.

    Args:
        target: the model.
        shown: kinds of banks that prompts have something for.
    """
    model, config = target.model, target.config
    banks = banks_of(config.data.paths) if config is not None else None
    trained = config is None or config.media.train_adapters or config.media.train_encoders
    found: dict[str, VisionEncoderConfig | AudioEncoderConfig] = {}
    for kind, encoder in ((kind, getattr(model, name)) for kind, name in ENCODERS.items()):
        if encoder is None or kind not in shown:
            continue
        if banks is None:
            taken = "prompts show them" if trained else "prompts do not reach it, as its adapter was frozen"
            warn(f"{target.path}: has an encoder of {kind}, and data that would tell whether it has learned "
                 f"from its features are not there: {taken}")
        if trained if banks is None else kind in banks:
            found[kind] = encoder
    return found


def encoding_of(encoders: Encoders) -> MediaEncoding:
    return MediaEncoding(tuple((kind, encoder.slots) for kind, encoder in encoders.items()))


def place_records(ids: Sequence[int], records: Records, tokens: FeatureTokens, encoders: Encoders,
                  where: str) -> EncoderInputs:
    """Return what stands over the placeholders of a prompt.

    Args:
        ids: of the prompt.
        records: what it shows.
        tokens: the tokenizer's tokens of media, made with `encoding_of` these encoders.
        encoders: which see it.
        where: names the prompt in a message.

    Raises:
        UserError: the chat template has lost placeholders, or the tokenizer's are not the encoder's.
    """
    try:
        numbers = tokens.numbers(ids, {kind: [(row, used) for row, (_, used) in enumerate(of_kind)]
                                      for kind, of_kind in records.items()})
    except BadRecord as e:
        raise UserError(f"{where}: {e}; its chat template must show what a user says as it is") from None
    prompt, found = np.asarray(ids, np.int64), {}
    for kind, of_kind in records.items():
        encoder = encoders[kind]
        # `numbers` tells which feature each of these placeholders stands for.
        places = np.flatnonzero(np.isin(prompt, tokens.placeholder_ids(kind)))
        if unknown := sorted({*prompt[places].tolist()} - {*encoder.placeholder_ids}):
            raise UserError(f"{where}: its {kind} stand at placeholders {unknown}, which are not among "
                            f"model.{ENCODERS[kind]}.placeholder_ids = {list(encoder.placeholder_ids)}; put "
                            "the tokenizer there that the model was trained with")
        found[kind] = take_records(places, numbers[places], [record for record, _ in of_kind], encoder.slots)
    return found


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
                if mark := find_media_token(part["text"]):
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
        # Codec and encoder may want other rates of the same sound.
        reads = {rate: reader.sound(path, rate) for rate in rates}
        block, records = "", list[tuple[np.ndarray, int]]()
        if codec is not None:
            import torch

            # A codec's memory grows with the length, so long sounds go through it in pieces.
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


Parts = Sequence[Mapping[str, Any]]
"""What a user shows and says: {"type": "text", "text": ...} or {"type": "image" | "audio" | "video", "path":
...}."""


@dataclass(frozen=True)
class Prompts:
    """Prompts as a model reads them."""

    asker: PromptEncoder
    """The model's tokenizer."""
    ids: list[list[int]]
    """Of each prompt."""
    encoder_inputs: list[EncoderInputs]
    """What each has for encoders."""


def blocks_of(target: Target) -> dict[str, VocabularyBlock]:
    model = target.model
    found = {AUDIO: model.audio_tokens, IMAGE: model.image_tokens}
    return {kind: VocabularyBlock(kind, block.first, block.size) for kind,
            block in found.items() if block is not None}


def refuse_unknown_kinds(target: Target, kinds: Iterable[str]) -> None:
    """Raise `UserError` where a model has no discrete tokens of one of some kinds."""
    if lacking := sorted(set(kinds) - set(blocks_of(target))):
        raise UserError(f"{target.path}: has no discrete tokens of kind {lacking[0]} "
                        f"(model.{lacking[0]}_tokens is not set); ask one that was trained on "
                        "media, or leave these options out")


def prompts_of(target: Target, prompts: Sequence[Parts], shown: ShownMedia, *, chat: bool = True,
               with_features: bool = True) -> Prompts:
    """Return prompts as a model reads them: media as discrete tokens, then as features of its encoders, as
    far as it has learned from each.

    Args:
        target: the model.
        prompts: of each, what a user shows and says.
        shown: the folder of media, and the tokenizers that see and hear.
        chat: whether prompts are framed by the chat template.
        with_features: whether encoders see what is shown.

    Raises:
        UserError: the model has no tokens of such media, a codec is another one than that of its data or is
            not there, or a medium cannot be read.
    """
    refuse_unknown_kinds(target, shown.tokenizers)
    known = codecs_of(target.config.data.paths) if target.config is not None else {}
    refuse_other_codecs(shown.tokenizers, known, "--{kind}-tokenizer")
    kinds = {kind for parts in prompts for part in parts if (kind := str(part.get("type"))) in BANK_OF}
    for kind, option in OPTIONS.items():
        if kind in kinds and known.get(kind) and kind not in shown.tokenizers:
            raise UserError(f"{target.path}: has learned from discrete tokens of kind {kind}, which needs "
                            f"{option} CODEC, the one that its data were encoded with")
    encoders = encoders_of(target, {BANK_OF[kind] for kind in kinds}) if with_features else {}
    asker = PromptEncoder(target, chat, encoding_of(encoders))
    assert asker.feature_tokens is not None, "it was asked for"
    shown = replace(shown, encoders=encoders)
    with MediaReader(shown.root) as reader:
        told = [shown.shown(parts, reader, f"prompt {n}") for n, parts in enumerate(prompts, 1)]
    # First the ids, then the places: placeholders are found in what the template made of the text.
    ids = asker.encode_prompts([one.text for one in told])
    inputs = [place_records(of, one.records, asker.feature_tokens, encoders, f"prompt {n}")
             for n, (of, one) in enumerate(zip(ids, told, strict=True), 1)]
    return Prompts(asker, ids, inputs)
