"""Measures of a tokenizer on texts and on all characters, and of its tokens, against plain computations."""

import json
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_sov.base.errors import UserError
from tokenizer.formats.reader import open_tokenizer
from tokenizer.report import measures
from tokenizer.report.measures import (
    CHUNK_BYTES, NamedText, check_inventory, check_scalars, check_superwords, check_texts, count_words,
    measure_text, parse_text, read_text, read_texts, try_scalars)

# Held-out texts: their figures, read limits, and pieces.

def build_text(*chunks: str) -> NamedText:
    return NamedText("t", "t", list(chunks), True)


def test_bytes_characters_and_words() -> None:
    text = build_text("한국 사람\n", "two  words ", "")
    assert (text.num_bytes, text.num_chars, text.num_words) == (14 + 11, 6 + 11, 4)


@pytest.mark.each(("text", "words"), [
    ("two words", True), ("한국어 문장", True), ("กำลังที่นี้", False), ("日本語と中文", False),
    ("日本 abcd", True), ("ខ្មែរ", False), ("12 34", True)])
def test_words_split_at_spaces_in_scripts_with_spaces(text: str, words: bool) -> None:
    assert build_text(text).has_words == words


def test_long_documents_are_split_without_loss(tmp_path: Path) -> None:
    document = "\n\n".join(f"paragraph {i} " * 40 for i in range(1000))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": document}) + "\n" + json.dumps({"text": "short"}))
    text = read_text("a", tmp_path / "a.jsonl", 10**9)
    assert "".join(text.chunks[:-1]) == document and text.chunks[-1] == "short" and text.whole
    assert len(text.chunks) > 5 and max(len(chunk) for chunk in text.chunks) <= CHUNK_BYTES


def test_reading_stops_at_the_limit_with_a_note(tmp_path: Path) -> None:
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
    texts = read_texts([f"{name}={path}" for name, path in heldout.items()], 1)
    check = check_texts(opened, [measure_text(opened, text) for text in texts])
    tokens = {name: sum(len(raw.encode(d).ids) for d in documents) for name, documents in docs.items()}
    for name, documents in docs.items():
        numbers = check.numbers["texts"][name]
        text = "".join(documents)
        assert numbers["num_tokens"] == tokens[name] and numbers["num_bytes"] == len(text.encode())
        assert numbers["bytes_per_token"] == pytest.approx(len(text.encode()) / tokens[name])
        assert numbers["tokens_per_char"] == pytest.approx(tokens[name] / len(text))
        assert numbers["share_of_flops"] == pytest.approx(tokens[name] / sum(tokens.values()))
    words = sum(len(d.split()) for d in docs["english"])
    assert check.numbers["texts"]["english"]["tokens_per_1000_words"] == pytest.approx(
        1000 * tokens["english"] / words)
    assert check.numbers["texts"]["thai"]["tokens_per_word"] is None
    assert check.numbers["texts"]["thai"]["share_of_partial_characters"] == 1  # all tokens are single bytes
    assert check.verdict == "good"


def test_text_that_decoding_does_not_give_back_is_bad(build: Build, heldout: dict[str, Path]) -> None:
    opened = open_tokenizer(build(without="Ã"))
    text = read_text("thai", heldout["thai"], 10**6)
    assert check_texts(opened, [measure_text(opened, text)]).verdict == "good"  # Thai has no such byte
    heldout["thai"].write_text("Ä")
    text = read_text("t", heldout["thai"], 10**6)
    assert check_texts(opened, [measure_text(opened, text)]).verdict == "bad"


def test_large_text_is_read_in_parts_from_all_over_it(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i:06d} " * 100}) for i in range(10_000)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    text = read_text("big", tmp_path / "big.jsonl", 2_000_000)
    firsts = [int(chunk[:6]) for chunk in text.chunks]
    assert not text.whole and 1_900_000 < text.num_bytes < 2_200_000
    assert min(firsts) == 0 and max(firsts) > 4_000
    whole = read_text("big", tmp_path / "big.jsonl", 10**9)
    assert whole.whole and len(whole.chunks) == 10_000
    part = whole.sample_chunks(700_000)
    assert len(part) == 1000 and part[1] == whole.chunks[10]


def test_names_of_texts(tmp_path: Path) -> None:
    assert parse_text("ko=a/b.jsonl") == ("ko", Path("a/b.jsonl"))
    assert parse_text("a/b.jsonl.gz") == ("b", Path("a/b.jsonl.gz"))
    (tmp_path / "x=y.txt").write_text("text")
    assert parse_text(f"{tmp_path}/x=y.txt") == ("x=y", tmp_path / "x=y.txt")


@pytest.mark.each(("arguments", "message"), [
    (["=x"], "must be a path or NAME=PATH"), (["none.txt"], "does not exist"),
    (["a.txt", "b/a.txt"], "the name 'a' is taken"), (["empty.txt"], "holds no text"),
    (["latin.txt"], "is not UTF-8"), (["bad.jsonl"], "bad.jsonl: ")])
def test_bad_text_costs_one_sentence(cwd: Path, arguments: list[str], message: str) -> None:
    (cwd / "b").mkdir()
    for name, raw in {"a.txt": b"x", "b/a.txt": b"y", "empty.txt": b" \n", "latin.txt": b"caf\xe9 ",
                      "bad.jsonl": b"{"}.items():
        (cwd / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_texts(arguments, 1)


Toy = Callable[..., Any]


@pytest.fixture(autouse=True)
def few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries the first 4,096 characters of Unicode only, to save time."""
    try_scalars = measures.try_scalars
    monkeypatch.setattr(measures, "try_scalars", lambda opened: try_scalars(opened, 0x1000))


def test_a_tokenizer_that_returns_all_characters_is_good(toy: Toy) -> None:
    opened = toy("가", "abc", "d\u00e9")
    check = check_scalars(opened)
    assert (check.verdict, check.summary) == ("good", "4,096 characters tried, all are returned")


def test_blocks_cover_all_scalar_values_without_surrogates() -> None:
    blocks = list(measures._iter_blocks(measures.END))
    scalars = chain(range(0xD800), range(0xE000, 0x110000))
    assert all(a == b for a, b in zip(chain.from_iterable(blocks), scalars, strict=True))


def test_a_lost_character_is_named_once_and_explains_its_block(toy: Toy) -> None:
    check = check_scalars(toy(change=lambda text: text.replace("ß", "ss").replace("\u0e01", "")))
    assert check.numbers["lost_blocks"] == []
    assert check.verdict == "bad" and check.summary == "4,096 characters tried, 2 lost, the first U+00DF"
    assert check.tables[0].rows == [["U+00DF", "LATIN SMALL LETTER SHARP S", "ß"],
                                    ["U+0E01", "THAI CHARACTER KO KAI", "ก"]]


def test_canonically_equivalent_output_is_a_remark(toy: Toy) -> None:
    opened = toy(change=lambda text: text.replace("\u0344", unicodedata.normalize("NFC", "\u0344")))
    check = check_scalars(opened)
    assert check.numbers["normalized"] == ["U+0344"] and check.numbers["lost"] == []
    assert check.verdict == "note"
    assert check.summary.endswith("1 replaced by equivalent text (normalization)")


def test_a_block_broken_only_by_context_is_reported_with_its_text(toy: Toy) -> None:
    check = check_scalars(toy(change=lambda text: text.replace(" \u0e01 ", " ")))
    assert check.numbers["lost_blocks"] == ["U+0800 to U+0FFF, after a space"] and not check.numbers["lost"]
    assert check.verdict == "bad" and "1 blocks are not returned" in check.summary


def test_planes_without_characters_are_tried_side_by_side_only(toy: Toy,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "EMPTY_PLANES", range(0x800, 0x1000))
    opened, texts = toy(), []
    encode_many = opened.encode_many
    opened.encode_many = lambda several: texts.append(len(several)) or encode_many(several)
    # each of three blocks of 2,048 characters is one text, and two more with spaces unless its plane is empty
    assert try_scalars(opened, 0x1800).num_tried == 0x1800 and texts == [3, 1, 3]


def test_every_part_is_counted(toy: Toy) -> None:
    """The tokens are 256 bytes, three texts, two parts of a Hangul syllable, and a special token."""
    opened = toy("the", " the", "of the time", "안".encode()[:2], "안".encode()[1:], special=("<|end|>",))
    check = check_inventory(opened)
    numbers = check.numbers
    assert check.verdict == "good"
    assert numbers["vocab_size"] == 262 and numbers["num_special"] == 1 and numbers["num_added"] == 0
    assert numbers["num_single_bytes"] == 256 and numbers["num_parts_of_characters"] == 2
    assert numbers["ids_without_token"] == numbers["num_same_bytes"] == 0
    assert numbers["special"] == {"261": "<|end|>"}
    assert numbers["mean_bytes"] == pytest.approx((256 + 3 + 4 + 11 + 2 + 2) / 261)
    assert numbers["tokens_by_num_bytes"] == {1: 256, 2: 2, 3: 1, 4: 1, 11: 1}
    assert numbers["longest"][0] == {"id": 258, "token": "of␣the␣time", "num_bytes": 11}
    assert check.summary == ("262 ids: 1 special, 0 added, 256 single bytes, 2 parts of characters; "
                             "the longest token has 11 bytes")
    assert check.tables[0].rows == [["<|end|>", "261", "special"]]


def test_gaps_and_twins_are_remarks(toy: Toy) -> None:
    opened = toy("the")
    opened.tokens |= {257: b"the", 260: b"x"}
    opened.added = {261: "<|pad|>"}
    check = check_inventory(opened)
    assert check.verdict == "note"
    assert (check.numbers["ids_without_token"], check.numbers["same_bytes"]) == (2, ["x", "the"])
    assert check.summary.endswith("; 2 ids have no token; 2 tokens share their bytes with another")


@pytest.mark.each(("token", "words"), [
    (b" of the", 2), (b"the", 1), (b" 1 2", 0), ("한국 사람".encode(), 2), (b" a-b c.", 2),
    ("안 a".encode()[1:], 1)])
def test_words_have_letters(token: bytes, words: int) -> None:
    assert count_words(token) == words


def test_superwords_are_listed_longest_first(toy: Toy) -> None:
    opened = toy(" of the", "in order to", " the", "one of the", special=(" so it is",))
    numbers = check_superwords(opened).numbers
    assert (numbers["num_superwords"], numbers["by_num_words"]) == (3, {2: 1, 3: 2})
    assert numbers["longest"] == ["in␣order␣to", "one␣of␣the", "␣of␣the"], (
        "by number of words, then by length")
    assert check_superwords(toy("the")).summary == "no token spans words"
