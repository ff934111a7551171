"""The commands of docs/omni.md for media records and codecs, run with small codecs."""

import json
import shlex
from pathlib import Path

import pytest

from data_prep.cli import main
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.shard_files import FEATURES
from tests.data_prep.media.chats import Encode
from tests.pages_typed import blocks, page_section, shown_files
from tokenizer.cli import main as sov_tokenizer

PAGE = page_section("omni.md", "Media records and codecs")
SMALLER = {"6561": "8", "65536": "8", "448:256": "4:3", "128:30:750": "8:1:5"}
"""Codec size on the page -> smaller size for a fast test."""


@pytest.mark.deep
def test_page_commands_pack_media(encode: Encode, tokenizers: dict[str, Path], cwd: Path) -> None:
    Path("work").mkdir()
    Path("work/tokenizer").symlink_to(tokenizers["solar-open"])
    # the `encode` fixture made the codecs in this folder; the page has them in `work`
    for name in ("images", "sounds"):
        Path(name).rename(f"work/{name}")
    for name, content in shown_files(PAGE).items():
        Path(name).write_text(content)
    local_commands, slurm_commands = (block.splitlines() for block in blocks(PAGE, "bash"))
    for line in local_commands:
        program, *words = [SMALLER.get(word, word) for word in shlex.split(line)]
        assert (main(words) if program == "sov-data" else sov_tokenizer(words)) == 0, line
    source = read_manifest(Path("work/tokens")).content["sources"][0]
    assert source[FEATURES]["sounds"]["slots"] == 5
    assert sum(split["num_documents"] for split in source["splits"].values()) == 2
    corpus = [json.loads(line) for line in Path("work/media/records.jsonl").read_text().splitlines()]
    assert corpus[1]["messages"][1]["content"].startswith("Listen:\n<|discrete_audio_start|>")
    assert len(slurm_commands) == 1  # not run: tests/test_docs.py parses its options
