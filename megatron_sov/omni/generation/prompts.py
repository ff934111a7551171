"""Encode prompts with pictures, sounds and videos for a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO, VocabularyBlock, find_media_token
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.model.modality import (
    ENCODERS, PICTURES, SOUNDS, EncoderInputs, FeatureTokens, MediaEncoding, take_records)
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.media.banks import BankShape, check_same_codecs, find_data_banks, find_data_codecs
from megatron_sov.omni.media.items import MediaItem, format_audio_tokens, format_image_tokens
from megatron_sov.omni.media.reading.limits import VideoSampling
from megatron_sov.omni.media.reading.reader import MediaReader
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, SpectrogramExtractor

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target

TOKENIZER_OPTIONS = {IMAGE: "--image-tokenizer", AUDIO: "--audio-tokenizer"}
BANK_KIND_BY_MEDIUM = {IMAGE: PICTURES, VIDEO: PICTURES, AUDIO: SOUNDS}
"""Medium (`IMAGE`, ...) -> bank kind that the encoder reads."""
PromptParts = Sequence[Mapping[str, Any]]
"""Parts of a prompt: {"type": "text", "text": ...} or {"type": "image" | "audio" | "video", "path": ...}."""
Encoders = Mapping[str, VisionEncoderConfig | AudioEncoderConfig]
"""Bank kind -> encoder."""
Records = list[tuple[np.ndarray, int]]
"""(raw record, used slots) in placeholder order."""


@dataclass(frozen=True)
class EncodedMediaPrompts:
    """Token ids and encoder inputs per prompt."""

    encoder: PromptEncoder
    """The model's tokenizer and chat template."""
    ids: list[list[int]]
    """Token ids per prompt."""
    encoder_inputs: list[EncoderInputs]


def encode_media_prompts(target: Target, prompts: Sequence[PromptParts], media: PromptMediaEncoder, *,
                         chat: bool = True, with_features: bool = True) -> EncodedMediaPrompts:
    """Encode prompts: each medium becomes discrete tokens, then placeholders for encoder features.

    Args:
        target: model.
        prompts: parts per prompt.
        media: media folder and tokenizers; its encoders are replaced by the model's.
        chat: apply the chat template.
        with_features: use encoders whose features the model was trained on.

    Raises:
        UserError: the model has no tokens for a kind of media, a codec is missing or differs from the codec
            of the training data, or a media file cannot be read.
    """
    check_known_kinds(target, media.tokenizers)
    data_codecs = find_data_codecs(target.config.data.paths) if target.config is not None else {}
    check_same_codecs(media.tokenizers, data_codecs, "--{kind}-tokenizer")
    kinds = {str(part.get("type")) for parts in prompts for part in parts} & set(BANK_KIND_BY_MEDIUM)
    for kind, option in TOKENIZER_OPTIONS.items():
        if kind in kinds and data_codecs.get(kind) and kind not in media.tokenizers:
            raise UserError(f"{target.path}: was trained on discrete tokens of kind {kind}, which needs "
                            f"{option} CODEC, the codec of its training data")
    encoders = (select_encoders(target, {BANK_KIND_BY_MEDIUM[kind] for kind in kinds}) if with_features
                else {})
    encoding = MediaEncoding(tuple((kind, encoder.slots) for kind, encoder in encoders.items()))
    prompt_encoder = PromptEncoder(target, chat, encoding)
    assert prompt_encoder.feature_tokens is not None
    media = replace(media, encoders=encoders)
    with MediaReader(media.root) as reader:
        encoded = [media.encode_parts(parts, reader, f"prompt {n}") for n, parts in enumerate(prompts, 1)]
    # Placeholders are located in the final ids, because the chat template may move text.
    ids = prompt_encoder.encode_prompts([prompt.text for prompt in encoded])
    inputs = [build_encoder_inputs(prompt_ids, prompt.records, prompt_encoder.feature_tokens, encoders,
                                   f"prompt {n}")
              for n, (prompt_ids, prompt) in enumerate(zip(ids, encoded, strict=True), 1)]
    return EncodedMediaPrompts(prompt_encoder, ids, inputs)


def get_vocabulary_blocks(target: Target) -> dict[str, VocabularyBlock]:
    """Return medium -> codebook ids in the model's vocabulary."""
    model = target.model
    blocks = {AUDIO: model.audio_tokens, IMAGE: model.image_tokens}
    return {kind: VocabularyBlock(kind, block.first, block.size) for kind, block in blocks.items()
            if block is not None}


def check_known_kinds(target: Target, kinds: Iterable[str]) -> None:
    """Raise `UserError` if the model has no discrete tokens for a medium."""
    if unknown := sorted(set(kinds) - set(get_vocabulary_blocks(target))):
        raise UserError(f"{target.path}: has no discrete tokens of kind {unknown[0]} "
                        f"(model.{unknown[0]}_tokens is not set); use a model that was trained on "
                        "media, or leave these options out")


def select_encoders(target: Target, kinds: set[str]) -> dict[str, VisionEncoderConfig | AudioEncoderConfig]:
    """Return the encoders whose features the model was trained on.

    If the training data are gone, use an encoder if its adapter was trained, and warn.

    Args:
        target: model.
        kinds: kinds of banks in the prompts.
    """
    model, config = target.model, target.config
    data_kinds = find_data_banks(config.data.paths) if config is not None else None
    was_trained = config is None or config.media.train_adapters or config.media.train_encoders
    encoders: dict[str, VisionEncoderConfig | AudioEncoderConfig] = {}
    for kind, name in ENCODERS.items():
        encoder = getattr(model, name)
        if encoder is None or kind not in kinds:
            continue
        if data_kinds is None:
            decision = "prompts use it" if was_trained else "prompts do not use it, as its adapter was frozen"
            warn(f"{target.path}: has an encoder of {kind}, and training data that would show whether the "
                 f"model learned from its features are not there: {decision}")
        if was_trained if data_kinds is None else kind in data_kinds:
            encoders[kind] = encoder
    return encoders


def build_encoder_inputs(ids: Sequence[int], records: Mapping[str, Records], tokens: FeatureTokens,
                         encoders: Encoders, where: str) -> EncoderInputs:
    """Return the encoder inputs for a prompt.

    Args:
        ids: token ids of the prompt.
        records: kind of bank -> records in placeholder order.
        tokens: the tokenizer's media tokens.
        encoders: encoders of these kinds.
        where: name of the prompt for error messages.

    Raises:
        UserError: the chat template dropped placeholders, or the encoder has other placeholder ids.
    """
    rows = {kind: [(row, used) for row, (_, used) in enumerate(kind_records)]
            for kind, kind_records in records.items()}
    try:
        numbers = tokens.numbers(ids, rows)
    except BadRecord as e:
        raise UserError(f"{where}: {e}; its chat template must keep the user's text unchanged") from None
    prompt, inputs = np.asarray(ids, np.int64), {}
    for kind, kind_records in records.items():
        encoder = encoders[kind]
        places = np.flatnonzero(np.isin(prompt, tokens.placeholder_ids(kind)))
        if unknown := sorted({*prompt[places].tolist()} - {*encoder.placeholder_ids}):
            raise UserError(f"{where}: its {kind} stand at placeholders {unknown}, which are not among "
                            f"model.{ENCODERS[kind]}.placeholder_ids = {list(encoder.placeholder_ids)}; "
                            "use the tokenizer that the model was trained with")
        inputs[kind] = take_records(places, numbers[places], [record for record, _ in kind_records],
                                    encoder.slots)
    return inputs


@dataclass
class PromptMedia:
    """Text and raw records for a prompt."""

    text: str
    """Text with media tokens, as `sov-data encode-media` writes it."""
    records: dict[str, Records] = field(default_factory=dict)
    """Bank kind -> records."""


@dataclass(frozen=True)
class PromptMediaEncoder:
    """Encodes media files as discrete tokens and as records for encoders."""

    root: Path
    """Media folder; files outside are refused."""
    tokenizers: Mapping[str, Path]
    """`IMAGE` or `AUDIO` -> codec folder for discrete tokens."""
    encoders: Encoders = field(default_factory=dict)
    """Encoders whose placeholders follow the discrete tokens."""

    def encode_parts(self, parts: PromptParts, reader: MediaReader, where: str) -> PromptMedia:
        """Encode a prompt's parts.

        Args:
            parts: texts and media files.
            reader: reader for `root`.
            where: name of the prompt for error messages.

        Raises:
            UserError: a part is malformed, has no tokenizer or encoder, or cannot be read.
        """
        texts, counts, media = list[str](), Counter[str](), PromptMedia("")
        for part in parts:
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                if mark := find_media_token(part["text"]):
                    raise UserError(f"{where}: its text contains the media token {mark!r}; remove it: media "
                                    "are only named by their paths")
                texts.append(part["text"])
            elif kind in BANK_KIND_BY_MEDIUM and isinstance(part.get("path"), str):
                texts.append(self._encode_medium(kind, part["path"], counts[kind], reader, where, media))
                counts[kind] += 1
            else:
                raise UserError(f"{where}: {str(part)[:80]} is not a part; write "
                                '{"type": "text", "text": ...} or {"type": "image" | "audio" | "video", '
                                '"path": ...}')
        media.text = "\n".join(texts)
        return media

    def _encode_medium(self, kind: str, path: str, number: int, reader: MediaReader, where: str,
                       media: PromptMedia) -> str:
        """Return a medium's text, and add the records to `media`."""
        encoder = self.encoders.get(BANK_KIND_BY_MEDIUM[kind])
        if kind == VIDEO and encoder is None:
            raise UserError(f"{where}: {path} is a video, whose frames need an encoder of pictures; use a "
                            "model that was trained with features of model.vision")
        if kind not in self.tokenizers and encoder is None:
            raise UserError(f"{where}: {path} is of kind {kind}, which needs {TOKENIZER_OPTIONS[kind]} CODEC")
        encode = {IMAGE: self._encode_picture, AUDIO: self._encode_sound, VIDEO: self._encode_video}[kind]
        try:
            item, records = encode(path, reader)
        except BadRecord as e:
            raise UserError(f"{where}: {path} {e}") from None
        if records:
            media.records.setdefault(BANK_KIND_BY_MEDIUM[kind], []).extend(records)
        return MediaItem(kind, number, filename=PurePosixPath(path).name, **item,
                         num_placeholders=sum(used for _, used in records)).format_text()

    def _encode_picture(self, path: str, reader: MediaReader) -> tuple[dict[str, Any], Records]:
        codec, encoder = self._codecs.get(IMAGE), self._vision
        sides = [] if codec is None else [codec.side_pixels]
        if encoder is not None:
            sides.append(encoder.image_size)
        decoded, discrete = reader.read_picture(path, tuple(sides)), ""
        if codec is not None:
            picture = torch.from_numpy(decoded.arrays[0].astype(np.float32) / 255)
            discrete = format_image_tokens(codec.encode(picture[None])[0].tolist(), codec.grid, decoded.width,
                                           decoded.height)
        records = [(decoded.arrays[-1], encoder.slots)] if encoder is not None else []
        return {"mime_type": decoded.mime_type, "discrete": discrete}, records

    def _encode_sound(self, path: str, reader: MediaReader) -> tuple[dict[str, Any], Records]:
        codec, encoder = self._codecs.get(AUDIO), self._audio
        rates = [] if codec is None else [codec.sample_rate_hz]
        if encoder is not None:
            rates.append(SAMPLE_RATE_HZ)
        sounds = {rate: reader.read_sound(path, rate) for rate in rates}
        discrete, records = "", list[tuple[np.ndarray, int]]()
        if codec is not None:
            # In pieces, because the codec's memory grows with the length.
            piece_samples = int(codec.max_piece_s * codec.sample_rate_hz)
            samples = torch.from_numpy(sounds[codec.sample_rate_hz].arrays[0].copy())
            codes = [code for piece in samples.split(piece_samples) for code in codec.encode(piece).tolist()]
            discrete = format_audio_tokens(codes)
        if encoder is not None:
            bank = BankShape(SOUNDS, encoder.record_shape, encoder.slots)
            pieces, num_frames = self._spectrograms.compute_pieces(sounds[SAMPLE_RATE_HZ].arrays[0])
            records = [(piece, bank.count_slots(n)) for piece, n in zip(pieces, num_frames, strict=True)]
        sound = sounds[rates[0]]
        return {"mime_type": sound.mime_type, "duration_s": sound.duration_s, "discrete": discrete}, records

    def _encode_video(self, path: str, reader: MediaReader) -> tuple[dict[str, Any], Records]:
        assert self._vision is not None, "checked by _encode_medium"
        video = reader.read_video(path, VideoSampling(self._vision.image_size))
        return ({"mime_type": video.mime_type, "duration_s": video.duration_s},
                [(frame, self._vision.slots) for frame in video.arrays[0]])

    @property
    def _vision(self) -> VisionEncoderConfig | None:
        encoder = self.encoders.get(PICTURES)
        return encoder if isinstance(encoder, VisionEncoderConfig) else None

    @property
    def _audio(self) -> AudioEncoderConfig | None:
        encoder = self.encoders.get(SOUNDS)
        return encoder if isinstance(encoder, AudioEncoderConfig) else None

    @cached_property
    def _spectrograms(self) -> SpectrogramExtractor:
        assert self._audio is not None, "only sounds with an encoder have spectrograms"
        seconds, remainder = divmod(self._audio.num_frames * HOP_SAMPLES, SAMPLE_RATE_HZ)
        if remainder:
            raise UserError(f"model.audio.num_frames = {self._audio.num_frames}: sounds are cut into pieces "
                            "of whole seconds, 100 frames each; use a model with such pieces")
        return SpectrogramExtractor(self._audio.num_mels, seconds)

    @cached_property
    def _codecs(self) -> dict[str, Any]:
        codecs = {}
        for kind, folder in self.tokenizers.items():
            codec = open_codec(folder)
            if not hasattr(codec, "side_pixels" if kind == IMAGE else "samples_per_token") \
                    or not hasattr(codec, "encode"):
                raise UserError(f"{TOKENIZER_OPTIONS[kind]} {folder}: is a codec of another kind "
                                f"({type(codec).__name__}); pass a tokenizer")
            codecs[kind] = codec
        return codecs
