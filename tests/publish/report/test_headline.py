"""What a run is judged by on the first screens: a loss of tokens, or what its objective is after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.publish.report.headline import headline_charts, headlines
from megatron_sov.publish.report.page import render
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.sections import sections
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.runs.obs.meters import LOSS, Meter, headline_fields


def write(folder: Path, objective: str, **start: Any) -> Path:
    """Write a run of an objective with the meters of all built-in ones."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"objective": {"name": objective}}), encoding="utf-8")
    log = EventLog(folder / EVENTS)
    log.write("run_start", resumed_from=0, num_ranks=1, **start)
    for step in range(1, 5):
        log.write("round", step=step - 1, round=step, groups={"learns": step, "all_right": 4 - step},
                  means={"reward": step / 4, "response_tokens": 10.0, "domains": {"a": {"reward": 1}}})
        log.write("step", step=step, loss=0.01 * step, tokens=step * 10,
                  meters={"pairs_right": step / 4, "margin": 0.5 * step, "kl": 1 / step, "mine": step})
    log.close()
    return folder


RL = (Meter("reward", "mean reward", better="higher"), Meter("response_tokens", "response length", "tokens"))
PAIRS = (Meter("pairs_right", "pairs right", "share", "higher"), Meter("margin", better="higher"))


@pytest.mark.parametrize(("objective", "declared", "titles"), [
    ("policy", RL, ["mean reward", "response length"]), ("preference", PAIRS, ["pairs right", "margin"]),
    ("lm", (LOSS,), ["loss"]), ("lm", (), ["loss"]),
    ("policy", (), ["policy loss"]), ("obj.py:Mine", (), ["loss of obj.py:Mine"])])
def test_an_objective_is_judged_by_what_it_is_after(
        objective: str, declared: tuple[Meter, ...], titles: list[str], tmp_path: Path) -> None:
    start = headline_fields(declared, comparable=objective == "lm") if declared else {}
    run = read_run(write(tmp_path / "run", objective, **start))
    assert [meter.title for meter, _ in headlines(run)] == titles
    assert len(headline_charts([run])) == len(titles)
    page = render([run])
    assert ("nats per token" in page) == (objective == "lm")
    assert all(title.lower() in page.lower() for title in titles[:1])


def test_a_run_may_declare_its_own_meters(tmp_path: Path) -> None:
    declared = [{"name": "mine", "unit": "share", "better": "higher", "label": "My share"},
                {"name": "absent"}]
    ((meter, curve),) = headlines(read_run(write(tmp_path / "run", "obj.py:Mine", headline=declared)))
    assert (meter.name, meter.title, meter.text(0.5)) == ("mine", "My share", "50 %")
    assert curve.values.tolist() == [1, 2, 3, 4]


def test_meters_that_are_none_leave_the_loss(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", "lm", headline=[{"name": "absent"}, "odd"]))
    assert [meter.title for meter, _ in headlines(run)] == ["loss"]


def test_rounds_are_points_over_steps_and_many_phases_are_folded(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", "policy"))
    assert run.curves["rounds"]["learning_groups"].values.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert "domains" not in run.curves["rounds"]
    log = EventLog(tmp_path / "run" / EVENTS)
    for step in range(5, 20):
        log.write("step", step=step, loss=0.1, phase=f"round {step}")
    log.close()
    (table,) = sections(read_run(tmp_path / "run"))[0].tables
    assert table.is_folded and "<summary>16 phases</summary>" in render([read_run(tmp_path / "run")])
