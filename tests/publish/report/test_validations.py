"""Validations and samples of responses, in the report."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.publish.report.page import render
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.sections import sections
from megatron_sov.publish.report.validations import validation_curves
from megatron_sov.runs.obs.events import EventLog


def write(path: Path) -> None:
    path.mkdir(exist_ok=True)
    log = EventLog(path / "events.jsonl")
    for step, reward in ((0, 0.25), (10, 0.25), (10, 0.5)):  # a step that was done again: the last counts
        figures = {"num_prompts": 4, "num_samples": 8, "reward": reward, "response_tokens": 12.0,
                   "truncated": 0.125, "pass_at_k": [
                       {"k": 1, "value": reward, "interval": [0.1, 0.9]},
                       {"k": 2, "value": reward + 0.25, "interval": [0.2, 1.0]}]}
        log.write("validation", step=step, text=f"held-out reward {reward}", **figures,
                  domains={"math": figures}, components={"format": 1.0})
        log.write("responses", step=step, of="validation", rows=[
            {"prompt": f"asked at {step}", "response": "<script>x</script>", "reward": reward,
             "components": {"format": 1.0}, "tokens": 3, "ended": "stop"}])
    log.write("responses", step=9, of="round", rows=[])
    log.close()


def test_the_report_shows_validations_and_the_newest_samples(tmp_path: Path) -> None:
    write(tmp_path)
    run = read_run(tmp_path)
    validation, samples = sections(run)
    assert validation.title == "Validation" and len(validation.charts) == 5
    assert validation.charts[1].caption.startswith("The share of held-out prompts of which one at least of k")
    (by_step,) = validation.tables
    assert len(by_step.rows) == 2 and by_step.rows[1] == [
        "10", "4", "8", "0.5000", "1: 50 % (10 % to 90 %); 2: 75 % (20 % to 100 %)", "12.0", "12.5 %"]
    curves = validation_curves(run)
    assert {name: curves[name].values.tolist() for name in ("reward", "pass_at_2", "domain/math/reward")} == {
        "reward": [0.25, 0.5], "pass_at_2": [0.5, 0.75], "domain/math/reward": [0.25, 0.5]}
    table = samples.tables[0]
    assert table.head[0] == "prompt (validation at step 10)" and table.rows == [
        ["asked at 10", "<script>x</script>", "0.5", '{"format": 1.0}', "3", "stop"]]
    assert "<script>x</script>" not in render([run])
