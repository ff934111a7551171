"""Key figures and sections of a run's report, and the command `report`."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.pages.page import Chart, PageSection
from megatron_sov.cli import main
from megatron_sov.publish.report.page import build_opening, render_report, split_by_model
from megatron_sov.publish.report.rl_rounds import extract_validation_curves
from megatron_sov.publish.report.run_data import Run, read_rounds, read_run
from megatron_sov.publish.report.sections import (
    MAX_ROWS, SECTIONS, build_sections, cut_lines, list_key_figures)
from megatron_sov.runs.obs.events import EventLog


def build_section(run_dir: Path, title: str) -> PageSection:
    return next(s for s in build_sections(read_run(run_dir)) if s.title == title)


def test_sections_without_data_are_omitted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("conversion", target="hf",
              checks=[{"name": "logits", "value": 2e-3, "limit": 1e-3, "passed": False}])
    run = read_run(tmp_path)
    assert build_sections(run) == [] == list_key_figures(run)
    assert [p.title for p in build_opening([run])] == ["Verdicts"] and build_opening([Run("a", {})]) == []
    assert '<span class="bad">FAILED</span>' in render_report([run])


def test_a_run_without_steps_is_marked_as_started(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    assert "This run has recorded nothing yet." in render_report([read_run(tmp_path)])


def test_key_figures(runs: list[Path]) -> None:
    found = {label: (value, detail) for label, value, detail in list_key_figures(read_run(runs[1]))}
    assert found["Parameters"] == ("2.89 M", "1.12 M active for each token")
    assert found["Tokens trained"] == ("1.64 M", "400 steps")
    assert found["Needle score"] == ("97 %", "up to 2,048 tokens")
    # losses as in conftest.py; the sources have equal numbers of tokens and 3.4 bytes per token
    best = (2.3 + 2.6 + 1.8) / 3 + 5 * math.exp(-400 / 70)
    assert found["Best held-out"] == (f"{best / math.log(2) / 3.4:.4f}", "bits per byte, step 400")


def test_heldout_table_has_bits_per_byte(runs: list[Path]) -> None:
    rows = {row[0]: row for row in build_section(runs[0], "Held-out loss").tables[0].rows}
    bits = (1.8 + 5 * math.exp(-400 / 70)) / math.log(2) / 3.4
    assert rows["code"][4:] == [f"{bits:.4g}"]


def test_warnings_are_listed_by_step(tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("warning", step=8, text="source ko is in epoch 4.1")
    section = build_section(tmp_path, "Warnings and faults")
    assert section.tables[0].rows == [["8", "source ko is in epoch 4.1"]]


def test_long_and_many_samples_are_truncated_with_a_note(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for _ in range(30):
        log.write("sample", step=5, prompt="p", text="x" * 4100)
    section = build_section(tmp_path, "Samples")
    assert len(section.samples) == 24 and section.text.endswith("6 more are in the run's events.")
    assert section.samples[0]["text"] == "x" * 2000 + "\n… (2,100 more characters)"


# Rounds of reinforcement learning in the report, read from the manifests of the rounds.

def write_round(run: Path, number: int, **content: object) -> None:
    """Write the artifact of round `number`, whose manifest has these fields."""
    with create_artifact(run / "rounds" / f"{number:04d}", "tokens") as artifact:
        artifact.content = {"round": number, **content}


def build_means(reward: float, **more: object) -> dict[str, object]:
    """Return the manifest field `means` of a round of 64 responses with this mean reward."""
    return {"responses": 64, "reward": reward, "components": {"right": reward, "<b>form</b>": 1.0},
            "response_tokens": 12.5, "truncated": 0.25, "staleness_steps": 0.0,
            "domains": {"sums": {"responses": 64, "reward": reward}}} | more


def read_curves(chart: Chart) -> dict[str, list[float]]:
    """Return name -> y values of each curve of a chart."""
    return {curve.name: list(curve.y) for curve in chart.plot.series}


def test_a_round_is_a_point_of_each_curve_and_a_row(tmp_path: Path) -> None:
    write_round(tmp_path, 2, means={**build_means(0.75), "pass_rate": 0.625},
                groups={"learns": 6, "all right": 2}, unjudged={"failed": 3})
    write_round(tmp_path, 1, means=build_means(0.5), groups={"learns": 8}, unjudged={})
    section = SECTIONS["Rounds"].build(Run("rl", {}, rounds=read_rounds(tmp_path)))
    assert read_curves(section.charts[0]) == {
        "reward": [0.5, 0.75], "<b>form</b>": [1, 1], "right": [0.5, 0.75]}
    assert read_curves(section.charts[-1]) == {"all right": [0, 2], "learns": [8, 6]}
    assert section.tables[0].rows == [
        ["1", "64", "0.5000", "–", "12.5", "25 %", "8", "–", "–"],
        ["2", "64", "0.7500", "62.5 %", "12.5", "25 %", "6", "all right 2", "failed 3"]]


def test_unscored_and_damaged_rounds_are_shown(tmp_path: Path) -> None:
    write_round(tmp_path, 1, means={"responses": 0}, groups={}, late=[], unjudged={"failed": 9})
    write_round(tmp_path, 2, means=build_means(0.5), groups={"learns": 1}, late=[], unjudged={})
    (tmp_path / "rounds" / "0002" / "manifest.json").write_text("{")
    rows = SECTIONS["Rounds"].build(Run("rl", {}, rounds=read_rounds(tmp_path))).tables[0].rows
    assert [row[0] for row in rows] == ["1"] and rows[0][-1] == "failed 9"


# Only runs of one model share charts.

def split_names(*paths: Path) -> tuple[list[str], list[str]]:
    """Return the names of the runs of the first run's model, and of the runs of other models."""
    own, others = split_by_model([read_run(path) for path in paths])
    return [run.name for run in own], [run.name for run in others]


def test_runs_of_other_sizes_have_separate_charts(runs: list[Path], toy: Path) -> None:
    assert split_names(runs[0], toy, runs[1]) == (["pretrain", "extend"], ["retrieval"])


def test_the_first_run_says_which_model_it_is(runs: list[Path], toy: Path) -> None:
    assert split_names(toy, *runs) == (["retrieval"], ["pretrain", "extend"])


def test_a_run_without_recorded_size_joins_the_first_chart(runs: list[Path], tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("step", step=1, loss=1.0)
    for order in ((runs[0], tmp_path), (tmp_path, runs[0])):
        assert split_names(*order)[1] == []


# Samples end with a whole line.

@pytest.mark.each(("text", "shown"), [
    ("short", "short"), ("exactly 10", "exactly 10"), ("", ""),
    ("one line\nand another", "one line\n… (12 more characters)"),
    ("0123456789\nnext", "0123456789\n… (5 more characters)"),
    ("many words of one line", "many words\n… (12 more characters)"),
    ("0123456789abcdef", "0123456789\n… (6 more characters)"),
    ("가나다 라마바사아자차카", "가나다\n… (9 more characters)"),
    ("a\n\nb\ncdefghij", "a\n\nb\n… (9 more characters)")])
def test_a_long_sample_ends_with_a_whole_line_or_word(text: str, shown: str) -> None:
    assert cut_lines(text, 10) == shown


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with one event of each kind of fault, and two rejected steps."""
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 41):
        if step not in (9, 20):
            log.write("step", step=step, loss=4.0 - step / 40, phase="1")
    log.write("skip", step=9, reason="the loss is nan", loss=float("nan"), grad_norm=float("nan"), ranks=[3])
    log.write("skip", step=20, reason="data.skip_steps")
    log.write("alarm", step=24, kind="collapse", layer=2,
              text="layer 2: the entropy of its expert load is 0.31")
    log.write("fault", step=30, fault="hang@step=30,rank=1", kind="hang", state="step", rank=1)
    log.write("hang", step=30, places={"faults.py, trigger": [1], "schedule.py, all_reduce_world": [0, 2]})
    log.write("restart", step=20, exit_code=76,
              text="rank 1 ended with exit code 76; all processes are started again")
    log.write("damaged_checkpoint", path="checkpoints/step-20", reason="model/0 has another hash",
              renamed_to="damaged-step-20")
    log.write("sdc", step=35, ranks=[1], hosts=["n7"], text="silent corruption after step 35: weights differ")
    log.write("rollback", step=38, back_to=30, refused=4,
              text="weights and optimizer are those of step 30 again")
    log.close()
    return tmp_path


def test_incidents_are_ordered_by_time(run: Path) -> None:
    (incidents,) = SECTIONS["Warnings and faults"].build(read_run(run)).tables
    assert incidents.rows == [
        ["9", "step rejected", "the loss is nan; not finite on rank 3"],
        ["24", "alarm", "layer 2: the entropy of its expert load is 0.31"],
        ["30", "injected fault", "--inject hang@step=30,rank=1"],
        ["30", "hang", "no progress; every process wrote its stacks into hang/ and ended: "
                       "rank 1 in faults.py, trigger; rank 0, 2 in schedule.py, all_reduce_world"],
        ["20", "restart", "rank 1 ended with exit code 76; all processes are started again"],
        ["0", "damaged checkpoint", "model/0 has another hash; set aside as damaged-step-20"],
        ["35", "silent corruption", "silent corruption after step 35: weights differ"],
        ["38", "rollback", "weights and optimizer are those of step 30 again"]]


def test_a_long_list_is_truncated_with_a_note(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, MAX_ROWS + 31):
        log.write("skip", step=step, reason="the loss is inf", ranks=[])
    log.close()
    (table,) = SECTIONS["Warnings and faults"].build(read_run(tmp_path)).tables
    assert len(table.rows) == MAX_ROWS + 1 and table.rows[-1][2] == "… and 30 more in the run's events"


def write_validations(path: Path) -> None:
    """Write a run with validations at steps 0 and 10, the latter twice, and sampled responses of both."""
    path.mkdir(exist_ok=True)
    log = EventLog(path / "events.jsonl")
    for step, reward in ((0, 0.25), (10, 0.25), (10, 0.5)):  # step 10 is repeated: the last counts
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
    write_validations(tmp_path)
    run = read_run(tmp_path)
    validation, samples = build_sections(run)
    assert validation.title == "Validation" and len(validation.charts) == 5
    assert validation.charts[1].caption.startswith("Unbiased estimate of pass@k")
    (by_step,) = validation.tables
    assert len(by_step.rows) == 2 and by_step.rows[1] == [
        "10", "4", "8", "0.5000", "1: 50 % (10 % to 90 %); 2: 75 % (20 % to 100 %)", "12.0", "12.5 %"]
    curves = extract_validation_curves(run)
    assert curves["reward"].values.tolist() == [0.25, 0.5]
    assert curves["pass_at_2"].values.tolist() == [0.5, 0.75]
    assert curves["domain/math/reward"].values.tolist() == [0.25, 0.5]
    table = samples.tables[0]
    assert table.head[0] == "prompt (validation at step 10)"
    assert table.rows == [["asked at 10", "<script>x</script>", "0.5", '{"format": 1.0}', "3", "stop"]]
    assert "<script>x</script>" not in render_report([run])


def test_the_command_writes_into_the_last_run(runs: list[Path], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, runs)]) == 0
    assert "All stages" in (runs[1] / "report.html").read_text(encoding="utf-8")
    assert str(runs[1] / "report.html") in capsys.readouterr().out
    out = tmp_path / "new" / "one.html"
    assert main(["report", str(runs[0]), "--output", str(out)]) == 0
    assert "All stages" not in out.read_text(encoding="utf-8")
    assert [p.name for p in out.parent.iterdir()] == ["one.html"]


def test_mistakes_end_with_one_sentence(runs: list[Path], tmp_path: Path, get_refusal: Any) -> None:
    assert "does not exist; pass the folder of a training command's --run" in get_refusal(
        "report", str(tmp_path / "nowhere"))
    assert "is a folder; name the file" in get_refusal("report", str(runs[0]), "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
