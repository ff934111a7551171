"""`sov-data encode-media`: options."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Le

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.errors import Fix
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, DeclaredCommand, Flag, ProblemCode, SettingsProblem, Violation, count_cores,
    requires_field)
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.banks import BankShape
from megatron_sov.omni.media.reading.limits import MediaLimits
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ
from megatron_sov.work.submit.cluster_options import ClusterOptions

CODE_VERSION = 2
"""Increase when equal input and settings give another unit."""
Animated = Literal["refuse", "first"]
Drawn = Literal["call", "content"]
BadMedia = Literal["stop", "skip"]
STOP, SKIP = get_args(BadMedia)
CALL, CONTENT = get_args(Drawn)


def _bound_numbers(names: str, *limits: int) -> Bound:
    """Return the bound for a text such as 448:256, with a number from 1 per limit, or ""."""
    def find_violation(text: str) -> Violation | None:
        parts = text.split(":")
        fits = len(parts) == len(limits) and all(
            part.isascii() and part.isdigit() and 1 <= int(part[:9]) <= limit
            for part, limit in zip(parts, limits, strict=True))
        if fits or not text:
            return None
        return ProblemCode.BOUND, f"must be {names}, whole numbers from 1 to {':'.join(map(str, limits))}", ""

    return Bound(find_violation)


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """Settings that turn media into text and banks."""

    media_root: Annotated[Path, Flag(value="DIR")]
    """Folder that media paths begin from; files outside are never read."""
    image_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec for discrete picture tokens (default: no tokens)."""
    audio_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec for discrete sound tokens (default: no tokens)."""
    continuous_pictures: Annotated[str, Flag(value="SIDE:SLOTS"),
                                   _bound_numbers("SIDE:SLOTS", 4096, 65536)] = ""
    """Keep pictures and video frames for the model's own encoder: height and width in pixels, and features
    per picture."""
    continuous_sounds: Annotated[str, Flag(value="MELS:SECONDS:SLOTS"),
                                 _bound_numbers("MELS:SECONDS:SLOTS", 1024, 600, 65536)] = ""
    """Likewise sound spectrograms: mels, seconds per piece, and features per piece."""
    video_frames_per_s: Annotated[AboveZero, Flag(value="N")] = 1.0
    """Video frames per second."""
    video_frames: Annotated[AtLeastOne, Le(4096)] = 64
    """Most frames per video."""
    animated: Animated = "refuse"
    """Animated pictures: refuse, or take the first frame."""
    drawn: Drawn = "call"
    """Pictures that an assistant draws: tool calls, as the published model draws, or in the message content,
    for templates that show no calls."""
    bad_media: BadMedia = "stop"
    """Bad records or media: stop at the first, or leave out bad records and list them in bad_media.jsonl."""
    device: Annotated[str, Flag(value="DEVICE")] = "cpu"
    """Where codecs compute, such as cuda."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """Limits per medium."""

    def problems(self) -> list[SettingsProblem]:
        if any((self.image_tokenizer, self.audio_tokenizer, self.continuous_pictures,
                self.continuous_sounds)):
            return []
        return [SettingsProblem(ProblemCode.RULE, "", "nothing says what becomes of media", way_out=
                                "pass --image-tokenizer, --audio-tokenizer, --continuous-pictures or "
                                "--continuous-sounds", fix=Fix(options=("--image-tokenizer", "CODEC")))]

    @property
    def picture_bank(self) -> tuple[int, int] | None:
        """Side in pixels and slots for encoder features of pictures; None: no bank."""
        if not self.continuous_pictures:
            return None
        side, slots = map(int, self.continuous_pictures.split(":"))
        return side, slots

    @property
    def sound_bank(self) -> tuple[int, int, int] | None:
        """Mels, seconds and slots of a sound piece; None: no bank."""
        if not self.continuous_sounds:
            return None
        mels, seconds, slots = map(int, self.continuous_sounds.split(":"))
        return mels, seconds, slots

    def get_banks(self) -> dict[str, BankShape]:
        banks = {}
        if self.picture_bank is not None:
            side, slots = self.picture_bank
            banks[PICTURES] = BankShape(PICTURES, (3, side, side), slots)
        if self.sound_bank is not None:
            mels, seconds, slots = self.sound_bank
            banks[SOUNDS] = BankShape(SOUNDS, (mels, seconds * SAMPLE_RATE_HZ // HOP_SAMPLES), slots,
                                      sample_rate_hz=SAMPLE_RATE_HZ, hop_samples=HOP_SAMPLES)
        return banks

    def format_identity(self) -> str:
        """Return JSON with the settings that determine a unit without bad records. Raises `UserError`: a
        folder without codec."""
        # media root, device and handling of bad records change no good unit
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                                 if f.name not in ("media_root", "device", "limits", "bad_media")}
        for name in ("image_tokenizer", "audio_tokenizer"):
            if (path := facts[name]) is not None:
                read_manifest(path, "codec")
                # a moved codec keeps the same hash
                facts[name] = manifest_sha256(path)
        return json.dumps({**facts, "limits": dataclasses.asdict(self.limits), "code": CODE_VERSION},
                          sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class EncodeMediaOptions(ClusterOptions):
    """Turn records that name pictures, sounds and videos into text with discrete tokens in their place, and
    into banks for continuous encoders. `sov-data pack` reads both.

    A killed command continues when run again."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """JSONL files, or folders with such files: chats ("messages") or documents ("content") whose parts are
    {"type": "text" | "image" | "audio" | "video", ...}."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the media corpus."""
    settings: MediaSettings
    threads: AtLeastOne = field(default_factory=count_cores)
    """Media decoded at a time, each in its own process; the output does not depend on it (default: this
    machine's cores)."""
    workers: Annotated[AtLeastOne | None, requires_field("cluster")] = None
    """With --cluster: jobs that encode (default: 4)."""
    overwrite: bool = False
    """Replace an existing media corpus."""


ENCODE_MEDIA = DeclaredCommand(EncodeMediaOptions, runs_in_checks=True,
                               run_function="data_prep.media.encode_media_run:run_encode_media")
