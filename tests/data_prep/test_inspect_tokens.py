"""`sov-data inspect`: the counts of each source and split."""

from __future__ import annotations

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
    assert capsys.readouterr().out.splitlines()[-2:] == table(tmp_path / "shards")[2:]
    record = read_manifest(tmp_path / "shards").content["sources"][0]["splits"]["train"]
    train, heldout = (line.split() for line in table(tmp_path / "shards")[2:])
    ratio = f"{2600 / record['num_tokens']:.3f}"
    assert train == ["one", "text", "train", "1", "1", f"{record['num_tokens']:,}", "2,600", ratio]
    assert heldout == ["one", "text", "heldout", "1", "0", "0", "0", "-"]


def test_other_folders_are_refused(tokenizers: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tokenizers["solar-open"])]) == 2
    assert "is a 'tokenizer' artifact where a 'tokens' artifact is needed" in capsys.readouterr().err
