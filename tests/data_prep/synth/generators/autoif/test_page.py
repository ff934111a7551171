"""docs/synth_autoif.md: its commands run one after the other, against endpoints of this machine."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.cli import main
from data_prep.synth.generators.autoif.texts import texts_of
from data_prep.synth.generators.safety import read_taxonomy

sys.path.append(str(Path(__file__).parents[5] / "benchmarks"))
from synthesis.actors import autoif, constraints, safety
from synthesis.endpoint import ScriptedEndpoint, serving
from synthesis.rules import Rule, plain

PAGE = (Path(__file__).parents[5] / "docs/synth_autoif.md").read_text(encoding="utf-8")
ADDRESS = re.compile(r"http://localhost:\d+/v1")
REPLIES = {"constraints": constraints.reply, "autoif": autoif.reply, "safety": safety.reply}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def kept(folder: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(folder, "kept.jsonl").read_text().splitlines()]


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    Path("queries.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    Path("seeds.txt").write_text("\n".join(list(constraints.RULES)[:3]), encoding="utf-8")
    Path("none.yaml").write_text("steps: []\n")
    less = {"constraints": ["--input", "seeds.txt", "--set", "rounds=0", "--checks", "none.yaml"],
            "autoif": [],  # with its default checks
            "safety": ["--set", "pairs_per_call=1", "--limit", "2", "--checks", "none.yaml"]}
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for line, generator in zip(lines, less, strict=True):
        with serving(ScriptedEndpoint(REPLIES[generator])) as server:
            arguments = shlex.split(ADDRESS.sub(server.url, line))[1:]
            assert arguments[:2] == ["synth", generator]
            assert main([*arguments, *less[generator], "--workers", "1"]) == 0, capsys.readouterr().err
    assert len(kept("work/constraints")) == 3
    assert [set(row) >= {"messages", "constraint", "language", "synthetic"} for row in kept("work/autoif")]
    assert {row["strategy"] for row in kept("work/safety")} == {"redirect", "answer"}


def test_the_first_command_begins_with_our_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is typed as it stands, for the first seed alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    line = blocks("bash")[0].replace("\\\n", " ")
    seed, *_ = texts_of("ko").seeds
    three = Rule(seed, r"len([part for part in response.split('\n\n') if part.strip()]) == 3",
                 "There must be three paragraphs.",
                 lambda topic, number: "\n\n".join(plain(topic, number + place) for place in range(3)), plain)
    monkeypatch.setitem(constraints.RULES, seed, three)
    with serving(ScriptedEndpoint(constraints.reply)) as server:
        assert main([*shlex.split(ADDRESS.sub(server.url, line))[1:], "--limit", "1", "--workers", "1"]) == 0
    (row,) = kept("work/constraints")
    assert row["prompt"] == seed and len(row["functions"]) >= 3


def test_the_taxonomy_of_the_page_is_one(tmp_path: Path) -> None:
    shown, = blocks("yaml")
    (tmp_path / "a.yaml").write_text(shown, encoding="utf-8")
    assert [category.id for category in read_taxonomy(tmp_path / "a.yaml")] == ["fraud"]
    assert yaml.safe_load(shown)["categories"][0]["strategy"] == "redirect"
