"""Headline figures of a run: the token loss, or the measure of its objective."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.publish.report.outcomes import build_gain_tables, find_headline_curves
from megatron_sov.publish.report.page import render_report
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.runs.obs.meters import LOSS, Meter, build_headline_fields


def write_run_of(folder: Path, objective: str, **start: Any) -> Path:
    """Write a run of four steps and rounds with meters of all built-in objectives.

    Args:
        folder: The new run folder, which is also returned.
        objective: The setting `objective.name` of the run.
        start: Further fields of the event `run_start`.
    """
    events: list[dict[str, Any]] = []
    for step in range(1, 5):
        means = {"reward": step / 4, "response_tokens": 10.0, "domains": {"a": {"reward": 1}}}
        meters = {"pairs_right": step / 4, "margin": 0.5 * step, "kl": 1 / step, "mine": step}
        events += [{"event": "round", "step": step - 1, "round": step, "means": means,
                    "groups": {"learns": step, "all_right": 4 - step}},
                   {"event": "step", "step": step, "loss": 0.01 * step, "tokens": step * 10,
                    "meters": meters}]
    return log_stage(folder, objective, *events, **start)


RL = (Meter("reward", "mean reward", better="higher"), Meter("response_tokens", "response length", "tokens"))
PAIRS = (Meter("pairs_right", "pairs right", "share", "higher"), Meter("margin", better="higher"))


@pytest.mark.each(("objective", "declared", "titles"), [
    ("policy", RL, ["mean reward", "response length"]), ("preference", PAIRS, ["pairs right", "margin"]),
    ("lm", (LOSS,), ["loss"]), ("lm", (), ["loss"]),
    ("policy", (), ["policy loss"]), ("obj.py:Mine", (), ["loss of obj.py:Mine"])])
def test_headline_is_the_measure_of_the_objective(objective: str, declared: tuple[Meter, ...],
                                                  titles: list[str], tmp_path: Path) -> None:
    start = build_headline_fields(declared, comparable=objective == "lm") if declared else {}
    run = read_run(write_run_of(tmp_path / "run", objective, **start))
    assert [meter.title for meter, _ in find_headline_curves(run)] == titles
    page = render_report([run])
    assert ("nats per token" in page) == (objective == "lm")
    assert titles[0] == "mean reward" or titles[0].lower() in page.lower()


def test_a_run_may_declare_its_own_meters(tmp_path: Path) -> None:
    declared = [{"name": "mine", "unit": "share", "better": "higher", "label": "My share"},
                {"name": "absent"}]
    run = read_run(write_run_of(tmp_path / "run", "obj.py:Mine", headline=declared))
    ((meter, curve),) = find_headline_curves(run)
    assert (meter.name, meter.title, meter.text(0.5)) == ("mine", "My share", "50 %")
    assert curve.values.tolist() == [1, 2, 3, 4]


def test_invalid_meters_fall_back_to_the_loss(tmp_path: Path) -> None:
    run = read_run(write_run_of(tmp_path / "run", "lm", headline=[{"name": "absent"}, "odd"]))
    assert [meter.title for meter, _ in find_headline_curves(run)] == ["loss"]


def test_rounds_are_points_over_steps(tmp_path: Path) -> None:
    run = read_run(write_run_of(tmp_path / "run", "policy"))
    assert run.curves["rounds"]["learning_groups"].values.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert "domains" not in run.curves["rounds"]


def log_stage(folder: Path, objective: str, *events: dict[str, Any], **start: Any) -> Path:
    """Write a run of the event `run_start`, with the fields `start`, and these events; return `folder`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"objective": {"name": objective}}), encoding="utf-8")
    log = EventLog(folder / EVENTS)
    log.write("run_start", resumed_from=0, num_ranks=1, **start)
    for event in events:
        log.write(event.pop("event"), **event)
    log.close()
    return folder


def build_evaluation(step: int, **bits: float) -> dict[str, Any]:
    """Return an `eval` event with the bits per byte of each source. A token is a byte; "chat" has turns."""
    return {"event": "eval", "step": step, "heldout": {
        name: {"loss": value * math.log(2), "bits_per_byte": value, "tokens": 100,
               **({"turns": {"first": {"loss": value, "tokens": 9}}} if name == "chat" else {})}
        for name, value in bits.items()}}


def build_score(mean: float, **settings: str) -> dict[str, Any]:
    return {"event": "score", "step": 9, "reward": "format", "settings": settings, "scored": 34,
            "mean_reward": mean}


def test_each_stage_gains_on_its_first_figures(tmp_path: Path) -> None:
    """The figures are of four kinds: held-out text, responses, pairs, and rewards of a rule."""
    pretrain = log_stage(tmp_path / "pretrain", "lm", build_evaluation(5, en=4.0, ko=6.0),
                         build_evaluation(9, en=2.0, ko=3.0), build_evaluation(9, chat=3.0))
    sft = log_stage(tmp_path / "sft", "lm", build_evaluation(1, chat=3.0), build_evaluation(9, chat=2.0),
                    build_score(0.25))
    pairs = {"event": "heldout_pairs", "source": "pairs", "pairs": 80}
    dpo = log_stage(tmp_path / "dpo", "preference", {**pairs, "step": 0, "pairs_right": 0.5},
                    {"event": "step", "step": 1, "loss": 0.7, "meters": {"pairs_right": 0.5}},
                    {**pairs, "step": 1, "pairs_right": 1.0}, build_score(float("nan")), headline=[
                        {**vars(PAIRS[0]), "heldout": "heldout_pairs.pairs_right"}], comparable_loss=False)
    (table,) = build_gain_tables([read_run(run) for run in (pretrain, sft, dpo)])
    lower = "lower is better"
    assert table.rows == [
        ["pretrain", "held-out text, bits per byte", "5.000", "2.500", lower],
        ["pretrain", "held-out responses of chat, nats per token", "–", "2.079", lower],
        ["sft", "held-out responses of chat, nats per token", "2.079", "1.386", lower],
        ["sft", "mean reward of 34 responses", "–", "0.25", "reward format"],
        ["dpo", "held-out pairs right", "50 %", "100 %", "higher is better"]]
    assert build_gain_tables([read_run(log_stage(tmp_path / "none", "lm"))]) == []
