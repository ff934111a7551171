"""`--gate` of post-training stages: when `eval lm` runs, with which arguments, and how its scores decide."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import StopRequested, UserError
from megatron_sov.commands.train import forgetting_gate
from megatron_sov.commands.train.forgetting_gate import ForgettingGate
from megatron_sov.commands.train.setup.stage_options import GateOptions
from megatron_sov.commands.train.setup.training import build_gate, check_benchmarks
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.obs.events import EventLog, read_events
from tests.typed_words import parse_settings


class Evaluations:
    """Stands for `eval lm` as a command: writes planted scores."""

    def __init__(self, write: Callable[..., Path], start: list[float], last: list[float]) -> None:
        self.write, self.scores, self.code = write, {"start": start, "last": last}, 0
        self.argvs: list[list[str]] = []

    def __call__(self, argv: list[str], go_on_by: str) -> int:
        self.argvs.append(argv)
        if self.code == 0:
            output = Path(argv[argv.index("--output") + 1])
            output.parent.mkdir(parents=True, exist_ok=True)
            self.write(output, self.scores[output.stem])
        return self.code


def asked(run: Path, *words: str) -> GateOptions:
    return parse_settings(GateOptions, ["--run", str(run), "--nproc", "2", *words])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run."""
    (folder := tmp_path / "run").mkdir()
    EventLog(folder / "events.jsonl").write("run_start")
    return folder


def gate_for(run: Path, *words: str) -> ForgettingGate | None:
    return build_gate(asked(run, *words), recipes.get("tiny-solar-open"), Path("base/checkpoints/step-9"))


def test_the_start_is_evaluated_first_and_both_share_their_answers(run: Path, written_scores: Any,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = Evaluations(written_scores, [1.0] * 40, [1.0] * 40)
    monkeypatch.setattr(forgetting_gate, "run_command", evaluations)
    gate = gate_for(run, "--gate", "quiz,other", "--gate-with=--task-dir 'my tasks' --limit 40")
    gate.begin()
    verdict = gate.judge(run / "checkpoints/step-4")
    first, last = evaluations.argvs
    assert first[:4] == ["megatron_sov", "eval", "lm", "base/checkpoints/step-9"]
    assert last[3] == str(run / "checkpoints/step-4") and last[-2:] == ["--run", str(run)]
    for argv in (first, last):
        assert argv[argv.index("--tasks") + 1] == "quiz,other"
        assert argv[argv.index("--cache") + 1] == str(run / "gate/cache")
        assert argv[argv.index("--task-dir") + 1] == "my tasks" and argv[argv.index("--nproc") + 1] == "2"
        assert "parallel.tp=1" in argv
    assert verdict.failure is None and verdict.completion["forgetting_gate"]["tasks"][0]["value"] == 0


def test_lost_scores_fail_the_stage_and_are_recorded_in_events(run: Path, written_scores: Any,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(forgetting_gate, "run_command",
                        Evaluations(written_scores, [1.0] * 40, [1.0] * 20 + [0.0] * 20))
    gate = gate_for(run, "--gate", "quiz", "--tolerance", "0.2")
    gate.begin()
    verdict = gate.judge(run / "checkpoints/step-4")
    assert verdict.failure.startswith("the forgetting gate did not pass: 1 of 1 tasks")
    assert "quiz, acc: forgotten; 1.0000 to 0.5000, difference -0.5000" in verdict.failure
    assert "forgetting gate: quiz, acc: forgotten" in capsys.readouterr().out
    (event,) = (e for e in read_events(run / "events.jsonl") if e["event"] == "forgetting_gate")
    assert (event["passed"], event["tolerance"], event["step"]) == (False, 0.2, 10)
    assert json.dumps(event["tasks"]) == json.dumps(verdict.completion["forgetting_gate"]["tasks"])


def test_exit_code_of_the_gate_evaluation_is_returned(run: Path, written_scores: Any,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = Evaluations(written_scores, [], [])
    monkeypatch.setattr(forgetting_gate, "run_command", evaluations)
    gate = gate_for(run, "--gate", "quiz")
    evaluations.code = 75
    with pytest.raises(StopRequested, match="continue with --resume"):
        gate.begin()
    evaluations.code = 2
    with pytest.raises(SystemExit, match="2"):
        gate.begin()


@pytest.mark.parametrize(("words", "said"), [
    (["--tolerance", "0.1"], "--tolerance 0.1: needs --gate TASKS"),
    (["--gate-with", "x y"], "--gate-with x y: needs --gate TASKS"),
    (["--gate", ","], "names no task"),
    (["--gate", "a", "--gate-with", "--task-dir 'x"], "close every quote"),
    (["--gate", "a", "--gate-with", "--cache x"], "the gate sets --cache"),
    (["--gate", "a", "--gate-with=--run=x y"], "the gate sets --run=x"),
    (["--gate", "a", "--gate-with", "--outp x"], "the gate sets --tasks"),
    (["--gate", "a", "--gate-with", "--no-such 3"], "--gate-with: .*--no-such"),
])
def test_a_mistake_is_one_sentence_before_anything_runs(run: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        gate_for(run, *words)


def test_a_gate_without_initial_weights_is_refused(run: Path) -> None:
    assert gate_for(run) is None
    with pytest.raises(UserError, match="add --from"):
        build_gate(asked(run, "--gate", "quiz"), recipes.get("tiny-solar-open"), None)


def refuse(*changes: str) -> None:
    pytest.importorskip("megatron_sov.bench.lm.tasks")
    asked = ('evaluate.background.tasks=["lm"]', 'evaluate.lm.tasks=["capitals"]')
    check_benchmarks(apply_settings(recipes.get("tiny-solar-open"), [*asked, *changes]))


def test_missing_gate_inputs_are_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "capitals.yaml").write_text("task: capitals\ntag: geography\n")
    here = f"evaluate.lm.task_dirs={json.dumps([str(tmp_path)])}"
    refuse(here)
    refuse(here, 'evaluate.lm.tasks=["geography"]')
    refuse("evaluate.lm.allow_download=true")  # lm-eval may have it
    with pytest.raises(UserError, match=r"evaluate.lm.tasks = \['capitels'\]: .* did you mean .*capitals"):
        refuse(here, 'evaluate.lm.tasks=["capitels"]')
    (tmp_path / "capitals.yaml").write_text(
        "task: capitals\nmetadata: a note\ndataset_kwargs: {data_files: '${DATA}/d.jsonl'}\n")
    with pytest.raises(UserError, match=r"needs d\.jsonl; put the data set into a folder"):
        refuse(here)
    refuse(here, f"evaluate.lm.data_dir={tmp_path}")
    for name, value in (("task_dirs", '["no such"]'), ("data_dir", "no such")):
        with pytest.raises(UserError, match=f"evaluate.lm.{name} = no such: is not a folder"):
            refuse(here, f"evaluate.lm.{name}={value}")
