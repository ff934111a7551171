"""`split_reply`: the text, pictures and speech in the token ids of a reply."""

import time

import pytest

from megatron_sov.chat import media_tokens as spelling
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock
from megatron_sov.omni.generation.replies import (
    AudioPart, ImagePart, MarkIds, ReplyPart, TextPart, split_reply)
from megatron_sov.omni.media.items import format_audio_tokens, format_image_tokens

WORDS = ["a", "b", *spelling.MARKS]
BLOCKS = (VocabularyBlock(AUDIO, len(WORDS), 20), VocabularyBlock(IMAGE, len(WORDS) + 20, 20))
MARKS = MarkIds.from_vocabulary(lambda name: WORDS.index(name) if name in WORDS else None)


def encode(text: str) -> list[int]:
    """Return the token ids of a text that consists of `WORDS` and codebook tokens."""
    ids = []
    while text:
        word = next((w for w in WORDS if text.startswith(w)), None) or spelling.find_media_token(text)
        numbers = {kind: spelling.parse_codebook_tokens(kind, word) for kind in (AUDIO, IMAGE)}
        ids.append(WORDS.index(word) if word in WORDS else
                   next(block.first + numbers[block.kind][0] for block in BLOCKS if numbers[block.kind]))
        text = text[len(word):]
    return ids


def test_formatted_blocks_split_into_parts() -> None:
    picture, speech = format_image_tokens([3, 1, 4, 1, 5, 9], 3, 900, 1200), format_audio_tokens([2, 7, 1])
    reply = encode(f"ab{picture}b{speech}a")
    assert split_reply(reply, BLOCKS, MARKS) == [
        TextPart((0, 1)), ImagePart((3, 1, 4, 1, 5, 9)), TextPart((1,)), AudioPart((2, 7, 1)),
        TextPart((0,))]


@pytest.mark.each(("ids", "parts"), [
    ([], []),
    (encode(format_image_tokens([1, 2], 2, 1, 1))[:-1], [ImagePart((1, 2), complete=False)]),
    (encode("<|discrete_image_start|>b"), [ImagePart((), complete=False), TextPart((1,))]),
    (encode("<|vision00001|>a<|audio0005|>"),
     [ImagePart((1,), complete=False), TextPart((0,)), AudioPart((5,))]),
    (encode("<|audio0001|>b<|audio0002|>"), [AudioPart((1,)), TextPart((1,)), AudioPart((2,))]),
    (encode("<|discrete_image_start|><|vision00001|><|discrete_image_start|><|vision00002|>"),
     [ImagePart((1,), complete=False), ImagePart((2,), complete=False)]),
])
def test_incomplete_replies_are_split(ids: list[int], parts: list[ReplyPart]) -> None:
    assert split_reply(ids, BLOCKS, MARKS) == parts


def test_an_end_mark_without_start_mark_completes_a_picture() -> None:
    end = WORDS.index(spelling.DISCRETE_IMAGE[1])
    marks = MarkIds.from_vocabulary(lambda name: end if name == spelling.DISCRETE_IMAGE[1] else None)
    assert split_reply([0, BLOCKS[1].first, end, 1], BLOCKS, marks) == [
        TextPart((0,)), ImagePart((0,)), TextPart((1,))]


def test_long_speech_is_split_in_linear_time() -> None:
    speech = [BLOCKS[0].first] * 200_000
    begin_s = time.process_time()
    assert split_reply(speech, BLOCKS, MARKS) == [AudioPart((0,) * len(speech))]
    assert time.process_time() - begin_s < 2.5  # concatenating tuples took minutes


def test_replies_without_marks_are_split_by_codebook_ids() -> None:
    first = BLOCKS[1].first
    assert split_reply([0, first + 1, first + 2, 1], BLOCKS, MarkIds()) == [
        TextPart((0,)), ImagePart((1, 2), complete=False), TextPart((1,))]
    assert split_reply([0, first], (), MarkIds()) == [TextPart((0, first))]
