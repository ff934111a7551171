"""The page about synthesis: its first run is typed as it stands, against an endpoint of this machine."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from data_prep.cli import main
from megatron_sov.work.progress.journal import iter_records_by_item, work_folder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from tests.data_prep.synth.scripted import by_system

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/synth.md").read_text(encoding="utf-8")
ADDRESS = "http://localhost:8000/v1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


OTHER_WORDS = (
    "Beside the old harbour stands a gauge of the tides that dates from 1911. Every morning, before the "
    "first ferry sets out, two keepers read it and write down how high the water is. A room in the town "
    "hall is filled with these books; the oldest one was restored in 1998.")


@pytest.mark.deep
def test_the_first_run_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents.jsonl").write_text(blocks("json")[0])
    lines = [line for block in blocks("bash")[:2] for line in block.replace("\\\n", " ").splitlines()
             if line.startswith("sov-data")]
    assert len(lines) == 3
    with serving(ScriptedEndpoint(by_system(rewrite=f"<rewrite>{OTHER_WORDS}</rewrite>", grade=9))) as server:
        for line in lines:
            assert main(shlex.split(line.replace(ADDRESS, server.url))[1:]) == 0
    told = capsys.readouterr().out
    assert "rewrite " in told and "rewrite (version" in told
    output = tmp_path / "work/rewritten"
    assert main(["inspect", str(output)]) == 0
    assert "kept work of `sov-data synth`" in capsys.readouterr().out
    (_, record), = iter_records_by_item(work_folder(output))
    samples = json.loads(record)["samples"]
    lines = [line for name in ("kept", "rejected")
             for line in (output / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == len(samples) > 0
    promised = re.findall(r"^\| `([\w.*/-]+)`", PAGE[PAGE.index("## What comes out"):PAGE.index(
        "## It goes on")], re.MULTILINE)
    assert len(promised) == 6 and all(
        (output.parent / name if name.startswith(".") else output / name).exists() for name in promised)


@pytest.mark.deep
def test_the_generator_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents.jsonl").write_text(blocks("json")[0])
    (tmp_path / "summaries.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
             if "summaries.yaml" in line]
    summary = ("Every morning, before the first ferry leaves, two keepers of the gauge in the old harbour "
               "note down how high the water stands; a whole room is full of their books.")
    replies = by_system(You_grade=9, material=f"<summary>{summary}</summary>")
    with serving(ScriptedEndpoint(replies)) as server:
        for line in lines:
            assert main(shlex.split(line.replace(ADDRESS, server.url))[1:]) == 0
        asked = len(server.requests)
        (tmp_path / "summaries.yaml").write_text(blocks("yaml")[0] + "# changed\n", encoding="utf-8")
        assert main(shlex.split(lines[1].replace(ADDRESS, server.url))[1:]) == 2
        assert "digests.summaries.yaml was" in capsys.readouterr().err
        assert len(server.requests) == asked
        (tmp_path / "summaries.yaml").write_text(blocks("yaml")[0].replace("{{ document }}",
                                                                           "{{ documnet }}"))
        assert main(shlex.split(lines[1].replace(ADDRESS, server.url))[1:]) == 2
        told = capsys.readouterr().err
        assert "summaries.yaml, line 8: prompts.write" in told and "did you mean 'document'" in told
        assert len(server.requests) == asked
    (row,) = map(json.loads, (tmp_path / "work/summaries/kept.jsonl").read_text().splitlines())
    assert row["text"] == summary
    assert row["synthetic"]["generator"] == "summaries"


def test_the_page_names_all_functions_readers_and_steps() -> None:
    from data_prep.synth.declared.functions import FUNCTIONS
    from data_prep.synth.declared.parsers import PARSERS
    from data_prep.synth.declared.readers import READERS
    from data_prep.synth.declared.steps import VERBS

    for name in (*FUNCTIONS, *PARSERS, *VERBS, *READERS):
        assert re.search(rf"`{name}[`:]", PAGE), name
