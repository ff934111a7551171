"""The pages about duplicates and decontamination: every setting and command on them works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import data_prep.cli
from data_prep.curate.pipeline.step import step_class
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.settings import problems_of

DOCS = Path(__file__).parents[1] / "docs"
QUESTION = "How many barrels of oil does a refinery with twelve towers fill each morning?"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"),
                      re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path / "bench.jsonl", [{"id": 7, "question": QUESTION, "answer": "Twelve."}])
    write(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": text},
                                                   {"role": "assistant", "content": "12"}]}
                                     for text in ("Hello!", QUESTION.upper())])
    write(tmp_path / "prompts.jsonl", [{"prompt": text, "answer": 12}
                                       for text in (f"Say: {QUESTION}", "Go!")])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("page", ["dedup.md", "decontamination.md"])
def test_the_steps_that_the_pages_show_have_these_settings(workplace: Path, page: str) -> None:
    for block in blocks(page, "yaml"):
        for step in yaml.safe_load(block)["steps"]:
            ((kind, settings),) = step.items()
            if "benchmarks" in settings:
                settings["benchmarks"] = tuple(map(Path, settings["benchmarks"]))
            assert problems_of(step_class(kind).Settings(**settings)) == []


def test_the_commands_that_the_page_shows_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in blocks("decontamination.md", "sh")[0].splitlines():
        assert data_prep.cli.main(shlex.split(line)[1:]) == 0
    assert ("chats.jsonl: 2 records read: 1 written, 1 set aside (1 text of benchmarks)"
            in capsys.readouterr().out)
    kept = (workplace / "clean-prompts/prompts.jsonl").read_text()
    assert kept == '{"prompt": "Go!", "answer": 12}\n'
    (hit,) = json.loads((workplace / "clean-prompts/hits.json").read_text())
    assert (hit["item"], hit["before"], hit["found"]) == ("7", "Say: ", QUESTION[:-1])
    records = read_manifest("clean-chats", "corpus").content["records"]
    assert records == {"chats.jsonl": {"read": 2, "kept": 1, "left_out": 1}}
