"""Tokenizer, chat template and token ids travel with the weights; code does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_sov import convert
from megatron_sov.errors import UserError


def test_companions_travel(solar_dir: Path, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    for file in solar_dir.iterdir():
        shutil.copy(file, source)
    (source / "modeling.py").write_text("raise SystemExit('code of strangers')")
    convert.from_hf(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (solar_dir / name).read_bytes()
    assert not (tmp_path / "hf/modeling.py").exists()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_a_link_is_not_followed_out_of_a_foreign_folder(solar_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(solar_dir, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "added_tokens.json").symlink_to("../secret")
    with pytest.raises(UserError, match=r"added_tokens\.json: is a link to .*secret, outside of its folder"):
        convert.from_hf(source, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_token_ids_come_from_the_tokenizer_where_nothing_else_says_them(solar_dir: Path,
                                                                        tmp_path: Path) -> None:
    source = shutil.copytree(solar_dir, tmp_path / "source",
                             ignore=shutil.ignore_patterns("generation_config.json"))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | ids))
    convert.from_hf(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {
        "bos_token_id": 0, "eos_token_id": 1}


def test_what_ends_a_turn_ends_generation(solar_dir: Path, tmp_path: Path) -> None:
    """Engines take their stop tokens from generation_config.json."""
    source = shutil.copytree(solar_dir, tmp_path / "source",
                             ignore=shutil.ignore_patterns("generation_config.json"))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        {"id": 3, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<end>{% endfor %}{{ eos_token }}")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | ids))
    convert.from_hf(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    written = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [1, 3]}
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 1


def test_a_tokenizer_that_transformers_would_read_otherwise_is_told(
        solar_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers splits the text of every qwen2 folder its own way."""
    from transformers import (
        AutoTokenizer,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2Tokenizer,
    )

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, **sizes))
    alphabet = {chr(i): n for n, i in enumerate([*range(33, 127), *range(161, 173), *range(174, 256),
                                                 *range(256, 324)])}
    for name in ("another", "its own"):
        model.save_pretrained(source := tmp_path / name)
        if name == "another":
            shutil.copy(solar_dir / "tokenizer.json", source)
        else:
            Qwen2Tokenizer(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]).save_pretrained(source)
        convert.from_hf(source, tmp_path / f"{name} ckpt")
        capsys.readouterr()
        convert.to_hf(tmp_path / f"{name} ckpt", tmp_path / f"{name} hf")
        assert ("may give other token ids" in capsys.readouterr().err) == (name == "another")
    written, text = tmp_path / "another hf", "in 1234 words 가나다"
    said = PreTrainedTokenizerFast.from_pretrained(str(solar_dir))(text)["input_ids"]
    assert PreTrainedTokenizerFast.from_pretrained(str(written))(text)["input_ids"] == said
    assert AutoTokenizer.from_pretrained(str(written))(text)["input_ids"] != said
