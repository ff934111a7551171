"""The page about pipelines: its file runs with its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.curate.pipeline.step import STEPS

PAGE = (Path(__file__).parents[1] / "docs/data_pipeline.md").read_text()
OWN = """import dataclasses

def shorter(document):
    return dataclasses.replace(document, text=document.text[:1000])
"""


@pytest.mark.deep
def test_the_pages_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (file,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    Path("notes.yaml").write_text(file)
    Path("own.py").write_text(OWN)
    for name in ("web", "books"):
        Path("raw", name).mkdir(parents=True)
        for number in range(3):
            Path("raw", name, f"{number}.txt").write_text(
                f"The {name} say that {number} ships came in. They brought salt and timber. " * 20)
    Path("raw/web/.draft.txt").write_text("not yet")
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    for line in lines:
        if "--cluster" not in line:
            assert cli.main(line[1:]) == 0, line
    printed = capsys.readouterr().out
    assert "corpus: complete" in printed
    assert "\nsource web: raw/web: passed over 1 hidden (.draft.txt)\n" in printed
    for name in ("text", "summary.json", "quarantine/web.jsonl", "manifest.json",
                 "pipeline.json", "shards/books", "shared"):
        assert Path("corpus", name).exists(), name


def test_the_page_names_every_step() -> None:
    assert [name for name in STEPS if f"`{name}`" not in PAGE] == []
