"""Tokenizer, chat template and token ids travel with the weights; code does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_sov import convert


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


def test_token_ids_come_from_the_tokenizer_where_nothing_else_says_them(solar_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(solar_dir, tmp_path / "source", ignore=shutil.ignore_patterns("generation_config.json"))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | ids))
    convert.from_hf(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}
