"""The first screen: what was trained, on what, how it was judged, what it writes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.obs.events import EventLog
from megatron_sov.pages.charts import Chart
from megatron_sov.pages.content import Panel
from megatron_sov.report.opening import MAX_SOURCES, opening, pictures
from megatron_sov.report.run_data import read_run


def panels(*paths: Path) -> dict[str, Panel]:
    return {panel.title: panel for panel in opening([read_run(path) for path in paths], [])}


def write(run: Path, *events: dict) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    log = EventLog(run / "events.jsonl")
    for event in events:
        log.write(**event)
    log.close()
    return run


def test_all_stages_count_together(runs: list[Path]) -> None:
    shown = panels(*runs)
    assert dict(shown["What was trained"].facts) == {
        "Model": "tiny-solar-open", "Parameters": "2.891 M (1.12 M active)", "Tokens": "3.277 M",
        "pretrain": "1.638 M in 400 steps", "extend": "1.638 M in 400 steps", "Context": "256 tokens",
        "Wall time": dict(shown["What was trained"].facts)["Wall time"]}
    data = shown["On what data"]
    assert data.facts == [("Token shards", "tokens"), ("Vocabulary", "2,048")]
    assert data.tables[0].rows == [["english", "1.64 M", "50.0%"], ["korean", "980 K", "29.9%"],
                                   ["code", "656.8 K", "20.0%"]]


def test_many_sources_share_the_last_row(tmp_path: Path) -> None:
    tokens = {f"s{i}": 100 - i for i in range(MAX_SOURCES + 3)}
    run = write(tmp_path, {"event": "data_consumed", "step": 1, "tokens": tokens, "plan": tokens})
    rows = panels(run)["On what data"].tables[0].rows
    assert len(rows) == MAX_SOURCES and rows[0][0] == "s0" and rows[-1] == ["4 more", "374", "43.3%"]


def test_the_same_prompt_stands_before_and_after(tmp_path: Path) -> None:
    before = write(tmp_path / "pretrain", {"event": "sample", "step": 5, "prompt": "only here", "text": "x"},
                   {"event": "sample", "step": 5, "prompt": "Why?", "text": "\n\nin the park\n"})
    after = write(tmp_path / "sft", {"event": "sample", "step": 9, "prompt": "Why?", "text": "y" * 700})
    (shown,) = panels(before, after)["What it writes"].comparisons
    assert shown.prompt == "Why?"
    assert shown.texts == [("Before: pretrain, step 5", "in the park"),
                           ("After: sft, step 9", "y" * 600 + " …")]


def test_stages_that_were_asked_different_things_show_one_of_each(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"event": "sample", "step": 5, "prompt": "p", "text": "x"})
    last = write(tmp_path / "b", {"event": "sample", "step": 5, "prompt": "q", "text": "y"})
    assert [(c.prompt, c.texts) for c in panels(first, last)["What it writes"].comparisons] == [
        ("p", [("Before: a, step 5", "x")]), ("q", [("After: b, step 5", "y")])]
    (alone,) = panels(first)["What it writes"].comparisons
    assert alone.texts == [("a, step 5", "x")]


def test_the_proof_gives_each_difference_with_its_limit(tmp_path: Path) -> None:
    run = write(tmp_path, {"event": "conversion", "target": "hf", "checks": [
        {"name": "largest difference of a logit", "value": 1.24e-5, "limit": 1.5e-3, "passed": True,
         "detail": "document 3"}]})
    shown = panels(run)
    assert shown["The export's proof"].tables[0].rows == [
        ["largest difference of a logit", "1.24e-05 (document 3)", "0.0015"]]
    assert list(shown) == ["Verdicts", "The export's proof"]  # what is not known takes no room


def test_settings_of_another_version_are_passed_over(tmp_path: Path) -> None:
    for config in ('{"model": 3, "data": {"paths": 3}}', '{"model": {"vocab_size": "many"}, "data": []}'):
        write(tmp_path)
        (tmp_path / "config.json").write_text(config)
        assert panels(tmp_path) == {}


def test_a_run_that_has_just_begun_has_no_first_screen(tmp_path: Path) -> None:
    assert panels(write(tmp_path)) == {}


# The first screen's pictures: one line through all stages.


def lines(chart: Chart) -> dict[str, tuple[list[float], list[float]]]:
    """Return each trace's x and y by its name."""
    return {trace["name"]: tuple(np.frombuffer(base64.b64decode(trace[axis]["bdata"]),
                                               dtype=trace[axis]["dtype"]).tolist() for axis in "xy")
            for trace in json.loads(chart.figure_json)["data"]}


def stage(path: Path, num_steps: int, tokens: int, heldout_at: int) -> Path:
    """Write a stage whose steps have `tokens` tokens each, and whose loss is its step."""
    path.mkdir()
    log = EventLog(path / "events.jsonl")
    for step in range(1, num_steps + 1):
        counted = {"tokens": step * tokens} if tokens else {}
        log.write("step", step=step, loss=float(step), tokens_per_s=9.0, **counted)
    log.write("eval", step=heldout_at, heldout={"en": {"loss": 1.0, "bits_per_byte": 2.0, "tokens": 5}})
    log.close()
    return path


def test_stages_follow_one_another_by_tokens(tmp_path: Path) -> None:
    runs = [read_run(stage(tmp_path / "a", 3, 100, 3)), read_run(stage(tmp_path / "b", 2, 10, 0))]
    loss, heldout, speed = pictures(runs)
    assert lines(loss) == {"a": ([100, 200, 300], [1, 2, 3]), "b": ([310, 320], [1, 2])}
    assert lines(heldout) == {"en": ([300, 300], [2, 2])}  # the second was measured before b's first step
    assert speed.caption == "Tokens per second."


def test_steps_stand_for_tokens_where_a_stage_has_none(tmp_path: Path) -> None:
    runs = [read_run(stage(tmp_path / "a", 3, 100, 3)), read_run(stage(tmp_path / "b", 2, 0, 1))]
    loss = pictures(runs)[0]
    assert lines(loss)["b"] == ([4, 5], [1, 2])
    assert json.loads(loss.figure_json)["layout"]["xaxis"]["title"]["text"] == "optimizer steps"


def test_the_last_needles_are_the_third_picture(runs: list[Path]) -> None:
    *_, needles = pictures([read_run(path) for path in runs])
    assert needles.caption == "Needles found by extend: multi-key, english."
    assert len(json.loads(needles.figure_json)["data"][0]["x"]) == 4


@pytest.mark.parametrize("event", [{"event": "run_start"},
                                   {"event": "step", "step": 1, "loss": float("nan")}])
def test_without_figures_there_is_nothing_to_draw(event: dict, tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write(**event)
    assert pictures([read_run(tmp_path)]) == []
