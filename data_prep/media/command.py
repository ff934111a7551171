"""`sov-data encode-media`: records that name pictures, sounds and videos become text that `sov-data pack`
reads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_prep.media.settings import CALL, CONTENT, SKIP, STOP, MediaSettings, parse_numbers
from megatron_sov.errors import UserError
from megatron_sov.media.reading.limits import MediaLimits

DESCRIPTION = """Turn records that name pictures, sounds and videos into text in which discrete tokens
stand in
their place, and into banks of what continuous encoders will see; `sov-data pack` reads both. A killed command
continues where it was when it is run again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = MediaSettings(Path())
    parser.description = DESCRIPTION
    parser.add_argument("--input", required=True, nargs="+", action="extend", type=Path, metavar="PATH",
                        help='JSONL files, or folders of them: chats ("messages") or documents ("content") '
                             'whose parts are {"type": "text" | "image" | "audio" | "video", ...}')
    parser.add_argument("--media-root", required=True, type=Path, metavar="DIR",
                        help="folder that the paths of media begin from; nothing outside of it is read")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for what is "
                                                                                  "written")
    parser.add_argument("--image-tokenizer", type=Path, metavar="CODEC",
                        help="codec that makes discrete tokens of pictures (default: they get none)")
    parser.add_argument("--audio-tokenizer", type=Path, metavar="CODEC",
                        help="codec that makes discrete tokens of sounds (default: they get none)")
    parser.add_argument("--continuous-pictures", metavar="SIDE:SLOTS",
                        help="keep pictures and frames of videos for the model's own encoder: height and "
                             "width in "
                             "pixels, and its features of each")
    parser.add_argument("--continuous-sounds", metavar="MELS:SECONDS:SLOTS",
                        help="likewise spectrograms of sounds: mels, length of a piece, and features of each")
    parser.add_argument("--video-frames-per-s", type=float, default=default.frames_per_s, metavar="N",
                        help="frames that are taken of a second (default %(default)g)")
    parser.add_argument("--video-frames", type=int, default=default.most_frames, metavar="N",
                        help="most frames of a video (default %(default)s)")
    parser.add_argument("--animated", choices=("refuse", "first"), default=default.animated,
                        help="animated pictures: refuse them, or take the first frame (default %(default)s)")
    parser.add_argument("--drawn", choices=(CALL, CONTENT), default=default.drawn,
                        help="pictures of an assistant: tool calls, as the published model draws, or in "
                             "what it "
                             "says, for templates that show no calls (default %(default)s)")
    parser.add_argument("--bad-media", choices=(STOP, SKIP), default=default.bad_media,
                        help="records that are bad, or name a bad medium: stop at the first, or leave them "
                             "out and "
                             "list them in bad_media.jsonl (default %(default)s)")
    _add_limits(parser)
    parser.add_argument("--device", metavar="DEVICE", default=default.device,
                        help="where codecs compute, such as cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="media that are decoded at a time, each by a process of its own; the output "
                             "does not "
                             "depend on it (default: this machine's cores)")
    parser.add_argument("--cluster", default="", metavar="PROFILE",
                        help="submit the run to Slurm: a cluster profile that comes with the package, or a "
                             "YAML "
                             "file of your own")
    parser.add_argument("--account", metavar="NAME", help="Slurm account, where the profile names none")
    parser.add_argument("--partition", metavar="NAME", help="Slurm partition, in place of the profile's")
    parser.add_argument("--workers", type=int, metavar="N", help="with --cluster: jobs that encode "
                                                                 "(default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is already there")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    default = MediaLimits()
    parser.add_argument("--max-file-bytes", type=int, default=default.file_bytes, metavar="N",
                        help="of a medium's file (default %(default)s)")
    parser.add_argument("--max-pixels", type=int, default=default.pixels, metavar="N",
                        help="of a picture (default %(default)s)")
    parser.add_argument("--max-duration", type=float, default=default.duration_s, metavar="S",
                        help="of a sound or video, in seconds (default %(default)g)")
    parser.add_argument("--max-time", type=float, default=default.time_s, metavar="S",
                        help="processor time to decode a medium, in seconds (default %(default)g)")
    parser.add_argument("--max-memory-bytes", type=int, default=default.memory_bytes, metavar="N",
                        help="of the process that decodes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data encode-media`; returns 0."""
    from data_prep.media.running import Order, run_order

    pictures = parse_numbers("--continuous-pictures", args.continuous_pictures, "SIDE:SLOTS")
    sounds = parse_numbers("--continuous-sounds", args.continuous_sounds, "MELS:SECONDS:SLOTS")
    limits = MediaLimits(args.max_file_bytes, args.max_pixels, args.max_duration, args.max_time,
                         args.max_memory_bytes)
    settings = MediaSettings(
        args.media_root, args.image_tokenizer, args.audio_tokenizer,
        None if pictures is None else (pictures[0], pictures[1]),
        None if sounds is None else (sounds[0], sounds[1], sounds[2]), args.video_frames_per_s,
        args.video_frames, args.animated, args.drawn, args.bad_media, limits, args.device)
    order = Order(tuple(args.input), args.output, settings, args.threads, args.overwrite)
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
