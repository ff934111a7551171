"""`sov-data inspect`: the counts of each source and split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.inspect_tokens import table
from data_prep.pack import PackSettings, Source, pack
from megatron_sov.artifacts import read_manifest


def test_inspect_shows_counts_per_source(tokenizers: dict[str, Path], tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("some text of one document " * 100)
    pack(tokenizers["solar-open"], [Source("one", tmp_path / "one.txt")], tmp_path / "shards",
         PackSettings(heldout_share=1e-9))
    assert main(["inspect", str(tmp_path / "shards")]) == 0
    told = capsys.readouterr().out.split("artifact of kind")[1].splitlines()
    assert [line.removeprefix("  ") for line in told[1:5]] == table(tmp_path / "shards")
    assert told[-1].startswith("  row 1: == one/train, document 0, ") and "some text of one" in told[-1]
    assert main(["inspect", str(tmp_path / "shards"), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("shards: sound as tokens\n")
    record = read_manifest(tmp_path / "shards").content["sources"][0]["splits"]["train"]
    train, heldout = (line.split() for line in table(tmp_path / "shards")[2:])
    ratio = f"{2600 / record['num_tokens']:.3f}"
    assert train == ["one", "text", "train", "1", "1", f"{record['num_tokens']:,}", "2,600", ratio]
    assert heldout == ["one", "text", "heldout", "1", "0", "0", "0", "-"]


def test_other_artifacts_are_told_too(tokenizers: dict[str, Path], capsys: pytest.CaptureFixture[str]
                                      ) -> None:
    assert main(["inspect", str(tokenizers["solar-open"])]) == 0
    assert "artifact of kind tokenizer" in capsys.readouterr().out


def test_shards_without_a_tokenizer_are_told_all_the_same(tokenizers: dict[str, Path], tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("some text of one document " * 100)
    pack(tokenizers["solar-open"], [Source("one", tmp_path / "one.txt")], tmp_path / "shards",
         PackSettings(heldout_share=1e-9))
    shutil.rmtree(tmp_path / "shards/tokenizer")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "shards")]) == 0
    assert "row 1: no document can be shown: " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "shards"), "--verify"]) == 3
    assert "shards/tokenizer/tokenizer.json: is missing" in capsys.readouterr().err
