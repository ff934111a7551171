"""Media as codebook entries and as records of banks, each content once; what `encode-media` is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from annotated_types import Le

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.messages import check_depth
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, Flag, ProblemCode, SettingsProblem, Violation, count_cores, requires_field)
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VIDEO, find_media_token
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.banks import BankShape
from megatron_sov.omni.media.items import format_audio_tokens, format_image_tokens
from megatron_sov.omni.media.reading.limits import MediaLimits, VideoSampling
from megatron_sov.omni.media.reading.reader import DecodedMedia, MediaReader, resolve_media_path
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, SpectrogramExtractor
from megatron_sov.work.submit.cluster_options import ClusterOptions

CODE_VERSION = 2
"""Raised when the same input and settings would give another unit."""
Animated = Literal["refuse", "first"]
Drawn = Literal["call", "content"]
BadMedia = Literal["stop", "skip"]
STOP, SKIP = get_args(BadMedia)
CALL, CONTENT = get_args(Drawn)


def _numbers(names: str, *most: int) -> Bound:
    """Return the bound of a text such as 448:256, or of none: as many numbers as `most` has."""
    def broken(text: str) -> Violation | None:
        parts = text.split(":")
        fits = len(parts) == len(most) and all(
            part.isascii() and part.isdigit() and 1 <= int(part[:9]) <= limit
            for part, limit in zip(parts, most, strict=True))
        if fits or not text:
            return None
        return ProblemCode.BOUND, f"must be {names}, whole numbers from 1 to {':'.join(map(str, most))}", ""

    return Bound(broken)


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """How media become text and banks."""

    media_root: Annotated[Path, Flag(value="DIR")]
    """Folder that the paths of media begin from; nothing outside of it is read."""
    image_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes discrete tokens of pictures (default: they get none)."""
    audio_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes discrete tokens of sounds (default: they get none)."""
    continuous_pictures: Annotated[str, Flag(value="SIDE:SLOTS"), _numbers("SIDE:SLOTS", 4096, 65536)] = ""
    """Keep pictures and frames of videos for the model's own encoder: height and width in pixels, and its
    features of each."""
    continuous_sounds: Annotated[str, Flag(value="MELS:SECONDS:SLOTS"),
                                 _numbers("MELS:SECONDS:SLOTS", 1024, 600, 65536)] = ""
    """Likewise spectrograms of sounds: mels, length of a piece, and features of each."""
    video_frames_per_s: Annotated[AboveZero, Flag(value="N")] = 1.0
    """Frames that are taken of a second."""
    video_frames: Annotated[AtLeastOne, Le(4096)] = 64
    """Most frames of a video."""
    animated: Animated = "refuse"
    """Animated pictures: refuse them, or take the first frame."""
    drawn: Drawn = "call"
    """Pictures of an assistant: tool calls, as the published model draws, or in what it says, for templates
    that show no calls."""
    bad_media: BadMedia = "stop"
    """Records that are bad, or name a bad medium: stop at the first, or leave them out and list them in
    bad_media.jsonl."""
    device: Annotated[str, Flag(value="DEVICE")] = "cpu"
    """Where codecs compute, such as cuda."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """Of each medium."""

    def problems(self) -> list[SettingsProblem]:
        if any((self.image_tokenizer, self.audio_tokenizer, self.continuous_pictures,
                self.continuous_sounds)):
            return []
        return [SettingsProblem(ProblemCode.RULE, "", "nothing says what becomes of media", way_out=
                                "pass --image-tokenizer, --audio-tokenizer, --continuous-pictures or "
                                "--continuous-sounds")]

    @property
    def picture_bank(self) -> tuple[int, int] | None:
        """Side in pixels and slots of pictures whose features are put over placeholders; None: none are."""
        side, slots = map(int, self.continuous_pictures.split(":")) if self.continuous_pictures else (0, 0)
        return (side, slots) if side else None

    @property
    def sound_bank(self) -> tuple[int, int, int] | None:
        """Mels, seconds of a piece, and slots of it; None: none are."""
        mels, seconds, slots = (map(int, self.continuous_sounds.split(":")) if self.continuous_sounds
                                else (0, 0, 0))
        return (mels, seconds, slots) if mels else None

    def banks(self) -> dict[str, BankShape]:
        found = {}
        if self.picture_bank is not None:
            side, slots = self.picture_bank
            found[PICTURES] = BankShape(PICTURES, (3, side, side), slots)
        if self.sound_bank is not None:
            mels, seconds, slots = self.sound_bank
            found[SOUNDS] = BankShape(SOUNDS, (mels, seconds * SAMPLE_RATE_HZ // HOP_SAMPLES), slots,
                                      sample_rate_hz=SAMPLE_RATE_HZ, hop_samples=HOP_SAMPLES)
        return found

    def identity(self) -> str:
        """Return JSON of all that a unit without bad records depends on besides its records and media.

        Raises:
            UserError: a folder is no codec.
        """
        # Left out: where media lie, what computes, limits (added below) and what is done about bad records
        # change no unit that is good.
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                 if f.name not in ("media_root", "device", "limits", "bad_media")}
        codecs: dict[str, str | None] = {}
        for name in ("image_tokenizer", "audio_tokenizer"):
            if (path := facts[name]) is not None:
                read_manifest(path, "codec")
            # A codec by the hash of its manifest: another path to the same one changes nothing.
            codecs[name] = None if path is None else manifest_sha256(path)
        return json.dumps({**facts, **codecs, "limits": dataclasses.asdict(self.limits),
                           "code": CODE_VERSION}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class EncodeMediaOptions(ClusterOptions):
    """Turn records that name pictures, sounds and videos into text with discrete tokens in their place, and
    into banks of what continuous encoders will see.  `sov-data pack` reads both.

    A killed command continues where it was when it is run again."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """JSONL files, or folders of them: chats ("messages") or documents ("content") whose parts are {"type":
    "text" | "image" | "audio" | "video", ...}."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for what is written."""
    settings: MediaSettings
    threads: AtLeastOne = field(default_factory=count_cores)
    """Media that are decoded at a time, each by a process of its own; the output does not depend on it
    (default: this machine's cores)."""
    workers: Annotated[AtLeastOne | None, requires_field("cluster")] = None
    """With --cluster: jobs that encode (default: 4)."""
    overwrite: bool = False
    """Replace what is already there."""


BATCH = 16
"""Pictures that a codec sees at a time: always as many, so that what it says of one does not depend on which
others there are."""
AT_A_TIME = 16
"""Media whose numbers are held in memory."""
KEPT = 50_000
"""Contents whose codebook entries are remembered."""


@dataclass(frozen=True)
class Medium:
    """What stands in a text for a medium, besides its name."""

    mime_type: str
    discrete: str = ""
    duration_s: float = 0.0
    """Length of a sound or video."""
    bank: str = ""
    """Kind of the bank that has its records; "": none."""
    rows: tuple[tuple[int, int], ...] = ()
    """Record of the bank, and how many of its slots are used, in order."""


@dataclass
class UnitBanks:
    """The records of a unit, each content once."""

    write: dict[str, Callable[[bytes], object]]
    """Kind -> what takes a record's bytes."""
    keys: dict[str, list[str]] = field(default_factory=lambda: {PICTURES: [], SOUNDS: []})
    """Kind -> a name of each record's content, in order."""

    def add(self, kind: str, content: str, records: np.ndarray) -> list[int]:
        """Append records of a medium; returns their rows."""
        first = len(self.keys[kind])
        for i, record in enumerate(records):
            self.write[kind](np.ascontiguousarray(record).tobytes())
            self.keys[kind].append(f"{content}/{i}")
        return list(range(first, first + len(records)))


def content_hash(file: Path) -> str:
    """Return the hash of a medium's bytes."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class MediaRecordEncoder:
    """Encodes media; one per process."""

    def __init__(self, settings: MediaSettings, threads: int) -> None:
        """Open the codecs.

        Raises:
            UserError: a folder is no codec of its kind.
        """
        self._settings, self._threads = settings, threads
        self._reader = MediaReader(settings.media_root, settings.limits, threads)
        self.images = _opened(settings.image_tokenizer, "--image-tokenizer", settings.device, "side_pixels",
                              "encode")
        self.sounds = _opened(settings.audio_tokenizer, "--audio-tokenizer", settings.device,
                              "samples_per_token", "encode")
        bank = settings.sound_bank
        self._spectrograms = SpectrogramExtractor(bank[0], bank[1]) if bank else None
        self._banks = settings.banks()
        self._known: OrderedDict[str, str] = OrderedDict()

    def close(self) -> None:
        self._reader.close()

    def codebooks(self) -> dict[str, int]:
        return {kind: int(codec.codebook_size) for kind, codec in ((IMAGE, self.images), (AUDIO, self.sounds))
                if codec is not None}

    def encode(self, parts: Sequence[MessagePart], banks: UnitBanks) -> dict[MessagePart, Medium | BadRecord]:
        """Return what stands for each of the parts, or why there is nothing; equal contents are encoded once.

        Args:
            parts: media.
            banks: take the records.
        """
        found: dict[MessagePart, Medium | BadRecord] = {}
        contents: dict[str, Medium | BadRecord] = {}
        names: dict[MessagePart, str] = {}
        for part in dict.fromkeys(parts):
            try:
                # The name of a content: equal bytes are encoded once, under any file name.
                names[part] = f"{part.kind}/{content_hash(self._place(part))}"
            except BadRecord as e:
                found[part] = e
            except OSError as e:
                found[part] = BadRecord("missing",
                                        f"cannot be read ({e.strerror or e}); check its permissions")
        first = {name: part for part, name in reversed(names.items())}
        todo = list(dict.fromkeys(names.values()))
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(todo), AT_A_TIME):
                here = todo[start:start + AT_A_TIME]
                # Decoding waits for processes, so threads suffice; codecs see the results one after the
                # other.
                reads = list(pool.map(lambda name: self._read(first[name]), here))
                contents |= self._encoded(here, reads, banks)
        return found | {part: contents[name] for part, name in names.items()}

    def _place(self, part: MessagePart) -> Path:
        file = resolve_media_path(self._settings.media_root.resolve(), part.value)
        if not file.is_file():
            raise BadRecord("missing", "is no file; name a picture, a sound or a video")
        most = self._settings.limits.file_bytes
        if (size_bytes := file.stat().st_size) > most:
            raise BadRecord("size", f"has {size_bytes:,} bytes, at most {most:,} are read; shrink it, or "
                                    "raise --max-file-bytes")
        return file

    def _read(self, part: MessagePart) -> list[DecodedMedia] | BadRecord:
        settings = self._settings
        try:
            if part.kind == VIDEO:
                if settings.picture_bank is None:
                    raise BadRecord("no_bank", "is a video, which needs --continuous-pictures")
                sampling = VideoSampling(settings.picture_bank[0], settings.video_frames_per_s,
                                       settings.video_frames)
                return [self._reader.read_video(part.value, sampling)]
            if part.kind == IMAGE:
                sides = [*([self.images.side_pixels] if self.images else []),
                         *([settings.picture_bank[0]] if settings.picture_bank else [])]
                if not sides:
                    raise BadRecord("no_codec", "is a picture, which needs --image-tokenizer or "
                                                "--continuous-pictures")
                return [self._reader.read_picture(part.value, tuple(sides), settings.animated)]
            # First for the codec, last for the spectrograms: taken by place.
            rates = [*([self.sounds.sample_rate_hz] if self.sounds else []),
                     *([SAMPLE_RATE_HZ] if settings.sound_bank else [])]
            if not self.sounds and not settings.sound_bank:
                raise BadRecord("no_codec", "is a sound, which needs --audio-tokenizer or "
                                            "--continuous-sounds")
            by_rate = {rate: self._reader.read_sound(part.value, rate) for rate in dict.fromkeys(rates)}
            return [by_rate[rate] for rate in rates]
        except BadRecord as e:
            return e

    def _encoded(self, names: list[str], reads: list[list[DecodedMedia] | BadRecord],
                 banks: UnitBanks) -> dict[str, Medium | BadRecord]:
        self._encode_pictures({name: read[0] for name, read in zip(names, reads, strict=True)
                               if not isinstance(read, BadRecord) and name.startswith(f"{IMAGE}/")})
        found: dict[str, Medium | BadRecord] = {}
        for name, read in zip(names, reads, strict=True):
            if isinstance(read, BadRecord):
                found[name] = read
                continue
            kind = name.partition("/")[0]
            found[name] = (self._sound(name, read, banks) if kind == AUDIO
                           else self._picture(name, read[0], banks, is_video=kind == VIDEO))
        return found

    def _encode_pictures(self, reads: dict[str, DecodedMedia]) -> None:
        if self.images is None:
            return
        import torch

        todo = [name for name in reads if name not in self._known]
        for start in range(0, len(todo), BATCH):
            here = todo[start:start + BATCH]
            side = self.images.side_pixels
            # The batch always has its full size: kernels chosen by size would give other last bits.
            batch = np.zeros((BATCH, 3, side, side), np.float32)
            for i, name in enumerate(here):
                batch[i] = reads[name].arrays[0].astype(np.float32) / 255
            with torch.inference_mode():
                ids = self.images.encode(torch.from_numpy(batch).to(self._settings.device)).cpu().numpy()
            for i, name in enumerate(here):
                numbers = _checked(ids[i], self.images, self._settings.image_tokenizer)
                self._remember(name, format_image_tokens(numbers, self.images.grid, reads[name].width,
                                                    reads[name].height))

    def _picture(self, name: str, read: DecodedMedia, banks: UnitBanks, *, is_video: bool) -> Medium:
        rows: list[int] = []
        if PICTURES in self._banks:
            records = read.arrays[-1] if is_video else read.arrays[-1][None]
            rows = banks.add(PICTURES, name, records)
        slots = self._banks[PICTURES].slots if rows else 0
        return Medium(read.mime_type, "" if is_video else self._known.get(name, ""), read.duration_s,
                      PICTURES if rows else "", tuple((row, slots) for row in rows))

    def _sound(self, name: str, reads: list[DecodedMedia], banks: UnitBanks) -> Medium:
        if self.sounds is not None and name not in self._known:
            numbers = [n for piece in self._pieces(reads[0].arrays[0]) for n in piece]
            self._remember(name, format_audio_tokens(numbers))
        rows: list[tuple[int, int]] = []
        if self._spectrograms is not None:
            records, frames = self._spectrograms.compute_pieces(reads[-1].arrays[0])
            shape = self._banks[SOUNDS]
            rows = [(row, shape.count_slots(used))
                    for row, used in zip(banks.add(SOUNDS, name, records), frames, strict=True)]
        return Medium(reads[0].mime_type, self._known.get(name, ""), reads[0].duration_s,
                      SOUNDS if rows else "", tuple(rows))

    def _pieces(self, samples: np.ndarray) -> Iterator[list[int]]:
        import torch

        piece = int(self.sounds.max_piece_s * self.sounds.sample_rate_hz)
        for start in range(0, len(samples), piece):
            with torch.inference_mode():
                # A copy: torch takes no array that may not be written to.
                sound = torch.from_numpy(samples[start:start + piece].copy()).to(self._settings.device)
                ids = self.sounds.encode(sound).cpu().numpy()
            yield _checked(ids, self.sounds, self._settings.audio_tokenizer)

    def _remember(self, name: str, block: str) -> None:
        self._known[name] = block
        while len(self._known) > KEPT:
            self._known.popitem(last=False)


def _opened(folder: Path | None, option: str, device: str, *needed: str) -> Any:
    if folder is None:
        return None
    from megatron_sov.omni.codecs.folder import open_codec

    codec = open_codec(folder, device)
    if not all(hasattr(codec, name) for name in needed):
        raise UserError(f"{option} {folder}: is a codec of another kind ({type(codec).__name__}); pass a "
                        "tokenizer")
    return codec


def _checked(ids: np.ndarray, codec: Any, folder: Path | None) -> list[int]:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < codec.codebook_size:
        raise UserError(f"{folder}: gives entries from {ids.min()} to {ids.max()} of a codebook of "
                        f"{codec.codebook_size}; make the codec again, or restore it from a copy")
    return [int(n) for n in ids]


CHAT, TEXT = "chat", "text"
"""Kinds of records, as `sov-data pack --format` names them."""
KINDS = (IMAGE, AUDIO, VIDEO)


@dataclass(frozen=True)
class MessagePart:
    """A piece of a content."""

    kind: str
    """"text", or one of `KINDS`."""
    value: str
    """The text, or the path."""


@dataclass(frozen=True)
class MediaMessage:
    """Parts that somebody says."""

    fields: dict[str, Any]
    """The message's other fields, its role among them; {} of a document."""
    parts: tuple[MessagePart, ...] | None
    """What it says; None: it has no content."""

    @property
    def is_drawn(self) -> bool:
        """Whether its media are what a model draws and says, and not what it is shown."""
        return self.fields.get("role") == "assistant"


@dataclass(frozen=True)
class MediaRecord:
    """A record of the input."""

    kind: str
    """`CHAT` or `TEXT`."""
    fields: dict[str, Any]
    messages: tuple[MediaMessage, ...]
    """Of a document: one."""

    def media(self) -> Iterator[MessagePart]:
        for message in self.messages:
            yield from (part for part in message.parts or () if part.kind in KINDS)


def parse_record(line: bytes) -> MediaRecord:
    """Return the record of a line.

    Raises:
        BadRecord: it is no chat or document, a part is none, or its text spells a token of media.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({e}); every line must be one JSON object") from None
    check_depth(record)
    if not isinstance(record, dict) or ("messages" in record) == ("content" in record):
        raise BadRecord("fields", "must be an object with either 'messages' (a chat) or 'content' (a "
                                  "document)")
    if FEATURES in record:
        raise BadRecord("fields", f"has a field {FEATURES!r}, which this step writes; remove it")
    if "content" in record:
        kind, own = TEXT, "content"
        messages = [MediaMessage({}, _parts(record["content"], "content"))]
    else:
        kind, own = CHAT, "messages"
        messages = _messages(record["messages"])
    fields = {name: value for name, value in record.items() if name != own}
    if kind == TEXT and "text" in fields:
        raise BadRecord("fields", "has both 'content' and 'text'; leave one out")
    # Fields count as well: templates may put any of them into the text.
    _refuse_marks([fields, *(m.fields for m in messages),
                   *(p.value for m in messages for p in m.parts or () if p.kind == "text")])
    return MediaRecord(kind, fields, tuple(messages))


def _messages(value: Any) -> list[MediaMessage]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRecord("fields", "'messages' must be a non-empty list of objects with 'role' and 'content'")
    found = []
    for i, message in enumerate(value):
        fields = {name: part for name, part in message.items() if name != "content"}
        content = message.get("content")
        found.append(MediaMessage(fields, None if content is None else _parts(content,
                                                                              f"messages[{i}].content")))
    return found


def _parts(content: Any, where: str) -> tuple[MessagePart, ...]:
    if isinstance(content, str):
        return (MessagePart("text", content),)
    if not isinstance(content, list) or not content:
        raise BadRecord("fields", f"{where} is {str(content)[:80]!r}, must be a string or a list of parts")
    return tuple(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> MessagePart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return MessagePart("text", part["text"])
    if kind not in KINDS or not isinstance(part.get("path"), str):
        raise BadRecord("fields", f"{where} is {str(part)[:80]!r}, must be "
                                  '{"type": "text", "text": ...} or {"type": "image", "path": ...}, '
                                  '"audio" or "video"')
    return MessagePart(kind, part["path"])


def _refuse_marks(values: list[Any]) -> None:
    if mark := find_media_token(json.dumps(values, ensure_ascii=False)):
        raise BadRecord("mark", f"spells {mark!r}, which is a token of media; remove it: media are named by "
                                "their paths alone")
