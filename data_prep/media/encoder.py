"""Encode media: codebook tokens from codecs, and bank records for continuous encoders."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.media.encode_media import MediaSettings
from data_prep.media.records import Medium, MessagePart
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.items import format_audio_tokens, format_image_tokens
from megatron_sov.omni.media.reading.limits import VideoSampling
from megatron_sov.omni.media.reading.reader import DecodedMedia, MediaReader, locate_media_file
from megatron_sov.omni.media.spectrograms import SAMPLE_RATE_HZ, SpectrogramExtractor

BATCH_PICTURES = 16
"""Pictures per codec batch: a constant size makes a picture's tokens independent of neighbours."""
BATCH_MEDIA = 16
"""Decoded media in memory at a time."""
CACHE_SIZE = 50_000
"""Contents with cached codebook tokens."""


@dataclass
class UnitBanks:
    """Bank records of a unit; each content is written once."""

    write: dict[str, Callable[[bytes], object]]
    """Bank kind -> function that appends a record."""
    keys: dict[str, list[str]] = field(default_factory=lambda: {PICTURES: [], SOUNDS: []})
    """Bank kind -> content name per row."""

    def add_records(self, kind: str, content: str, records: np.ndarray) -> list[int]:
        """Append a medium's records; return their rows."""
        first = len(self.keys[kind])
        for i, record in enumerate(records):
            self.write[kind](np.ascontiguousarray(record).tobytes())
            self.keys[kind].append(f"{content}/{i}")
        return list(range(first, first + len(records)))


class MediaRecordEncoder:
    """Encodes media; one instance per process."""

    def __init__(self, settings: MediaSettings, threads: int) -> None:
        """Open the codecs. Raises `UserError`: a folder without codec, or another kind of codec."""
        self._settings, self._threads = settings, threads
        self._reader = MediaReader(settings.media_root, settings.limits, threads)
        self.images = _open_codec(settings.image_tokenizer, "--image-tokenizer", settings.device,
                                  "side_pixels", "encode")
        self.sounds = _open_codec(settings.audio_tokenizer, "--audio-tokenizer", settings.device,
                                  "samples_per_token", "encode")
        bank = settings.sound_bank
        self._spectrograms = SpectrogramExtractor(bank[0], bank[1]) if bank else None
        self._banks = settings.get_banks()
        self._tokens: OrderedDict[str, str] = OrderedDict()
        """Content name -> text of codebook tokens."""

    def close(self) -> None:
        self._reader.close()

    def get_codebook_sizes(self) -> dict[str, int]:
        return {kind: int(codec.codebook_size) for kind, codec in ((IMAGE, self.images), (AUDIO, self.sounds))
                if codec is not None}

    def encode(self, parts: Sequence[MessagePart], banks: UnitBanks) -> dict[MessagePart, Medium | BadRecord]:
        """Return part -> encoded medium or problem; write records to `banks`, equal contents once."""
        encoded: dict[MessagePart, Medium | BadRecord] = {}
        names: dict[MessagePart, str] = {}
        root, max_bytes = self._settings.media_root.resolve(), self._settings.limits.file_bytes
        for part in dict.fromkeys(parts):
            try:
                # named by content: equal bytes under two file names are encoded once
                with open(locate_media_file(root, part.value, max_bytes), "rb") as f:
                    names[part] = f"{part.kind}/{hashlib.file_digest(f, 'sha256').hexdigest()}"
            except BadRecord as e:
                encoded[part] = e
            except OSError as e:
                encoded[part] = BadRecord("missing",
                                          f"cannot be read ({e.strerror or e}); check its permissions")
        first_parts = {name: part for part, name in reversed(names.items())}
        contents: dict[str, Medium | BadRecord] = {}
        pending = list(dict.fromkeys(names.values()))
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(pending), BATCH_MEDIA):
                batch = pending[start:start + BATCH_MEDIA]
                # decoders are processes, and threads suffice; codecs take the results in order
                decoded = list(pool.map(lambda name: self._decode(first_parts[name]), batch))
                contents |= self._encode_contents(dict(zip(batch, decoded, strict=True)), banks)
        return encoded | {part: contents[name] for part, name in names.items()}

    def _decode(self, part: MessagePart) -> list[DecodedMedia] | BadRecord:
        try:
            if part.kind == VIDEO:
                return [self._decode_video(part.value)]
            if part.kind == IMAGE:
                return [self._decode_picture(part.value)]
            return self._decode_sound(part.value)
        except BadRecord as e:
            return e

    def _decode_video(self, path: str) -> DecodedMedia:
        settings = self._settings
        if settings.picture_bank is None:
            raise BadRecord("no_bank", "is a video, which needs --continuous-pictures")
        return self._reader.read_video(path, VideoSampling(
            settings.picture_bank[0], settings.video_frames_per_s, settings.video_frames))

    def _decode_picture(self, path: str) -> DecodedMedia:
        """Decode a picture at the codec's side length, then at the bank's."""
        sides = [*([self.images.side_pixels] if self.images else []),
                 *([self._settings.picture_bank[0]] if self._settings.picture_bank else [])]
        if not sides:
            raise BadRecord("no_codec", "is a picture, which needs --image-tokenizer or "
                                        "--continuous-pictures")
        return self._reader.read_picture(path, tuple(sides), self._settings.animated)

    def _decode_sound(self, path: str) -> list[DecodedMedia]:
        """Decode a sound at the codec's sample rate, then at the spectrograms'."""
        rates = [*([self.sounds.sample_rate_hz] if self.sounds else []),
                 *([SAMPLE_RATE_HZ] if self._settings.sound_bank else [])]
        if not rates:
            raise BadRecord("no_codec", "is a sound, which needs --audio-tokenizer or --continuous-sounds")
        by_rate = {rate: self._reader.read_sound(path, rate) for rate in dict.fromkeys(rates)}
        return [by_rate[rate] for rate in rates]

    def _encode_contents(self, decoded: dict[str, list[DecodedMedia] | BadRecord],
                         banks: UnitBanks) -> dict[str, Medium | BadRecord]:
        self._tokenize_pictures({name: media[0] for name, media in decoded.items()
                                 if not isinstance(media, BadRecord) and name.startswith(f"{IMAGE}/")})
        encoded: dict[str, Medium | BadRecord] = {}
        for name, media in decoded.items():
            kind = name.partition("/")[0]
            if isinstance(media, BadRecord):
                encoded[name] = media
            elif kind == AUDIO:
                encoded[name] = self._encode_sound(name, media, banks)
            else:
                encoded[name] = self._encode_picture(name, media[0], banks, is_video=kind == VIDEO)
        return encoded

    def _tokenize_pictures(self, decoded: dict[str, DecodedMedia]) -> None:
        codec = self.images
        if codec is None:
            return
        pending = [name for name in decoded if name not in self._tokens]
        for start in range(0, len(pending), BATCH_PICTURES):
            names = pending[start:start + BATCH_PICTURES]
            # a full batch always: kernels chosen by size would change the last bits
            batch = np.zeros((BATCH_PICTURES, 3, codec.side_pixels, codec.side_pixels), np.float32)
            for i, name in enumerate(names):
                batch[i] = decoded[name].arrays[0].astype(np.float32) / 255
            ids = self._run_codec(codec, batch)
            for i, name in enumerate(names):
                entries = _check_entries(ids[i], codec, self._settings.image_tokenizer)
                self._cache_tokens(name, format_image_tokens(entries, codec.grid, decoded[name].width,
                                                             decoded[name].height))

    def _encode_picture(self, name: str, decoded: DecodedMedia, banks: UnitBanks, *,
                        is_video: bool) -> Medium:
        rows: list[int] = []
        if PICTURES in self._banks:
            records = decoded.arrays[-1] if is_video else decoded.arrays[-1][None]
            rows = banks.add_records(PICTURES, name, records)
        slots = self._banks[PICTURES].slots if rows else 0
        return Medium(decoded.mime_type, "" if is_video else self._tokens.get(name, ""), decoded.duration_s,
                      PICTURES if rows else "", tuple((row, slots) for row in rows))

    def _encode_sound(self, name: str, decoded: list[DecodedMedia], banks: UnitBanks) -> Medium:
        if self.sounds is not None and name not in self._tokens:
            self._cache_tokens(name, format_audio_tokens(self._tokenize_sound(decoded[0].arrays[0])))
        rows: list[tuple[int, int]] = []
        if self._spectrograms is not None:
            records, frames = self._spectrograms.compute_pieces(decoded[-1].arrays[0])
            shape = self._banks[SOUNDS]
            rows = [(row, shape.count_slots(used))
                    for row, used in zip(banks.add_records(SOUNDS, name, records), frames, strict=True)]
        return Medium(decoded[0].mime_type, self._tokens.get(name, ""), decoded[0].duration_s,
                      SOUNDS if rows else "", tuple(rows))

    def _tokenize_sound(self, samples: np.ndarray) -> list[int]:
        piece_samples = int(self.sounds.max_piece_s * self.sounds.sample_rate_hz)
        entries: list[int] = []
        for start in range(0, len(samples), piece_samples):
            # torch rejects read-only arrays
            ids = self._run_codec(self.sounds, samples[start:start + piece_samples].copy())
            entries += _check_entries(ids, self.sounds, self._settings.audio_tokenizer)
        return entries

    def _run_codec(self, codec: Any, array: np.ndarray) -> np.ndarray:
        import torch  # slow: media without codecs need no torch

        with torch.inference_mode():
            ids: np.ndarray = codec.encode(torch.from_numpy(array).to(self._settings.device)).cpu().numpy()
        return ids

    def _cache_tokens(self, name: str, tokens: str) -> None:
        self._tokens[name] = tokens
        while len(self._tokens) > CACHE_SIZE:
            self._tokens.popitem(last=False)


def _open_codec(folder: Path | None, option: str, device: str, *attributes: str) -> Any:
    if folder is None:
        return None
    from megatron_sov.omni.codecs.folder import open_codec  # imports torch

    codec = open_codec(folder, device)
    if not all(hasattr(codec, name) for name in attributes):
        raise UserError(f"{option} {folder}: is a codec of another kind ({type(codec).__name__}); pass a "
                        "tokenizer")
    return codec


def _check_entries(ids: np.ndarray, codec: Any, folder: Path | None) -> list[int]:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < codec.codebook_size:
        raise UserError(f"{folder}: gives entries from {ids.min()} to {ids.max()} of a codebook of "
                        f"{codec.codebook_size}; make the codec again, or restore it from a copy")
    return [int(n) for n in ids]
