"""Stages of an extension: start times, gate checks and warnings."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.suite import Cell
from megatron_sov.eval.statistics import compute_wilson_interval
from megatron_sov.model.config import GateConfig, NeedleKind, PhaseConfig, RunConfig, apply_settings
from megatron_sov.model.recipes import get
from megatron_sov.post.extend import running
from megatron_sov.post.extend.running import (
    StageGate, add_needles_to_blends, build_needles, compute_mean_loss, decide_verdict, describe_small_suite,
    run_stages)
from megatron_sov.train.objectives.heldout_evaluator import HeldoutLoss

# A stage's gate: check times, conditions to pass, and records in events, checkpoint and manifest.

SETTINGS = GateConfig(every_steps=4, min_accuracy=0.9, loss_tolerance_nats=0.1)


class Run:
    """Stands for a run under a gate: it finds `num_correct` of 20 needles, and its loss is `loss`.

    Attributes:
        written_events: events, as dicts.
        records: (when, step, number of correct answers) of each needle record.
    """

    def __init__(self, num_steps: int = 10, is_main: bool = True) -> None:
        self.step, self.num_steps, self.num_correct, self.loss = 0, num_steps, 0, 2.0
        self.world, self.config, self.policy = SimpleNamespace(is_main=is_main), None, None
        self.written_events: list[dict[str, Any]] = []
        self.events = SimpleNamespace(
            write=lambda event, **fields: self.written_events.append({"event": event, **fields}))
        self.records: list[tuple[str, int, int]] = []
        self.gate: Any = None

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps or self.gate.passed

    def measure_scores(self, run: Run) -> Any:
        cell = Cell("single", "english", 512, 0.5, 0, self.num_correct, 20,
                    compute_wilson_interval(self.num_correct, 20))
        return SimpleNamespace(cells=[cell], num_correct=self.num_correct)

    def record_scores(self, run: Run, when: str, scores: Any) -> dict[str, Any]:
        self.records.append((when, self.step, scores.num_correct))
        return {"correct": scores.num_correct}

    def list_gate_checks(self) -> list[tuple[int, bool]]:
        """Return (step, whether the gate passed) of each gate event."""
        return [(e["step"], e["passed"]) for e in self.written_events if e["event"] == "gate"]


@pytest.fixture
def build_gate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StageGate]:
    """Return `build_gate(run, start_loss, min_steps)`: a gate with the losses and scores of the run."""

    def build(run: Run, start_loss: float | None = 2.0, min_steps: int = 4) -> StageGate:
        monkeypatch.setattr(running, "evaluate_forward_model", lambda loaded, short: {"text": HeldoutLoss(
            loss=run.loss, bits_per_byte=1.0, tokens=100)})
        monkeypatch.setattr(running.collectives, "all_reduce_world", lambda values: values)
        needles: Any = SimpleNamespace(measure_scores=run.measure_scores, record=run.record_scores)
        run.gate = StageGate(SETTINGS, needles, SimpleNamespace(seq_len=64), start_loss, min_steps)
        return run.gate

    return build


def check_gate_at(run: Run, *steps: tuple[int, int]) -> None:
    """Check the gate at each (step, number of needles found there)."""
    for run.step, run.num_correct in steps:
        run.gate.check(run)


def test_gate_checks_before_the_first_step(build_gate: Any, capsys: Any) -> None:
    run = Run()
    build_gate(run).begin(run)
    assert run.list_gate_checks() == [(0, False)] and run.records == [("before", 0, 0)]
    assert capsys.readouterr().out.startswith("gate at step 0 does not pass\n  single, english, "
                                              "512 tokens: 0 of 20 right")


def test_gate_checks_periodically_and_after_the_last_step(build_gate: Any) -> None:
    run = Run()
    build_gate(run)
    check_gate_at(run, *((step, 0) for step in range(1, 11)))
    assert run.list_gate_checks() == [(4, False), (8, False), (10, False)]
    assert run.records == [("after", 10, 0)]


def test_gate_passes_from_the_stages_min_steps_on(build_gate: Any, capsys: Any) -> None:
    run = Run()
    gate = build_gate(run, min_steps=7)
    check_gate_at(run, (4, 20))
    assert not gate.passed and run.records == []
    assert "gate at step 4 passes, and the stage continues to step 7\n" in capsys.readouterr().out
    check_gate_at(run, (7, 20))
    assert gate.passed and run.list_gate_checks() == [(4, False), (7, True)]
    assert run.records == [("after", 7, 20)]
    assert capsys.readouterr().out == "gate at step 7 passes\n"


def test_a_higher_loss_in_short_contexts_fails_the_gate(build_gate: Any) -> None:
    run = Run()
    gate = build_gate(run)
    # 2.0 at the start, and a tolerance of 0.1
    for run.loss, passes in ((2.11, False), (math.nan, False), (1.9, True), (2.09, True)):
        check_gate_at(run, (4, 20))
        assert gate.passed == passes == (not gate.state()["checks"][-1]["failures"])
    (_, event) = [e for e in run.written_events if e["event"] == "gate" and e["passed"]]
    assert (event["start_loss"], event["losses"], event["seq_len"], event["min_steps"]) == (
        2.0, {"text": 2.09}, 64, 4)


def test_other_ranks_receive_the_loss_of_rank_0_silently(build_gate: Any, capsys: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    run, summed_losses = Run(is_main=False), []
    build_gate(run, start_loss=None)
    monkeypatch.setattr(running.collectives, "all_reduce_world",
                        lambda values: summed_losses.append(values.tolist()) or values + 2.0)
    check_gate_at(run, (4, 20))
    assert summed_losses == [[0.0]] and run.gate.passed and capsys.readouterr().out == ""
    check_gate_at(run, (8, 20))
    assert summed_losses == [[0.0], [0.0]], "the loss received before is not sent again"


def test_failure_completion_and_checkpoint_contain_all_checks(build_gate: Any) -> None:
    run = Run()
    gate = build_gate(run)
    check_gate_at(run, (4, 3), (8, 12), (10, 17))
    summary, *lines = gate.failure().splitlines()
    assert summary.startswith(
        "the gate has not passed within its 10 steps; give the stage more with max_steps")
    assert lines == ["  single, english, 512 tokens: 17 of 20 right over all depths = 85.0%, below 90%"]
    resumed_run = Run(num_steps=20)
    resumed_gate = build_gate(resumed_run, start_loss=None)
    resumed_gate.restore(json.loads(json.dumps(gate.state())))
    assert resumed_gate.state() == gate.state() and resumed_gate.failure() == gate.failure()
    check_gate_at(resumed_run, (12, 20))
    completion = resumed_gate.completion(resumed_run)
    assert completion["needle"] == {"correct": 20} and completion["gate"]["passed"]
    assert completion["gate"]["start_loss"] == 2.0
    assert [(c["step"], c["passed"]) for c in completion["gate"]["checks"]] == [
        (4, False), (8, False), (10, False), (12, True)]
    assert len(gate.state()["checks"]) == 3, "the restored checks are a copy"


def test_the_mean_is_over_tokens_and_not_over_sources() -> None:
    losses = {name: HeldoutLoss(loss=loss, bits_per_byte=1.0, tokens=tokens)
              for name, loss, tokens in (("a", 1.0, 900), ("b", 3.0, 100))}
    assert compute_mean_loss(losses) == pytest.approx(1.2) and compute_mean_loss({}) == 0


# The gate's decision on given scores.


GATE = GateConfig(every_steps=1, min_accuracy=0.9, loss_tolerance_nats=0.05)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


def build_cells(*correct: int, length: int = 512, kind: NeedleKind = "single") -> list[Cell]:
    """Build the cell of each depth, with its correct answers of 20."""
    return [Cell(kind, "english", length, depth, 0, num_correct, 20, compute_wilson_interval(num_correct, 20))
            for depth, num_correct in zip(DEPTHS, correct, strict=True)]


@pytest.mark.each(("correct", "failing_rows", "failing_cells"), [
    ((20, 20, 20, 20, 20), 0, 0),
    # The row reaches 90 %. A cell with 17 of 20 right (85 %) is not clearly below 90 %.
    ((18, 19, 17, 20, 18), 0, 0),
    ((18, 18, 18, 18, 17), 1, 0),  # 89 of 100
    ((20, 20, 20, 20, 13), 0, 1),  # 93 of 100, and one depth that is clearly worse
    ((3, 4, 2, 5, 3), 1, 5),
    ((0, 0, 0, 0, 0), 1, 5),
])
def test_gate_passes_if_rows_reach_the_threshold_and_no_cell_is_clearly_below(
        correct: tuple[int, ...], failing_rows: int, failing_cells: int) -> None:
    verdict = decide_verdict(build_cells(*correct), 2.0, 2.0, GATE)
    assert (len(verdict.failing_rows), len(verdict.failing_cells)) == (failing_rows, failing_cells)
    assert verdict.passed == (not failing_rows and not failing_cells)
    assert len(verdict.lines()) == failing_rows + failing_cells


def test_every_length_and_kind_is_a_separate_row() -> None:
    cells = [*build_cells(20, 20, 20, 20, 20),
             *build_cells(20, 20, 15, 15, 15, length=2048),
             *build_cells(17, 17, 17, 17, 17, kind="multi-key")]
    verdict = decide_verdict(cells, 2.0, 2.0, GATE)
    assert [(r["kind"], r["length_tokens"], r["correct"]) for r in verdict.failing_rows] == [
        ("single", 2048, 85), ("multi-key", 512, 85)]
    assert ("single, english, 2,048 tokens: 85 of 100 right over all depths = 85.0%, below 90%"
            in verdict.lines())


# Needles in an extension: their share of a blend, their documents, and reserved source names.


def build_config(data: Path, share: float, **blend: float) -> RunConfig:
    run = get("tiny-solar-open")
    phases = (PhaseConfig("a", seq_len=128, blend=blend), PhaseConfig("b", seq_len=96))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, paths={str(data): 1.0}, phases=phases),
                               needle=dataclasses.replace(run.needle, train_share=share))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_needles_leave_the_proportions_of_blends(share: float) -> None:
    first, second = add_needles_to_blends(build_config(Path("x"), share, en=3.0, ko=1.0)).data.phases
    total = sum(first.blend.values())
    assert first.blend["needle"] / total == pytest.approx(share)
    assert (first.blend["en"], first.blend["ko"], second.blend) == (3.0, 1.0, {})


@pytest.mark.parametrize(("share", "blend"), [(0.0, {"en": 1.0}), (0.5, {"en": 1.0, "needle": 0.1})])
def test_blends_stay_if_they_need_no_needles_or_name_them(share: float, blend: dict[str, float]) -> None:
    config = build_config(Path("x"), share, **blend)
    assert add_needles_to_blends(config) == config


def test_documents_are_as_long_as_the_longest_phase_and_the_suite_as_set(token_shards: Path) -> None:
    needles = build_needles(build_config(token_shards, 0.1), token_shards)
    (source,) = needles.sources
    assert source.name == "needle" and int(source.open_split("train").lengths[7]) == 128
    suite = needles.suite
    assert (suite.kinds, suite.lengths, suite.depths, suite.samples) == (
        ("multi-key",), (256, 512), (0.0, 0.5, 0.95), 20)
    assert [h.language for h in suite.haystacks] == ["code"] and suite.distractor_share == 0.25
    assert build_needles(build_config(token_shards, 0.0), token_shards).sources == ()


def test_blends_name_short_needle_documents(token_shards: Path) -> None:
    config = build_config(token_shards, 0.0, first=1.0, **{"needle/64": 1.0})
    (short,) = build_needles(config, token_shards).sources
    assert (short.name, short.share, int(short.open_split("train").lengths[0])) == ("needle/64", 0.0, 64)
    sources = build_needles(build_config(token_shards, 0.1, first=1.0, **{"needle/64": 1.0}),
                            token_shards).sources
    lengths = {source.name: int(source.open_split("train").lengths[0]) for source in sources}
    assert lengths == {"needle": 128, "needle/64": 64}
    with pytest.raises(UserError, match=r"e\.g\. needle/4096"):
        build_needles(build_config(token_shards, 0.1, **{"needle/x": 1.0}), token_shards)


def test_the_needle_source_name_is_reserved(token_shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(token_shards, tmp_path / "data")
    text = (data / "manifest.json").read_text().replace('"name": "first"', '"name": "needle"')
    (data / "manifest.json").write_text(json.dumps(json.loads(text) | {"sha256": ""}))
    with pytest.raises(UserError, match="source named 'needle'"):
        build_needles(build_config(data, 0.1), data)


class Folder:
    """Stands for the folder of a stage, complete or not."""

    def __init__(self, name: str, complete: bool) -> None:
        self.path, self.checkpoints, self._complete = Path(name), Path(name) / "checkpoints", complete

    def completion(self) -> dict[str, int] | None:
        return {"step": 4} if self._complete else None


# The first incomplete stage starts with the command (1000 s), a later stage when the previous has ended.
@pytest.mark.each(("num_complete", "start_times_s"),
                  [(0, [1000, 5000, 6000]), (1, [1000, 1000, 6000]), (3, [1000] * 3)])
def test_start_times_of_stages(num_complete: int, start_times_s: list[float],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    config = apply_settings(get("tiny-solar-open"), ["extend.gate.every_steps=0"])
    stages = [SimpleNamespace(config=config, folder=Folder(f"stage-{i}", i < num_complete)) for i in range(3)]
    stage_runs: list[tuple[str, Path, float]] = []

    def run_stage(stage: Any, nproc: int | None, start_s: float) -> bool:
        stage_runs.append((stage.folder.path.name, stage.start_from, start_s))
        return True

    monkeypatch.setattr(running, "run_stage", run_stage)
    monkeypatch.setattr(running, "build_needles",
                        lambda config, start, formats: SimpleNamespace(
                            data=(), sources=(), before=None, after=None))
    monkeypatch.setattr(running, "add_needles_to_blends", lambda config: config)
    monkeypatch.setattr(running, "find_checkpoint", lambda path: path / "checkpoints/step-4")
    monkeypatch.setattr(running, "get_command_start", lambda: 1000.0)
    monkeypatch.setattr(running, "time", SimpleNamespace(time=lambda: 4000.0 + 1000 * len(stage_runs)))
    objective: Any = SimpleNamespace()
    run_stages(stages, Path("start"), objective, 1, True)  # type: ignore[arg-type]
    starts = [Path("start"), *(Path(f"stage-{i}/checkpoints/step-4") for i in range(2))]
    assert stage_runs == [(f"stage-{i}", starts[i], start_times_s[i]) for i in range(3)]


@pytest.mark.each(("lengths", "message"), [
    ("[64, 512]", None), ("[64]", "the gate asks at most 64 tokens, and the stage has 512"),
    ("[1024]", None)])
def test_a_gate_with_short_needles_warns(lengths: str, message: str | None) -> None:
    phases = 'data.phases=[{"name": "a", "seq_len": 128}, {"name": "b", "seq_len": 512}]'
    config = apply_settings(get("tiny-solar-open"), [phases, f"needle.lengths_tokens={lengths}"])
    warning = describe_small_suite(config)
    assert warning is None if message is None else message in str(warning)
