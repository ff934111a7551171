"""What `sov-data encode-media` is asked for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Le

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, Breach, Flag, ProblemCode, SettingsProblem, num_cores, only_with)
from megatron_sov.omni.media.banks import PICTURES, SOUNDS, BankShape
from megatron_sov.omni.media.reading.kinds import MediaLimits
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ
from megatron_sov.work.submit.cluster_options import ClusterOptions

CODE_VERSION = 1
"""Raised when the same input and settings would give another unit."""
Animated = Literal["refuse", "first"]
Drawn = Literal["call", "content"]
BadMedia = Literal["stop", "skip"]
STOP, SKIP = get_args(BadMedia)
CALL, CONTENT = get_args(Drawn)


def _numbers(names: str, *most: int) -> Bound:
    """Return the bound of a text such as 448:256, or of none: as many numbers as `most` has."""
    def broken(text: str) -> Breach | None:
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
        """Return what does not fit together."""
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


@dataclass(frozen=True, kw_only=True)
class EncodeMediaOptions(ClusterOptions):
    """Turn records that name pictures, sounds and videos into text in which discrete tokens stand in their
    place, and into banks of what continuous encoders will see; `sov-data pack` reads both.

    A killed command continues where it was when it is run again."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """JSONL files, or folders of them: chats ("messages") or documents ("content") whose parts are {"type":
    "text" | "image" | "audio" | "video", ...}."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for what is written."""
    settings: MediaSettings
    threads: AtLeastOne = field(default_factory=num_cores)
    """Media that are decoded at a time, each by a process of its own; the output does not depend on it
    (default: this machine's cores)."""
    workers: Annotated[AtLeastOne | None, only_with("cluster")] = None
    """With --cluster: jobs that encode (default: 4)."""
    overwrite: bool = False
    """Replace what is already there."""
