"""A training stage from outside: refusals before any process starts, arguments of restarts, and messages at
every end."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import GateFailed, StopRequested, UserError
from megatron_sov.engine.parallel.launcher import RestartPolicy
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS
from megatron_sov.train.data.ledger import plan_ledger
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.data.views import add_source_views
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.stages import launch as launch_module
from megatron_sov.train.stages.launch import run_stage
from megatron_sov.train.stages.rank import _lock_folder
from megatron_sov.train.stages.stage import LaunchState, Stage
from tests.run_files import read_run_events

SMALL = ("model.vocab_size=368", 'data.phases=[{"name": "main", "seq_len": 32}]', "train.steps=4",
         "train.global_batch_size=8", "train.micro_batch_size=2", "train.max_restarts=2")
Launched = Callable[[Callable[[], int], RestartPolicy], int]


class Launcher:
    """Stands for `launcher.launch`: starts no process, and runs a function of the test."""

    def __init__(self) -> None:
        self.calls = 0
        self.does: Launched = lambda main, restarts: 0

    def __call__(self, main: Callable[[], int], nproc: int | None, num_threads: int,
                 restarts: RestartPolicy) -> int:
        self.calls += 1
        return self.does(main, restarts)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    result = Launcher()
    monkeypatch.setattr(launch_module.launcher, "launch_ranks", result)
    return result


@pytest.fixture
def stage(packed_data: Any, tmp_path: Path) -> Callable[..., Stage]:
    """Return `stage(*settings, **fields)`: a stage that has not begun, on small data."""

    def made(*settings: str, **fields: Any) -> Stage:
        paths = f"data.paths={json.dumps({str(packed_data.text): 1.0})}"
        config = apply_settings(recipes.get("tiny-solar-open"), [*SMALL, paths, *settings])
        return Stage(config, RunFolder(tmp_path / "run"), SimpleNamespace(), resume=True, **fields)

    return made


def open_run(stage: Stage) -> None:
    """Do the work of a stage's processes before their first step."""
    stage.folder.create()
    stage.folder.declare(stage.config)
    (stage.folder.path / EVENTS).touch()


@pytest.mark.parametrize(("settings", "says"), [
    (("parallel.ep=2",), "parallel"), (("model.vocab_size=300",), "vocab_size"),
    (("model.qk_norm=true",), "qk_norm"),
    (('data.phases=[{"name": "main", "seq_len": 32, "blend": {"french": 1.0}}]',), "french")])
def test_invalid_stages_are_refused_before_any_process_or_file(settings: tuple[str, ...], says: str,
                                                               stage: Callable[..., Stage],
                                                               launcher: Launcher) -> None:
    with pytest.raises(UserError, match=says):
        run_stage(stage(*settings), 1)
    assert launcher.calls == 0 and not stage().folder.path.exists()


def test_weights_that_know_other_tokens_are_refused(stage: Callable[..., Stage], launcher: Launcher,
                                                    packed_data: Any, tmp_path: Path) -> None:
    shutil.copytree(packed_data.tokenizer, tmp_path / "start/tokenizer")
    with pytest.raises(StopRequested):
        run_stage(stage(start_from=tmp_path / "start"), 1)
    file = tmp_path / "start/tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    names = {token: name for name, token in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"][names[367] + "x"] = tokenizer["model"]["vocab"].pop(names[367])
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="1 ids mean other"):
        run_stage(stage(start_from=tmp_path / "start"), 1)
    assert launcher.calls == 1


def test_a_complete_stage_starts_nothing(stage: Callable[..., Stage], launcher: Launcher,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    ready = stage()
    open_run(ready)
    ready.folder.complete({"step": 4})
    assert run_stage(ready, 1)
    assert launcher.calls == 0
    assert capsys.readouterr().out == f"{ready.folder.path}: is complete at step 4\n"


def test_processes_receive_the_start_time_of_each_attempt(stage: Callable[..., Stage], launcher: Launcher,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    begun_s: list[float] = []
    monkeypatch.setattr(launch_module, "run_rank",
                        lambda stage, data, launch: begun_s.append(launch.time_s) or 0)

    def started_three_times(main: Callable[[], int], restarts: RestartPolicy) -> int:
        open_run(ready)
        main()
        restarts.note(137, "rank 1 was ended by SIGKILL")
        main()
        ready.folder.checkpoint(3).mkdir()
        restarts.note(1, "rank 0 ended with exit code 1")
        main()
        assert restarts.limit == 2 and restarts.progress() == ready.folder.checkpoint(3)
        return 0

    ready, launcher.does = stage(), started_three_times
    before_s = time.time()
    with pytest.raises(StopRequested):
        run_stage(ready, 2, start_s=1000.0)
    assert begun_s[0] == 1000.0 and before_s <= begun_s[1] <= begun_s[2] <= time.time()
    run_events = read_run_events(ready.folder.path, "restart")
    assert [(e["step"], e["exit_code"]) for e in run_events] == [(0, 137), (3, 1)]
    assert [e["text"] for e in run_events] == [
        "rank 1 was ended by SIGKILL; all processes are started again, from the beginning",
        "rank 0 ended with exit code 1; all processes are started again, from step-3"]
    assert capsys.readouterr().err.count("warning: ") == 2
    launcher.does = lambda main, restarts: main()
    with pytest.raises(StopRequested):
        run_stage(stage(), 1)
    assert before_s <= begun_s[-1] <= time.time(), "who calls it from Python begins when it is called"


@pytest.mark.parametrize(("max_restarts", "says"), [
    (0, "= 0 lets no process start again"), (2, "= 2 starts in a row have left no new checkpoint")])
def test_giving_up_is_recorded_with_its_exit_code(max_restarts: int, says: str, stage: Callable[..., Stage],
                                                  launcher: Launcher,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    ready = stage(f"train.max_restarts={max_restarts}")

    def fails(main: Callable[[], int], restarts: RestartPolicy) -> int:
        restarts.give_up(137, "rank 1 was ended by SIGKILL")
        assert not (ready.folder.path / EVENTS).exists(), "there is no run to add to"
        open_run(ready)
        ready.folder.checkpoint(2).mkdir()
        restarts.give_up(137, "rank 1 was ended by SIGKILL")
        return 137

    launcher.does = fails
    with pytest.raises(SystemExit) as raised:
        run_stage(ready, 2)
    assert raised.value.code == 137
    (failure,) = read_run_events(ready.folder.path, "failure")
    assert (failure["step"], failure["exit_code"]) == (2, 137)
    assert says in failure["text"]
    assert capsys.readouterr().err == f"error: {failure['text']}\n" * 2


def test_a_failed_gate_is_an_error_until_the_next_start(stage: Callable[..., Stage],
                                                        launcher: Launcher) -> None:
    ready, seen = stage(), []

    def fails(main: Callable[[], int], restarts: RestartPolicy) -> int:
        seen.append(ready.folder.failure())
        open_run(ready)
        ready.folder.mark_gate_failed("7 of 9 needles found")
        return 0

    launcher.does = fails
    for _ in range(2):
        with pytest.raises(GateFailed, match="7 of 9 needles"):
            run_stage(ready, 1)
    assert seen == [None, None]


@pytest.mark.parametrize(("rank", "message"), [("0", "gate: {run}: too few\n"), ("1", "")])
def test_under_a_launcher_ranks_leave_in_peace_and_the_first_says_why(
        rank: str, message: str, stage: Callable[..., Stage], launcher: Launcher,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ready = stage()
    assert not run_stage(ready, None), "it was stopped"
    assert capsys.readouterr().err == ""
    open_run(ready)
    launcher.does = lambda main, restarts: ready.folder.mark_gate_failed("too few") or 0
    assert not run_stage(ready, None)
    assert capsys.readouterr().err == message.format(run=ready.folder.path)


def with_views_and_skips(data: Path) -> RunConfig:
    phases = 'data.phases=[{"name": "main", "seq_len": 32, "blend": {"even": 1, "even/16": 1}}]'
    return apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", phases, f"data.paths={json.dumps({str(data): 1.0})}",
        "data.skip_steps=[[3, 4]]"])


def test_data_is_opened_and_planned_with_its_views(packed_data: Any) -> None:
    settings = with_views_and_skips(packed_data.text)
    data = launch_module._open_data(Stage(settings, RunFolder(Path("run")), LanguageModelling))
    expected = add_source_views(settings, open_sources(settings.data.paths, 368))
    assert [s.name for s in data.sources] == [s.name for s in expected] == ["even", "odd", "even/16"]
    assert data.planned == plan_ledger(settings, expected)
    assert [e.skip for e in data.planned] == [False, True, False]


def test_checks_are_repeated_under_the_lock(stage: Callable[..., Stage]) -> None:
    """Another run may have come, and even gone, between the first look and the lock."""
    ready, other = stage("train.seed=2"), stage()
    ready.folder.enter(ready.config, resume=False)
    open_run(other)
    launch = LaunchState(0.0, may_resume=False)
    with pytest.raises(UserError, match="already holds a run"):
        _lock_folder(ready, None, launch)
    launch.may_resume = True
    with pytest.raises(UserError, match=r"was started with train\.seed = "):
        _lock_folder(ready, None, launch)
    _lock_folder(other, None, launch)


def test_a_refused_run_removes_only_its_own_files(stage: Callable[..., Stage], launcher: Launcher) -> None:
    made = stage()
    made = dataclasses.replace(made, resume=False)

    def refused(declares: bool) -> None:
        def does(main: Callable[[], int], restarts: RestartPolicy) -> int:
            open_run(made)
            if declares:
                begins[-1].declared[0] = 1
            return 2

        launcher.does = does
        with pytest.raises(SystemExit):
            run_stage(made, 1)

    begins: list[LaunchState] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_module, "LaunchState",
                      lambda *given: begins.append(LaunchState(*given)) or begins[-1])
        refused(declares=False)
        assert made.folder.config() is not None, "another run's, which came in between"
        shutil.rmtree(made.folder.path)
        refused(declares=True)
    assert not made.folder.path.exists()
