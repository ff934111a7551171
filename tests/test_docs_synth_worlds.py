"""The page about tool data: its commands are typed as they stand, against an endpoint of this machine; its
world is sound and plays."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.judge.tools.worlds.virtual import Virtual, problems_of

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from tests.data_prep.synth.models import goals, tool_trajectories, worlds

PAGE = (Path(__file__).parents[1] / "docs/synth_worlds.md").read_text(encoding="utf-8")
ADDRESS = "http://localhost:8000/v1"
FEWER = {"worlds": ["--limit", "1"], "goals": ["--set", "tasks_per_world=1", "--set", "num_solvers=1"],
         "tool-trajectories": ["--set", "conversations_per_task=1"]}
"""What is typed behind the lines of the page, for time."""


def reply(request: Mapping[str, Any]) -> Any:
    """One model for all three generators."""
    system = request["messages"][0]["content"]
    if system.startswith("You design"):
        return worlds.reply(request)
    return (goals if system.startswith("You write tasks") else tool_trajectories).reply(request)


@pytest.mark.deep
def test_the_page_leads_from_a_word_to_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"^`([a-z_.]+)`:\n\n```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        Path(name).write_text(content)
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
             for line in block.splitlines()]
    assert [line.split()[0] for line in lines] == ["sov-data"] * 3 + ["megatron-sov"]
    with serving(ScriptedEndpoint(reply)) as server:
        for line in lines[:3]:
            words = shlex.split(line.replace(ADDRESS, server.url))[1:]
            assert main([*words, *FEWER[words[1]], "--workers", "1"]) == 0, capsys.readouterr()
    kept = [json.loads(line) for line in Path("work/chats/kept.jsonl").read_text().splitlines()]
    assert len(kept) == 1 and all(parse_messages(row["messages"], "messages") for row in kept)


def test_the_world_of_the_page_is_one() -> None:
    world = json.loads(re.findall(r"^```json world\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0])
    assert problems_of(world) == []
    play = Virtual()
    play.reset({"question": "?", "world": world, "goal": {"calls": [
        {"name": "give_out", "arguments": {"coat_id": "C1"}}]}})
    assert play.call("give_out", {"coat_id": "C1"}) == {"owner": "Ada", "hook": 4}
    assert play.score("").reward == 1
