"""Background evaluations of exports: one at a time, without delaying steps; failures and hangs are
reported."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import read_command_options
from megatron_sov.bench.lm.results import read_results
from megatron_sov.bench.lm.settings import LmEvalSettings, TaskSources
from megatron_sov.commands.evaluate.eval import EVAL
from megatron_sov.commands.evaluate.eval_lm import EvalLmOptions
from megatron_sov.commands.train.setup.export_benchmarks import check_benchmarks
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.folder import EVALUATIONS
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.train.side_jobs import evaluations
from megatron_sov.train.side_jobs.evaluations import EvalJob, ExportEvaluations, build_eval_command

# programs of evaluation processes; the argument is the file for the figures
WRITES = "import sys, json; json.dump({'x': 1}, open(sys.argv[1], 'w'))"
WAITS = f"""
import os, sys, time
deadline_s = time.monotonic() + 600
while not os.path.exists(os.path.join(os.path.dirname(sys.argv[1]), "goes-on")):
    assert time.monotonic() < deadline_s
    time.sleep(0.01)
{WRITES}
"""
FAILS = "import sys; sys.exit('error: no memory')"
HANGS = "import time; time.sleep(600)"
SUBMITS = "print('submitted eval as job 12')"


def build_config(*changes: str) -> RunConfig:
    return apply_settings(recipes.get("tiny-solar-open"), [
        "train.export_every_checkpoints=1", 'evaluate.background.tasks=["ppl"]', *changes])


class RunWithExports:
    """A run with exports, whose evaluation commands are small programs; `programs`: step -> program, if it is
    not `WRITES`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.programs: dict[int, str] = {}

    def build_evaluations(self, *changes: str) -> ExportEvaluations:
        def build_command(task: EvalJob, export: Path, out: Path) -> list[str]:
            assert export == self.path / f"exports/step-{task.step}"
            return [sys.executable, "-c", self.programs.get(task.step, WRITES), str(out)]

        def record(name: str, **fields: Any) -> None:
            self.events.append({"event": name, **fields})

        return ExportEvaluations(self.path, build_config(*changes), record, build_command)

    def write_export(self, step: int) -> int:
        (folder := self.path / f"exports/step-{step}").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        return step

    def list_files(self) -> list[str]:
        return sorted(p.name for p in (self.path / EVALUATIONS).iterdir())

    def list_outcomes(self) -> list[tuple[int, str, str | None]]:
        return [(e["step"], e["task"], e.get("error")) for e in self.events if e["event"] == "evaluation"]


@pytest.fixture
def run(tmp_path: Path) -> RunWithExports:
    return RunWithExports(tmp_path / "run")


def test_evaluations_follow_one_another_and_training_never_waits(run: RunWithExports) -> None:
    run.programs = {10: WAITS}
    background = run.build_evaluations('evaluate.background.tasks=["ppl", "needle"]')
    background.offer(run.write_export(10))
    background.poll(now=True)
    assert run.list_outcomes() == [], "the evaluation waits for a file, and `poll` has not waited for it"
    (run.path / EVALUATIONS / "goes-on").touch()
    background.wait()
    assert run.list_outcomes() == [(10, "ppl", None), (10, "needle", None)]
    assert all(e["took_s"] > 0 for e in run.events)
    assert run.list_files() == ["goes-on", "step-10.needle.json", "step-10.ppl.json"]


def test_scores_of_benchmarks_become_events_and_cached_answers_are_removed(run: RunWithExports,
                                                                           written_scores: Any) -> None:
    stored_scores = written_scores(run.path.parent / "planted.json", [1.0, 0.0, 1.0, 1.0])
    run.programs = {10: f"import sys, shutil; shutil.copy({str(stored_scores)!r}, sys.argv[1])", 20: WRITES}
    background = run.build_evaluations('evaluate.background.tasks=["lm"]', 'evaluate.lm.tasks=["quiz"]')
    for step in (10, 20):
        (answers := run.path / EVALUATIONS / f".step-{step}.lm.cache").mkdir(parents=True)
        background.offer(run.write_export(step))
        answers.mkdir(exist_ok=True)  # as the evaluation process does
        background.wait()
    (score,) = [e for e in run.events if e["event"] == "eval_lm"]
    assert (score["step"], score["task"], score["metric"], score["value"]) == (10, "quiz", "acc", 0.75)
    assert score["output"] == str(run.path / EVALUATIONS / "step-10.lm.json")
    (_, (step, _, error)) = run.list_outcomes()
    assert step == 20 and "holds no results of `megatron-sov eval lm`" in str(error)
    assert [p.name for p in (run.path / EVALUATIONS).glob(".*.cache")] == [".step-20.lm.cache"]


def test_an_interrupted_task_resumes(run: RunWithExports) -> None:
    begun = run.path / EVALUATIONS / "begun"
    run.programs = {10: f"import os, sys\nif not os.path.exists({str(begun)!r}):\n"
                        f"    open({str(begun)!r}, 'w')\n    sys.exit(75)\n{WRITES}"}
    background = run.build_evaluations()
    background.offer(run.write_export(10))
    background.wait()
    assert begun.is_file() and run.list_outcomes() == [(10, "ppl", None)]


def test_failing_hanging_and_displaced_evaluations_are_reported(run: RunWithExports,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    run.programs = {10: FAILS, 20: HANGS, 30: HANGS}
    background = run.build_evaluations("evaluate.background.timeout_s=1000",
                                       "evaluate.background.max_waiting=2")
    background.offer(run.write_export(10))
    background.wait()
    for step in (20, 30, 40, 50):
        background.offer(run.write_export(step))
    assert background._running is not None
    background._running.process.began_s -= 1001
    background.wait()
    assert run.list_outcomes() == [(10, "ppl", "no memory"),
                                   (30, "ppl", "2 newer exports were ready before it was begun"),
                                   (20, "ppl", "it took more than evaluate.background.timeout_s = 1000"),
                                   (40, "ppl", None), (50, "ppl", None)]
    assert (next(e["text"] for e in run.events if e["event"] == "warning")
            == "evaluation ppl at step 10 failed: no memory")
    assert (run.path / EVALUATIONS / "step-10.ppl.failed").read_text() == "no memory\n"
    assert capsys.readouterr().err.count("warning: evaluation ppl at step") == 3
    assert run.build_evaluations()._waiting == []  # a failed evaluation is not retried


def test_resumed_runs_evaluate_repeated_steps_again(run: RunWithExports) -> None:
    run.programs = {10: HANGS}
    background = run.build_evaluations()
    background.offer(run.write_export(10))
    background.close()
    run.programs = {}
    resumed = run.build_evaluations()
    resumed.wait()
    assert run.list_outcomes() == [(10, "ppl", None)]
    run.programs = {10: FAILS}
    resumed.offer(10)
    resumed.wait()
    assert run.list_outcomes()[1:] == [(10, "ppl", "no memory")]
    assert "step-10.ppl.json" not in run.list_files()


def test_jobs_report_their_figures_when_they_end(run: RunWithExports,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    run.programs = dict.fromkeys((10, 20, 30, 40), SUBMITS)
    slurm = ("evaluate.background.where=slurm", "evaluate.background.cluster=local",
             "evaluate.background.timeout_s=100")
    background = run.build_evaluations(*slurm)
    for step in (10, 20, 30):
        background.offer(run.write_export(step))
    background.wait()
    # At most two jobs run at a time: the third waits.
    assert run.list_outcomes() == [] and [t.step for t in background._submitted] == [10, 20]
    (run.path / EVALUATIONS / "step-10.ppl.json").write_text("{}")
    background.wait()
    assert run.list_outcomes() == [(10, "ppl", None)] and [t.step for t in background._submitted] == [20, 30]
    background.offer(run.write_export(40))
    (run.path / EVALUATIONS / "step-30.ppl.json").write_text("{}")
    resumed = run.build_evaluations(*slurm)
    assert [t.step for t in resumed._submitted] == [20, 30] and [t.step for t in resumed._waiting] == [40]
    later_s = time.time() + 200
    monkeypatch.setattr(evaluations.time, "time", lambda: later_s)
    resumed.poll(now=True)
    assert run.list_outcomes() == [
        (10, "ppl", None),
        (20, "ppl", "its job gave no result within evaluate.background.timeout_s = 100; see its log"),
        (30, "ppl", None)]


def test_benchmarks_take_the_options_of_eval_lm(tmp_path: Path) -> None:
    config = build_config('evaluate.lm={"tasks": ["capitals", "-odd"], "options": '
                          '["--task-dir=a b", "--limit=3", "--output=elsewhere"]}')
    output, cache = tmp_path / "step-10.lm.json", tmp_path / ".step-10.lm.cache"
    argv = build_eval_command(config, EvalJob(10, "lm"), tmp_path / "export", output)
    parser = argparse.ArgumentParser()
    EVAL.add_arguments(parser)
    assert read_command_options(parser.parse_args(argv[4:])) == EvalLmOptions(
        target=str(tmp_path / "export"), tasks="capitals,-odd", settings=LmEvalSettings(
            output=output, cache=cache, num_items=3, sources=TaskSources((Path("a b"),))))


@pytest.mark.each(("options", "reason"), [
    (["--task-dir=nowhere"], "nowhere: is no folder"), (["--limitt=3"], "--limitt"),
    (["--run=x"], "leave it out"), ([], "'quiz'")])
def test_wrong_benchmarks_are_refused_before_the_run(options: list[str], reason: str) -> None:
    config = build_config('evaluate.background.tasks=["lm"]', 'evaluate.lm.tasks=["quiz"]',
                          f"evaluate.lm.options={json.dumps(options)}")
    with pytest.raises(UserError, match=reason):
        check_benchmarks(config)


def test_evaluation_jobs_are_valid_submit_commands(tmp_path: Path, read_output: Any) -> None:
    config = build_config(f"data.paths={json.dumps({str(tmp_path): 1.0})}", "evaluate.background.where=slurm",
                          "evaluate.background.cluster=local", 'evaluate.lm.tasks=["quiz"]')
    for task, separator in (("needle", " "), ("lm", "=")):
        argv = build_eval_command(config, EvalJob(10, task), tmp_path / "step-10", tmp_path / "out.json")
        assert argv[1:4] == ["-m", "megatron_sov", "submit"]
        script = read_output(*argv[3:], "--dry-run")
        assert f"megatron_sov eval {task}" in script.replace("\\\n", "")
        assert f"--output{separator}{tmp_path / 'out.json'}" in script


def write_capitals_task(folder: Path) -> Path:
    """Write a task folder with the task of docs/eval_lm.md."""
    folder.mkdir()
    text = (Path(__file__).parents[3] / "docs/eval_lm.md").read_text()
    for name, kind in (("capitals.yaml", "yaml"), ("capitals.jsonl", "json")):
        (folder / name).write_text(text.partition(f"```{kind}\n")[2].partition("```")[0])
    return folder


@pytest.mark.deep
@pytest.mark.distributed
def test_exports_are_evaluated_like_the_run(packed_data: Any, tmp_path: Path, run_checked: Any,
                                            warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOV_TESTS_PYTHON", warm_python)
    tasks = write_capitals_task(tmp_path / "tasks")
    changes = ["model.vocab_size=368", "model.hidden_size=32", "model.num_layers=1", "model.num_experts=4",
               "train.global_batch_size=8", 'data.phases=[{"name": "main", "seq_len": 32}]', "train.steps=2",
               "train.checkpoint_every_steps=2", "train.export_every_checkpoints=1",
               "data.heldout_tokens=256", "train.precision=fp32",
               'evaluate.background.tasks=["ppl", "lm"]', 'evaluate.lm.tasks=["capitals"]',
               f'evaluate.lm.options=["--task-dir={tasks}"]']
    run_checked("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run",
                str(tmp_path / "run"), *(f"--set={change}" for change in changes))
    events = list(read_events(tmp_path / "run" / EVENTS))
    ppl_event, benchmarks = [e for e in events if e["event"] == "evaluation"]
    background_losses = json.loads((tmp_path / "run" / ppl_event["path"]).read_text())
    initial_losses, run_losses = [e["heldout"] for e in events if e["event"] == "eval"]
    assert set(initial_losses) == set(run_losses)
    assert set(background_losses) == set(run_losses) == {"even", "odd"}
    for source, figures in run_losses.items():
        assert background_losses[source]["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-4)
        assert background_losses[source]["tokens"] == figures["tokens"]
    (score,) = [e for e in events if e["event"] == "eval_lm"]
    outcome = read_results(tmp_path / "run" / benchmarks["path"])
    assert (score["step"], score["task"], score["items"]) == (2, "capitals", 3)
    assert score["value"] == outcome.tasks["capitals"].metrics[0].value in (0, 1 / 3, 2 / 3, 1)
    assert outcome.model.path == str(tmp_path / "run/exports/step-2")
    assert score["model_hash"] == outcome.model.hash
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "Evaluation during training" in page and ">capitals</t" in page
