"""`sov-tokenizer import`: an imported tokenizer gives the ids of its original library, or is refused."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer

from data_prep.shards.encode import Encoder
from megatron_sov.base.artifacts import read_manifest
from tokenizer.cli import main
from tokenizer.formats.tiktoken_format import format_ranks

PROSE = ("The quick brown fox doesn't jump over 12 lazy dogs, 1234567 of them.\n  다람쥐 헌 쳇바퀴에 타고파. "
         "กำลังเรียนภาษาไทย\n"
         "f(x) < s / 2 > unk pad mask 0x1A2B3C4D5E6F7890\n"
         "Zwölf Boxkämpfer jagen Viktor. It is a fact that they have said so, haven't they? 東京タワー 333\n")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
          r"|\s++$|\s*[\r\n]"
          r"|\s+(?!\S)|\s")
TEXTS = st.one_of(st.text(max_size=40), st.text(alphabet="the fox'sS \u00a0\u3000\n\t12345ü가타ไท<mask>/s>▁",
                                                max_size=60))


@functools.cache
def load_cached_tokenizer(folder: Path) -> Any:
    """Return transformers' tokenizer of an unchanging folder, cached."""
    return AutoTokenizer.from_pretrained(folder)


def learn_ranks() -> dict[bytes, int]:
    """Return ranks learned by tiktoken's educational trainer, and a last token that no merges produce."""
    from tiktoken._educational import bpe_train

    ranks = dict(bpe_train(PROSE * 3, 420, CL100K, visualise=None))
    return ranks | {b" xyzzy": len(ranks)}


@pytest.fixture(scope="module")
def by_tiktoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiktoken.Encoding, Path]:
    """tiktoken's encoding, and the folder of its import. Ids 421 to 429 have no token."""
    root, ranks = tmp_path_factory.mktemp("tiktoken"), learn_ranks()
    special = {"<|endoftext|>": 430, "<|pad|>": 431}
    (root / "cl.tiktoken").write_bytes(format_ranks(ranks))
    (root / "rules.json").write_text(json.dumps({"pat_str": CL100K, "special_tokens": special,
                                                 "comment": "ignored"}))
    assert main(["import", str(root / "cl.tiktoken"), "--rules", str(root / "rules.json"), "--eos",
                 "<|endoftext|>", "--output", str(root / "mine")]) == 0
    return (tiktoken.Encoding("cl", pat_str=CL100K, mergeable_ranks=ranks, special_tokens=special),
            root / "mine")


@settings(max_examples=150)
@given(text=st.one_of(TEXTS, st.just("say xyzzy or  xyzzyx 1234567  \n")))
def test_tiktokens_ids(by_tiktoken: tuple[tiktoken.Encoding, Path], text: str) -> None:
    encoding, folder = by_tiktoken
    ids = load_cached_tokenizer(folder)(text, split_special_tokens=True)["input_ids"]
    assert ids == encoding.encode_ordinary(text)


def test_tiktokens_special_tokens_and_facts(by_tiktoken: tuple[tiktoken.Encoding, Path]) -> None:
    encoding, folder = by_tiktoken
    loaded, text = AutoTokenizer.from_pretrained(folder), "a<|endoftext|>b<|pad|> c"
    assert loaded.encode(text) == encoding.encode(text, allowed_special="all")
    content = read_manifest(folder, "tokenizer").content
    ids = [content[name] for name in ("vocab_size", "bos_id", "eos_id", "pad_id")]
    assert ids == [432, None, 430, 430]
    encoder = Encoder(folder)
    assert (encoder.vocab_size, encoder.eos_id, encoder.plain.encode(text).ids) == (
        432, 430, encoding.encode_ordinary(text))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer of 420 tokens that `train` has written."""
    root = tmp_path_factory.mktemp("trained")
    (root / "prose.txt").write_text(PROSE * 40)
    assert main(["train", "--preset", "solar-open", "--vocab-size", "420", "--input", str(root / "prose.txt"),
                 "--output", str(root / "tokenizer")]) == 0
    return root / "tokenizer"


@pytest.mark.deep
def test_ours_through_tiktoken_and_back_is_the_same_file(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained), "--format", "tiktoken", "--output",
                 str(tmp_path / "x.tiktoken")]) == 0
    assert main(["import", str(tmp_path / "x.tiktoken"), "--output", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    before, after = read_manifest(trained).content, read_manifest(tmp_path / "back").content
    assert before.keys() - after.keys() <= {"num_superwords"}
    assert all(before[key] == after[key]
               for key in ("tokenizer_sha256", "vocab_size", "bos_id", "eos_id", "pad_id"))


def edit_tokenizer(folder: Path, target: Path, edit: Callable[[dict[str, Any]], Any],
                   name: str = "tokenizer.json") -> Path:
    """Copy a tokenizer's folder without its manifest to `target`, whose file `name` is edited in place."""
    shutil.copytree(folder, target)
    (target / "manifest.json").unlink()
    raw = json.loads((target / name).read_text())
    edit(raw)
    (target / name).write_text(json.dumps(raw))
    return target


@pytest.mark.deep
def test_a_hugging_face_folder_is_not_cut_off(trained: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    source = edit_tokenizer(trained, tmp_path / "hf", lambda raw: raw.update(truncation=truncation))
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}, "pad_token": None,
               "tokenizer_class": "LlamaTokenizerFast",
               "chat_template": [{"name": "tool_use", "template": "T"},
                                 {"name": "default", "template": "{{ messages }}"}]}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["import", str(source), "--output", str(tmp_path / "mine")]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert loaded.encode(PROSE) == AutoTokenizer.from_pretrained(trained).encode(PROSE)
    assert (loaded.eos_token, loaded.pad_token, loaded.chat_template) == (
        "<|end|>", "<|end|>", "{{ messages }}")
    assert read_manifest(tmp_path / "mine").content["eos_id"] == 21


def test_mistakes_cost_one_sentence(trained: Path, tmp_path: Path, get_refusal: Any) -> None:
    ranks = format_ranks(learn_ranks())
    files = {
        "a.tiktoken": ranks, "b.tiktoken": ranks,
        "b.tiktoken.json": json.dumps({"pat_str": "(", "special_tokens": {}}), "c.tiktoken": ranks,
        "c.tiktoken.json": json.dumps({"pat_str": ".", "special_tokens": {"<e>": 5}}),
        "d.tiktoken": ranks[:-3] + b"!\n", "d.tiktoken.json": "{}", "e.tiktoken": ranks.split(b"\n", 1)[1],
        "f.txt": "words", "g.tiktoken": ranks, "h.tiktoken": ranks,
        "g.tiktoken.json": json.dumps({"pat_str": "a+", "special_tokens": {"<e>": 999}, "eos_token": "<e>"}),
        "h.tiktoken.json": json.dumps({"pat_str": ".", "special_tokens": {"<e>": "5"}})}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    no_eos = edit_tokenizer(trained, tmp_path / "no-eos", lambda config: config.pop("eos_token"),
                            "tokenizer_config.json")
    wrong = edit_tokenizer(trained, tmp_path / "wrong", lambda config: config.update(eos_token="<|ends|>"),
                           "tokenizer_config.json")
    random_ids = edit_tokenizer(trained, tmp_path / "dropout", lambda raw: raw["model"].update(dropout=0.1))
    mistakes = {
        tmp_path / "none": "does not exist", tmp_path / "f.txt": "is no tokenizer",
        tmp_path: "holds 7 tokenizers",
        tmp_path / "a.tiktoken": "a.tiktoken.json: does not exist, but a ranks file alone",
        tmp_path / "b.tiktoken": "is no regular",
        tmp_path / "c.tiktoken": "special token '<e>' has id 5, which is the id of",
        tmp_path / "d.tiktoken": "d.tiktoken:421: ", tmp_path / "e.tiktoken": "byte 0x00 is no token",
        tmp_path / "g.tiktoken": "cannot be represented, since tokenizers would not",
        tmp_path / "h.tiktoken": "must be an id",
        no_eos: "does not say which token ends a document; pass it by --eos",
        wrong: "eos_token = '<|ends|>' is no token; did you mean '<|end|>'?",
        random_ids: "makes encoding random",
    }
    for path, sentence in mistakes.items():
        error = get_refusal("import", str(path), "--output", str(tmp_path / "out"))
        assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def _write_tiktoken(more_ranks: bytes = b"", **rules: Any) -> Callable[[Path, Path], Path]:
    """Return a function that writes a ranks file and its rules, and returns the file to import."""

    def write(root: Path, trained: Path) -> Path:
        (root / "a.tiktoken").write_bytes(format_ranks(learn_ranks()) + more_ranks)
        (root / "a.tiktoken.json").write_text(json.dumps(
            {"pat_str": ".", "special_tokens": {"<e>": 900}, "eos_token": "<e>"} | rules))
        return root / "a.tiktoken"
    return write


def _edit_trained(file: str, change: Callable[[Any], Any]) -> Callable[[Path, Path], Path]:
    return lambda root, trained: edit_tokenizer(trained, root / "in", change, file)


def _truncate(file: str) -> Callable[[Path, Path], Path]:
    """Return a function that copies the trained folder, with a `file` of JSON nested too deep."""

    def write(root: Path, trained: Path) -> Path:
        (shutil.copytree(trained, root / "in") / file).write_text("[" * 200_000)
        return root / "in"

    return write


@pytest.mark.each("write", [
    _write_tiktoken(b"YWI= 3000000000\n"),
    _write_tiktoken(special_tokens={"<e>": 2**32}),
    _write_tiktoken(pat_str=""),
    _write_tiktoken(pat_str="(?=(a+))*"),
    _edit_trained("tokenizer.json", lambda raw: raw["added_tokens"].append(raw["added_tokens"][0] | {
        "id": 3 * 10**9, "content": "<far>"})),
    _edit_trained("tokenizer.json", lambda raw: raw["model"]["vocab"].update(abc="x")),
    _edit_trained("tokenizer.json", lambda raw: raw["model"]["vocab"].update(abc=300)),
    _edit_trained("tokenizer.json", lambda raw: raw.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$|(.*)*x"}, "behavior": "Isolated",
                       "invert": False})),
    _edit_trained("tokenizer_config.json", lambda config: config.update(eos_token=["a"])),
    _edit_trained("tokenizer_config.json", lambda config: config.update(
        eos_token=None, chat_template=[{"name": ["default"]}])),
    _truncate("tokenizer.json"),
])
def test_hostile_files_cost_a_sentence(write: Callable[[Path, Path], Path], trained: Path, tmp_path: Path,
                                       get_refusal: Any) -> None:
    error = get_refusal("import", str(write(tmp_path, trained)), "--output", str(tmp_path / "out"))
    assert error.startswith("error: ") and error.count("\n") == 1
