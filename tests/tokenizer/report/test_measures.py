"""Figures of texts against plain recomputation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_sov.base.errors import UserError
from tokenizer.formats.reader import open_tokenizer
from tokenizer.report.measures import (
    CHUNK_BYTES, NamedText, check_texts, measure, parse_text, read_text, read_texts)

# Held-out texts: their figures, how much of them is read, and in which pieces.

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


Build = Callable[..., Path]


def test_figures_are_those_of_plain_counting(build: Build, heldout: dict[str, Path]) -> None:
    folder = build()
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    docs = {"english": [json.loads(line)["text"] for line in heldout["english"].read_text().splitlines()],
            "thai": [heldout["thai"].read_text()]}
    opened = open_tokenizer(folder)
    measured = [measure(opened, text) for text in read_texts([f"{n}={p}" for n, p in heldout.items()], 1)]
    check = check_texts(opened, measured)
    tokens = {name: sum(len(raw.encode(d).ids) for d in found) for name, found in docs.items()}
    for name, found in docs.items():
        numbers = check.numbers["texts"][name]
        text = "".join(found)
        assert numbers["num_tokens"] == tokens[name] and numbers["num_bytes"] == len(text.encode())
        assert numbers["bytes_per_token"] == pytest.approx(len(text.encode()) / tokens[name])
        assert numbers["tokens_per_char"] == pytest.approx(tokens[name] / len(text))
        assert numbers["share_of_flops"] == pytest.approx(tokens[name] / sum(tokens.values()))
    words = sum(len(d.split()) for d in docs["english"])
    assert check.numbers["texts"]["english"]["tokens_per_1000_words"] == pytest.approx(
        1000 * tokens["english"] / words)
    assert check.numbers["texts"]["thai"]["tokens_per_word"] is None
    assert check.numbers["texts"]["thai"]["share_of_partial_characters"] == 1  # nothing but single bytes
    assert check.verdict == "good"


def test_text_that_decoding_does_not_give_back_is_bad(build: Build, heldout: dict[str, Path]) -> None:
    opened = open_tokenizer(build(without="Ã"))
    text = read_text("thai", heldout["thai"], 10**6)
    assert check_texts(opened, [measure(opened, text)]).verdict == "good"  # Thai has no such byte
    heldout["thai"].write_text("Ä")
    assert check_texts(opened, [measure(opened, read_text("t", heldout["thai"], 10**6))]).verdict == "bad"


def test_large_text_is_read_in_parts_from_all_over_it(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i:06d} " * 100}) for i in range(10_000)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    text = read_text("big", tmp_path / "big.jsonl", 2_000_000)
    firsts = [int(chunk[:6]) for chunk in text.chunks]
    assert not text.whole and 1_900_000 < text.num_bytes < 2_200_000
    assert min(firsts) == 0 and max(firsts) > 4_000
    whole = read_text("big", tmp_path / "big.jsonl", 10**9)
    assert whole.whole and len(whole.chunks) == 10_000
    part = whole.part(700_000)
    assert len(part) == 1000 and part[1] == whole.chunks[10]


def test_names_of_texts(tmp_path: Path) -> None:
    assert parse_text("ko=a/b.jsonl") == ("ko", Path("a/b.jsonl"))
    assert parse_text("a/b.jsonl.gz") == ("b", Path("a/b.jsonl.gz"))
    (tmp_path / "x=y.txt").write_text("text")
    assert parse_text(f"{tmp_path}/x=y.txt") == ("x=y", tmp_path / "x=y.txt")


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["=x"], "must be a path or NAME=PATH"), (["none.txt"], "does not exist"),
    (["a.txt", "b/a.txt"], "the name 'a' is taken"), (["empty.txt"], "holds no text"),
    (["latin.txt"], "is not UTF-8"), (["bad.jsonl"], "bad.jsonl: ")])
def test_bad_text_costs_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                     sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for name, raw in {"a.txt": b"x", "b/a.txt": b"y", "empty.txt": b" \n", "latin.txt": b"caf\xe9 ",
                      "bad.jsonl": b"{"}.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=sentence):
        read_texts(arguments, 1)
