"""An answer as it grows: what is sure stays, and comes soon."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from megatron_sov.infer.request import LENGTH, STOP
from megatron_sov.serve.replies import ReplyWriting

TEXT = "Ein Bär 곰 sagt: stop. Und 🐻‍❄️ sagt nichts."


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    """Return a tokenizer whose every token is a byte."""
    tokenizer = Tokenizer(models.WordLevel(byte_alphabet(), "?"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_what_is_sure_only_grows_and_is_never_a_part_of_a_character(by_bytes: Tokenizer) -> None:
    writing, told = ReplyWriting(by_bytes.decode, (), ()), ""
    for byte in TEXT.encode():
        writing.add(byte, None)
        sure = writing.sure_text()
        assert sure.startswith(told) and TEXT.startswith(sure)
        told = sure
    assert told == TEXT == writing.text()


@pytest.mark.parametrize("stops", [("stop",), (": s", "sagt:"), ("곰 ",), ("🐻",), ("never",)])
def test_a_stop_string_ends_it_and_no_part_of_it_is_told(by_bytes: Tokenizer, stops: tuple[str, ...]) -> None:
    writing = ReplyWriting(by_bytes.decode, stops, ())
    wanted = min((TEXT.partition(stop)[0] for stop in stops), key=len)
    for byte in TEXT.encode():
        writing.add(byte, None)
        assert wanted.startswith(writing.sure_text())
    assert writing.text() == wanted
    assert writing.reason == (STOP if any(stop in TEXT for stop in stops) else None)


def test_a_token_or_the_length_ends_it(by_bytes: Tokenizer) -> None:
    ended, cut = (ReplyWriting(by_bytes.decode, (), (0,)) for _ in range(2))
    for token, reason in ((65, None), (0, STOP), (66, LENGTH)):
        ended.add(token, reason)
    cut.add(65, LENGTH)
    assert (ended.tokens, ended.reason) == ([65, 0], STOP) and (cut.tokens, cut.reason) == ([65], LENGTH)
