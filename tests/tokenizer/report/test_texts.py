"""Held-out texts: their figures, how much of them is read, and in which pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from tokenizer.report.texts import CHUNK_BYTES, NamedText, parse_text, read_text, read_texts


def named(*chunks: str) -> NamedText:
    return NamedText("t", "t", list(chunks), True)


def test_bytes_characters_and_words() -> None:
    text = named("한국 사람\n", "two  words ", "")
    assert (text.num_bytes, text.num_chars, text.num_words) == (14 + 11, 6 + 11, 4)


@pytest.mark.parametrize(("text", "words"), [
    ("two words", True), ("한국어 문장", True), ("กำลังที่นี้", False), ("日本語と中文", False),
    ("日本 abcd", True), ("ខ្មែរ", False), ("12 34", True)])
def test_words_are_parted_by_spaces_where_most_letters_are_of_such_a_script(text: str, words: bool) -> None:
    assert named(text).has_words == words


def test_a_part_comes_from_all_over_a_text() -> None:
    text = named(*(f"{i:09} " for i in range(100)))
    assert (text.part(200) == text.chunks[::5] and text.part(10**9) == text.chunks
            and text.part(1) == text.chunks[:1])


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    document = "\n\n".join(f"paragraph {i} " * 40 for i in range(1000))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": document}) + "\n" + json.dumps({"text": "short"}))
    text = read_text("a", tmp_path / "a.jsonl", 10**9)
    assert "".join(text.chunks[:-1]) == document and text.chunks[-1] == "short" and text.whole
    assert len(text.chunks) > 5 and max(len(chunk) for chunk in text.chunks) <= CHUNK_BYTES


def test_reading_ends_at_the_limit_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * 100}) for _ in range(50)))
    text = read_text("a", tmp_path / "a.jsonl", 1000)
    assert (len(text.chunks), text.whole, text.path) == (10, False, str(tmp_path / "a.jsonl"))


def test_empty_documents_are_passed_over_and_a_folder_of_them_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "word"}\n')
    assert read_text("a", tmp_path, 1000).chunks == ["word"]
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"holds no text; pass files with text in them"):
        read_text("a", tmp_path, 1000)


def test_names_are_the_files_own_or_given_and_stand_once(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ko.txt", "en.txt"):
        Path(name).write_text("text")
    assert ([text.name for text in read_texts(["ko.txt", "other=ko.txt", "en.txt"], 1.0)]
            == ["ko", "other", "en"])
    assert parse_text("dir.with.dots/") == ("dir", Path("dir.with.dots"))
    with pytest.raises(UserError,
                       match=r"the name 'ko' is taken by another text; name it, e.g. other=en.txt"):
        read_texts(["ko.txt", "ko=en.txt"], 1.0)
