"""The order of actions in the training loop, with a trainer that only records calls."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.train.loop import start_run, train
from megatron_sov.train.trainer import CurrentWork

NEVER = 10 ** 9
"""A step that no run here reaches."""


class RecordingTrainer:
    """Stands for a trainer and its parts; `actions` has the loop's calls, as "action step".

    `watched` is the step that the watchdog times, or None. `skipped` are steps whose `train_step` learns
    nothing. The run is asked to stop from step `stop_after` on.
    """

    has_heldout = False
    work = CurrentWork()
    missing_data: str | None = None
    """Why the next step has no data; None: it has."""
    unfinished_data: str | None = None
    """Why work on the data is not finished after the last step; None: it is."""

    def __init__(self, num_steps: int, step: int = 0, skipped: tuple[int, ...] = (), **settings: int) -> None:
        self.skipped = skipped
        self.num_steps, self.step, self.state = num_steps, step, "counters"
        self.config = SimpleNamespace(train=SimpleNamespace(
            **{"eval_every_steps": 0, "checkpoint_every_steps": 100, **settings}))
        self.actions, self.saved_step = list[str](), step
        self.gate: Any = None
        self.stop_after = NEVER
        self.watched: int | None = None
        watchdog = SimpleNamespace(begin=lambda step: setattr(self, "watched", step),
                                   end=lambda: setattr(self, "watched", None))
        self.guards = SimpleNamespace(step_guard=SimpleNamespace(wants_rollback=False), watchdog=watchdog)
        self.side_jobs: Any = SimpleNamespace(poll=lambda: self.note("poll"))
        self.checkpointer = SimpleNamespace(finish=lambda: self.note("saved"), sync=self.sync)
        self.recorder = SimpleNamespace(
            record_step=lambda done, result, load: self.note("record"),
            record_stop=lambda step, reason: self.note("stop"),
            record_expert_load=lambda step, load: self.note("expert load"),
            record_end=lambda step, wall_s, loss: self.note("run_end"))
        self.profiling = SimpleNamespace(before_step=lambda step: None, after_step=lambda step: None,
                                         close=lambda step: None)
        self.garbage = SimpleNamespace(after_step=lambda step: None)
        self.expert_load = SimpleNamespace(gather=lambda: None)

    def note(self, action: str) -> None:
        self.actions.append(f"{action} {self.step}")

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps or (self.gate is not None and self.gate.passed)

    def fetch_data(self, stop: Any) -> str | None:
        assert self.watched is None, "waiting for data is no hang"
        return self.missing_data

    def finish_data(self, stop: Any) -> str | None:
        assert self.watched is None, "the work after the last step is no hang"
        return self.unfinished_data

    def is_evaluation_due(self) -> bool:
        every_steps = self.config.train.eval_every_steps
        return bool(every_steps and self.step % every_steps == 0)

    def is_checkpoint_due(self, step: int) -> bool:
        return bool(step % self.config.train.checkpoint_every_steps == 0)

    def train_step(self) -> Any:
        self.step += 1
        assert self.watched == self.step, "a hang in a step is noticed"
        return None if self.step in self.skipped else SimpleNamespace(loss=1.0)

    def observe_step(self) -> Any:
        assert self.watched == self.step, "collectives can hang"
        self.note("observe")

    def sync(self, stop: Any) -> bool:
        self.note("sync")
        return self.step >= self.stop_after

    def wall_s(self) -> float:
        return 0.0

    @property
    def is_saved(self) -> bool:
        return self.saved_step == self.step

    def save(self) -> None:
        self.saved_step = self.step
        self.evaluate("save")

    def evaluate(self, name: str = "evaluate") -> None:
        assert self.watched is None, f"{name} may take longer than a step"
        self.note(name)

    def record_start(self) -> None:
        self.note("start")


@pytest.fixture(autouse=True)
def recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.train.loop.train_step", lambda trainer: trainer.train_step())


EVERY_STEP = ("observe", "poll", "record", "expert load", "sync")


def run_loop(trainer: RecordingTrainer, stop_after: int = NEVER,
             until: int | None = None) -> tuple[bool, list[str]]:
    """Run `train`; return whether the run is complete, and its actions without those of every step."""
    trainer.stop_after = stop_after
    complete = train(trainer, SimpleNamespace(reason="SIGTERM"), until)  # type: ignore[arg-type]
    return complete, [a for a in trainer.actions if not a.startswith(EVERY_STEP)]


@pytest.mark.each(("step", "has_heldout", "evaluated"), [
    (0, True, ["evaluate 0"]), (0, False, []), (1, True, [])])
def test_a_new_run_is_evaluated_before_its_first_step(step: int, has_heldout: bool,
                                                      evaluated: list[str]) -> None:
    trainer = RecordingTrainer(2, step)
    trainer.has_heldout = has_heldout
    start_run(trainer)  # type: ignore[arg-type]
    assert trainer.actions == [f"start {step}", *evaluated]


def test_a_run_ends_after_the_configured_step() -> None:
    complete, actions = run_loop(RecordingTrainer(7, checkpoint_every_steps=4), until=5)
    assert not complete and actions[:2] == ["save 4", "save 5"]
    assert run_loop(RecordingTrainer(5), until=5)[0]


@pytest.mark.each(("trainer", "stop_after", "complete", "actions"), [
    # evaluations and checkpoints when they are due, and at the end
    (RecordingTrainer(7, eval_every_steps=3, checkpoint_every_steps=2), NEVER, True,
     ["save 2", "evaluate 3", "save 4", "evaluate 6", "save 6", "evaluate 7", "save 7", "saved 7",
      "run_end 7"]),
    # a stop saves once and leaves
    (RecordingTrainer(5, checkpoint_every_steps=2), 1, False, ["save 1", "saved 1", "stop 1"]),
    (RecordingTrainer(5, checkpoint_every_steps=2), 2, False, ["save 2", "saved 2", "stop 2"]),
    # a stop at the last step, and a run killed after its last step
    (RecordingTrainer(3), 3, True, ["evaluate 3", "save 3", "saved 3", "run_end 3"]),
    (RecordingTrainer(3, step=3), NEVER, True, ["saved 3", "run_end 3"])])
def test_a_run_evaluates_saves_and_ends_when_it_is_due(trainer: RecordingTrainer, stop_after: int,
                                                       complete: bool, actions: list[str]) -> None:
    assert run_loop(trainer, stop_after) == (complete, actions)


def test_a_passing_gate_ends_the_run_like_the_last_step() -> None:
    trainer = RecordingTrainer(9, eval_every_steps=2)
    trainer.gate = SimpleNamespace(passed=False)
    trainer.gate.check = lambda trainer: setattr(trainer.gate, "passed", trainer.step == 5)
    assert run_loop(trainer) == (True, ["evaluate 2", "evaluate 4", "evaluate 5", "save 5", "saved 5",
                                        "run_end 5"])
    assert run_loop(trainer)[1][-2:] == ["saved 5", "run_end 5"], "a second call only ends the run"


def test_a_step_is_observed_recorded_and_then_synchronized() -> None:
    trainer = RecordingTrainer(1)
    run_loop(trainer)
    assert trainer.actions == ["observe 1", "poll 1", "record 1", "expert load 1", "evaluate 1",
                               "sync 1", "save 1", "saved 1", "run_end 1"]


def test_a_skipped_step_keeps_intervals_and_records_no_step() -> None:
    trainer = RecordingTrainer(4, skipped=(2, 4), eval_every_steps=2, checkpoint_every_steps=2)
    assert run_loop(trainer) == (True, ["evaluate 2", "save 2", "evaluate 4", "save 4", "saved 4",
                                        "run_end 4"])
    step_actions = [a for a in trainer.actions if a.startswith(("observe", "record"))]
    assert step_actions == ["observe 1", "record 1", "observe 3", "record 3"]
    assert [a for a in trainer.actions if a.startswith("expert load")] == [], (
        "both evaluations follow a step without tokens")


def test_side_jobs_are_polled_after_learned_and_skipped_steps() -> None:
    trainer = RecordingTrainer(4, skipped=(2, 3))
    run_loop(trainer)
    assert [a for a in trainer.actions if a.startswith("poll")] == ["poll 1", "poll 2", "poll 3", "poll 4"]
    other_rank = RecordingTrainer(4)
    other_rank.side_jobs = None  # rank 0 has them
    assert run_loop(other_rank)[0]


def test_a_rollback_is_saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = RecordingTrainer(5, skipped=(2, 3), checkpoint_every_steps=4)
    train_step = trainer.train_step

    def update() -> Any:
        result = train_step()
        trainer.guards.step_guard.wants_rollback = trainer.step == 3
        return result

    trainer.train_step = update  # type: ignore[method-assign]
    monkeypatch.setattr("megatron_sov.train.loop.rollback_weights",
                        lambda t: t.actions.append(f"roll back {t.step}"))
    assert run_loop(trainer) == (True, ["roll back 3", "save 3", "save 4", "evaluate 5", "save 5", "saved 5",
                                        "run_end 5"])


def test_missing_data_ends_the_run_without_another_checkpoint() -> None:
    trainer: Any = RecordingTrainer(3, step=2)
    trainer.missing_data = "round 2 is not there yet"
    assert train(trainer, SimpleNamespace(reason=None)) is False  # type: ignore[arg-type]
    assert trainer.actions == ["saved 2", "stop 2"]
    trainer.actions, trainer.saved_step = [], 0
    assert train(trainer, SimpleNamespace(reason=None)) is False  # type: ignore[arg-type]
    assert trainer.actions == ["save 2", "saved 2", "stop 2"]


# A signal that asks for a stop is remembered, and ends nothing by itself.

SIGNAL_PROGRAM = """
import os, signal, sys, time
from megatron_sov.work.processes.stop_signals import StopFlag
stop, answers = StopFlag(), []
with stop.answer_first_signal(lambda name: answers.append((name, time.monotonic()))):
    began = time.monotonic()
    os.kill(os.getpid(), int(sys.argv[1]))
    os.kill(os.getpid(), int(sys.argv[1]))
    while not answers:
        time.sleep(0.001)
with stop.answer_first_signal(print):
    pass
print(stop.reason, [name for name, _ in answers])
# A C call that holds the main thread: no Python handler runs before it ends.
import ctypes, threading
libc = ctypes.CDLL(None)
with stop.answer_first_signal(lambda name: answers.append((name, time.monotonic()))):
    threading.Timer(0.1, lambda: os.kill(os.getpid(), int(sys.argv[1]))).start()
    held = time.monotonic() + 0.6
    while time.monotonic() < held:
        libc.usleep(int((held - time.monotonic()) * 1e6))
    print(len(answers), held - answers[-1][1] > 0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_answered_from_a_thread(number: signal.Signals) -> None:
    completed = subprocess.run([sys.executable, "-c", SIGNAL_PROGRAM, str(int(number))], capture_output=True,
                               text=True, env=os.environ, check=False)
    assert (completed.returncode, completed.stdout.splitlines()) == (
        0, [f"{number.name} ['{number.name}']", "2 True"]), completed.stderr


def test_remaining_time_is_predicted_from_earlier_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    work = CurrentWork()
    assert work.describe() == "the start of the run (the first start: its time is not known yet)"
    for number, (kind, seconds) in enumerate((("step", 100.0), ("evaluation", 7.0), ("step", 300.0),
                                              ("step", 240.0), ("step", 40.0)), 1):
        work.begin(kind, f"{kind} {number}")
        description, now_s = work.describe(), now_s + seconds
    assert description == "step 5 (about 5 min 0 s)"
    work.begin("step", "step 5")  # the same work goes on: 300 s expected (upper quartile), 40 s over
    assert work.describe() == "step 5 (about 4 min 20 s)"
    now_s += 1000
    assert work.describe() == "step 5 (about 1.0 s)"


def test_a_run_waits_for_background_work_at_its_end() -> None:
    trainer = RecordingTrainer(num_steps=1)
    trainer.unfinished_data = "asked to stop in the last validation"
    complete, actions = run_loop(trainer)
    assert not complete
    assert actions[-1] == "stop 1" and "run_end 1" not in actions
