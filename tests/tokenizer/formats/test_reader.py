"""`open_tokenizer` of both formats: ids, bytes and text equal those of each format's library."""

import base64
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
import sentencepiece
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_sov.base.errors import UserError
from tests.tokenizer.formats.test_commands import CL100K
from tokenizer.formats.reader import open_tokenizer
from tokenizer.formats.tiktoken_format import convert_to_oniguruma

Build = Callable[..., Path]
TEXT = "the other, 가나다 <|end|>  x\n"
PATTERN = r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"


def write_ranks(path: Path, more: tuple[bytes, ...] = (b"th", b"the")) -> dict[bytes, int]:
    """Write a tiktoken file with all bytes and longer tokens, and return their ranks."""
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *more])}
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return ranks


def test_hugging_face(build: Build) -> None:
    folder = build(special=("<|end|>",), added=("<think>",))
    for path in (folder, folder / "tokenizer.json"):
        opened = open_tokenizer(path)
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert opened.encode_special(TEXT) == raw.encode(TEXT).ids
        assert raw.token_to_id("<|end|>") not in opened.encode(TEXT) == opened.encode_many([TEXT, "x"])[0]
        assert opened.decode(opened.encode(TEXT)) == TEXT
        assert list(opened.special.values()) == ["<|end|>"] and list(opened.added.values()) == ["<think>"]
        assert opened.vocab_size == raw.get_vocab_size()
        assert opened.tokens[raw.token_to_id("Ġthe")] == b" the"
        assert len(opened.tokens) == raw.get_vocab_size() - 2  # without special and added tokens


def test_tiktoken(tmp_path: Path) -> None:
    ranks = write_ranks(tmp_path / "it.tiktoken")
    (tmp_path / "it.tiktoken.json").write_text(json.dumps({"pat_str": PATTERN,
                                                           "special_tokens": {"<|end|>": 300}}))
    reference = tiktoken.Encoding("it", pat_str=PATTERN, mergeable_ranks=ranks,
                                  special_tokens={"<|end|>": 300})
    for path in (tmp_path, tmp_path / "it.tiktoken"):
        opened = open_tokenizer(path)
        assert opened.encode(TEXT) == reference.encode_ordinary(TEXT) == opened.encode_many([TEXT])[0]
        assert opened.encode_special(TEXT) == reference.encode(TEXT, allowed_special="all")
        assert opened.decode(opened.encode(TEXT)) == TEXT
        assert opened.special == {300: "<|end|>"} and opened.vocab_size == 301
        assert opened.tokens[257] == b"the"


def test_folders_of_other_forms_name_the_conversion(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the other theme", "then the train 가나다"] * 50), vocab_size=300,
        model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", byte_fallback=True, minloglevel=2)
    with pytest.raises(UserError, match="transformers converts sentencepiece's models") as caught:
        open_tokenizer(tmp_path)
    [command] = caught.value.fix.before
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)
    opened = open_tokenizer(tmp_path)
    assert opened.decode(opened.encode(TEXT)) == opened.normalize(TEXT)
    assert {b" the", b"\n"} <= set(opened.tokens.values())


def test_mistakes_cost_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_bytes(b"nothing")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "none.json").write_text(Tokenizer(models.BPE()).to_str())
    (tmp_path / "bad.tiktoken").write_bytes(b"nothing\n")
    write_ranks(tmp_path / "alone.tiktoken")
    write_ranks(tmp_path / "cut.tiktoken")
    with open(tmp_path / "cut.tiktoken", "ab") as f:
        f.write(b"dGg")
    write_ranks(tmp_path / "form.tiktoken")
    (tmp_path / "cut.tiktoken.json").write_text(json.dumps({"pat_str": PATTERN, "special_tokens": {}}))
    (tmp_path / "form.tiktoken.json").write_text('{"pat_str": 1}')
    for name, sentence in {"empty.model": "is not tiktoken's ranks", "none.json": "holds no tokens",
                           "none": "does not exist", "empty": "holds", "bad.json": "bad.json",
                           "bad.model": "bad.model", "bad.tiktoken": "bad.tiktoken",
                           "alone.tiktoken": "pat_str", "cut.tiktoken": "cut.tiktoken:259",
                           "form.tiktoken": "pat_str"}.items():
        with pytest.raises(UserError, match=sentence):
            open_tokenizer(tmp_path / name)


O200K_PART = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{M}]*(?i:'s|'t)?|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+")
TEXTS = ["12 123 1234 1234567 a1",
         "it's  a TEST\n\n  end  \nof ", "  ", "a\n b\n", "price: 12,345.67!!\n\n", "한국어 123 [x{2}+]"]


def split_by_oniguruma(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


@pytest.mark.each("pattern", [CL100K, O200K_PART, r"(?:a(b)?){1,2}+|[\]{1,2}+$]+|.|\n",
                                     r"^\p{L}+|\s|.", r"x{2}+|\{2}+|[^x]|x"])
def test_converted_patterns_split_as_by_regex(pattern: str) -> None:
    converted = convert_to_oniguruma(pattern)
    for text in TEXTS:
        expected = [match.group() for match in regex.finditer(pattern, text)]
        assert split_by_oniguruma(converted, text) == expected


def test_unconverted_patterns_split_differently() -> None:
    assert split_by_oniguruma(r"\p{N}{1,3}+", "1234567") == ["1234567"]
    assert split_by_oniguruma(convert_to_oniguruma(r"\p{N}{1,3}+"), "1234567") == ["123", "456", "7"]
    pattern, text = r"\s+$|\s", "a  \nb"
    assert split_by_oniguruma(pattern, text) != split_by_oniguruma(convert_to_oniguruma(pattern), text)


def test_compatible_patterns_are_unchanged() -> None:
    assert convert_to_oniguruma(O200K_PART) == O200K_PART
    pattern = r"a{1,3}|b{2,}?|[a-z[0-9]{2}+$]|\$|\^"
    assert convert_to_oniguruma(pattern) == pattern
    assert convert_to_oniguruma(r"(unclosed{1}+") == r"(unclose(?>d{1})"
