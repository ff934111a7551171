"""What stands in a text for one picture, sound or video, and the ids that it has there.

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

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.shard_files import NO_FEATURE
from megatron_sov.chat.media_tokens import (
    AUDIO, AUDIO_AUX, AUDIO_PAD, CONTINUOUS_AUDIO, CONTINUOUS_IMAGE, CONTINUOUS_VIDEO, DISCRETE_AUDIO,
    DISCRETE_IMAGE, END_OF_FRAME, END_OF_LINE, IMAGE, IMAGE_PAD, MEDIA_TOKEN, MIME, RATIOS, VIDEO, VIDEO_AUX,
    VIDEO_PAD, codebook_token, ratio_token)
from megatron_sov.model.modality import PICTURES, SOUNDS, MediaEncoding, Rows
from megatron_sov.omni.media.banks import KINDS

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
    rows = ["".join(codebook_token(IMAGE, n) for n in numbers[i:i + columns]) + END_OF_LINE
            for i in range(0, len(numbers), columns)]
    return f"{DISCRETE_IMAGE[0]}{ratio_token(*nearest_ratio(width, height))}{''.join(rows)}{END_OF_FRAME}" \
           f"{DISCRETE_IMAGE[1]}"


def discrete_audio(numbers: Sequence[int]) -> str:
    """Return the discrete block of a sound."""
    return f"{DISCRETE_AUDIO[0]}{''.join(codebook_token(AUDIO, n) for n in numbers)}{DISCRETE_AUDIO[1]}"


def drawing_call(block: str) -> dict[str, object]:
    """Return the tool call by which a model draws the picture of a discrete block, as OpenAI spells calls."""
    return {"type": "function", "function": {"name": TOOL, "arguments": {ARGUMENT: block}}}


def nearest_ratio(width: int, height: int) -> tuple[int, int]:
    """Return the ratio of `media_tokens.RATIOS` whose logarithm is nearest to that of a picture."""
    wanted = math.log(width / height)
    return min(RATIOS, key=lambda r: abs(math.log(r[0] / r[1]) - wanted))


# Tokens of media in texts that `sov-data encode-media` wrote: they are special tokens there, and ordinary
# text where other texts spell them.

PLACEHOLDERS = {PICTURES: (IMAGE_PAD, VIDEO_PAD), SOUNDS: (AUDIO_PAD,)}
"""Bank -> the tokens that stand for its features."""


class MediaVocabulary:
    """The tokens of media of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, encoding: MediaEncoding) -> None:
        """`tokenizer`: one that `sov-tokenizer media` wrote."""
        self._id_of = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()
                       if MEDIA_TOKEN.fullmatch(token.content)}
        self.ids = frozenset(self._id_of.values())
        self._slots = dict(encoding.slots)

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Return ordinary texts and tokens of media with their ids, in order.

        Raises:
            BadRecord: the tokenizer lacks one.
        """
        found: list[tuple[str, int | None]] = []
        start = 0
        for match in MEDIA_TOKEN.finditer(text):
            id_ = self._id_of.get(match.group())
            if id_ is None:
                raise BadRecord("media_token", f"has {match.group()}, and the tokenizer has no such token; "
                                               "make one "
                                               "with `sov-tokenizer media`, as large as the codec's codebook")
            if start < match.start():
                found.append((text[start:match.start()], None))
            found.append((match.group(), id_))
            start = match.end()
        return [*found, (text[start:], None)] if start < len(text) or not found else found

    def placeholder_ids(self, kind: str) -> tuple[int, ...]:
        """Return the tokens that stand for features of a bank."""
        return tuple(self._id_of[token] for token in PLACEHOLDERS[kind] if token in self._id_of)

    def refuse_lost(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Refuse a document whose tokens of media are not all there: a template may leave calls out, or spell
        them otherwise.

        Raises:
            BadRecord: some are not.
        """
        wanted = sum(1 for text in texts for _ in MEDIA_TOKEN.finditer(text))
        if (found := sum(1 for id_ in ids if id_ in self.ids)) != wanted:
            raise BadRecord("media_lost", f"has {wanted} tokens of media, and {found} behind the chat "
                                          "template, which leaves out or respells calls; encode media with "
                                          "--drawn content")

    def numbers(self, ids: Sequence[int], rows: Rows) -> NDArray[np.int64]:
        """Return what the sidecar says of each token: ``row * slots + slot`` of a placeholder, else -1.

        Raises:
            BadRecord: placeholders and features are not as many.
        """
        tokens = np.asarray(ids, np.int64)
        found = np.full(len(tokens), NO_FEATURE, np.int64)
        for kind in KINDS:
            places = np.flatnonzero(np.isin(tokens, self.placeholder_ids(kind)))
            held, slots = rows.get(kind, ()), self._slots.get(kind, 0)
            # rows come from a stranger's record: a wrong one would point into another one's features
            if any(row < 0 or not 0 < used <= slots for row, used in held):
                raise BadRecord("media_rows", f"names rows of {kind} that cannot be; encode the media again")
            features = [row * slots + slot for row, used in held for slot in range(used)]
            if len(features) != len(places):
                raise BadRecord("placeholders", f"has {len(places)} placeholders of {kind} and "
                                                f"{len(features)} features for them; encode the media again")
            found[places] = features
        return found
