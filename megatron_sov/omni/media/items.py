"""Text and token ids of media items: pictures, sounds and videos in a conversation.

The blocks of an item follow the chat template of HyperCLOVA X 8B Omni's serving code (GitHub:
NAVER-Cloud-HyperCLOVA-X/OmniServe, omni_chainer/tests/chat_template/track_b): type, length, discrete tokens,
continuous tokens. Videos have continuous tokens only. To draw a picture, the model calls a tool with the
discrete block as argument.
"""

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
from megatron_sov.omni.media.banks import BANK_KINDS

DRAWING_TOOL, DRAWING_ARGUMENT = "t2i_model_generation", "discrete_image_token"
_LENGTHS = {AUDIO: (AUDIO_AUX, "다음 중 audio_duration은 오디오 길이 정보입니다. 참고하여 답변하세요. "),
            VIDEO: (VIDEO_AUX, "다음 중 video_duration은 비디오 길이 정보입니다. 참고하여 답변하세요. ")}
"""Kind -> marks around an item's length, and the sentence in front of the length, as published."""
_CONTINUOUS = {IMAGE: (CONTINUOUS_IMAGE, IMAGE_PAD), AUDIO: (CONTINUOUS_AUDIO, AUDIO_PAD),
               VIDEO: (CONTINUOUS_VIDEO, VIDEO_PAD)}
PLACEHOLDERS = {PICTURES: (IMAGE_PAD, VIDEO_PAD), SOUNDS: (AUDIO_PAD,)}
"""Bank kind -> placeholder tokens for features."""


@dataclass(frozen=True)
class MediaItem:
    """A picture, sound or video in a prompt."""

    kind: str
    """`IMAGE`, `AUDIO` or `VIDEO`."""
    number: int
    """Index among the conversation's items of this kind."""
    mime_type: str
    """MIME type, such as image/png."""
    filename: str
    """File name without folders."""
    duration_s: float = 0.0
    """Length of a sound or video, in seconds."""
    discrete: str = ""
    """Discrete tokens (`format_image_tokens`, `format_audio_tokens`), or ""."""
    num_placeholders: int = 0
    """Placeholder tokens that encoder features replace."""

    def format_text(self) -> str:
        """Return the item's blocks in the published order."""
        blocks = [self._format_type()]
        if self.kind in _LENGTHS:
            (start, end), sentence = _LENGTHS[self.kind]
            length = json.dumps({f"{self.kind}_duration": f"{self.duration_s:.2f}"})
            blocks.append(f"{start}{sentence}{length}{end}")
        if self.discrete and self.kind != VIDEO:
            blocks.append(self.discrete)
        if self.num_placeholders:
            (start, end), pad = _CONTINUOUS[self.kind]
            blocks.append(f"{start}{pad * self.num_placeholders}{end}")
        return "\n".join(blocks)

    def _format_type(self) -> str:
        description = json.dumps({"id": f"{self.kind}_{self.number:02d}", "type": self.mime_type,
                                  "filename": self.filename}, ensure_ascii=False)
        # Escape "<", because a file name could spell a mark.
        return f"{MIME[0]}{description.replace('<', chr(92) + 'u003c')}{MIME[1]}"


def format_image_tokens(codes: Sequence[int], columns: int, width: int, height: int) -> str:
    """Return a picture's discrete block.

    Args:
        codes: codebook entries, row by row.
        columns: entries per row.
        width: width before the picture was made square, in pixels.
        height: height before the picture was made square, in pixels.
    """
    rows = ["".join(codebook_token(IMAGE, code) for code in codes[i:i + columns]) + END_OF_LINE
            for i in range(0, len(codes), columns)]
    return f"{DISCRETE_IMAGE[0]}{ratio_token(*find_nearest_ratio(width, height))}{''.join(rows)}" \
           f"{END_OF_FRAME}{DISCRETE_IMAGE[1]}"


def format_audio_tokens(codes: Sequence[int]) -> str:
    """Return a sound's discrete block for codebook entries."""
    return f"{DISCRETE_AUDIO[0]}{''.join(codebook_token(AUDIO, code) for code in codes)}{DISCRETE_AUDIO[1]}"


def build_drawing_call(block: str) -> dict[str, object]:
    """Return the OpenAI-style tool call for drawing a discrete block."""
    return {"type": "function", "function": {"name": DRAWING_TOOL, "arguments": {DRAWING_ARGUMENT: block}}}


def find_nearest_ratio(width: int, height: int) -> tuple[int, int]:
    """Return the aspect ratio from `media_tokens.RATIOS` with the nearest logarithm."""
    log_ratio = math.log(width / height)
    return min(RATIOS, key=lambda ratio: abs(math.log(ratio[0] / ratio[1]) - log_ratio))


class MediaVocabulary:
    """A tokenizer's media tokens; implements `model.modality.FeatureTokens`.

    Media tokens are special tokens in texts from `sov-data encode-media` and ordinary text elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer, encoding: MediaEncoding) -> None:
        """Collect the media tokens that `sov-tokenizer media` added to `tokenizer`."""
        self._id_by_token = {token.content: token_id
                             for token_id, token in tokenizer.get_added_tokens_decoder().items()
                             if MEDIA_TOKEN.fullmatch(token.content)}
        self.ids = frozenset(self._id_by_token.values())
        self._slots = dict(encoding.slots)

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Split a text into (ordinary text, None) and (media token, id). Raises `BadRecord`: the tokenizer
        lacks a media token."""
        parts: list[tuple[str, int | None]] = []
        start = 0
        for match in MEDIA_TOKEN.finditer(text):
            token_id = self._id_by_token.get(match.group())
            if token_id is None:
                raise BadRecord("media_token", f"has {match.group()}, which the tokenizer lacks; make one "
                                               "with `sov-tokenizer media`, as large as the codec's codebook")
            if start < match.start():
                parts.append((text[start:match.start()], None))
            parts.append((match.group(), token_id))
            start = match.end()
        if start < len(text) or not parts:
            parts.append((text[start:], None))
        return parts

    def placeholder_ids(self, kind: str) -> tuple[int, ...]:
        """Return the placeholder token ids for a bank kind."""
        return tuple(self._id_by_token[token] for token in PLACEHOLDERS[kind] if token in self._id_by_token)

    def refuse_lost(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Check that encoding preserved the media tokens of a document's `texts`.

        A chat template may drop tool calls, or format their arguments in another way. Raises `BadRecord`: the
        numbers of media tokens differ.
        """
        num_expected = sum(len(MEDIA_TOKEN.findall(text)) for text in texts)
        num_encoded = sum(token_id in self.ids for token_id in ids)
        if num_encoded != num_expected:
            raise BadRecord("media_lost", f"has {num_expected} media tokens, and {num_encoded} after the "
                                          "chat template, which leaves out or respells calls; encode media "
                                          "with --drawn content")

    def numbers(self, ids: Sequence[int], rows: Rows) -> NDArray[np.int64]:
        """Return the sidecar values for tokens: ``row * slots + slot`` for placeholders, else `NO_FEATURE`.

        Args:
            ids: token ids of a document.
            rows: kind -> (bank row, used slots) of the document's records.

        Raises:
            BadRecord: a row is invalid, or the numbers of placeholders and features differ.
        """
        tokens = np.asarray(ids, np.int64)
        numbers = np.full(len(tokens), NO_FEATURE, np.int64)
        for kind in BANK_KINDS:
            places = np.flatnonzero(np.isin(tokens, self.placeholder_ids(kind)))
            kind_rows, slots = rows.get(kind, ()), self._slots.get(kind, 0)
            # Rows come from untrusted records: invalid rows would leak features between documents.
            if any(row < 0 or not 0 < used <= slots for row, used in kind_rows):
                raise BadRecord("media_rows", f"names impossible rows of {kind}; encode the media again")
            features = [row * slots + slot for row, used in kind_rows for slot in range(used)]
            if len(features) != len(places):
                raise BadRecord("placeholders", f"has {len(places)} placeholders of {kind} and "
                                                f"{len(features)} features for them; encode the media again")
            numbers[places] = features
        return numbers
