"""Tokens for images, audio and video: spelling, and ids in a vocabulary.

The spelling follows HyperCLOVA X 8B Omni: marks and placeholders from the chat template in its serving code
(github NAVER-Cloud-HyperCLOVA-X/OmniServe, omni_chainer/tests/chat_template/track_b), codebook tokens from
its released model code (`<|vision00000|>` to `<|vision65535|>`, `<|audio0000|>`).

Text tokens come first; each medium has a block of ids after them: codebook index `i` has id `first + i`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError

MEDIA = "media"
"""Field in a tokenizer's manifest: kind -> first id and block size."""
AUDIO, IMAGE, VIDEO = "audio", "image", "video"
"""Media kinds; video has no discrete tokens."""
MIME = ("<|mime_start|>", "<|mime_end|>")
"""Around the JSON description of an item."""
AUDIO_AUX, VIDEO_AUX = (("<|audio_aux_start|>", "<|audio_aux_end|>"),
                        ("<|video_aux_start|>", "<|video_aux_end|>"))
"""Around the sentence with the duration of audio or video."""
DISCRETE_IMAGE = ("<|discrete_image_start|>", "<|discrete_image_end|>")
DISCRETE_AUDIO = ("<|discrete_audio_start|>", "<|discrete_audio_end|>")
"""Around codebook tokens."""
CONTINUOUS_IMAGE, CONTINUOUS_AUDIO, CONTINUOUS_VIDEO = (
    ("<|image_start|>", "<|image_end|>"), ("<|audio_start|>", "<|audio_end|>"),
    ("<|video_start|>", "<|video_end|>"))
"""Around continuous-feature placeholders."""
IMAGE_PAD, AUDIO_PAD, VIDEO_PAD = "<|IMAGE_PAD|>", "<|AUDIO_PAD|>", "<|VIDEO_PAD|>"
"""Placeholders, one per continuous feature."""
END_OF_LINE, END_OF_FRAME = "<|vision_eol|>", "<|vision_eof|>"
"""After each row of a discrete image, and after the last row."""
_HALF = ((1, 1), (1, 2), (3, 4), (3, 5), (4, 5), (6, 9), (9, 16))
DIGITS = {AUDIO: 4, IMAGE: 5}
"""Zero-padded digits in a codebook token."""
_NAMES = {AUDIO: "audio", IMAGE: "vision"}
RATIOS = (*_HALF, *((h, w) for w, h in _HALF if w != h))
"""Width:height ratios of the published image decoder (decoder/vision/track_b/serve.py)."""
_ENTRY = {kind: re.compile(rf"<\|{name}(\d{{{DIGITS[kind]},}})\|>") for kind, name in _NAMES.items()}


@dataclass(frozen=True)
class VocabularyBlock:
    """Token id range for a codebook."""

    kind: str
    """`AUDIO` or `IMAGE`."""
    first: int
    """Id of codebook index 0."""
    size: int
    """Codebook size."""

    @property
    def end(self) -> int:
        """Exclusive end of the id range."""
        return self.first + self.size


def describe_blocks(blocks: Iterable[VocabularyBlock]) -> dict[str, dict[str, int]]:
    return {block.kind: {"first": block.first, "size": block.size} for block in blocks}


def read_blocks(record: Any, where: str) -> dict[str, VocabularyBlock]:
    """Parse blocks written by `describe_blocks` into kind -> block; {} without record. Raises `UserError`:
    the record is invalid; `where` names its file."""
    try:
        return {kind: VocabularyBlock(kind, int(record[kind]["first"]), int(record[kind]["size"]))
                for kind in (AUDIO, IMAGE) if kind in (record or {})}
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where}: {MEDIA} = {str(record)[:200]} cannot be read ({e}); make the tokenizer "
                        "again with `sov-tokenizer media`") from None


def codebook_token(kind: str, number: int) -> str:
    """Return the token text of a codebook index; `kind`: AUDIO or IMAGE."""
    return f"<|{_NAMES[kind]}{number:0{DIGITS[kind]}d}|>"


def parse_codebook_tokens(kind: str, text: str) -> list[int]:
    """Return the codebook indices in a text, in order."""
    return [int(number) for number in _ENTRY[kind].findall(text)]


def display_name(token: str) -> str:
    """Return a token's name for messages; codebook tokens are abbreviated to `<|vision...|>`."""
    kind = next((kind for kind, pattern in _ENTRY.items() if pattern.fullmatch(token)), None)
    return f"<|{_NAMES[kind]}...|>" if kind else token


def ratio_token(width: int, height: int) -> str:
    return f"<|vision_ratio_{width}:{height}|>"


# the order determines ids in new vocabularies: append only
MARKS = (*MIME, *AUDIO_AUX, *VIDEO_AUX, *DISCRETE_IMAGE, *DISCRETE_AUDIO, *CONTINUOUS_IMAGE,
         *CONTINUOUS_AUDIO, *CONTINUOUS_VIDEO, IMAGE_PAD, AUDIO_PAD, VIDEO_PAD,
         *(ratio_token(w, h) for w, h in RATIOS), END_OF_LINE, END_OF_FRAME)
"""All media tokens except codebook tokens, in vocabulary order."""
# longest first, because a mark may be a prefix of another
MEDIA_TOKEN = re.compile("|".join([*map(re.escape, sorted(MARKS, key=len, reverse=True)),
                                   *(pattern.pattern.replace("(", "(?:") for pattern in _ENTRY.values())]))
"""Pattern of any media token."""


def find_media_token(text: str) -> str:
    match = MEDIA_TOKEN.search(text)
    return match.group() if match else ""
