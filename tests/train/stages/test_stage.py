"""`run_stage` without processes: refusals before any process starts, arguments of restarts, and messages at
the end of a stage."""

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
LaunchAction = Callable[[Callable[[], int], RestartPolicy], int]
"""(main function of a rank, restart policy) -> exit code."""


class Launcher:
    """Stands for `launcher.launch_ranks`: starts no process, and calls `action`."""

    def __init__(self) -> None:
        self.calls = 0
        self.action: LaunchAction = lambda main, restarts: 0

    def __call__(self, main: Callable[[], int], nproc: int | None, num_threads: int,
                 restarts: RestartPolicy) -> int:
        self.calls += 1
        return self.action(main, restarts)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    result = Launcher()
    monkeypatch.setattr(launch_module.launcher, "launch_ranks", result)
    return result


@pytest.fixture
def stage(packed_data: Any, tmp_path: Path) -> Callable[..., Stage]:
    """Return `stage(*settings, **fields)`: build a new stage, on small data."""

    def build(*settings: str, **fields: Any) -> Stage:
        paths = f"data.paths={json.dumps({str(packed_data.text): 1.0})}"
        config = apply_settings(recipes.get("tiny-solar-open"), [*SMALL, paths, *settings])
        return Stage(config, RunFolder(tmp_path / "run"), SimpleNamespace(), resume=True, **fields)

    return build


def open_run(stage: Stage) -> None:
    """Do the work of a stage's processes before their first step."""
    stage.folder.create()
    stage.folder.declare(stage.config)
    (stage.folder.path / EVENTS).touch()


@pytest.mark.parametrize(("settings", "message"), [
    (("parallel.ep=2",), "parallel"), (("model.vocab_size=300",), "vocab_size"),
    (("model.qk_norm=true",), "qk_norm"),
    (('data.phases=[{"name": "main", "seq_len": 32, "blend": {"french": 1.0}}]',), "french")])
def test_invalid_stages_are_refused_before_any_process_or_file(settings: tuple[str, ...], message: str,
                                                               stage: Callable[..., Stage],
                                                               launcher: Launcher) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(stage(*settings), 1)
    assert launcher.calls == 0 and not stage().folder.path.exists()


def test_start_weights_with_another_tokenizer_are_refused(stage: Callable[..., Stage], launcher: Launcher,
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
    complete_stage = stage()
    open_run(complete_stage)
    complete_stage.folder.complete({"step": 4})
    assert run_stage(complete_stage, 1)
    assert launcher.calls == 0
    run = complete_stage.folder.path
    assert capsys.readouterr().out == (
        f"{run}: is complete at step 4; more steps need a new --run --from it\n"
        f"  next        megatron-sov report {run}\n              megatron-sov convert to-hf {run} HF_DIR\n")


def test_processes_receive_the_start_time_of_each_attempt(stage: Callable[..., Stage], launcher: Launcher,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    start_times_s: list[float] = []
    monkeypatch.setattr(launch_module, "run_rank",
                        lambda stage, data, launch: start_times_s.append(launch.time_s) or 0)

    def start_three_times(main: Callable[[], int], restarts: RestartPolicy) -> int:
        open_run(new_stage)
        main()
        restarts.note(137, "rank 1 was ended by SIGKILL")
        main()
        new_stage.folder.checkpoint(3).mkdir()
        restarts.note(1, "rank 0 ended with exit code 1")
        main()
        assert restarts.limit == 2 and restarts.progress() == new_stage.folder.checkpoint(3)
        return 0

    new_stage, launcher.action = stage(), start_three_times
    before_s = time.time()
    with pytest.raises(StopRequested):
        run_stage(new_stage, 2, start_s=1000.0)
    assert start_times_s[0] == 1000.0 and before_s <= start_times_s[1] <= start_times_s[2] <= time.time()
    run_events = read_run_events(new_stage.folder.path, "restart")
    assert [(e["step"], e["exit_code"]) for e in run_events] == [(0, 137), (3, 1)]
    assert [e["text"] for e in run_events] == [
        "rank 1 was ended by SIGKILL; all processes are started again, from the beginning",
        "rank 0 ended with exit code 1; all processes are started again, from step-3"]
    assert capsys.readouterr().err.count("warning: ") == 2
    launcher.action = lambda main, restarts: main()
    with pytest.raises(StopRequested):
        run_stage(stage(), 1)
    assert before_s <= start_times_s[-1] <= time.time(), "without `start_s`, the time of the call"


@pytest.mark.parametrize(("max_restarts", "message"), [
    (0, "= 0 lets no process start again"), (2, "= 2 starts in a row have left no new checkpoint")])
def test_giving_up_is_recorded_with_its_exit_code(max_restarts: int, message: str,
                                                  stage: Callable[..., Stage],
                                                  launcher: Launcher,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    new_stage = stage(f"train.max_restarts={max_restarts}")

    def give_up_twice(main: Callable[[], int], restarts: RestartPolicy) -> int:
        restarts.give_up(137, "rank 1 was ended by SIGKILL")
        assert not (new_stage.folder.path / EVENTS).exists(), "without a run, no event is written"
        open_run(new_stage)
        new_stage.folder.checkpoint(2).mkdir()
        restarts.give_up(137, "rank 1 was ended by SIGKILL")
        return 137

    launcher.action = give_up_twice
    with pytest.raises(SystemExit) as raised:
        run_stage(new_stage, 2)
    assert raised.value.code == 137
    (failure,) = read_run_events(new_stage.folder.path, "failure")
    assert (failure["step"], failure["exit_code"]) == (2, 137)
    assert message in failure["text"]
    assert capsys.readouterr().err == f"error: {failure['text']}\n" * 2


def test_a_failed_gate_is_an_error_until_the_next_start(stage: Callable[..., Stage],
                                                        launcher: Launcher) -> None:
    new_stage, failures = stage(), []

    def fail_gate(main: Callable[[], int], restarts: RestartPolicy) -> int:
        failures.append(new_stage.folder.failure())
        open_run(new_stage)
        new_stage.folder.mark_gate_failed("7 of 9 needles found")
        return 0

    launcher.action = fail_gate
    for _ in range(2):
        with pytest.raises(GateFailed, match="7 of 9 needles"):
            run_stage(new_stage, 1)
    assert failures == [None, None]


@pytest.mark.parametrize(("rank", "message"), [("0", "gate: {run}: too few\n"), ("1", "")])
def test_under_a_launcher_rank_0_alone_prints_the_reason(
        rank: str, message: str, stage: Callable[..., Stage], launcher: Launcher,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    new_stage = stage()
    assert not run_stage(new_stage, None), "it was stopped"
    assert capsys.readouterr().err == ""
    open_run(new_stage)
    launcher.action = lambda main, restarts: new_stage.folder.mark_gate_failed("too few") or 0
    assert not run_stage(new_stage, None)
    assert capsys.readouterr().err == message.format(run=new_stage.folder.path)


def build_config_with_views(data: Path) -> RunConfig:
    phases = 'data.phases=[{"name": "main", "seq_len": 32, "blend": {"even": 1, "even/16": 1}}]'
    return apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", phases, f"data.paths={json.dumps({str(data): 1.0})}",
        "data.skip_steps=[[3, 4]]"])


def test_data_is_opened_and_planned_with_its_views(packed_data: Any) -> None:
    settings = build_config_with_views(packed_data.text)
    data = launch_module._open_data(Stage(settings, RunFolder(Path("run")), LanguageModelling))
    expected = add_source_views(settings, open_sources(settings.data.paths, 368))
    assert [s.name for s in data.sources] == [s.name for s in expected] == ["even", "odd", "even/16"]
    assert data.planned == plan_ledger(settings, expected)
    assert [e.skip for e in data.planned] == [False, True, False]


def test_checks_are_repeated_under_the_lock(stage: Callable[..., Stage]) -> None:
    """Another run may have used the folder between the first check and the lock."""
    our_stage, other_stage = stage("train.seed=2"), stage()
    our_stage.folder.enter(our_stage.config, resume=False)
    open_run(other_stage)
    launch = LaunchState(0.0, may_resume=False)
    with pytest.raises(UserError, match="already holds a run"):
        _lock_folder(our_stage, None, launch)
    launch.may_resume = True
    with pytest.raises(UserError, match=r"was started with train\.seed = "):
        _lock_folder(our_stage, None, launch)
    _lock_folder(other_stage, None, launch)


def test_a_refused_run_removes_only_its_own_files(stage: Callable[..., Stage], launcher: Launcher) -> None:
    new_stage = stage()
    new_stage = dataclasses.replace(new_stage, resume=False)

    def run_refused_stage(declares: bool) -> None:
        def enter_and_exit(main: Callable[[], int], restarts: RestartPolicy) -> int:
            open_run(new_stage)
            if declares:
                launches[-1].declared[0] = 1
            return 2

        launcher.action = enter_and_exit
        with pytest.raises(SystemExit):
            run_stage(new_stage, 1)

    launches: list[LaunchState] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_module, "LaunchState",
                      lambda *given: launches.append(LaunchState(*given)) or launches[-1])
        run_refused_stage(declares=False)
        assert new_stage.folder.config() is not None, "the files belong to another run, which came in between"
        shutil.rmtree(new_stage.folder.path)
        run_refused_stage(declares=True)
    assert not new_stage.folder.path.exists()
