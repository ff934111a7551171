"""`megatron-sov resume`: the command that it runs, and refusals. tests/e2e/test_resume.py trains."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.base.settings import DeclaredCommand
from megatron_sov.commands.train.kinds import PRETRAIN
from megatron_sov.model.config import apply_settings
from megatron_sov.runs import launch_environment
from megatron_sov.runs.folder import COMMAND, RunFolder, read_command
from megatron_sov.runs.obs.events import EVENTS, EventLog

BEGIN_COMMAND = ("pretrain", "tiny-qwen3", "--data", "tokens:2", "--run", "runs/a", "--nproc", "2", "--set",
                 "train.steps=9")
BeginRun = Callable[..., Path]
Parsed = list[argparse.Namespace]
"""Arguments of each `pretrain` that `resume` runs."""


@pytest.fixture
def begin_run(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> BeginRun:
    """Return a function that creates a run's folder for a command line."""
    monkeypatch.delenv("RANK", raising=False)

    def create_run(*words: str, settings: Sequence[str] = (), has_config: bool = True) -> Path:
        run = cwd / "runs/a"
        monkeypatch.setenv(launch_environment.COMMAND_VARIABLE, json.dumps(words))
        config = apply_settings(recipes.get("tiny-qwen3"), ["train.steps=9", *settings])
        run.mkdir(parents=True)
        RunFolder(run).declare(config)
        if not has_config:
            (run / "config.json").unlink()
        return run

    return create_run


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """Record the arguments of `pretrain` instead of running it."""
    recorded: Parsed = []
    run = DeclaredCommand.run

    def run_or_record(self: DeclaredCommand, args: argparse.Namespace) -> int:
        if self is not PRETRAIN:
            return run(self, args)
        recorded.append(args)
        return 0

    monkeypatch.setattr(DeclaredCommand, "run", run_or_record)
    return recorded


def test_the_command_and_its_settings_come_from_the_folder(begin_run: BeginRun, parsed: Parsed,
                                                           read_output: Any) -> None:
    run = begin_run(*BEGIN_COMMAND)
    output = read_output("resume", "runs/a")
    args = vars(parsed[0])
    assert (args["run"], args["resume"], args["nproc"], args["configs"]) == (
        str(run), True, "2", [f"{run}/config.json"])
    assert "recipe" not in args and "settings" not in args and "data" not in args
    assert output == (
        f"resume: megatron-sov pretrain --run {run} --nproc 2 --resume --config {run}/config.json\n")


def test_words_after_the_folder_override_the_recorded_command(begin_run: BeginRun, parsed: Parsed,
                                                              read_output: Any) -> None:
    begin_run(*BEGIN_COMMAND)
    output = read_output("resume", "runs/a", "--nproc", "4", "--set", "train.steps=12").splitlines()[1:]
    assert parsed[0].nproc == "4" and parsed[0].settings == ["train.steps=12"]
    assert sorted(output) == ["resume: --nproc was 2, is 4", "resume: --set train.steps=12"]


@pytest.mark.parametrize(("typed", "line"), [
    ("--from b", "pretrain tiny-qwen3 --data tokens:2 --nproc 2 --set train.steps=9 --run runs/a-2 --from b"),
    ("--run b", "pretrain tiny-qwen3 --data tokens:2 --nproc 2 --set train.steps=9 --from runs/a --run b"),
    ("--set optim.lr=1 --from b", "pretrain tiny-qwen3 --data tokens:2 --nproc 2 --set train.steps=9 --set "
                                  "optim.lr=1 --run runs/a-2 --from b"),
    ("--ckpt-step 5", "pretrain tiny-qwen3 --data tokens:2 --nproc 2 --set train.steps=9 --run runs/a-2 "
                      "--from runs/a/checkpoints/step-5")])
def test_other_weights_and_other_folders_are_a_new_run(typed: str, line: str, begin_run: BeginRun,
                                                       parsed: Parsed, get_refusal: Any) -> None:
    (begin_run(*BEGIN_COMMAND) / "checkpoints/step-5").mkdir(parents=True)
    assert f"write\n  megatron-sov {line}\n" in get_refusal("resume", "runs/a", *typed.split())
    assert not parsed


def test_a_launched_run_resumes_with_the_same_number_of_processes(begin_run: BeginRun,
                                                                  parsed: Parsed,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "1")
    begin_run(*BEGIN_COMMAND[:6])
    monkeypatch.delenv("RANK")
    assert cli.main(["resume", "runs/a"]) == 0
    assert parsed[0].nproc == "8"


def test_from_another_folder_paths_are_read_where_the_run_was_begun(
        begin_run: BeginRun, parsed: Parsed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        read_output: Any) -> None:
    run = begin_run(*BEGIN_COMMAND)
    monkeypatch.chdir("/")
    output = read_output("resume", str(run))
    assert Path.cwd() == tmp_path
    assert output.startswith(f"resume: relative paths start at {tmp_path}, where")


def test_a_resumed_run_can_be_resumed_again(begin_run: BeginRun, parsed: Parsed) -> None:
    run = begin_run(*BEGIN_COMMAND)
    assert cli.main(["resume", "runs/a"]) == 0
    RunFolder(run).declare(recipes.get("tiny-qwen3"))
    assert read_command(run).words[0] == "pretrain" and "--config" in read_command(run).words
    assert cli.main(["resume", "runs/a", "--dry-run"]) == 0
    assert parsed[1].dry_run and parsed[1].configs == parsed[0].configs


def test_a_multi_stage_run_is_planned_again_from_its_command(begin_run: BeginRun, parsed: Parsed) -> None:
    begin_run(*BEGIN_COMMAND, has_config=False)
    assert cli.main(["resume", "runs/a"]) == 0
    assert (parsed[0].recipe, parsed[0].data, parsed[0].settings) == ("tiny-qwen3", ["tokens:2"],
                                                                      ["train.steps=9"])


def test_code_that_only_the_folder_names_is_not_run(begin_run: BeginRun, parsed: Parsed, tmp_path: Path,
                                                    get_refusal: Any) -> None:
    run = begin_run(*BEGIN_COMMAND, "--plugin", "evil.py:X")
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    errors = get_refusal("resume", "runs/a")
    assert f"type `megatron-sov resume {run} --plugin {tmp_path}/evil.py:X`" in errors
    assert not parsed and not (tmp_path / "ran").exists()
    assert cli.main(["resume", "runs/a", "--plugin", "evil.py:X"]) == 0
    assert parsed[0].plugins == ["evil.py:X"]


@pytest.mark.parametrize(("command", "objective", "more"), [
    ("pretrain", "lm", ()), ("sft", "sft", ()), ("prefer", "preference", ()),
    ("distill", "distill", ("--teacher", "gone")),
    ("rl run", "policy", ("--prompts", "gone", "--store", "gone", "--reward", "math")),
    ("rl train", "policy", ("--prompts", "gone", "--store", "gone", "--reward", "math"))])
def test_a_complete_run_needs_none_of_its_inputs(begin_run: BeginRun, command: str, objective: str,
                                                 more: Sequence[str], capsys: pytest.CaptureFixture[str],
                                                 read_output: Any) -> None:
    data = () if objective == "policy" else ("--data", "gone")
    words = [*command.split(), "tiny-qwen3", *data, "--from", "gone", "--run", "runs/a", *more]
    run = begin_run(*words, settings=[f"objective.name={objective}"])
    assert cli.main(["resume", "runs/a"]) == 2
    RunFolder(run).complete({"step": 9})
    EventLog(run / EVENTS).close()
    for again in (["resume", "runs/a"], [*words, "--resume"]):
        assert read_output(*again).endswith("runs/a HF_DIR\n")
        # more steps are work: that command is checked as any other
        assert cli.main([*again, "--set", "train.steps=12"]) == 2
        assert "is complete" not in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [
    (None, "no command line of this version began it; type the whole command again with --resume"),
    ("{", "is damaged"), ('{"words": 3}', "is damaged"),
    ('{"words": ["doctor"], "folder": "/", "processes": 1}', "started the run and is not a training command"),
    ('{"words": ["rm", "-r"], "folder": "/", "processes": 1}', "started the run and is not a command of"),
])
def test_a_folder_without_a_valid_command_is_refused(begin_run: BeginRun, content: str | None, message: str,
                                                     get_refusal: Any) -> None:
    run = begin_run(*BEGIN_COMMAND)
    (run / COMMAND).unlink()
    if content is not None:
        (run / COMMAND).write_text(content)
    assert message in get_refusal("resume", "runs/a")


def test_a_run_that_python_began_has_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch_environment.COMMAND_VARIABLE, raising=False)
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").declare(recipes.get("tiny-qwen3"))
    assert not (tmp_path / "run" / COMMAND).exists()


def test_resume_without_options_names_a_complete_command(get_refusal: Any) -> None:
    assert ("`megatron-sov resume RUN` goes on without them"
            in get_refusal("sft", "--run", "runs/a", "--resume"))
