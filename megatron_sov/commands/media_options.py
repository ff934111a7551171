"""Codecs and folders of commands that show media to a model, or have it draw and speak."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.errors import UserError
from megatron_sov.media.vocabulary import AUDIO, IMAGE
from megatron_sov.settings import Flag, NotNegativeInt

if TYPE_CHECKING:
    from megatron_sov.generate.made_media import MediaDecoders
    from megatron_sov.generate.shown_media import ShownMedia


@dataclass(frozen=True, kw_only=True)
class CodecsOptions:
    """Codecs of pictures and sounds."""

    image_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that its pictures were encoded with, to show it some."""
    audio_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that its sounds were encoded with, to let it hear some."""
    image_decoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes pictures of its tokens: a decoder, or a tokenizer of `codec train`, by its own plain
    decoder."""
    vocoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes sounds of its tokens, likewise."""
    no_features: bool = False
    """Show discrete tokens alone, also to a model that has learned from features of its encoders."""
    speaker: Annotated[str, Flag(value="NAME")] = ""
    """Voice of the vocoder (default: its first)."""
    max_audio_tokens: NotNegativeInt = 0
    """Longest speech of a reply, in its tokens (default: the reply's length)."""


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare codecs."""
    for option, text in (
            ("--image-tokenizer", "codec that its pictures were encoded with, to show it some"),
            ("--audio-tokenizer", "codec that its sounds were encoded with, to let it hear some"),
            ("--image-decoder", "codec that makes pictures of its tokens: a decoder, or a tokenizer of "
                                "`codec train`, by its own plain decoder"),
            ("--vocoder", "codec that makes sounds of its tokens, likewise")):
        parser.add_argument(option, type=Path, metavar="CODEC", help=text)
    parser.add_argument("--no-features", action="store_true",
                        help="show discrete tokens alone, also to a model that has learned from features of "
                             "its encoders")
    parser.add_argument("--speaker", default="", metavar="NAME", help="voice of the vocoder (default: its "
                                                                      "first)")
    parser.add_argument("--max-audio-tokens", type=int, default=0, metavar="N",
                        help="longest speech of a reply, in its tokens (default: the reply's length)")


def shown_media(args: CodecsOptions, root: Path) -> ShownMedia:
    """Return what sees and hears media below a folder."""
    from megatron_sov.generate.shown_media import ShownMedia

    given = {IMAGE: args.image_tokenizer, AUDIO: args.audio_tokenizer}
    return ShownMedia(root, {kind: folder for kind, folder in given.items() if folder is not None})


def media_decoders(args: CodecsOptions, seed: int) -> MediaDecoders:
    """Return what draws and speaks."""
    from megatron_sov.generate.made_media import MediaDecoders

    given = {IMAGE: args.image_decoder, AUDIO: args.vocoder}
    return MediaDecoders({kind: folder for kind, folder in given.items() if folder is not None},
                         args.speaker, seed)


def check_media(args: CodecsOptions, out: dict[str, Path]) -> None:
    """Raise `UserError` where a folder is asked for and nothing makes what belongs there, or no codec is
    there."""
    for kind, option, codec in ((IMAGE, "--image-decoder", args.image_decoder),
                                (AUDIO, "--vocoder", args.vocoder)):
        if kind in out and codec is None:
            raise UserError(f"--out-{kind} {out[kind]}: needs {option} CODEC, which makes files of tokens")
