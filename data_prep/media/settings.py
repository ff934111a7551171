"""What `sov-data encode-media` is asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_sov.artifacts import manifest_sha256, read_manifest
from megatron_sov.errors import UserError
from megatron_sov.media.banks import PICTURES, SOUNDS, BankShape
from megatron_sov.media.reading.limits import MediaLimits
from megatron_sov.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ
from megatron_sov.settings import check

CODE_VERSION = 1
"""Raised when the same input and settings would give another unit."""
Animated = Literal["refuse", "first"]
Drawn = Literal["call", "content"]
BadMedia = Literal["stop", "skip"]
STOP, SKIP = get_args(BadMedia)
CALL, CONTENT = get_args(Drawn)


@dataclass(frozen=True)
class MediaSettings:
    """How media become text and banks."""

    media_root: Path
    """Folder of the media; nothing outside of it is read."""
    image_tokenizer: Path | None = None
    """Codec of pictures; None: they have no discrete tokens."""
    audio_tokenizer: Path | None = None
    """Codec of sounds; None: likewise."""
    picture_bank: tuple[int, int] | None = None
    """Side in pixels and slots of pictures whose features are put over placeholders; None: none are."""
    sound_bank: tuple[int, int, int] | None = None
    """Mels, seconds of a piece, and slots of it; None: none are."""
    frames_per_s: float = 1.0
    """Frames of a video that are taken of a second."""
    most_frames: int = 64
    """Of a video."""
    animated: Animated = "refuse"
    """What becomes of an animated picture: "refuse", or "first" takes its first frame."""
    drawn: Drawn = "call"
    """Where a picture stands that an assistant draws: `CALL`, a tool call as the published model draws; or
    `CONTENT`, in what it says, for templates that show no calls."""
    bad_media: BadMedia = "stop"
    """What becomes of a record with a bad medium: `STOP` at the first, or `SKIP` and list it."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """Of each medium."""
    device: str = "cpu"
    """Where codecs compute."""

    def problems(self) -> list[str]:
        """Return one sentence for each value that breaks a rule."""
        p = [str(problem.below("limits")) for problem in check(self.limits)]
        if not self.media_root.is_dir():
            p.append(f"--media-root {self.media_root}: is no folder; name the one that paths in the "
                     "records begin "
                     "from")
        if not any((self.image_tokenizer, self.audio_tokenizer, self.picture_bank, self.sound_bank)):
            p.append("nothing says what becomes of media; pass --image-tokenizer, --audio-tokenizer, "
                     "--continuous-pictures or --continuous-sounds")
        if self.picture_bank is not None and not (
                0 < self.picture_bank[0] <= 4096 and 0 < self.picture_bank[1] <= 1 << 16):
            p.append(f"--continuous-pictures {_spelled(self.picture_bank)}: a side of 1..4096 pixels and "
                     "1..65536 slots")
        if self.sound_bank is not None and not (
                0 < self.sound_bank[0] <= 1024 and 0 < self.sound_bank[1] <= 600
                and 0 < self.sound_bank[2] <= 1 << 16):
            p.append(f"--continuous-sounds {_spelled(self.sound_bank)}: 1..1024 mels, 1..600 seconds and "
                     "1..65536 slots")
        if not 0 < self.frames_per_s < math.inf or not 1 <= self.most_frames <= 4096:
            p.append(f"--video-frames-per-s {self.frames_per_s}, --video-frames {self.most_frames}: a "
                     "positive "
                     "number, and 1..4096")
        return p

    def banks(self) -> dict[str, BankShape]:
        """Return the banks that are written, by kind."""
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
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                 if f.name not in ("media_root", "device", "limits", "bad_media")}
        codecs: dict[str, str | None] = {}
        for name in ("image_tokenizer", "audio_tokenizer"):
            if (path := facts[name]) is not None:
                read_manifest(path, "codec")
            codecs[name] = None if path is None else manifest_sha256(path)
        return json.dumps({**facts, **codecs, "limits": dataclasses.asdict(self.limits),
                           "code": CODE_VERSION}, sort_keys=True)


def _spelled(numbers: tuple[int, ...]) -> str:
    return ":".join(map(str, numbers))


def parse_numbers(option: str, text: str | None, names: str) -> tuple[int, ...] | None:
    """Return the numbers of an option such as 448:256.

    Raises:
        UserError: they are not as many numbers as `names` has parts.
    """
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != len(names.split(":")) or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{option} {text}: must be {names}, whole numbers with colons between them")
    return tuple(map(int, parts))
