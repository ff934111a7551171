"""A stage's gate: when it looks, what it takes for a pass, and what it leaves in events,
checkpoint and manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.config import GateConfig
from megatron_sov.eval.intervals import wilson_interval
from megatron_sov.eval.needle.suite import Cell
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.extend import gate as gate_module  # noqa: E402
from megatron_sov.extend.gate import StageGate, mean_loss  # noqa: E402
from megatron_sov.train.evaluate import HeldoutLoss  # noqa: E402

SETTINGS = GateConfig(every_steps=4, min_accuracy=0.9, loss_tolerance_nats=0.1)


class Run:
    """Stands for the run that is judged: of 20 needles `right` are found,
    and the short context costs `loss`."""

    def __init__(self, num_steps: int = 10, is_main: bool = True) -> None:
        self.step, self.num_steps, self.right, self.loss = 0, num_steps, 0, 2.0
        self.world, self.config, self.policy = SimpleNamespace(is_main=is_main), None, None
        self.told: list[dict[str, Any]] = []
        self.events = SimpleNamespace(
            write=lambda event, **fields: self.told.append({"event": event, **fields}))
        self.recorded: list[tuple[str, int, int]] = []
        self.gate: Any = None

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps or self.gate.passed

    def measure(self, run: Run) -> Any:
        cell = Cell("single", "english", 512, 0.5, 0, self.right, 20, wilson_interval(self.right, 20))
        return SimpleNamespace(cells=[cell], right=self.right)

    def record(self, run: Run, when: str, result: Any) -> dict[str, Any]:
        self.recorded.append((when, self.step, result.right))
        return {"right": result.right}

    def gates(self) -> list[tuple[int, bool]]:
        return [(e["step"], e["passed"]) for e in self.told if e["event"] == "gate"]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StageGate]:
    """Return `judged(run, start_loss, min_steps)`: a gate of that run,
    whose losses and needles are the run's."""

    def made(run: Run, start_loss: float | None = 2.0, min_steps: int = 4) -> StageGate:
        monkeypatch.setattr(gate_module, "evaluate_forward_model", lambda loaded, short: {"text": HeldoutLoss(
            loss=run.loss, bits_per_byte=1.0, tokens=100)})
        monkeypatch.setattr(gate_module.collectives, "all_reduce_world", lambda values: values)
        clean: Any = SimpleNamespace(fields=lambda: {"questions_found": 0})
        needles: Any = SimpleNamespace(measure=run.measure, record=run.record)
        run.gate = StageGate(SETTINGS, needles, SimpleNamespace(seq_len=64), start_loss, min_steps, clean)
        return run.gate

    return made


def steps(run: Run, *found: tuple[int, int]) -> None:
    """Let the run go on: (step, needles found there)."""
    for run.step, run.right in found:
        run.gate.check(run)


def test_the_model_is_judged_before_the_first_step_and_the_search_is_told(judged: Any, capsys: Any) -> None:
    run = Run()
    judged(run).begin(run)
    assert run.told[0] == {"event": "decontamination", "step": 0, "questions_found": 0}
    assert run.gates() == [(0, False)] and run.recorded == [("before", 0, 0)]
    assert capsys.readouterr().out.startswith("gate at step 0 does not pass\n  single, english, "
                                              "512 tokens: 0 of 20 right")


def test_it_looks_every_so_many_steps_and_after_the_last_one(judged: Any) -> None:
    run = Run()
    judged(run)
    steps(run, *((step, 0) for step in range(1, 11)))
    assert run.gates() == [(4, False), (8, False), (10, False)]
    assert run.recorded == [("after", 10, 0)]


def test_it_looks_and_may_pass_from_the_stages_fewest_steps_on(judged: Any, capsys: Any) -> None:
    run = Run()
    gate = judged(run, min_steps=7)
    steps(run, (4, 20))
    assert not gate.passed and run.recorded == []
    assert "gate at step 4 passes, and the stage goes on to step 7\n" in capsys.readouterr().out
    steps(run, (7, 20))
    assert gate.passed and run.gates() == [(4, False), (7, True)] and run.recorded == [("after", 7, 20)]
    assert capsys.readouterr().out == "gate at step 7 passes\n"


def test_a_short_context_that_got_worse_is_no_pass(judged: Any) -> None:
    run = Run()
    gate = judged(run)
    for run.loss, passes in ((2.11, False), (math.nan, False), (2.09, True)):
        steps(run, (4, 20))
        assert gate.passed == passes
    (event,) = [e for e in run.told if e["event"] == "gate" and e["passed"]]
    assert (event["start_loss"], event["losses"], event["seq_len"], event["min_steps"]) == (
        2.0, {"text": 2.09}, 64, 4)


def test_other_processes_take_the_loss_of_the_first_one_and_say_nothing(
        judged: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sent = Run(is_main=False), []
    judged(run, start_loss=None)
    monkeypatch.setattr(gate_module.collectives, "all_reduce_world",
                        lambda values: sent.append(values.tolist()) or values + 2.0)
    steps(run, (4, 20))
    assert sent == [[0.0]] and run.gate.passed and capsys.readouterr().out == ""
    steps(run, (8, 20))
    assert sent == [[0.0], [0.0]], "what it heard it does not add"


def test_failure_completion_and_checkpoint_tell_all_checks(judged: Any) -> None:
    run = Run()
    gate = judged(run)
    steps(run, (4, 3), (8, 12), (10, 17))
    first, *lines = gate.failure().splitlines()
    assert first.startswith("the gate has not passed within its 10 steps; give the stage more with max_steps")
    assert lines == ["  single, english, 512 tokens: 17 of 20 right over all depths = 85.0%, below 90%"]
    after = judged(other := Run(num_steps=20), start_loss=None)
    after.restore(json.loads(json.dumps(gate.state())))
    assert after.state() == gate.state() and after.failure() == gate.failure()
    steps(other, (12, 20))
    done = after.completion(other)
    assert done["needle"] == {"right": 20} and done["gate"]["passed"] and done["gate"]["start_loss"] == 2.0
    assert [(c["step"], c["passed"]) for c in done["gate"]["checks"]] == [
        (4, False), (8, False), (10, False), (12, True)]
    assert done["gate"]["decontamination"] == {"questions_found": 0}
    assert len(gate.state()["checks"]) == 3, "what was restored is a copy"


def test_the_mean_is_over_tokens_and_not_over_sources() -> None:
    losses = {name: HeldoutLoss(loss=loss, bits_per_byte=1.0, tokens=tokens)
              for name, loss, tokens in (("a", 1.0, 900), ("b", 3.0, 100))}
    assert mean_loss(losses) == pytest.approx(1.2) and mean_loss({}) == 0
