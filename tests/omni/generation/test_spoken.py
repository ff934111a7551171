"""A reply in parts, and speech that is heard while the text goes on."""

from __future__ import annotations

import pytest
import torch

from megatron_sov.chat import media_tokens as spelling
from megatron_sov.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock
from megatron_sov.omni.codecs.bigvgan import UnitBigVGAN
from megatron_sov.omni.codecs.decoder_settings import UnitBigVGANSettings
from megatron_sov.omni.generation.replies import (
    Audio, Image, MarkIds, Part, SpokenReply, Text, parts_of, speak, transcript)
from megatron_sov.omni.media.items import discrete_audio, discrete_image

WORDS = ["a", "b", *spelling.MARKS]
BLOCKS = (VocabularyBlock(AUDIO, len(WORDS), 20), VocabularyBlock(IMAGE, len(WORDS) + 20, 20))
MARKS = MarkIds.of(lambda name: WORDS.index(name) if name in WORDS else None)


def _ids(text: str) -> list[int]:
    """Tokenize a text of the words, marks and entries."""
    ids = []
    while text:
        word = next((w for w in WORDS if text.startswith(w)), None) or spelling.spelled(text)
        numbers = {kind: spelling.entries(kind, word) for kind in (AUDIO, IMAGE)}
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


@pytest.mark.parametrize(("piece_tokens", "lookahead_tokens"), [(1, 0), (3, 0), (100, 0), (3, 1)])
def test_speech_is_heard_while_the_text_goes_on(piece_tokens: int, lookahead_tokens: int) -> None:
    torch.manual_seed(0)
    vocoder = UnitBigVGAN(UnitBigVGANSettings(sample_rate_hz=100, codebook_size=20, speakers=("x",),
                                              unit_width=4, speaker_width=4, channels=4, rates=(4,),
                                              kernels=(3,), dilations=(1,),
                                              lookahead_tokens=lookahead_tokens))
    reply, given = SpokenReply(BLOCKS, MARKS), []

    def parts() -> object:
        for number in _ids(f"a{discrete_audio([2, 7, 1, 8])}b{discrete_audio([4])}"):
            for part in reply.feed(number):
                given.append(part)
                yield part

    out = []
    for heard in speak(parts(), vocoder, "x", piece_tokens):  # type: ignore[arg-type]
        out.append(heard)
        if heard == Text((1,)):
            assert Audio((4,)) not in given, "the text is not held back until more speech comes"
    kinds = ["sound" if isinstance(part, torch.Tensor) else part.ids for part in out]
    assert kinds[0] == (0,) and kinds[1] == "sound" and kinds[-1] == "sound" and (1,) in kinds
    whole = vocoder.decode(torch.tensor([2, 7, 1, 8, 4]), "x")
    sound = torch.cat([part for part in out if isinstance(part, torch.Tensor)])
    torch.testing.assert_close(sound, whole, atol=1e-6, rtol=0)


def test_a_transcript_is_what_the_authors_server_shows() -> None:
    heard = "<user_transcript>A?</user_transcript>\n<assistant_transcript>B.</assistant_transcript>\n"
    assert transcript(f"{heard}<audio_decoder_call>") == ("B.", {})
    assert transcript("<user_transcript>A?</user_transcript>") == ("A?", {})
    assert transcript('B.<speaker_info>{"gender": "f", "age": "40-50"}</speaker_info>') == (
        "B.", {"gender": "f", "age": "40-50"})
    assert transcript("B.<speaker_info>{gender}</speaker_info>") == ("B.", {})
