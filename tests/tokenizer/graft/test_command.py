"""`sov-tokenizer graft`: models made here keep every old id and row to the bit, and new rows are the means
that the list says."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_sov import convert
from megatron_sov.base.artifacts import damaged_files, read_manifest
from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
from tokenizer.cli import main

prepare_megatron()

ENGLISH = ("The quick brown fox jumps over the lazy dog, and the other dogs jump over it. "
           "def f(x):\n    return x + 12\n" * 40)
THAI = ("กำลังเรียนภาษาไทย น้ำใจไมตรี เป็นมนุษย์สุดประเสริฐ ภาษาไทย มนุษย์ ประเทศไทย 다람쥐 헌 쳇바퀴에 타고파 "
        "quickly browse " * 40)
OLD_TOKENS, OLD_ROWS = 370, 400


def train(root: Path, name: str, text: str, vocab_size: int) -> Path:
    (root / f"{name}.text").mkdir(parents=True)
    (root / f"{name}.text/t.txt").write_text(text)
    assert main(["train", "--preset", "solar-open", "--vocab-size", str(vocab_size), "--input",
                 str(root / f"{name}.text"), "--output", str(root / name)]) == 0
    return root / name


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("donor"), "thai", THAI, 430)


# of untied ones the test of a Solar model tells in `make test`
@pytest.fixture(scope="module", params=[
    pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.deep)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model in bfloat16, in several files, with rows to spare behind its tokens."""
    root = tmp_path_factory.mktemp("model")
    base = train(root, "base", ENGLISH, OLD_TOKENS)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=OLD_ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=request.param,
                         initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "model", max_shard_size="30KB")
    shutil.copy(base / "tokenizer_config.json", root / "model")
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "NFC"}  # transformers has a class for qwen2: this preset's pattern, and NFC
    (root / "model/tokenizer.json").write_text(json.dumps(raw))
    (root / "model/vocab.json").write_text("{}")
    return root / "model"


@pytest.fixture(scope="module")
def grafted(model: Path, donor: Path) -> Path:
    words = model.parent / "words.txt"
    words.write_text("ประเทศไทย\nlazy dog\n")
    assert main(["graft", str(model), "--add", str(words), "--add", str(donor), "--replace",
                 "<|reserved_5|>=<|muse|>", "--output", str(model.parent / "grafted")]) == 0
    return model.parent / "grafted"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def listed(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "graft.json").read_text())["tokens"])


def test_old_logits_are_the_same_to_the_bit(model: Path, grafted: Path) -> None:
    before, after = AutoModelForCausalLM.from_pretrained(model), AutoModelForCausalLM.from_pretrained(grafted)
    ids = torch.randint(64, OLD_TOKENS, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old, new = before(ids).logits, after(ids).logits
    kept = [i for i in range(OLD_TOKENS) if i != 5]
    assert torch.equal(old[..., kept], new[..., kept])
    assert (new.shape[-1] == after.config.vocab_size > OLD_ROWS and torch.isfinite(new).all()
            and new.dtype == torch.bfloat16)


def test_new_rows_are_means_of_the_listed_old_ones(model: Path, grafted: Path) -> None:
    before, after, tokens = weights(model), weights(grafted), listed(grafted)
    old_tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tables = [name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(tables) == (1 if AutoModelForCausalLM.from_pretrained(model).config.tie_word_embeddings else 2)
    for name in before:
        if name not in tables:
            assert torch.equal(before[name], after[name])
            continue
        for token in tokens:
            assert token["old_ids"] and token["id"] not in token["old_ids"]
            mean = before[name][token["old_ids"]].double().mean(0).bfloat16()
            assert torch.equal(after[name][token["id"]], mean)
        untouched = [i for i in range(OLD_TOKENS) if i != 5]
        assert torch.equal(before[name][untouched], after[name][untouched])
    for token in tokens:
        if "\ufffd" not in token["text"]:
            assert old_tokenizer.encode(token["text"]).ids == token["old_ids"]
    assert [t["id"] for t in tokens] == [5, *range(OLD_TOKENS, OLD_TOKENS + len(tokens) - 1)]
    index = json.loads((grafted / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in after.values())


def test_text_is_cut_as_before_and_new_tokens_are_found(model: Path, grafted: Path, donor: Path) -> None:
    before, after = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(grafted)
    tokens, fresh = {t["text"]: t for t in listed(grafted)}, {t["id"] for t in listed(grafted)}
    for text in ("The quick fox, jumps\n\n  over 12 dogs!", "def g(y): return 3", "\u0e3f £ ½ 東京",
                 "é\u0301 \u00a0 😀"):
        assert after.encode(text) == before.encode(text) or fresh & set(after.encode(text))
        assert after.decode(after.encode(text)) == unicodedata.normalize("NFC", text)
    assert after.encode(ENGLISH.replace("lazy dog", "lazy cat")) == before.encode(
        ENGLISH.replace("lazy dog", "lazy cat"))
    whole = [text for text, token in tokens.items() if token["how"] == "merge" and "\ufffd" not in text]
    longest = max((text for text in whole if text > "\u0e00"), key=len)
    for text, how in (("ประเทศไทย", "word"), ("lazy dog", "word"), ("<|muse|>", "instead of <|reserved_5|>"),
                      (longest, "merge")):
        assert tokens[text]["how"] == how
        assert after.encode(text) == [tokens[text]["id"]]
    assert len(after.encode(THAI)) < 0.4 * len(before.encode(THAI))
    donated = set(Tokenizer.from_file(str(donor / "tokenizer.json")).get_vocab()) - set(before.get_vocab())
    taken = {t["token"] for t in listed(grafted) if t["how"] == "merge"}
    assert taken <= donated and len(taken) > 0.9 * len(donated)


def test_the_folder_is_whole(grafted: Path) -> None:
    manifest = read_manifest(grafted, "hf_model")
    assert damaged_files(grafted) == []
    assert (manifest.content["num_new_tokens"] == len(listed(grafted))
            and manifest.settings["old_vocab_size"] == OLD_ROWS)
    assert not (grafted / "vocab.json").exists() and not (grafted / "merges.txt").exists()
    assert json.loads((grafted / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_our_conversion_and_our_import_take_it(grafted: Path, tmp_path: Path) -> None:
    convert.from_hf(grafted, tmp_path / "checkpoint")
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "back")
    before, after = weights(grafted), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert main(["import", str(grafted), "--output", str(tmp_path / "tokenizer")]) == 0
    imported = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert imported.encode(THAI) == AutoTokenizer.from_pretrained(grafted).encode(THAI)


def test_a_solar_model_grows_to_a_given_size(hf_models: dict[str, Path], donor: Path, tmp_path: Path) -> None:
    source = hf_models["solar_open"]
    assert main(["graft", str(source), "--add", str(donor), "--vocab-size", "1034", "--output",
                 str(tmp_path / "filled")]) == 0
    assert [t["id"] for t in listed(tmp_path / "filled")] == list(range(1024, 1034))
    (tmp_path / "w.txt").write_text("<|listen|>\n")
    assert main(["graft", str(source), "--add", str(tmp_path / "w.txt"), "--special", "--vocab-size", "1056",
                 "--output", str(tmp_path / "padded")]) == 0
    before, after = weights(source), weights(tmp_path / "padded")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name][:1024]) and after[name].shape[0] == 1056
        assert torch.equal(after[name][1025:], before[name].double().mean(0).float().expand(31, -1))
    assert json.loads((tmp_path / "padded/graft.json").read_text())["mean_rows_from_to"] == [1025, 1056]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "padded")
    assert tokenizer.encode("<|listen|>") == [1024]
    assert 1024 not in tokenizer("<|listen|>", split_special_tokens=True)["input_ids"]
    old, new = (AutoModelForCausalLM.from_pretrained(source),
                AutoModelForCausalLM.from_pretrained(tmp_path / "padded"))
    ids = torch.arange(64, 104)[None]
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits[..., :1024])
    convert.from_hf(tmp_path / "padded", tmp_path / "checkpoint")


def test_an_ordinary_token_at_the_end_of_merges_can_be_replaced(model: Path, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((model / "tokenizer.json").read_text())
    left, right = raw["model"]["merges"][-1]
    last, text = left + right, (left + right).replace("Ġ", " ").replace("Ċ", "\n")
    assert main(["graft", str(model), "--replace", f"{text}=<a=b>", "--output", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    vocab = raw["model"]["vocab"]
    assert tokenizer.encode("<a=b>") == [vocab[last]]
    assert tokenizer.encode(text) == [vocab[left], vocab[right]]
    inner = next(a for a, _ in raw["model"]["merges"] if len(a) > 1)
    assert main(["graft", str(model), "--replace", f"{inner}=xyz", "--output", str(tmp_path / "no")]) == 2
    assert "is a part of" in capsys.readouterr().err


def broken(model: Path, target: Path, edit: Callable[[dict[str, Any]], Any],
           name: str = "config.json") -> Path:
    shutil.copytree(model, target)
    value = json.loads((target / name).read_text())
    edit(value)
    (target / name).write_text(json.dumps(value))
    return target


def test_mistakes_cost_one_sentence_and_leave_nothing(model: Path, donor: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    files = {"known.txt": b" the\n", "twice.txt": b"aq\naq\n", "empty.txt": b"\n", "bytes.txt": b"\xff\xfe",
             "space.txt": b"  \n", "new.txt": b"wxyz\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    smaller = broken(model, tmp_path / "smaller", lambda config: config.update(vocab_size=360))
    other = broken(model, tmp_path / "other", lambda config: config.update(vocab_size=500))
    unigram = tmp_path / "unigram.json"
    unigram.write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}))
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled, ignore=shutil.ignore_patterns("*.safetensors*"))
    add = ["--add", str(tmp_path / "new.txt")]
    mistakes = {
        "nothing to do": [model], "has no config.json": [tmp_path, *add],
        "' the' is a token of": [model, "--add", tmp_path / "known.txt"],
        "has 'aq' twice": [model, "--add", tmp_path / "twice.txt"],
        "holds no tokens": [model, "--add", tmp_path / "empty.txt"],
        "cannot be read as": [model, "--add", tmp_path / "bytes.txt"],
        "'  ' is no token": [model, "--add", tmp_path / "space.txt"],
        "must be OLD=NEW": [model, "--replace", "x"],
        "is no token of": [model, "--replace", "<|reserved_5|=<|x|>"],
        "'<|endoftext|>' is in use": [model, "--replace", "<|endoftext|>=<|x|>"],
        "'<|begin|>' is in use (as bos": [model, "--replace", "<|begin|>=<|x|>"],
        "'Z' is a byte or character": [model, "--replace", "Z=<|x|>"],
        "--vocab-size 390: must be at least 400": [model, *add, "--vocab-size", "390"],
        "its tokenizer has 370 ids, but vocab_size in config.json is 360": [smaller, *add],
        "no tensor has 500 rows": [other, *add], "has neither model.safetensors nor": [pickled, *add],
        "since it is Unigram and": [model, "--add", unigram],
        "none of the tokens can be added": [model, "--add", model.parent / "base"],
    }
    for sentence, arguments in mistakes.items():
        assert main(["graft", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("error:") == 1 and len(error.splitlines()) == 1, (
            sentence, error)
    assert not list(tmp_path.glob("*out*"))
