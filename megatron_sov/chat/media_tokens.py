"""Tokens of media: how a text spells them, and which ids of a vocabulary they have.

The spelling is that of HyperCLOVA X 8B Omni: marks and placeholders as in the chat template of its serving
code (github NAVER-Cloud-HyperCLOVA-X/OmniServe, omni_chainer/tests/chat_template/track_b), codebook entries
as its released model code names them (`<|vision00000|>` to `<|vision65535|>`, `<|audio0000|>`).

A text's tokens come first; each kind of medium has a block of ids behind them, and token `i` of its codebook
is id `first + i`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError

MEDIA = "media"
"""Field of a tokenizer's manifest: kind -> first id and size of its block."""
AUDIO, IMAGE, VIDEO = "audio", "image", "video"
"""Kinds of media; a video has no discrete tokens."""


@dataclass(frozen=True)
class VocabularyBlock:
    """The ids of one codebook."""

    kind: str
    """`AUDIO` or `IMAGE`."""
    first: int
    """Id of its token 0."""
    size: int
    """Tokens of its codebook."""

    @property
    def end(self) -> int:
        """The id behind its last one."""
        return self.first + self.size


def describe_blocks(blocks: Iterable[VocabularyBlock]) -> dict[str, dict[str, int]]:
    return {block.kind: {"first": block.first, "size": block.size} for block in blocks}


def read_blocks(record: Any, where: str) -> dict[str, VocabularyBlock]:
    """Return kind -> block, as `describe_blocks` wrote them; nothing where there is no record.

    Raises:
        UserError: it is no such record; `where` names it.
    """
    try:
        return {kind: VocabularyBlock(kind, int(record[kind]["first"]), int(record[kind]["size"]))
                for kind in (AUDIO, IMAGE) if kind in (record or {})}
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where}: {MEDIA} = {str(record)[:200]} cannot be read ({e}); make the tokenizer "
                        "again with `sov-tokenizer media`") from None


MIME = ("<|mime_start|>", "<|mime_end|>")
"""Around the JSON that says what an item is."""
AUDIO_AUX, VIDEO_AUX = (("<|audio_aux_start|>", "<|audio_aux_end|>"),
                        ("<|video_aux_start|>", "<|video_aux_end|>"))
"""Around the sentence that tells how long a sound or a video is."""
DISCRETE_IMAGE = ("<|discrete_image_start|>", "<|discrete_image_end|>")
DISCRETE_AUDIO = ("<|discrete_audio_start|>", "<|discrete_audio_end|>")
"""Around tokens of a codebook."""
CONTINUOUS_IMAGE, CONTINUOUS_AUDIO, CONTINUOUS_VIDEO = (
    ("<|image_start|>", "<|image_end|>"), ("<|audio_start|>", "<|audio_end|>"),
    ("<|video_start|>", "<|video_end|>"))
"""Around placeholders of continuous features."""
IMAGE_PAD, AUDIO_PAD, VIDEO_PAD = "<|IMAGE_PAD|>", "<|AUDIO_PAD|>", "<|VIDEO_PAD|>"
"""Placeholders: one stands for one feature."""
END_OF_LINE, END_OF_FRAME = "<|vision_eol|>", "<|vision_eof|>"
"""Behind each row of a discrete picture, and behind its last one."""
_HALF = ((1, 1), (1, 2), (3, 4), (3, 5), (4, 5), (6, 9), (9, 16))
RATIOS = (*_HALF, *((h, w) for w, h in _HALF if w != h))
"""Width to height, as the published picture decoder knows them (decoder/vision/track_b/serve.py)."""
DIGITS = {AUDIO: 4, IMAGE: 5}
"""Digits of a codebook entry's number, with zeros in front."""
_NAMES = {AUDIO: "audio", IMAGE: "vision"}
_ENTRY = {kind: re.compile(rf"<\|{name}(\d{{{DIGITS[kind]},}})\|>") for kind, name in _NAMES.items()}


def codebook_token(kind: str, number: int) -> str:
    """Return the token of a codebook entry; `kind`: AUDIO or IMAGE."""
    return f"<|{_NAMES[kind]}{number:0{DIGITS[kind]}d}|>"


def parse_codebook_tokens(kind: str, text: str) -> list[int]:
    """Return the numbers of the codebook entries that a text spells, in order."""
    return [int(number) for number in _ENTRY[kind].findall(text)]


def display_name(token: str) -> str:
    """Return what a token is told as: an entry of a codebook as `<|vision...|>`, any other as it is."""
    kind = next((kind for kind, pattern in _ENTRY.items() if pattern.fullmatch(token)), None)
    return f"<|{_NAMES[kind]}...|>" if kind else token


def ratio_token(width: int, height: int) -> str:
    return f"<|vision_ratio_{width}:{height}|>"


# the order gives ids to tokens of new vocabularies: add at the end, never in between
MARKS = (*MIME, *AUDIO_AUX, *VIDEO_AUX, *DISCRETE_IMAGE, *DISCRETE_AUDIO, *CONTINUOUS_IMAGE,
         *CONTINUOUS_AUDIO, *CONTINUOUS_VIDEO, IMAGE_PAD, AUDIO_PAD, VIDEO_PAD,
         *(ratio_token(w, h) for w, h in RATIOS), END_OF_LINE, END_OF_FRAME)
"""All tokens of media that are no codebook entries, in the order in which a vocabulary gets them."""
# longest first: a mark may be the beginning of another one
MEDIA_TOKEN = re.compile("|".join([*map(re.escape, sorted(MARKS, key=len, reverse=True)),
                               *(pattern.pattern.replace("(", "(?:") for pattern in _ENTRY.values())]))
"""Finds any token of media in a text."""


def find_media_token(text: str) -> str:
    """Return the first token of media that a text spells, or an empty string."""
    found = MEDIA_TOKEN.search(text)
    return found.group() if found else ""
