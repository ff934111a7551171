"""A reply in parts."""

from __future__ import annotations

import pytest

from megatron_sov.chat import media_tokens as spelling
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock
from megatron_sov.omni.generation.replies import Audio, Image, MarkIds, Part, Text, parts_of
from megatron_sov.omni.media.items import discrete_audio, discrete_image

WORDS = ["a", "b", *spelling.MARKS]
BLOCKS = (VocabularyBlock(AUDIO, len(WORDS), 20), VocabularyBlock(IMAGE, len(WORDS) + 20, 20))
MARKS = MarkIds.of(lambda name: WORDS.index(name) if name in WORDS else None)


def _ids(text: str) -> list[int]:
    """Tokenize a text of the words, marks and entries."""
    ids = []
    while text:
        word = next((w for w in WORDS if text.startswith(w)), None) or spelling.find_media_token(text)
        numbers = {kind: spelling.parse_codebook_tokens(kind, word) for kind in (AUDIO, IMAGE)}
        ids.append(WORDS.index(word) if word in WORDS else
                   next(block.first + numbers[block.kind][0] for block in BLOCKS if numbers[block.kind]))
        text = text[len(word):]
    return ids


def test_blocks_as_they_are_written_come_back_as_parts() -> None:
    picture, speech = discrete_image([3, 1, 4, 1, 5, 9], 3, 900, 1200), discrete_audio([2, 7, 1])
    reply = _ids(f"ab{picture}b{speech}a")
    assert parts_of(reply, BLOCKS, MARKS) == [
        Text((0, 1)), Image((3, 1, 4, 1, 5, 9), (3, 4)), Text((1,)), Audio((2, 7, 1)), Text((0,))]


@pytest.mark.parametrize(("ids", "parts"), [
    ([], []),
    (_ids(discrete_image([1, 2], 2, 1, 1))[:-1], [Image((1, 2), (1, 1), complete=False)]),
    (_ids("<|discrete_image_start|>b"), [Image((), (1, 1), complete=False), Text((1,))]),
    (_ids("<|vision00001|>a<|audio0005|>"), [Image((1,), (1, 1), complete=False), Text((0,)), Audio((5,))]),
    (_ids("<|audio0001|>b<|audio0002|>"), [Audio((1,)), Text((1,)), Audio((2,))]),
    (_ids("<|discrete_image_start|><|vision00001|><|discrete_image_start|><|vision00002|>"),
     [Image((1,), (1, 1), complete=False), Image((2,), (1, 1), complete=False)]),
])
def test_what_breaks_off_or_lacks_marks_is_still_split(ids: list[int], parts: list[Part]) -> None:
    assert parts_of(ids, BLOCKS, MARKS) == parts


def test_without_marks_the_blocks_alone_decide() -> None:
    first = BLOCKS[1].first
    assert parts_of([0, first + 1, first + 2, 1], BLOCKS, MarkIds()) == [
        Text((0,)), Image((1, 2), complete=False), Text((1,))]
    assert parts_of([0, first], (), MarkIds()) == [Text((0, first))]
