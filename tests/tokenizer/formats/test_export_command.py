"""`sov-tokenizer export`: tiktoken gives the same ids with the exported file, or there is no output."""

import base64
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer

from tests.tokenizer.formats.test_commands import edit_tokenizer
from tokenizer.cli import main

PROSE = ("The quick brown fox doesn't jump over 12 lazy dogs.\n\n  다람쥐 헌 쳇바퀴에 타고파. "
         "กำลังเรียนภาษาไทย " * 40)


@pytest.fixture(scope="module", params=[pytest.param("solar-open", marks=pytest.mark.deep), "k-exaone"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained tokenizer with a preset's rules."""
    root = tmp_path_factory.mktemp("export")
    (root / "prose.txt").write_text(PROSE)
    assert main(["train", "--preset", request.param, "--vocab-size", "420", "--input",
                 str(root / "prose.txt"), "--output", str(root / "tokenizer")]) == 0
    return root / "tokenizer"


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[tiktoken.Encoding, dict[str, Any], Tokenizer]:
    """tiktoken's encoding of the exported files, the exported rules, and the original tokenizer."""
    file = folder.parent / "out/my.tiktoken"
    assert main(["export", str(folder), "--format", "tiktoken", "--output", str(file),
                 "--text", str(folder.parent / "prose.txt")]) == 0
    rules = json.loads(file.with_name("my.tiktoken.json").read_text())
    ranks = {base64.b64decode(token): int(rank)
             for token, rank in (line.split() for line in file.read_bytes().splitlines())}
    encoding = tiktoken.Encoding(rules["name"], pat_str=rules["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=rules["special_tokens"], explicit_n_vocab=420)
    return encoding, rules, Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=200)
@given(text=st.one_of(st.text(max_size=80),
                      st.text(alphabet="ab'sS 가\u1100\u1161\u0301\n\r\t1/\u3000<|end|>", max_size=80)))
def test_tiktoken_gives_the_same_ids(exported: tuple[tiktoken.Encoding, dict[str, Any], Tokenizer],
                                     text: str) -> None:
    encoding, rules, tokenizer = exported
    normal = unicodedata.normalize("NFC", text) if rules["normalization"] else text
    assert (encoding.encode(normal, allowed_special="all")
            == tokenizer.encode(text, add_special_tokens=False).ids)
    tokenizer.encode_special_tokens = True
    assert encoding.encode_ordinary(normal) == tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False


@settings(max_examples=200)
@given(raw=st.one_of(st.binary(max_size=60),
                     st.text(max_size=20).map(lambda text: text.encode()[1:] + b"\xe0 \xff the")))
def test_any_bytes_come_back_by_tiktoken(
        exported: tuple[tiktoken.Encoding, dict[str, Any], Tokenizer], raw: bytes) -> None:
    encoding = exported[0]
    assert encoding.decode_bytes(encoding._encode_bytes(raw)) == raw


def test_raw_bytes_and_special_tokens_keep_their_ids(
        exported: tuple[tiktoken.Encoding, dict[str, Any], Tokenizer]) -> None:
    encoding, rules, tokenizer = exported
    assert sorted(encoding.encode_single_token(bytes([b])) for b in range(256)) == list(range(64, 320))
    assert (encoding.decode_bytes([encoding.encode_single_token(bytes([b])) for b in (0xff, 0x00, 0xe0)])
            == b"\xff\x00\xe0")
    assert {t: encoding.encode_single_token(t) for t in rules["special_tokens"]} == {
        token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    assert rules["eos_token"] in rules["special_tokens"]


def leave_text_unmatched(raw: dict[str, Any]) -> None:
    """Set a split pattern that matches only "a": tiktoken would drop other text, `tokenizers` would not."""
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a+"


@pytest.mark.each(("edit", "message"), [
    (leave_text_unmatched, "cannot be exported, since tiktoken would not give the same ids for"),
    (lambda raw: raw.update(normalizer={"type": "Lowercase"}),
     "its normalizer Lowercase has no form in tiktoken"),
    (lambda raw: raw["added_tokens"][3].update(lstrip=True), "has lstrip, for which tiktoken has no form"),
    (lambda raw: raw["model"]["merges"].reverse(),
     "has no form in tiktoken: its ids do not rise with its merges"),
    (lambda raw: raw.pop("model"), "is no tokenizer.json"),
    (lambda raw: raw["model"].update(dropout=0.1), "model.dropout = 0.1 makes encoding random"),
])
def test_tokenizers_outside_tiktoken_are_refused(folder: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str],
                                                 edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    bad = edit_tokenizer(folder, tmp_path / "bad", edit)
    assert main(["export", str(bad), "--format", "tiktoken", "--output", str(tmp_path / "out.tiktoken")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_files_are_replaced_only_on_request(folder: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.tiktoken.json").write_text("mine")
    command = ["export", str(folder), "--format", "tiktoken", "--output", str(tmp_path / "t.tiktoken")]
    assert main(command) == 2 and "t.tiktoken.json: exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["export", str(tmp_path / "t.tiktoken"), *command[2:], "--overwrite"]) == 2
    assert "`sov-tokenizer import` first" in capsys.readouterr().err
