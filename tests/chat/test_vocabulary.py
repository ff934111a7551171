"""Data and model must agree on the meaning of token ids; other data is refused."""

import json
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import (
    check_same_tokenizer, check_same_tokens, find_difference, read_tokenizer, tokenizer_digest)
from megatron_sov.train.data.token_bytes import count_token_bytes
from tests.chat.byte_tokenizer import train_tokenizer
from tokenizer.cli import main as sov_tokenizer


def write_tokenizer(folder: Path, words: list[str], special: str = "<end>") -> Path:
    """Write a tokenizer with the ids of `words`, and then of a special token."""
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.add_special_tokens([special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_ordinary_tokens_by_id(tmp_path: Path) -> None:
    assert read_tokenizer(write_tokenizer(tmp_path / "a", ["one", "two"])).ordinary == {0: "one", 1: "two"}


def test_equal_longer_and_renamed_vocabularies_are_accepted(tmp_path: Path) -> None:
    data = write_tokenizer(tmp_path / "data", ["one", "two"])
    for name, words, special in (("same", ["one", "two"], "<end>"),
                                 ("longer", ["one", "two", "three"], "<end>"),
                                 ("renamed", ["one", "two"], "<stop>")):
        other = write_tokenizer(tmp_path / name, words, special)
        check_same_tokens(data, other)
        check_same_tokens(other, data)


def test_contradicting_ids_are_rejected(tmp_path: Path) -> None:
    data, weights = (write_tokenizer(tmp_path / "data", ["one", "two"]),
                     write_tokenizer(tmp_path / "weights", ["one", "drei"]))
    with pytest.raises(UserError, match=r"1 ids mean other tokens than in .*weights \(e.g. 1: "
                                        r"'two' here, 'drei' there\)"):
        check_same_tokens(data, weights)


def test_missing_tokenizer_skips_comparison(tmp_path: Path) -> None:
    data = write_tokenizer(tmp_path / "data", ["one"])
    check_same_tokens(None, data)
    check_same_tokens(data, tmp_path)


@pytest.mark.each("content", ["{", "[]", "{}", '{"model": {}}'])
def test_damaged_tokenizer_raises_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        count_token_bytes(tmp_path, 10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer("the fox jumps over the dogs", 280, "<end>", "<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>", "chat_template": "{{ x }}"}')
    return folder


def change_file(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    raw = json.loads((folder / file).read_text())
    change(raw)
    (folder / file).write_text(json.dumps(raw))
    return folder


def add_template(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text("{{ y }}")
    return folder


MODEL_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {  # field -> change of tokenizer.json
    "merges": lambda r: r["model"]["merges"].reverse(),
    "normalizer": lambda r: r.update(normalizer={"type": "NFC"}),
    "pre_tokenizer": lambda r: r["pre_tokenizer"].update(add_prefix_space=True),
    "byte_fallback": lambda r: r["model"].update(byte_fallback=True)}
OTHER_CHANGES: dict[str, Callable[[Path], Path]] = {  # beginning of the message -> change of the folder
    "/tokenizer.json: its added_tokens": lambda d: change_file(
        d, "tokenizer.json", lambda r: r["added_tokens"][0].update(content="<stop>")),
    "/tokenizer.json: its decoder": lambda d: change_file(d, "tokenizer.json",
                                                          lambda r: r.update(decoder=None)),
    ": tokenizer_config.json: eos_token": lambda d: change_file(
        d, "tokenizer_config.json", lambda r: r.update(eos_token="a")),
    r": chat_template.jinja \(or chat_template in tokenizer_config.json\)": add_template}


@pytest.mark.each("field", MODEL_CHANGES)
def test_different_tokenization_is_rejected(field: str, trained: Path, tmp_path: Path) -> None:
    other = change_file(shutil.copytree(trained, tmp_path / "other"), "tokenizer.json", MODEL_CHANGES[field])
    expected = rf"other/tokenizer.json: its {field} differs from that of .*, so the same text has other ids; "
    with pytest.raises(UserError, match=f"{expected}pack the data"):
        check_same_tokens(other, trained)
    with pytest.raises(UserError, match=f"{expected}choose"):
        check_same_tokenizer(trained, other, "choose")


@pytest.mark.each("where", OTHER_CHANGES)
def test_comparison_includes_chat_format(where: str, trained: Path, tmp_path: Path) -> None:
    other = OTHER_CHANGES[where](shutil.copytree(trained, tmp_path / "other"))
    check_same_tokens(other, trained)
    with pytest.raises(UserError, match=f"other{where} differs from that of .*; choose"):
        check_same_tokenizer(trained, other, "choose")


# The identity of a tokenizer, compared with encoding and decoding in `tokenizers`.


PROBES = ("the fox <end> jumps", "The\u0301 fox12 34<end>", "<pad> the\n\nfoxes", "a dove over <pad>dog f")


def copy_tokenizer(source: Path, target: Path, change: Callable[[dict[str, Any]], Any],
                   **json_options: Any) -> Path:
    """Copy a folder's tokenizer.json with a change; `json_options` go to `json.dumps`."""
    raw = json.loads((source / "tokenizer.json").read_text())
    change(raw)
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(raw, **json_options), encoding="utf-8")
    return target


def encode_probes(folder: Path) -> list[Any]:
    """Return ids and texts of the probes from the `tokenizers` library."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    return [ids, [tokenizer.decode(row) for row in ids],
            [tokenizer.decode(row, skip_special_tokens=False) for row in ids]]


def set_fields(*path: str | int, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets fields of the object at a path."""
    def change(raw: Any) -> None:
        for key in path:
            raw = raw[key]
        raw.update(values)
    return change


def swap_merges(raw: dict[str, Any]) -> None:
    merges = raw["model"]["merges"]
    i, j = merges.index(["d", "o"]), merges.index(["o", "v"])
    merges[i], merges[j] = merges[j], merges[i]


def swap_ids(raw: dict[str, Any]) -> None:
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["f"] = vocab["f"], vocab["a"]


EQUIVALENT: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "white space": (lambda r: None, {"indent": 2}),
    "no white space": (lambda r: None, {"separators": (",", ":")}),
    "characters": (lambda r: None, {"ensure_ascii": False}),
    "order of keys": (lambda r: None, {"sort_keys": True}),
    "merges as text": (lambda r: r["model"].update(merges=[" ".join(m) for m in r["model"]["merges"]]), {}),
    "lengths": (lambda r: r.update(
        padding={"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                 "pad_type_id": 0, "pad_token": "<pad>"},
        truncation={"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}), {}),
    "order of added tokens": (lambda r: r["added_tokens"].reverse(), {}),
    "order of the vocabulary": (lambda r: r["model"].update(
        vocab=dict(reversed(r["model"]["vocab"].items()))), {}),
    "special tokens around a text": (set_fields(post_processor={
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [0], "tokens": ["<end>"]}}}), {}),
    "fields that are off": (lambda r: [r["model"].pop(name, None) for name in (
        "dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "end_of_word_suffix")], {}),
    "a field that is implied": (lambda r: [r["pre_tokenizer"].pop("use_regex")], {}),
    "fields of offsets": (set_fields("pre_tokenizer", trim_offsets=False), {}),
    "fields of a decoder that it does not read": (set_fields("decoder", add_prefix_space=False), {})}
DIFFERENT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "lstrip": (set_fields("added_tokens", 0, lstrip=True),
               r"added_tokens .*\(0: lstrip: True here, None there"),
    "rstrip": (set_fields("added_tokens", 0, rstrip=True), r"added_tokens .*\(0: rstrip"),
    "single_word": (set_fields("added_tokens", 0, single_word=True), r"added_tokens .*\(0: single_word"),
    "special": (set_fields("added_tokens", 0, special=False),
                r"added_tokens .*\(0: special: None here, True"),
    "no added token": (lambda r: r["added_tokens"].pop(), "ids mean other tokens|added_tokens"),
    "normalizer": (set_fields(normalizer={"type": "NFC"}), r"normalizer differs from .*None there"),
    "one merge": (swap_merges, r"merges differs from .* \(\d+: \d: '\w+' here, '\w+' there\)"),
    "two ids": (swap_ids, r"2 ids mean other tokens than in .*'[af]' here, '[af]' there"),
    "splitter": (set_fields(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": "o"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}),
        "pre_tokenizer differs"),
    "regular expression": (set_fields("pre_tokenizer", use_regex=False),
                           r"pre_tokenizer .*\(use_regex: None here, True"),
    "space in front": (set_fields("pre_tokenizer", add_prefix_space=True),
                       r"pre_tokenizer .*add_prefix_space"),
    "decoder": (set_fields(decoder={"type": "Fuse"}), r"decoder differs .*\(type: 'Fuse' here, 'ByteLevel'"),
    "end of a word": (set_fields("model", end_of_word_suffix="s"), "end_of_word_suffix differs")}


@pytest.mark.each("name", EQUIVALENT)
def test_identity_ignores_file_layout(name: str, trained: Path, tmp_path: Path) -> None:
    other = copy_tokenizer(trained, tmp_path / "other", *EQUIVALENT[name][:1], **EQUIVALENT[name][1])
    assert encode_probes(other) == encode_probes(trained), "`tokenizers` sees no difference"
    assert hash_file(other / "tokenizer.json") != hash_file(trained / "tokenizer.json")
    assert tokenizer_digest(other) == tokenizer_digest(trained) and find_difference(other, trained) is None


@pytest.mark.each("name", DIFFERENT)
def test_difference_names_first_field(name: str, trained: Path, tmp_path: Path) -> None:
    change, message = DIFFERENT[name]
    other = copy_tokenizer(trained, tmp_path / "other", change)
    # these probes split equally with another regular expression
    assert name == "regular expression" or encode_probes(other) != encode_probes(trained)
    assert tokenizer_digest(other) != tokenizer_digest(trained)
    assert re.search(message, str(find_difference(other, trained))), find_difference(other, trained)


MODELS: dict[str, dict[str, Any]] = {
    "unigram": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]] + [
        [f"t{i}", -((i * 0.61803398875) % 1) * 17] for i in range(500)]}, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True, "str_rep": "\u2581"},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}},
    "wordpiece": {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                            "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}},
                  "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                                 "strip_accents": None, "lowercase": True},
                  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"},
                                                                          {"type": "Punctuation"}]},
                  "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    "llama 2": {"model": {"vocab": {"a": 0, "b": 1, "ab": 2, "<0x0A>": 3}, "merges": ["a b"],
                          "byte_fallback": True, "fuse_unk": True, "unk_token": "a"},
                "normalizer": {"type": "Sequence", "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
                "decoder": {"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                    {"type": "ByteFallback"}, {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}}


@pytest.mark.each("name", MODELS)
def test_rewriting_by_library_keeps_identity(name: str, tmp_path: Path) -> None:
    """As `sov-tokenizer import` and `save_pretrained` do, also with the last digit of scores."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(
        {"version": "1.0", "added_tokens": [], **MODELS[name]}))
    digest = tokenizer_digest(tmp_path)
    Tokenizer.from_file(str(tmp_path / "tokenizer.json")).save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_digest(tmp_path) == digest


@pytest.mark.parametrize("lowercase", [True, False])
def test_identity_includes_strip_accents(lowercase: bool, tmp_path: Path) -> None:
    """null strips them of a text in lower case, false never does."""
    digests: dict[str, set[str]] = {}
    for strips in (None, False, True):
        folder = tmp_path / str(strips)
        folder.mkdir()
        raw = {**MODELS["wordpiece"], "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": strips, "lowercase": lowercase}}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **raw}))
        normalizer = Tokenizer.from_file(str(folder / "tokenizer.json")).normalizer
        assert normalizer is not None
        digests.setdefault(tokenizer_digest(folder), set()).add(normalizer.normalize_str("\u00c9t\u00e9"))
    assert len(digests) >= 2 and all(len(texts) == 1 for texts in digests.values())


def test_identity_includes_unknown_token(tmp_path: Path) -> None:
    for name, unknown in (("none", None), ("first", 0), ("second", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {
            "type": "Unigram", "unk_id": unknown, "vocab": [["a", 0.0], ["b", -1.0]]}}))
    assert len({tokenizer_digest(tmp_path / name) for name in ("none", "first", "second")}) == 3


def test_changed_file_is_read_again(trained: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(trained, tmp_path / "other", lambda r: None)
    before = tokenizer_digest(folder)
    change_file(folder, "tokenizer.json", swap_ids)
    assert tokenizer_digest(folder) != before
    for content in ("{", "[]", '{"model": {}}'):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read as a tokenizer"):
            tokenizer_digest(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        tokenizer_digest(folder)


# Bytes of tokens, compared with the tokenizer's own decoding.


TEXT = "The 가나다 fox — 한국어 문장입니다. naïve 🦊 jumps\n\tover 12345 dogs."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(TEXT, 330, "<|end|>")
    tokenizer.add_tokens([AddedToken("한 fox", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_text_bytes_are_sum_over_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sizes = count_token_bytes(folder, 400)
    for text in (TEXT, "한 fox 한 fox", "🦊", "plain"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_pieces_are_characters(kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{TEXT}\n{string.printable[:95]}\n{string.__doc__}\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tiny"), vocab_size=380,
        byte_fallback=True, model_type=kind, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    (tmp_path / "tiny.model").rename(tmp_path / "tokenizer.model")
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert sov_tokenizer(["import", str(tmp_path), "--eos", "</s>", "--output", str(tmp_path / "out")]) == 0
    sizes = count_token_bytes(tmp_path / "out", 500)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in ("The naïve fox", "한국어 문장입니다", "🦊 ☃"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sizes[ids].sum() == len(f" {text}".encode()), "it puts a space before"
    assert sizes[tokenizer.token_to_id("<0x0A>")] == 1


def test_special_and_unused_ids_have_no_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sizes = count_token_bytes(folder, 400)
    assert sizes[tokenizer.token_to_id("<|end|>")] == 0
    assert (sizes[tokenizer.get_vocab_size():] == 0).all()
    assert len(count_token_bytes(folder, 100)) == 100
