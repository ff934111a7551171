"""Sample texts on which two formats of a tokenizer are compared, and the description of a difference."""

import json
import unicodedata
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from tokenizer.formats import sample_texts
from tokenizer.formats.sample_texts import (
    BYTES_PER_FILE, CHUNK_BYTES, SENTENCES, find_first_difference, iter_builtin_texts, iter_user_texts)


def test_users_files_come_in_pieces_and_not_without_end(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a paragraph of words\n\n" * 200_000)
    (tmp_path / "short.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    pieces = list(iter_user_texts([tmp_path / "long.txt", tmp_path / "short.jsonl"]))
    assert pieces[-2:] == ["one", "two"], "the limit is per file"
    sizes = [len(piece.encode()) for piece in pieces[:-2]]
    assert max(sizes) <= CHUNK_BYTES and BYTES_PER_FILE <= sum(sizes) < BYTES_PER_FILE + CHUNK_BYTES
    with pytest.raises(UserError, match=r"none\.txt"):
        list(iter_user_texts([tmp_path / "none.txt"]))


def test_the_first_text_with_other_ids_is_named_with_the_place() -> None:
    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    assert find_first_difference(["a", "b"], encode, encode) is None
    difference = find_first_difference(["ab", "abcdef", "x"], encode,
                                       lambda text: [ord(c) - (c == "d") for c in text])
    assert difference == "'abcdef' (ids [100, 101, 102] and [99, 101, 102] from token 3 on)"
    assert (find_first_difference(["ab"], encode, lambda text: encode(text)[:1])
            == "'ab' (ids [98] and [] from token 1 on)")
    assert str(find_first_difference(["x" * 100], encode, lambda text: [])).startswith(f"'{'x' * 60}' (ids ")


def test_sample_sentences_cover_many_scripts_first_alone_then_joined() -> None:
    result = list(iter_builtin_texts({"model": {"vocab": {"▁the": 0, "a": 1}}}))
    assert result[:len(SENTENCES)] == list(SENTENCES) and result[len(SENTENCES)] == "\n".join(SENTENCES)
    assert result[-2:] == [" thea", " the a"], "tokens of the vocabulary, without and with spaces"
    scripts = {unicodedata.name(c, "none").split()[0] for c in "".join(SENTENCES)}
    assert {"LATIN", "CJK", "HANGUL", "HIRAGANA", "THAI", "CYRILLIC", "ARABIC", "DEVANAGARI",
            "DIGIT"} <= scripts


def test_a_byte_level_tokenizer_meets_every_block_of_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    monkeypatch.setattr(sample_texts, "iter_adversarial_texts",
                        lambda raw: calls.append(raw) or ["every block"])
    raw = {"decoder": {"type": "ByteLevel"}, "model": {"vocab": {}}}
    assert list(iter_builtin_texts(raw))[-1] == "every block" and calls == [raw]
    many = {"model": {"vocab": [[f"t{i}", 0.0] for i in range(2 * sample_texts.TOKENS_PER_TEXT + 1)]}}
    assert len(list(iter_builtin_texts(json.loads(json.dumps(many))))) == len(SENTENCES) + 1 + 2 * 3
