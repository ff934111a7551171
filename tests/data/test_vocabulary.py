"""Token ids mean the same on both sides, or the data is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megatron_sov.data.vocabulary import read_vocabulary, refuse_other_tokens
from megatron_sov.errors import UserError


def tokenizer(folder: Path, words: list[str], special: str = "<end>") -> Path:
    folder.mkdir()
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens([special])
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_ordinary_tokens_by_id(tmp_path: Path) -> None:
    assert read_vocabulary(tokenizer(tmp_path / "a", ["one", "two"])) == {0: "one", 1: "two"}


def test_equal_longer_and_renamed_special_tokens_pass(tmp_path: Path) -> None:
    data = tokenizer(tmp_path / "data", ["one", "two"])
    for name, words, special in (("same", ["one", "two"], "<end>"),
                                 ("longer", ["one", "two", "three"], "<end>"),
                                 ("renamed", ["one", "two"], "<stop>")):
        other = tokenizer(tmp_path / name, words, special)
        refuse_other_tokens(data, other)
        refuse_other_tokens(other, data)


def test_an_id_with_two_meanings_is_refused(tmp_path: Path) -> None:
    data, weights = (tokenizer(tmp_path / "data", ["one", "two"]),
                     tokenizer(tmp_path / "weights", ["one", "drei"]))
    with pytest.raises(UserError, match=r"1 ids mean other tokens than in .*weights \(e.g. 1: "
                                        r"'two' here, 'drei' there\)"):
        refuse_other_tokens(data, weights)


def test_without_a_tokenizer_on_one_side_nothing_is_compared(tmp_path: Path) -> None:
    data = tokenizer(tmp_path / "data", ["one"])
    refuse_other_tokens(None, data)
    refuse_other_tokens(data, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        read_vocabulary(tmp_path)
