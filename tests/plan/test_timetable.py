"""What `megatron-sov plan` says of a run before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.cli import main
from megatron_sov.config import apply_settings
from megatron_sov.config.schedules import Schedule
from megatron_sov.plan import timetable

RAMP = ["train.ramp_from_batch_size=8", "train.ramp_increment=8", "train.ramp_steps=40"]


def test_the_table_shows_every_place_at_which_something_changes() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"),
                            ["optim.schedule=wsd", "optim.rewarm=[[70, 9]]", *RAMP])
    found = {row.step: row for row in timetable.rows(config)}
    # warm-up over, ramp over, re-warmed, decay begins; then the four phases' first steps
    assert {20, 21, 40, 41, 79, 80, 160, 161} <= set(found)
    assert {start + 1 for start in config.phase_starts()} <= set(found)
    assert found[40].samples == 8 and found[41].samples == 16 and found[1].tokens == 8 * 256
    assert found[200].tokens == 40 * 8 * 256 + 160 * 16 * 256
    assert found[20].lr == found[160].lr == pytest.approx(4e-3) and found[200].lr == pytest.approx(2e-4)
    for step, row in found.items():
        assert row.lr == Schedule(config).learning_rate(step - 1)


def test_a_ramp_of_many_stretches_does_not_fill_the_page() -> None:
    config = apply_settings(recipes.get("solar-open-102b"), [
        "train.ramp_from_batch_size=480", "train.ramp_increment=480", "train.ramp_steps=20000"])
    assert 30 < len(timetable.rows(config)) < 100
    assert len(Schedule(config).stretches) == 27 + 4


def test_the_command_prints_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", "k-exaone-236b", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    others = "spanish 2.5 %, german 2.5 %, japanese 2.5 %, vietnamese 2.5 %"
    assert f"foundation: web 70 %, korean 10 %, {others}, code 10 %" in printed
    assert "#" * timetable.BAR_CHARACTERS in printed
    html = page.read_text()
    assert ("Planned learning rate." in html and "Planned blend of each phase." in html
            and "reasoning-trajectories" in html)
    assert main(["plan", "k-exaone-236b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == pytest.approx(11e12, rel=1e-4) and plan["schedule"][-1]["step"] == plan["steps"]
    assert main(["plan", "k-exaone-236b", "--set", "optim.decay_share=2"]) == 2
    assert "optim.decay_share = 2 must be at most 1" in capsys.readouterr().err
    assert main(["plan", "k-exaone-236b", "--nproc", "24"]) == 2
    assert "must divide the number of processes, 24" in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "lengths"), [
    ("solar-open-102b-extend", [32768, 102400]), ("k-exaone-236b-extend", [32768, 262144]),
    ("tiny-solar-open-extend", [512, 1024])])
def test_the_stages_of_an_extension_are_planned_as_phases(recipe: str, lengths: list[int],
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in plan["phases"]] == [s.name for s in recipes.get(recipe).extend.stages]
    assert sorted({row["seq_len"] for row in plan["schedule"]}) == lengths
