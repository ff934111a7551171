"""`sov-data encode-media`: records that name pictures, sounds and videos become text that `sov-data pack`
reads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Le

from data_prep.media.settings import Animated, BadMedia, Drawn, MediaSettings, parse_numbers
from megatron_sov.errors import UserError
from megatron_sov.media.reading.limits import MediaLimits
from megatron_sov.settings import AboveZero, AtLeastOne, Flag, add_options, num_cores, read_options

DESCRIPTION = """Turn records that name pictures, sounds and videos into text in which discrete tokens
stand in
their place, and into banks of what continuous encoders will see; `sov-data pack` reads both. A killed command
continues where it was when it is run again."""


@dataclass(frozen=True, kw_only=True)
class EncodeMediaOptions:
    """Turn records that name media into text and banks."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """JSONL files, or folders of them: chats ("messages") or documents ("content") whose parts are {"type":
    "text" | "image" | "audio" | "video", ...}."""
    media_root: Annotated[Path, Flag(value="DIR")]
    """Folder that the paths of media begin from; nothing outside of it is read."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for what is written."""
    image_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes discrete tokens of pictures (default: they get none)."""
    audio_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes discrete tokens of sounds (default: they get none)."""
    continuous_pictures: Annotated[str | None, Flag(value="SIDE:SLOTS")] = None
    """Keep pictures and frames of videos for the model's own encoder: height and width in pixels, and its
    features of each."""
    continuous_sounds: Annotated[str | None, Flag(value="MELS:SECONDS:SLOTS")] = None
    """Likewise spectrograms of sounds: mels, length of a piece, and features of each."""
    video_frames_per_s: Annotated[AboveZero, Flag(value="N")] = MediaSettings.frames_per_s
    """Frames that are taken of a second."""
    video_frames: Annotated[AtLeastOne, Le(4096)] = MediaSettings.most_frames
    """Most frames of a video."""
    animated: Animated = "refuse"
    """Animated pictures: refuse them, or take the first frame."""
    drawn: Drawn = "call"
    """Pictures of an assistant: tool calls, as the published model draws, or in what it says, for templates
    that show no calls."""
    bad_media: BadMedia = "stop"
    """Records that are bad, or name a bad medium: stop at the first, or leave them out and list them in
    bad_media.jsonl."""
    device: Annotated[str, Flag(value="DEVICE")] = MediaSettings.device
    """Where codecs compute, such as cuda."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    threads: AtLeastOne = field(default_factory=num_cores)
    """Media that are decoded at a time, each by a process of its own; the output does not depend on it
    (default: this machine's cores)."""
    cluster: Annotated[str, Flag(value="PROFILE")] = ""
    """Submit the run to Slurm: a cluster profile that comes with the package, or a YAML file of
    your own."""
    account: Annotated[str | None, Flag(value="NAME")] = None
    """Slurm account, where the profile names none."""
    partition: Annotated[str | None, Flag(value="NAME")] = None
    """Slurm partition, in place of the profile's."""
    workers: AtLeastOne | None = None
    """With --cluster: jobs that encode (default: 4)."""
    overwrite: bool = False
    """Replace what is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = DESCRIPTION
    add_options(parser, EncodeMediaOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data encode-media`; returns 0."""
    args = read_options(EncodeMediaOptions, typed)
    from data_prep.media.running import Order, run_order

    pictures = parse_numbers("--continuous-pictures", args.continuous_pictures, "SIDE:SLOTS")
    sounds = parse_numbers("--continuous-sounds", args.continuous_sounds, "MELS:SECONDS:SLOTS")
    settings = MediaSettings(
        args.media_root, args.image_tokenizer, args.audio_tokenizer,
        None if pictures is None else (pictures[0], pictures[1]),
        None if sounds is None else (sounds[0], sounds[1], sounds[2]), args.video_frames_per_s,
        args.video_frames, args.animated, args.drawn, args.bad_media, args.limits, args.device)
    order = Order(args.input, args.output, settings, args.threads, args.overwrite)
    if args.cluster:
        from data_prep.media.slurm_array import submit_order

        submit_order(order, args.cluster, 4 if args.workers is None else args.workers, account=args.account,
                     partition=args.partition)
        return 0
    if idle := [f"--{name}" for name in ("account", "partition", "workers")
                if getattr(args, name) is not None]:
        raise UserError(f"{', '.join(idle)}: only with --cluster; leave it out, or name a profile")
    run_order(order)
    return 0
