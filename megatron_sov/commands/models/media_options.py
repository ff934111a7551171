"""Codecs and folders of commands that show media to a model, or have it draw and speak."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, Flag, NotNegativeInt
from megatron_sov.commands.shared_options import ModelPath, RecordOptions
from megatron_sov.infer.request import Batching, BatchSize, RankOptions, WholeSampling

if TYPE_CHECKING:
    from megatron_sov.infer.media.media_prompts import ShownMedia
    from megatron_sov.infer.media.media_replies import MediaDecoders


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


def shown_media(args: CodecsOptions, root: Path) -> ShownMedia:
    """Return what sees and hears media below a folder."""
    from megatron_sov.infer.media.media_prompts import ShownMedia

    given = {IMAGE: args.image_tokenizer, AUDIO: args.audio_tokenizer}
    return ShownMedia(root, {kind: folder for kind, folder in given.items() if folder is not None})


def media_decoders(args: CodecsOptions, seed: int) -> MediaDecoders:
    """Return what draws and speaks."""
    from megatron_sov.infer.media.media_replies import MediaDecoders

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


@dataclass(frozen=True)
class ReplySampling(WholeSampling):
    """How each token of a reply is chosen."""

    max_new_tokens: AtLeastOne = 1024
    """Longest reply."""


@dataclass(frozen=True, kw_only=True)
class EvalMediaOptions(CodecsOptions, RecordOptions, RankOptions):
    """From text, pictures and speech to one another, judged by what is recognised."""

    target: ModelPath
    data: Annotated[tuple[str, ...], Flag(value="PAIR=FILE.jsonl")] = ()
    """Rows of a pair (image-text, image-audio, text-image, text-audio, audio-text, audio-image,
    audio-audio): {"content": [parts], "answer": "..."}, and "labels" where a judge chooses; may be
    repeated."""
    media_root: Annotated[Path, Flag(value="DIR")]
    """Folder that paths of media begin from; nothing outside of it is read."""
    image_judge: Annotated[str | None, Flag(value="FILE.py:NAME|COMMAND")] = None
    """Recognises what the model draws: a function (files, labels) -> texts, or a program."""
    audio_judge: Annotated[str | None, Flag(value="FILE.py:NAME|COMMAND")] = None
    """Recognises what the model says, likewise."""
    files: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Folder for what the model draws and says, where a pair asks for that."""
    sampling: ReplySampling = field(default_factory=ReplySampling)
    no_chat: bool = False
    """Do not frame prompts by the chat template."""
    batch_size: BatchSize = Batching.batch_size
    output: Annotated[Path | None, Flag(value="FILE.json")] = None
    """Write figures and every sample as JSON."""
    retrieval: Annotated[tuple[str, ...], Flag(value="PAIR=FILE.jsonl")] = ()
    """Rows of a pair (image-text, audio-text), as --data has them: rank the answers of all rows behind what
    each shows, and back; may be repeated."""
    candidates: Annotated[int, Ge(2)] = 100
    """Rows that are candidates for each other at most."""
