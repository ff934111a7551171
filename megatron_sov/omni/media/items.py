"""What stands in a text for one picture, sound or video.

The order of an item's blocks is that of the chat template of HyperCLOVA X 8B Omni's serving code (github
NAVER-Cloud-HyperCLOVA-X/OmniServe, omni_chainer/tests/chat_template/track_b): what the item is, how long it
is, its discrete tokens, then its continuous ones; a video has continuous ones alone.  A picture that the
model draws is a tool call whose argument is the discrete block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sov.base.chat.media_tokens import (
    AUDIO, AUDIO_AUX, AUDIO_PAD, CONTINUOUS_AUDIO, CONTINUOUS_IMAGE, CONTINUOUS_VIDEO, DISCRETE_AUDIO,
    DISCRETE_IMAGE, END_OF_FRAME, END_OF_LINE, IMAGE, IMAGE_PAD, MIME, RATIOS, VIDEO, VIDEO_AUX, VIDEO_PAD,
    entry, ratio)

TOOL, ARGUMENT = "t2i_model_generation", "discrete_image_token"
"""The call by which a model draws, and its argument."""
_AUX = {AUDIO: (AUDIO_AUX, "다음 중 audio_duration은 오디오 길이 정보입니다. 참고하여 답변하세요. "),
        VIDEO: (VIDEO_AUX, "다음 중 video_duration은 비디오 길이 정보입니다. 참고하여 답변하세요. ")}
"""Marks around the sentence about an item's length, and the published sentence."""
_CONTINUOUS = {IMAGE: (CONTINUOUS_IMAGE, IMAGE_PAD), AUDIO: (CONTINUOUS_AUDIO, AUDIO_PAD),
               VIDEO: (CONTINUOUS_VIDEO, VIDEO_PAD)}


@dataclass(frozen=True)
class MediaItem:
    """A medium that a model is shown."""

    kind: str
    """`IMAGE`, `AUDIO` or `VIDEO`."""
    number: int
    """Which one of its kind it is in the conversation, from 0."""
    mime_type: str
    """As in image/png."""
    filename: str
    """Its name, without folders."""
    duration_s: float = 0.0
    """Length of a sound or video, in seconds."""
    discrete: str = ""
    """Its discrete block (`discrete_image`, `discrete_audio`); "": none."""
    num_placeholders: int = 0
    """Features that are put over its placeholders; 0: none."""

    def text(self) -> str:
        """Return its blocks, in the published order."""
        blocks = [_mime(self)]
        if self.kind in _AUX:
            (start, end), sentence = _AUX[self.kind]
            said = json.dumps({f"{self.kind}_duration": f"{self.duration_s:.2f}"})
            blocks.append(f"{start}{sentence}{said}{end}")
        if self.discrete and self.kind != VIDEO:
            blocks.append(self.discrete)
        if self.num_placeholders:
            (start, end), pad = _CONTINUOUS[self.kind]
            blocks.append(f"{start}{pad * self.num_placeholders}{end}")
        return "\n".join(blocks)


def _mime(item: MediaItem) -> str:
    """Return the JSON that says what an item is, between its marks; a name cannot spell a mark there."""
    said = json.dumps({"id": f"{item.kind}_{item.number:02d}", "type": item.mime_type,
                       "filename": item.filename}, ensure_ascii=False)
    return f"{MIME[0]}{said.replace('<', chr(92) + 'u003c')}{MIME[1]}"


def discrete_image(numbers: Sequence[int], columns: int, width: int, height: int) -> str:
    """Return the discrete block of a picture.

    Args:
        numbers: codebook entries, row by row.
        columns: of a row.
        width: of the picture before it was made square, in pixels.
        height: likewise.
    """
    rows = ["".join(entry(IMAGE, n) for n in numbers[i:i + columns]) + END_OF_LINE
            for i in range(0, len(numbers), columns)]
    return f"{DISCRETE_IMAGE[0]}{ratio(*nearest_ratio(width, height))}{''.join(rows)}{END_OF_FRAME}" \
           f"{DISCRETE_IMAGE[1]}"


def discrete_audio(numbers: Sequence[int]) -> str:
    """Return the discrete block of a sound."""
    return f"{DISCRETE_AUDIO[0]}{''.join(entry(AUDIO, n) for n in numbers)}{DISCRETE_AUDIO[1]}"


def drawing_call(block: str) -> dict[str, object]:
    """Return the tool call by which a model draws the picture of a discrete block, as OpenAI spells calls."""
    return {"type": "function", "function": {"name": TOOL, "arguments": {ARGUMENT: block}}}


def nearest_ratio(width: int, height: int) -> tuple[int, int]:
    """Return the ratio of `media_tokens.RATIOS` whose logarithm is nearest to that of a picture."""
    wanted = math.log(width / height)
    return min(RATIOS, key=lambda r: abs(math.log(r[0] / r[1]) - wanted))
