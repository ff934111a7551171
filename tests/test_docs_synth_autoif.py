"""docs/synth_autoif.md: its commands run one after the other, against endpoints of this machine."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from data_prep.cli import main

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from tests.data_prep.synth.models import autoif, constraints
from tests.data_prep.synth.scripted import by_system, generator

PAGE = (Path(__file__).parents[1] / "docs/synth_autoif.md").read_text(encoding="utf-8")
ADDRESS = re.compile(r"http://localhost:\d+/v1")
REQUEST = "내가 아는 노인에게서 돈을 얻어 내려고 하는데 손자인 척하는 전화 대본을 써 주세요."
TWIN = "내가 아는 노인에게 손자를 사칭하는 전화를 조심하라고 알려 주는 안내문을 써 주세요."
SAFETY = by_system(make_a_language_model_safe=json.dumps([{"request": REQUEST, "twin": TWIN}]), grade=9,
                   You_decline="죄송하지만 그 요청은 도와드릴 수 없습니다. 대신 가까운 상담소에서 도움을 "
                               "받을 수 있습니다.",
                   to_the_point="모르는 전화에서 가족이라고 말하면 먼저 끊고 아는 번호로 다시 걸어 "
                                "확인하세요.")
REPLIES = {"constraints": constraints.reply, "autoif": autoif.reply, "safety": SAFETY}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def kept(folder: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(folder, "kept.jsonl").read_text().splitlines()]


@pytest.mark.deep
def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    Path("queries.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    seeds = "\n".join(f"- {text}" for text in list(constraints.RULES)[:3])
    Path("kinds.jsonl").write_text(json.dumps({"kind": "form", "seeds": seeds}), encoding="utf-8")
    Path("none.yaml").write_text("steps: []\n")
    less = {"constraints": ["--input", "kinds.jsonl", "--set", "rounds=1", "--set", "per_call=1", "--checks",
                            "none.yaml"],
            "autoif": [],  # with its default checks
            "safety": ["--set", "pairs_per_call=1", "--limit", "2", "--checks", "none.yaml"]}
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for line, name in zip(lines, less, strict=True):
        with serving(ScriptedEndpoint(REPLIES[name])) as server:
            arguments = shlex.split(ADDRESS.sub(server.url, line))[1:]
            assert arguments[:2] == ["synth", name]
            assert main([*arguments, *less[name], "--workers", "1"]) == 0, capsys.readouterr().err
    assert len(kept("work/constraints")) == 3
    assert [set(row) >= {"messages", "constraint", "language", "synthetic"} for row in kept("work/autoif")]
    assert {row["strategy"] for row in kept("work/safety")} == {"redirect", "answer"}


def test_the_category_of_the_page_is_one(tmp_path: Path) -> None:
    shown = blocks("json")[1]
    (tmp_path / "a.jsonl").write_text(shown, encoding="utf-8")
    items = list(generator("safety", calls=1).items([tmp_path / "a.jsonl"]))
    assert [item.id for item in items] == ["fraud.1"] and items[0].fields["strategy"] == "redirect"
