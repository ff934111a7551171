"""Reading users' text: what becomes a document, in which order, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov import documents
from megatron_sov.documents import cut_at_blank_lines, cut_text, list_files, read_documents
from megatron_sov.errors import UserError


def read(path: Path) -> list[str]:
    return [d.text for d in read_documents(list_files(path))]


def test_a_text_file_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\t\n")
    assert read(tmp_path / "a.txt") == ["one\r\n\r\n  two\t\n"]


def test_a_folder_is_read_recursively_in_sorted_order_and_only_its_text(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/y.txt", ".git/config.txt", "picture.png", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/y.txt", "a/z.py", "b.md"]


def test_a_large_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "x" * 999 + "\n\n"
    (tmp_path / "big.txt").write_text(paragraph * 1200)
    found = read(tmp_path / "big.txt")
    assert "".join(found) == paragraph * 1200
    assert all(len(t) <= documents.DOCUMENT_BYTES and t.endswith("\n\n") for t in found)
    assert len(found) == -(-1200 // (documents.DOCUMENT_BYTES // len(paragraph)))


def test_jsonl_holds_text_or_messages_and_blank_ones_are_passed_over(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    lines = [{"text": "한국어"}, {"text": "  "}, {"messages": chat}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second = read_documents([tmp_path / "a.jsonl"])
    assert first.text == "한국어" and first.where.endswith("a.jsonl:1")
    assert second.messages == (("user", "hi"), ("assistant", "yo")) and second.texts() == ("hi", "yo")


@pytest.mark.parametrize(("line", "rule"), [
    ("{bad", "is not valid JSON"),
    ("[1]", "is a JSON list"),
    ('{"txt": "a"}', "no string field 'text'"),
    ('{"text": 3}', "no string field 'text'"),
    ('{"text": "\\ud800"}', "surrogate"),
    ('{"messages": []}', "non-empty list"),
    ('{"messages": [{"role": "<|end|>", "content": "a"}]}', "must be one of system, user"),
    ('{"messages": [{"role": "user", "content": null}]}', "must be a string"),
    (b'{"text": "\xb0\xa1"}', "is not UTF-8"),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str | bytes, rule: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + raw + b"\n")
    with pytest.raises(UserError, match=rule) as e:
        read(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl:2" in str(e.value)


def test_other_encodings_and_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cp949.txt").write_bytes("abc 한국어".encode("cp949"))
    with pytest.raises(UserError, match=r"cp949.txt: is not UTF-8 \(byte 0xc7 at offset 4\)"):
        read(tmp_path / "cp949.txt")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no text file"):
        read(tmp_path / "empty")


@given(st.text(alphabet=st.sampled_from("ab가é\U0001f600 \n\r")), st.integers(4, 20))
def test_pieces_join_to_the_text_and_keep_the_limit(text: str, limit_bytes: int) -> None:
    pieces = list(cut_text(text, limit_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(p.encode()) <= limit_bytes for p in pieces)


@given(st.binary(max_size=200), st.integers(4, 50), st.integers(1, 20))
def test_cuts_terminate_on_any_bytes(raw: bytes, limit_bytes: int, block_bytes: int) -> None:
    blocks = [raw[i : i + block_bytes] for i in range(0, len(raw), block_bytes)]
    assert b"".join(cut_at_blank_lines(blocks, limit_bytes)) == raw


def test_cuts_prefer_blank_lines_then_lines_then_spaces() -> None:
    assert list(cut_text("aa\n\nbb\ncc dd", 9)) == ["aa\n\n", "bb\ncc dd"]
    assert list(cut_text("aaaa\nbb cc", 8)) == ["aaaa\n", "bb cc"]
    assert list(cut_text("aaaa bbbb", 8)) == ["aaaa ", "bbbb"]
    assert list(cut_text("가나다", 8)) == ["가나", "다"]
