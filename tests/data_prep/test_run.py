"""The command `sov-data run`: command lines that cannot be meant are a sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import cli


@pytest.mark.parametrize(("words", "sentence"), [
    (["gone.yaml", "--output", "out"], "gone.yaml: does not exist; pass a pipeline file"),
    (["p.yaml", "--output", "out", "--workers", "0"], "--workers 0: must be at least 1"),
    (["p.yaml", "--output", "out", "--account", "me"], "is only for --cluster"),
    (["p.yaml", "--output", "full"], "full: exists and is no folder of a pipeline"),
    (["p.yaml", "--output", "full/x.txt"], "x.txt"),
    (["p.yaml", "--output", "out", "--cluster", "h1000"], "there is no such profile; did you mean"),
    (["p.yaml"], "--output"),
    (["p.yaml", "--output", "raw/out"], "lies in 'raw' of source raw"),
    (["raw", "--output", "out"], "raw: is a folder; pass a pipeline file"),
    (["full/x.txt", "--output", "out"], "full/x.txt:1: holds no mapping"),
    (["p.yaml", "--output", "out", "--set", "a=b"], "--set a=b: nothing takes this"),
])
def test_a_wrong_command_line_is_a_sentence(tmp_path: Path, words: list[str], sentence: str,
                                            monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("words")
    (tmp_path / "p.yaml").write_text("name: p\nsources: [{name: raw, path: raw}]\n")
    assert cli.main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
    assert not (tmp_path / "out/manifest.json").exists()
