"""The page about synthesis: its first run is typed as it stands, against an endpoint of this machine."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from data_prep.cli import main
from megatron_sov.work.progress.journal import records_by_item, work_folder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/synth.md").read_text(encoding="utf-8")
ADDRESS = "http://localhost:8000/v1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_first_run_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    from synthesis.actors import rewrite

    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents.jsonl").write_text(blocks("json")[0])
    lines = [line for block in blocks("bash")[:2] for line in block.replace("\\\n", " ").splitlines()
             if line.startswith("sov-data")]
    assert len(lines) == 3
    with serving(ScriptedEndpoint(rewrite.reply)) as server:
        for line in lines:
            assert main(shlex.split(line.replace(ADDRESS, server.url))[1:]) == 0
    told = capsys.readouterr().out
    assert "rewrite " in told and "rewrite (version" in told
    output = tmp_path / "work/rewritten"
    assert main(["inspect", str(output)]) == 0
    assert "kept work of `sov-data synth`" in capsys.readouterr().out
    (_, record), = records_by_item(work_folder(output))
    samples = json.loads(record)["samples"]
    lines = [line for name in ("kept", "rejected")
             for line in (output / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == len(samples) > 0
    promised = re.findall(r"^\| `([\w.*/-]+)`", PAGE[PAGE.index("## What comes out"):PAGE.index(
        "## It goes on")], re.MULTILINE)
    assert len(promised) == 6 and all(
        (output.parent / name if name.startswith(".") else output / name).exists() for name in promised)


def test_the_template_of_the_page_is_one(tmp_path: Path) -> None:
    from data_prep.synth.templates import load_prompt

    (tmp_path / "a.j2").write_text(blocks("jinja")[0])
    prompt = load_prompt("a", ["document"], [tmp_path])
    assert prompt.messages({"document": "x"})[1]["content"] == "Rewrite this document:\n\nx"
